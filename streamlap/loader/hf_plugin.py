"""How transformers loads, saves and merges a streamlap folder. Importing this file registers the loader, nothing else.

A folder keeps its native `model_type`; `quantization_config` in config.json lists the modules that differ from it:

    {"quant_method": "streamlap", "format_version": 2,
     "modules": {"model.layers.0.self_attn.q_proj": {"rank": 7}, "model.layers.0.mlp.down_proj": {"in": 96}}}

A matrix that holds several linears is there with {"parts": 3}, and each of these under its path, as in "PATH.q".

transformers builds the native model on the meta device; the quantizer below puts the listed modules in, and the weights
are read into them. This file is copied as it is into every output folder, next to modules.py, forms.py, linears.py and
adapters.py, so that `trust_remote_code=True` works where streamlap is not installed; it therefore imports nothing else of the
package. Where peft is installed, adapters.py teaches it these modules when a model is loaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .forms import Dense, form_of, short
from .linears import JoinedLinear, LowRankLinear, PivotedLinear, RemovedLinear, StoredLinear
from .modules import carriers, check_loaded, merge_modules, swap_modules, unhook

QUANT_METHOD = "streamlap"
FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
"""A table of version 1 has the rows {"rank": r}, {"out": o} and {"in": i} only."""

logger = logging.getLogger(__name__)


class StreamlapConfig(QuantizationConfigMixin):
    """The `quantization_config` of a streamlap folder: which modules differ from the native model, and how.

    Raises ValueError for a format version that this loader does not read and for a malformed table. Rows are checked
    against the model's own shapes when it is built (see `swap_modules`).
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, int]] | None = None,
        format_version: int | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        # The version comes first: a later format may well have other keys, and its message is the useful one.
        if type(format_version) is not int or format_version not in READ_VERSIONS:
            raise ValueError(
                f"quantization_config.format_version: seen {short(format_version)}; wanted one of {READ_VERSIONS}. "
                "Update streamlap to load this folder."
            )
        if quant_method != QUANT_METHOD or unknown:
            keys = [short(key)[1:-1] for key in sorted(unknown)[:8]] or [f"quant_method = {short(quant_method)}"]
            raise ValueError(
                f"quantization_config: seen {', '.join(keys)}; wanted quant_method, format_version, modules"
            )
        if not isinstance(modules, Mapping):
            raise ValueError(
                f"quantization_config.modules: seen {short(modules)}; wanted a table of module path -> row"
            )
        for path, row in modules.items():
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"quantization_config.modules[{short(path)}]: seen {short(row)}; wanted {{'rank': 7}} or the like"
                )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers declares its own closed enum
        self.format_version = FORMAT_VERSION
        self.modules = {path: dict(row) for path, row in modules.items()}


class DiskName(WeightRenaming):
    """A renaming that this loader gave, to tell it from the others of a model."""

    __slots__ = ()


