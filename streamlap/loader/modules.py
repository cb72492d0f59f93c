"""The modules of a model that differ from its native ones: put in their place, taken out again, and named on disk.

This file is copied as it is into every output folder, so of the package it imports `forms` and `linears` alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .forms import Dense, check_size, read_row, short
from .linears import PARTS, JoinedLinear, PivotedLinear, RemovedLinear, StoredLinear, joined


def swap_modules(root: nn.Module, modules: Mapping[str, Mapping[str, int]]) -> dict[str, nn.Linear]:
    """Put the module that each row of `modules` describes in place of the `nn.Linear` at its path, on its device and dtype.
    A row with "parts" makes it a `JoinedLinear`, whose parts may have rows too.

    Shapes are read, never computed. Gives back the modules that were replaced, by path. Raises ValueError for a path that is
    not an `nn.Linear` or a row that does not fit it, before anything is replaced.
    """
    wholes = {path: _linear_at(root, path) for path, row in modules.items() if "parts" in row}
    taken_apart = {path: _joined(path, modules[path], whole) for path, whole in wholes.items()}
    replaced = wholes | {path: _linear_at(root, path, taken_apart) for path in modules if path not in wholes}
    forms = {
        path: read_row(path, row, Dense.from_module(replaced[path]))
        for path, row in modules.items()
        if path not in wholes
    }
    for path, module in taken_apart.items():
        root.set_submodule(path, module)
    for path, form in forms.items():
        old = replaced[path].weight
        root.set_submodule(path, form.build(old.device, old.dtype))
    skip_removed(root)
    return replaced


class Skipped:
    """The forward of a module that is gone: it computes nothing, and keeps no keys and values. A cache hears of the tokens all
    the same, as keys and values of no width: one of a window counts them, and is cut back by that where tokens are guessed."""

    def __init__(self, pair: bool, layer_idx: int | None = None) -> None:
        self.pair = pair
        """Whether the module gives two things, as attention does."""
        self.layer_idx = layer_idx
        """Its place in a cache."""

    def __call__(self, hidden_states: torch.Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        if not self.pair:
            return zeros
        # Nothing of no width can be quantised, and there no place is cut back.
        quantised = "QuantizedCache" in [kind.__name__ for kind in type(past_key_values).__mro__]
        if past_key_values is not None and self.layer_idx is not None and not quantised:
            none = hidden_states.new_empty(hidden_states.shape[0], 1, hidden_states.shape[1], 0)
            past_key_values.update(none, none, self.layer_idx)
        return zeros, None


def skip_removed(root: nn.Module) -> None:
    """Skip every module all of whose linears are removed, its own children all of them; run again one that has others now."""
    modules = list(root.modules())
    if not any(isinstance(module, RemovedLinear) or is_skipped(module) for module in modules):
        return
    for module in modules:
        if isinstance(module, JoinedLinear):
            continue
        linears = [part for part in module.modules() if isinstance(part, nn.Linear | StoredLinear)]
        matrices = [part for part in module.children() if isinstance(part, JoinedLinear)]
        own = {*module.children(), *(part for matrix in matrices for part in matrix.children())}.issuperset(linears)
        gone = linears and own and all(isinstance(part, RemovedLinear) for part in linears)
        skipped = is_skipped(module)
        if gone and not skipped:
            attention = "attention_mask" in inspect.signature(module.forward).parameters
            module.__dict__["forward"] = Skipped(attention, getattr(module, "layer_idx", None))
        elif skipped and not gone:
            del module.__dict__["forward"]


def is_skipped(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), Skipped)


def merge_modules(root: nn.Module, natives: Mapping[str, Dense], dtype: torch.dtype | None = None) -> None:
    """Undo `swap_modules`: put a dense `nn.Linear` as it was at first in `dtype` (that of the module) at each path.

    Missing channels become zeros: a gate and an up row of zeros give an activation of zero, and the zero column of down reads
    nothing, so the layer computes the same function. A bias stays, also where the native model knows none.
    """
    for path in sorted(natives, key=lambda path: -path.count(".")):  # the parts of a matrix before the matrix
        module, native = root.get_submodule(path), natives[path]
        if isinstance(module, JoinedLinear):
            root.set_submodule(path, _put_together(module, dtype))
        else:
            root.set_submodule(path, dense_linear(module, native, dtype))
    skip_removed(root)


def dense_linear(module: nn.Module, native: Dense, dtype: torch.dtype | None = None) -> nn.Linear:
    """The `nn.Linear` of the shape of `native` that computes what `module` does, with zeros where it has no channels."""
    if isinstance(module, StoredLinear):
        weight_oi, bias_o = module.merged(dtype), module.bias
    else:
        weight_oi, bias_o = module.get_parameter("weight"), module._parameters["bias"]
    biased = native.bias or bias_o is not None
    new = nn.Linear(native.shape[1], native.shape[0], biased, weight_oi.device, dtype or weight_oi.dtype)
    with torch.no_grad():
        new.weight.zero_()[: weight_oi.shape[0], : weight_oi.shape[1]] = weight_oi
        if biased:
            new.bias.zero_()
        if bias_o is not None:
            new.bias[: bias_o.shape[0]] = bias_o
    return new


def _put_together(matrix: JoinedLinear, dtype: torch.dtype | None) -> nn.Linear:
    """The one `nn.Linear` that computes what its parts do, all of them dense."""
    parts = [part for part in matrix.children() if isinstance(part, nn.Linear)]
    weight_oi = joined([part.weight for part in parts], matrix.head_dim, 0)
    biased = any(part.bias is not None for part in parts)
    new = nn.Linear(weight_oi.shape[1], weight_oi.shape[0], biased, weight_oi.device, dtype or weight_oi.dtype)
    with torch.no_grad():
        new.weight.copy_(weight_oi)
        if biased:
            biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
            new.bias.copy_(joined(biases, matrix.head_dim, 0))
    return new


def check_loaded(path: str, module: nn.Module) -> None:
    """transformers before 5.23 does not compare the shapes of tensors that it loads through a quantizer."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear) and linear.weight.shape != (linear.out_features, linear.in_features):
            raise ValueError(
                f"streamlap module {path!r}: seen a tensor of shape {tuple(linear.weight.shape)} in the folder; "
                f"wanted {(linear.out_features, linear.in_features)}, as quantization_config.modules says"
            )
    if isinstance(module, PivotedLinear) and not module.has_permutation():
        raise ValueError(
            f"streamlap module {path!r}: seen an order in the folder that is no permutation; "
            f"wanted each of 0..{module.out_features - 1} once"
        )


