"""The modules that stand in a compressed layer, and the one rule for their names on disk. Imports torch only.

This file is copied as it is into every output folder, so it imports nothing else of the package.

Shape suffixes: O out, I in, R rank; leading dimensions of activations are written `...`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


class LowRankLinear(nn.Module):
    """y = up(down(x)) + bias, with `down` [R, I] and `up` [O, R]; both are `nn.Linear`, so adapters and quantisers see them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, up_OR: torch.Tensor, down_RI: torch.Tensor, bias_O: torch.Tensor | None) -> LowRankLinear:
        """Wrap two factors (kept, not copied) and the bias of the dense layer, which survives."""
        rank, in_features = down_RI.shape
        module = cls(in_features, up_OR.shape[0], rank, bias_O is not None, device="meta")
        module.down.weight = nn.Parameter(down_RI, requires_grad=False)
        module.up.weight = nn.Parameter(up_OR, requires_grad=False)
        if bias_O is not None:
            module.up.bias = nn.Parameter(bias_O, requires_grad=False)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., O]."""
        y: torch.Tensor = self.up(self.down(x))
        return y

    def merged(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense matrix [O, I] that the factors stand for, multiplied in float32 or wider, in `dtype` (the factors' own)."""
        up_OR, down_RI = self.up.weight, self.down.weight
        wide = torch.promote_types(up_OR.dtype, torch.float32)
        return (up_OR.to(wide) @ down_RI.to(wide)).to(dtype or up_OR.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Names on disk are welcome too: a Trainer resumes by handing the saved file to load_state_dict as it is, and
        # would otherwise go on with the old `up` after no more than a warning.
        for leaf in ("weight", "bias"):
            if prefix + leaf in state_dict:
                state_dict[f"{prefix}up.{leaf}"] = state_dict.pop(prefix + leaf)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def swap_modules(root: nn.Module, modules: Mapping[str, Mapping[str, int]]) -> dict[str, nn.Linear]:
    """Put the module that each row of `modules` describes in place of the `nn.Linear` at its path, on its device and dtype.

    Rows: {"rank": r} two factors; {"out": o} and/or {"in": i} a linear of another width. Shapes are read, never computed.
    Gives back the modules that were replaced, by path. Raises ValueError for a path that is not an `nn.Linear` or a row
    that does not fit it, before anything is replaced.
    """
    replaced = {path: _linear_at(root, path) for path in modules}
    for path, row in modules.items():
        _check_row(path, row, replaced[path])
    for path, row in modules.items():
        root.set_submodule(path, _build(row, replaced[path]))
    return replaced


def merge_modules(
    root: nn.Module, dense_shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype | None = None
) -> None:
    """Undo `swap_modules`: put a dense `nn.Linear` of shape (O, I) in `dtype` (that of the module) at each path.

    Factors are multiplied back. Missing channels become zeros: a gate and an up row of zeros give an activation of zero,
    and the zero column of down reads nothing, so the layer computes the same function.
    """
    for path, (out_features, in_features) in dense_shapes.items():
        old = root.get_submodule(path)
        last = old.up if isinstance(old, LowRankLinear) else old
        weight_oi = old.merged(dtype) if isinstance(old, LowRankLinear) else old.get_parameter("weight")
        bias_o = last._parameters["bias"]
        new = nn.Linear(in_features, out_features, bias_o is not None, weight_oi.device, dtype or weight_oi.dtype)
        with torch.no_grad():
            new.weight.zero_()[: weight_oi.shape[0], : weight_oi.shape[1]] = weight_oi
            if bias_o is not None:
                new.bias.zero_()[: bias_o.shape[0]] = bias_o
        root.set_submodule(path, new)


def disk_name(name: str, low_rank_paths: Iterable[str]) -> str:
    """Name on disk of the state-dict entry `name`.

    The `up` factor of a low-rank module carries the dense layer's own name: a loader that does not know the format meets
    a [O, R] tensor where it wants [O, I] and raises, instead of starting from random weights.
    """
    for path in low_rank_paths:
        if name.startswith(path + ".up."):
            return path + name[len(path) + len(".up") :]
    return name


def _linear_at(root: nn.Module, path: str) -> nn.Linear:
    try:
        module = root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"streamlap module {path!r}: seen no such module in {type(root).__name__}; wanted the path of a Linear"
        ) from error
    if not isinstance(module, nn.Linear):
        raise ValueError(f"streamlap module {path!r}: seen a {type(module).__name__}; wanted a Linear")
    return module


def _check_row(path: str, row: Mapping[str, int], old: nn.Linear) -> None:
    if not row or set(row) - {"rank", "out", "in"}:
        raise ValueError(f"streamlap module {path!r}: seen {dict(row)!r}; wanted 'rank', 'out' or 'in'")
    for key, width in (("out", old.out_features), ("in", old.in_features)):
        _check_size(path, key, row.get(key, width), width)
    if "rank" in row:
        # Below the width: an up factor [O, I] would have the dense layer's name and its shape, and load where it must not.
        _check_size(path, "rank", row["rank"], row.get("in", old.in_features) - 1)


def _check_size(path: str, key: str, size: int, most: int) -> None:
    if type(size) is not int or not 1 <= size <= most:
        raise ValueError(f"streamlap module {path!r}: seen {key} = {size!r}; wanted an integer 1..{most}")


def _build(row: Mapping[str, int], old: nn.Linear) -> nn.Module:
    bias, weight = old.bias is not None, old.weight
    width_out, width_in = row.get("out", old.out_features), row.get("in", old.in_features)
    if "rank" in row:
        return LowRankLinear(width_in, width_out, row["rank"], bias, weight.device, weight.dtype)
    return nn.Linear(width_in, width_out, bias, weight.device, weight.dtype)
