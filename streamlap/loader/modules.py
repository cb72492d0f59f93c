"""The table of modules that differ from a native model: rows to modules and back, and the one rule for names on disk.

A row says what stands in place of an `nn.Linear` of [out, in]; its keys are those of `KINDS`, and besides

    "out", "in"   another width of the output, of the input
    "bias": 1     a bias where the dense linear has none

This file is copied as it is into every output folder, so of the package it imports `linears` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import Repr

import torch
from torch import nn

from .linears import LowRankLinear as LowRankLinear
from .linears import PaddedLinear as PaddedLinear
from .linears import PivotedLinear as PivotedLinear
from .linears import SlicedLinear as SlicedLinear
from .linears import StoredLinear as StoredLinear
from .linears import is_permutation as is_permutation

_REPR = Repr()
_REPR.maxstring, _REPR.maxdict, _REPR.maxlist = 120, 8, 8
short = _REPR.repr
"""What stands in a file as messages show it; no file can make them long."""

KINDS: dict[str, tuple[set[str], set[str]]] = {
    "rank": (set(), set()),  # LowRankLinear: two factors
    "pivots": (set(), {"groups"}),  # PivotedLinear: rows, and the others as sums of them
    "out_heads": ({"head_dim"}, set()),  # PaddedLinear: heads whose tails are zeros
    "in_heads": ({"head_dim"}, set()),  # SlicedLinear: heads whose tails are not read
}
"""Key that names a kind -> keys that must stand beside it, and keys that may."""

ANYWHERE = {"out", "in", "bias"}
WANTED = (
    "at most one of 'rank', 'pivots' (it may have 'groups'), 'out_heads' and 'in_heads' (they have 'head_dim'), "
    "and 'out', 'in' or 'bias'"
)


def swap_modules(root: nn.Module, modules: Mapping[str, Mapping[str, int]]) -> dict[str, nn.Linear]:
    """Put the module that each row of `modules` describes in place of the `nn.Linear` at its path, on its device and dtype.

    Shapes are read, never computed. Gives back the modules that were replaced, by path. Raises ValueError for a path that is
    not an `nn.Linear` or a row that does not fit it, before anything is replaced.
    """
    replaced = {path: _linear_at(root, path) for path in modules}
    for path, row in modules.items():
        _check_row(path, row, replaced[path])
    for path, row in modules.items():
        root.set_submodule(path, _build(row, replaced[path]))
    return replaced


def module_row(module: nn.Module, of: tuple[int, int]) -> dict[str, int]:
    """The row for `module` in place of a linear of (out, in) `of`, but for an added bias, which only the caller can know."""
    assert isinstance(module, (StoredLinear, nn.Linear))
    widths = {"out": (module.out_features, of[0]), "in": (module.in_features, of[1])}
    kind = module.row if isinstance(module, StoredLinear) else {}
    return kind | {key: new for key, (new, old) in widths.items() if new != old}


def merge_modules(
    root: nn.Module, dense_shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype | None = None
) -> None:
    """Undo `swap_modules`: put a dense `nn.Linear` of shape (O, I) in `dtype` (that of the module) at each path.

    Missing channels become zeros: a gate and an up row of zeros give an activation of zero, and the zero column of down reads
    nothing, so the layer computes the same function. A bias stays, also where the native model knows none.
    """
    for path, shape in dense_shapes.items():
        root.set_submodule(path, dense_linear(root.get_submodule(path), shape, dtype))


def dense_linear(module: nn.Module, shape: tuple[int, int], dtype: torch.dtype | None = None) -> nn.Linear:
    """The `nn.Linear` of shape (O, I) that computes what `module` does, with zeros where it has no channels."""
    if isinstance(module, StoredLinear):
        weight_oi, bias_o = module.merged(dtype), module.merged_bias()
    else:
        weight_oi, bias_o = module.get_parameter("weight"), module._parameters["bias"]
    new = nn.Linear(shape[1], shape[0], bias_o is not None, weight_oi.device, dtype or weight_oi.dtype)
    with torch.no_grad():
        new.weight.zero_()[: weight_oi.shape[0], : weight_oi.shape[1]] = weight_oi
        if bias_o is not None:
            new.bias.zero_()[: bias_o.shape[0]] = bias_o
    return new


def carriers(root: nn.Module) -> dict[str, str]:
    """Path of every stored module in `root` -> the name of its part that carries the dense layer's own names on disk."""
    return {path: module.carrier for path, module in root.named_modules() if isinstance(module, StoredLinear)}