def unhook(module: StoredLinear) -> None:
    """Tensor parallel: the parts have hooks of their own, the module itself is whole.

    A plan has one row for all layers, so the module got the hook, an instance attribute, and the distributed bias that its
    dense siblings in other layers need.
    """
    module.__dict__.pop("forward", None)
    for name, parameter in module.named_parameters(recurse=False):
        if hasattr(parameter, "to_local"):
            module.register_parameter(name, nn.Parameter(parameter.to_local(), parameter.requires_grad))


def carriers(root: nn.Module) -> dict[str, str]:
    """Path of every stored module in `root` -> the name of its part that carries the dense layer's own names on disk."""
    stored = {path: module for path, module in root.named_modules() if isinstance(module, StoredLinear)}
    return {path: module.carrier for path, module in stored.items() if module.carrier}


def disk_name(name: str, carriers: Mapping[str, str]) -> str:
    """Name on disk of the state-dict entry `name`; see the function `carriers`.

    One part of every stored module carries the dense layer's own name: a loader that does not know the format meets a tensor
    of another shape than it wants and raises, instead of starting from random weights.
    """
    part, _, leaf = name.rpartition(".")
    path, _, part = part.rpartition(".")
    return f"{path}.{leaf}" if part and carriers.get(path) == part else name


def _joined(path: str, row: Mapping[str, int], whole: nn.Linear) -> JoinedLinear:
    """What a row with "parts" makes of a matrix, on its device and dtype. Raises ValueError for a row that does not fit it."""
    parts, head_dim, out = row["parts"], row.get("head_dim"), whole.out_features
    if row.keys() - {"parts", "head_dim"} or type(parts) is not int or parts not in PARTS or out % parts:
        known = ", ".join(map(str, PARTS))
        raise ValueError(
            f"streamlap module {short(path)}: seen {short(dict(row))}; wanted 'parts', one of {known} that divides the {out} "
            "rows, and perhaps 'head_dim'"
        )
    if "head_dim" in row:
        check_size(path, "head_dim", row["head_dim"], out // parts)
        if out // parts % row["head_dim"]:
            raise ValueError(
                f"streamlap module {short(path)}: seen head_dim = {head_dim}; wanted a divisor of {out // parts}"
            )
    weight = whole.weight
    biased = whole.bias is not None
    return JoinedLinear(whole.in_features, out, parts, biased, head_dim, weight.device, weight.dtype)


def _linear_at(root: nn.Module, path: str, taken_apart: Mapping[str, nn.Module] | None = None) -> nn.Linear:
    """The linear at `path`, which may be a part of a matrix that is not yet in `root`."""
    parent, _, leaf = path.rpartition(".")
    matrix = (taken_apart or {}).get(parent)
    try:
        module = root.get_submodule(path) if matrix is None else matrix.get_submodule(leaf)
    except AttributeError as error:
        raise ValueError(
            f"streamlap module {short(path)}: seen no such module in {type(root).__name__}; wanted the path of a Linear"
        ) from error
    if not isinstance(module, nn.Linear):
        raise ValueError(f"streamlap module {short(path)}: seen a {type(module).__name__}; wanted a Linear")
    return module
