"""How vLLM loads a streamlap folder: native model classes whose linears have the forms that config.json lists.

vLLM finds `register` by the entry point `vllm.general_plugins` where streamlap is installed beside it, and imports this file
itself; nothing else does. What is not a linear layer of vLLM, what is none of its modules, and a model split by tensor
parallelism, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from .forms import short
from .hf_plugin import QUANT_METHOD, StreamlapConfig
from .side_by_side import SideBySide, forms_at, layer_of, paths_of


class Compressed(QuantizationConfig):  # type: ignore[misc]  # vllm is not there when types are checked
    """The table of config.json, by the paths that vLLM gives the linears."""

    def __init__(self, modules: dict[str, dict[str, int]]) -> None:
        super().__init__()
        self.modules = modules
        self.met: set[str] = set()
        """Paths of the linears that vLLM has built."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Compressed:
        """Raises ValueError for a table of another version, that is malformed, or with linears that share a matrix."""
        modules = StreamlapConfig(**config).modules
        if shared := [path for path, row in modules.items() if "parts" in row]:
            raise ValueError(
                f"streamlap module {short(shared[0])}: seen linears that share a matrix; wanted none, as vLLM computes them as "
                "one. Run it with transformers, or compress with --format stock."
            )
        return cls(modules)

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # plain matrix products

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Raises ValueError where something else than a linear layer of vLLM is listed, as experts are."""
        paths = paths_of(prefix, self.packed_modules_mapping)
        if isinstance(layer, LinearBase):
            self.met.update(paths)
            listed = any(path in self.modules for path in paths)
            return CompressedLinear(self, paths) if listed else PlainLinear(self)
        inside = [path for path in self.modules if prefix and f"{path}.".startswith(f"{prefix}.")]
        if inside:
            raise ValueError(
                f"streamlap module {short(inside[0])}: seen in a {type(layer).__name__} of vLLM; wanted in a linear layer. "
                "Run it with transformers, or compress with --format stock."
            )
        return None

    def check(self) -> None:
        """Raise ValueError for rows that no linear of vLLM has; called once the model is built. Layers of which nothing was
        built are another process's where a pipeline has several."""
        unmet = [path for path in self.modules if path not in self.met]
        if get_pp_group().world_size > 1:
            here = {layer_of(path) for path in self.met}
            unmet = [path for path in unmet if layer_of(path) in here]
        if unmet:
            raise ValueError(
                f"streamlap module {short(unmet[0])}: seen in config.json, and no linear layer of vLLM has it ({len(unmet)} of "
                f"{len(self.modules)} rows); wanted all. Run it with transformers, or compress with --format stock."
            )


class PlainLinear(UnquantizedLinearMethod):  # type: ignore[misc]
    """What a layer computes with where none of its linears is listed: as without the plugin."""

    def __init__(self, config: Compressed) -> None:
        super().__init__()
        self.config = config

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raises ValueError where a row was not met."""
        self.config.check()
        super().process_weights_after_loading(layer)


class CompressedLinear(LinearMethodBase):  # type: ignore[misc]
    """What a layer of vLLM computes with where one of its linears is listed."""

    def __init__(self, config: Compressed, paths: list[str]) -> None:
        self.config, self.paths = config, paths

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        """Raises ValueError where the layer is split between devices, or adds its bias elsewhere."""
        if layer.tp_size != 1:
            raise ValueError(
                f"streamlap module {short(self.paths[0])}: seen tensor_parallel_size = {layer.tp_size}; wanted 1, as the "
                "parts of a compressed linear are whole. Compress with --format stock or nas, which has plain linears."
            )
        biased: Any = layer.has_bias
        if layer.skip_bias_add and biased:
            raise ValueError(f"streamlap module {short(self.paths[0])}: seen a bias that vLLM adds apart; wanted none")
        forms = forms_at(self.paths, self.config.modules, input_size, output_partition_sizes, biased)
        layer.compressed = SideBySide(self.paths, forms, torch.get_default_device(), params_dtype)
        layer.load_weights = _load_into(layer, self.config)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., I] -> [..., O]; the parts have their bias, not `bias`, which nothing was loaded into."""
        y: torch.Tensor = _compressed(layer)(x)
        return y

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raises ValueError where a tensor was not in the folder, or a row was not met."""
        self.config.check()
        _compressed(layer).check()
        layer.register_parameter("bias", None)


def _compressed(layer: nn.Module) -> SideBySide:
    compressed = layer.compressed
    assert isinstance(compressed, SideBySide)
    return compressed


def _load_into(layer: nn.Module, config: Compressed) -> Any:
    """What vLLM calls with the layer's tensors, named as behind the path of a linear; each says which linear it is of."""

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        config.check()  # before vLLM complains of a tensor of such a row in its own words
        for leaf, tensor in weights:
            yield f"compressed.{_compressed(layer).load(leaf, getattr(tensor, 'shard_id', None), tensor)}"
        if layer.bias is not None:
            yield "bias"  # the parts have it

    return load_weights


def register() -> None:
    """Have vLLM know the quant_method of compressed folders; called in each of its processes, maybe more than once.

    The import of streamlap has registered the configuration of the format nas with transformers, which vLLM reads it by.
    """
    register_quantization_config(QUANT_METHOD)(Compressed)