class StreamlapQuantizer(HfQuantizer):
    """Swaps the listed modules in before the weights are read, and maps their names on disk, both ways."""

    # A dense checkpoint cannot be compressed while it loads: transformers refuses it with a clear message.
    requires_calibration = True
    quantization_config: StreamlapConfig

    def __init__(self, quantization_config: StreamlapConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.natives: dict[str, Dense] = {}
        """What the native model has at each path of the table."""
        self.carriers: dict[str, str] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        rows = self.quantization_config.modules
        replaced = swap_modules(model, {_path_in(model, path): row for path, row in rows.items()})
        self.natives = {path: Dense.from_module(replaced[_path_in(model, path)]) for path in rows}
        # transformers loads a bare decoder's checkpoint into the whole model and the other way round: know both names.
        found, prefix = carriers(model), f"{model.base_model_prefix}."
        given = {path: found[_path_in(model, path)] for path in rows if _path_in(model, path) in found}
        given |= {_path_in(model, path): part for path, part in given.items()}
        self.carriers = given | {path.removeprefix(prefix): part for path, part in given.items()}

    def get_weight_conversions(self) -> list[WeightTransform]:
        """The rule of `disk_name` as transformers' own renamings, which it also reverses to save.

        One expression spells out every path and is anchored at the start, so neither another layer nor an unlisted
        module can match. No `$` at the end: transformers closes names itself, and keeps a `$` as a letter in reverse.
        """
        renamings: list[WeightTransform] = []
        for part in sorted(set(self.carriers.values())):
            paths = "|".join(re.escape(path) for path in sorted(self.carriers) if self.carriers[path] == part)
            leaves = ("weight",) if part == PivotedLinear.carrier else ("weight", "bias")  # that bias has no part
            renamings += [DiskName(rf"^({paths})\.{leaf}", rf"^\1\.{part}\.{leaf}") for leaf in leaves]
        return renamings

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Tensor parallel: the part that faces the heads is split, the others are whole on every rank.

        Raises ValueError where the model is to be split and the output of a pivoted module with it, whose rows come from two
        parts. transformers asks for the plan of every model, so a plan alone is no reason.
        """
        split = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
        for path, module in model.named_modules():
            key = re.sub(r"\.\d+(?=\.|$)", ".*", path)
            if isinstance(module, JoinedLinear) and key in plan and split > 1:
                raise ValueError(
                    f"streamlap module {path!r}: seen linears that are joined under the tensor-parallel plan {plan[key]!r}; "
                    "wanted no such plan. Load this folder without tensor parallelism, or dequantize it."
                )
            if not isinstance(module, StoredLinear) or key not in plan:
                continue
            columns = plan[key].startswith("colwise")
            whole = isinstance(module, RemovedLinear) or (isinstance(module, PivotedLinear) and columns)
            if whole and split == 1:
                continue
            if whole:
                raise ValueError(
                    f"streamlap module {path!r}: seen {form_of(module).own} under the tensor-parallel plan {plan[key]!r}; "
                    "wanted a plan that leaves its output whole. Load this folder without tensor parallelism, or dequantize it."
                )
            part = "down" if isinstance(module, LowRankLinear) and not columns else module.carrier
            plan[f"{key}.{part}"] = plan[key]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # save_pretrained writes no code files, so the reference to them must not be written either.
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map
        _teach_peft()
        for path in self.natives:
            module = model.get_submodule(_path_in(model, path))
            if isinstance(module, StoredLinear):
                # transformers before 5.21 leaves a tensor that it renamed in the dtype that it has on disk.
                module.get_submodule(module.carrier).to(model.dtype)
                if getattr(model, "_tp_size", None):
                    unhook(module)
            check_loaded(path, module)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Every linear dense, widths padded with zeros: the plain native model of config.json, all in `dtype`."""
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # save_pretrained leaves a string there
        merge_modules(model, {_path_in(model, path): native for path, native in self.natives.items()}, wanted)
        if wanted is not None:
            # Parameters only: Module.to would also round the rotary frequencies, which stay float32 on purpose.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(wanted)
        without = [path for path, native in self.natives.items() if not native.bias]
        modules = dict(model.named_modules())  # without the parts of what was one matrix
        added = [path for path in without if getattr(modules.get(_path_in(model, path)), "bias", None) is not None]
        if added:
            logger.warning("%s and %d more have a bias that a saved native model leaves out", added[0], len(added) - 1)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """Asked for before anything is saved: the table and the names on disk become those of the modules that are there.

        Merging an adapter changes forms, and loading one makes transformers forget the renamings. Raises ValueError for weights
        that were quantised after loading, which the format cannot hold.
        """
        for name, parameter in model.named_parameters():
            if is_traceable_wrapper_subclass(parameter) and not hasattr(parameter, "to_local"):
                raise ValueError(
                    f"{name}: seen a {type(parameter).__name__}; wanted plain numbers, as a streamlap folder holds no others. "
                    "Save before quantising, and quantise again after loading."
                )
        modules, rows = dict(model.named_modules()), dict(self.quantization_config.modules)
        for path, native in self.natives.items():
            module = modules.get(_path_in(model, path))
            if isinstance(module, StoredLinear | nn.Linear):  # and no adapter
                rows[path] = form_of(module).row(native)
        self.quantization_config.modules = {path: row for path, row in rows.items() if row}
        model.config.quantization_config = self.quantization_config
        kept = getattr(model, "_weight_conversions", None) or ()
        others = [entry for entry in kept if not isinstance(entry, DiskName)]
        vars(model)["_weight_conversions"] = [*others, *self.get_weight_conversions()]
        return super().get_state_dict_and_metadata(model)  # type: ignore[no-untyped-call]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _teach_peft() -> None:
    """Have peft, where it is installed, know the modules that are not an `nn.Linear`."""
    try:
        from .adapters import register
    except ImportError as error:
        if error.name != "peft":
            logger.warning("peft is installed and cannot adapt compressed modules by name: %s", error)
    else:
        register()


def _refuse_another(merge: Any) -> Any:
    """`merge` of the table in config.json with a `quantization_config` that was given, which takes no other than the table."""

    @wraps(merge)
    def merge_or_refuse(stored: Any, given: Any) -> Any:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else stored.quant_method
        if method == QUANT_METHOD and given is not None and not isinstance(given, StreamlapConfig):
            raise ValueError(
                f"quantization_config: seen a {type(given).__name__} for a compressed folder; wanted none, as its own says "
                "which modules are compressed. Load it without, then quantise: torchao's quantize_(model, "
                "Int8WeightOnlyConfig())."
            )
        return merge(stored, given)

    return merge_or_refuse


def _path_in(model: PreTrainedModel, path: str) -> str:
    """`path` as `model` spells it: the bare decoder that AutoModel gives has no `model.` in front, and the language model
    alone, out of a model that has more, no `language_model.`."""
    if not hasattr(model.base_model, "language_model"):
        path = path.replace(".language_model.", ".", 1)
    return path.removeprefix(f"{model.base_model_prefix}.") if model.base_model is model else path


if (
    QUANT_METHOD not in AUTO_QUANTIZER_MAPPING
):  # a second copy of this file, out of a folder, leaves the first in charge
    register_quantization_config(QUANT_METHOD)(StreamlapConfig)
    register_quantizer(QUANT_METHOD)(StreamlapQuantizer)
    # transformers' own message advises to pass the class of this table, which no one wants who passes another.
    AutoHfQuantizer.merge_quantization_configs = staticmethod(  # type: ignore[method-assign]
        _refuse_another(AutoHfQuantizer.merge_quantization_configs)
    )
