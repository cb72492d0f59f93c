"""LoRA of peft on a whole compressed matrix, by the name of the module: `target_modules=["q_proj", "v_proj"]`.

A module computes form(x) + scaling B A x, with A [S, I] and B [O, S], whatever its form: rank and targets mean what they mean
on the dense model, and an adapter of the dense model fits. Merging cuts nothing off: see `StoredLinear.plus`.

Import this file only where peft is installed. It is copied as it is into every output folder.

Shape suffixes: O out, I in, S rank of an adapter.
"""

from __future__ import annotations

import itertools
import warnings
from functools import wraps
from typing import Any

import torch

try:  # transformers wants all that a file of a folder imports outside of `try` to be installed
    from peft.tuners.lora import LoraConfig, LoraModel
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
except ImportError:
    raise

from .linears import JoinedLinear, StoredLinear

INITS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that do not read the matrix."""

PARTS = "or adapters on the parts of the matrix (target_modules='all-linear')"


class StoredLoraLinear(Linear):
    """What peft puts in place of a `StoredLinear` that a LoraConfig names."""

    def __init__(self, base_layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        self.unmerged: list[StoredLinear] = []  # in a list, so that it is no submodule
        super().__init__(base_layer, *args, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Raises ValueError for what needs the matrix itself, which is not stored, and for what would not be saved."""
        _check(self.stored, config, kwargs.get("target_name", ""))
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @property
    def stored(self) -> StoredLinear:
        """The compressed matrix without adapters."""
        module = self.unmerged[0] if self.unmerged else self.get_base_layer()
        assert isinstance(module, StoredLinear)
        return module

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError where the parts are quantised, or where `safe_merge` finds numbers that are not finite."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        stored, every = self.stored, [*self.merged_adapters, *names]
        _check_plain(stored)
        sides = [(self.lora_B[name], self.lora_A[name], self.scaling[name]) for name in every]
        left_OS = torch.cat([b.get_parameter("weight") * scale for b, _, scale in sides], 1)
        right_SI = torch.cat([a.get_parameter("weight") for _, a, _ in sides], 0)
        bias_O, (_, dtype) = stored.bias, self._get_base_layer_device_and_dtype(stored)
        for added_O in (
            b.get_parameter("bias") * scale for b, _, scale in sides if "bias" in dict(b.named_parameters())
        ):
            bias_O = added_O.to(dtype) if bias_O is None else (bias_O + added_O).to(bias_O)
        merged = stored.plus(left_OS, right_SI, bias_O)
        if safe_merge and not all(parameter.isfinite().all() for parameter in merged.parameters()):
            raise ValueError(f"seen numbers that are not finite after merging {names}; wanted a sound adapter")
        self.unmerged, self.base_layer, self.merged_adapters = [stored], merged, every

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        device, _ = self._get_base_layer_device_and_dtype(self.base_layer)
        self.base_layer = self.unmerged.pop().to(device)
        self.merged_adapters.clear()

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _get_base_layer_device_and_dtype(self, base_layer: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = next(itertools.chain(base_layer.parameters(), base_layer.buffers()))
        return weight.device, weight.dtype


def register() -> None:
    """Have every LoraConfig know the modules above, through peft's own table of custom modules.

    The table is in the config, which people make before or after the model is loaded, so it is filled when a module is made.
    """
    create = LoraModel._create_new_module
    if getattr(create, "knows_stored_linears", False):
        return

    @wraps(create)
    def create_new_module(lora_config: LoraConfig, adapter_name: str, target: torch.nn.Module, **kwargs: Any) -> Any:
        if isinstance(target, JoinedLinear):
            parts = ", ".join(name for name, _ in target.named_children())
            raise ValueError(f"LoRA on linears that share a matrix: seen it whole; wanted its parts, {parts}, by name")
        lora_config._register_custom_module({StoredLinear: StoredLoraLinear})
        return create(lora_config, adapter_name, target, **kwargs)  # type: ignore[no-untyped-call]

    create_new_module.knows_stored_linears = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)  # type: ignore[method-assign]


def _check(stored: StoredLinear, config: LoraConfig, name: str) -> None:
    where = f"LoRA on {name!r}, a compressed matrix"
    fields = [field for field in config.__dataclass_fields__.values() if field.metadata.get("is_lora_variant")]
    variants = [field.name for field in fields if getattr(config, field.name)]
    if variants:
        raise ValueError(f"{where}: seen {variants[0]}; wanted plain LoRA, {PARTS}")
    if config.init_lora_weights not in INITS:
        raise ValueError(
            f"{where}: seen init_lora_weights = {config.init_lora_weights!r}; wanted one of {INITS}, {PARTS}"
        )
    if config.bias.endswith("_only") and stored.bias is not None and "bias" not in stored._parameters:
        raise ValueError(f"{where}: seen bias = {config.bias!r}, which would not be saved; wanted 'none' or 'all'")
    if any(isinstance(module, BaseTunerLayer) for module in stored.modules()):
        raise ValueError(
            f"{where}: seen adapters on its parts; wanted adapters on the matrix or on its parts, not both"
        )
    if any(hasattr(parameter, "to_local") for parameter in stored.parameters()):
        raise ValueError(f"{where}: seen it split between processes; wanted a whole one, {PARTS}")


def _check_plain(stored: StoredLinear) -> None:
    kinds = {type(parameter.data) for parameter in stored.parameters()} - {torch.Tensor}
    if kinds:
        raise ValueError(f"merging LoRA: seen {kinds.pop().__name__}; wanted plain numbers. Merge before quantising.")