def disk_name(name: str, carriers: Mapping[str, str]) -> str:
    """Name on disk of the state-dict entry `name`; see the function `carriers`.

    One part of every stored module carries the dense layer's own name: a loader that does not know the format meets a tensor
    of another shape than it wants and raises, instead of starting from random weights.
    """
    part, _, leaf = name.rpartition(".")
    path, _, part = part.rpartition(".")
    return f"{path}.{leaf}" if part and carriers.get(path) == part else name


def _linear_at(root: nn.Module, path: str) -> nn.Linear:
    try:
        module = root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"streamlap module {short(path)}: seen no such module in {type(root).__name__}; wanted the path of a Linear"
        ) from error
    if not isinstance(module, nn.Linear):
        raise ValueError(f"streamlap module {short(path)}: seen a {type(module).__name__}; wanted a Linear")
    return module


def _check_row(path: str, row: Mapping[str, int], old: nn.Linear) -> None:
    _check_keys(path, row)
    for key, width in (("out", old.out_features), ("in", old.in_features)):
        _check_size(path, key, row.get(key, width), width)
    out, width_in = row.get("out", old.out_features), row.get("in", old.in_features)
    if "bias" in row:
        _check_size(path, "bias", row["bias"], 1)
        if old.bias is not None:
            raise ValueError(
                f"streamlap module {short(path)}: seen a bias; wanted none, as the dense linear has its own"
            )
    # Of every kind the carrier must have another shape than [O, I]: with the dense layer's name and its shape it would
    # load where it must not.
    if "rank" in row:
        _check_size(path, "rank", row["rank"], width_in - 1)
    if "pivots" in row:
        _check_size(path, "pivots", row["pivots"], min(out - 1, width_in))
        _check_parts(path, "groups", row.get("groups", 1), (row["pivots"], out - row["pivots"]))
    for heads, width in (("out_heads", out), ("in_heads", width_in)):
        if heads in row:
            _check_parts(path, heads, row[heads], (width,))
            _check_size(path, "head_dim", row["head_dim"], width // row[heads] - 1)


def _check_keys(path: str, row: Mapping[str, int]) -> None:
    """One kind at most, with the keys that belong to it."""
    kind = next((kind for kind in KINDS if kind in row), None)
    must, may = KINDS[kind] if kind else (set(), set())
    if not row or not must <= row.keys() or row.keys() - must - may - {kind} - ANYWHERE:
        raise ValueError(f"streamlap module {short(path)}: seen {short(dict(row))}; wanted {WANTED}")


def _check_size(path: str, key: str, size: int, most: int) -> None:
    if type(size) is not int or not 1 <= size <= most:
        raise ValueError(f"streamlap module {short(path)}: seen {key} = {short(size)}; wanted an integer 1..{most}")


def _check_parts(path: str, key: str, parts: int, sizes: tuple[int, ...]) -> None:
    _check_size(path, key, parts, min(sizes))
    if any(size % parts for size in sizes):
        wanted = " and ".join(map(str, sizes))
        raise ValueError(f"streamlap module {short(path)}: seen {key} = {parts}; wanted a divisor of {wanted}")


def _build(row: Mapping[str, int], old: nn.Linear) -> nn.Module:
    bias, device, dtype = old.bias is not None or "bias" in row, old.weight.device, old.weight.dtype
    out, width_in = row.get("out", old.out_features), row.get("in", old.in_features)
    if "rank" in row:
        return LowRankLinear(width_in, out, row["rank"], bias, device, dtype)
    if "pivots" in row:
        return PivotedLinear(width_in, out, row["pivots"], bias, row.get("groups"), device, dtype)
    if "out_heads" in row:
        heads = row["out_heads"]
        return PaddedLinear(nn.Linear(width_in, heads * row["head_dim"], bias, device, dtype), heads, out // heads)
    if "in_heads" in row:
        heads = row["in_heads"]
        return SlicedLinear(nn.Linear(heads * row["head_dim"], out, bias, device, dtype), heads, width_in // heads)
    return nn.Linear(width_in, out, bias, device, dtype)
