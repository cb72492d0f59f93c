"""The modules that stand in a compressed layer in place of an `nn.Linear`. Imports torch only.

Each is made of plain `nn.Linear` parts, so that adapters and quantisers see them, and says which part carries the dense
layer's own names on disk. This file is copied as it is into every output folder.

Shape suffixes: O out, I in, R rank, N = O - R; leading dimensions of activations are written `...`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

Device = torch.device | str | None
Dtype = torch.dtype | None


class StoredLinear(nn.Module, ABC):
    """What the kinds below have in common. Seen from outside each is a linear map from `in_features` to `out_features`."""

    carrier: ClassVar[str]
    """The part whose weight and bias have the dense layer's own names on disk."""
    in_features: int
    out_features: int
    rank: int
    bias: torch.Tensor | None
    """The bias [O] of the dense layer."""

    @abstractmethod
    def merged(self, dtype: Dtype = None) -> torch.Tensor:
        """The dense matrix [O, I] that this stands for, computed in float32 or wider, in `dtype` (that of the parts)."""

    @abstractmethod
    def plus(self, left_OS: torch.Tensor, right_SI: torch.Tensor, bias_O: torch.Tensor | None) -> nn.Module:
        """What computes self(x) + left right x, with `bias_O` for its own bias, in the dtype of the parts.

        Nothing is cut off: the rank grows by S at most. Where that form is no smaller than the dense matrix, it is an
        `nn.Linear`.
        """

    def _dense_plus(self, left_OS: torch.Tensor, right_SI: torch.Tensor, bias_O: torch.Tensor | None) -> nn.Linear:
        dtype = next(self.parameters()).dtype
        w_OI = self.merged(torch.promote_types(dtype, torch.float32)) + _wide(left_OS) @ _wide(right_SI)
        dense = nn.Linear(self.in_features, self.out_features, bias_O is not None, device="meta")
        dense.weight = _frozen(w_OI.to(dtype))
        if bias_O is not None:
            dense.bias = _frozen(bias_O)
        return dense

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Names on disk are welcome too: a Trainer resumes by handing the saved file to load_state_dict as it is, and
        # would otherwise go on with the old weights after no more than a warning.
        for leaf in {"weight", "bias"} - self._parameters.keys() - self._buffers.keys():
            if prefix + leaf in state_dict:
                state_dict[f"{prefix}{self.carrier}.{leaf}"] = state_dict.pop(prefix + leaf)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(StoredLinear):
    """y = up(down(x)) + bias, with `down` [R, I] and `up` [O, R]."""

    carrier = "up"

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = False, device: Device = None,
        dtype: Dtype = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, up_OR: torch.Tensor, down_RI: torch.Tensor, bias_O: torch.Tensor | None) -> LowRankLinear:
        """Wrap two factors (kept, not copied) and a bias."""
        rank, in_features = down_RI.shape
        module = cls(in_features, up_OR.shape[0], rank, bias_O is not None, device="meta")
        module.down.weight, module.up.weight = _frozen(down_RI), _frozen(up_OR)
        if bias_O is not None:
            module.up.bias = _frozen(bias_O)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., O]."""
        y: torch.Tensor = self.up(self.down(x))
        return y

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        bias_O: torch.Tensor | None = self.up.bias
        return bias_O

    @torch.no_grad()
    def plus(
        self, left_OS: torch.Tensor, right_SI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> LowRankLinear | nn.Linear:
        out_features, in_features, rank = self.out_features, self.in_features, self.rank + len(right_SI)
        if rank * (out_features + in_features) >= out_features * in_features:
            return self._dense_plus(left_OS, right_SI, bias_O)
        up_OR = torch.cat((self.up.weight, left_OS.to(self.up.weight)), 1)
        down_RI = torch.cat((self.down.weight, right_SI.to(self.down.weight)), 0)
        return LowRankLinear.from_factors(up_OR, down_RI, bias_O)

    def merged(self, dtype: Dtype = None) -> torch.Tensor:
        up_OR, down_RI = self.up.weight, self.down.weight
        return (_wide(up_OR) @ _wide(down_RI)).to(dtype or up_OR.dtype)


class PivotedLinear(StoredLinear):
    """A matrix of rank R in R (O + I - R) numbers: R of its rows as they are, and the others as sums of these.

    z_P = base(x), with the pivot rows `base` [R, I]; z_N = rest(z_P), with `rest` [N, R]. Each is cut into `groups` equal
    parts, and y is z_P part 0, z_N part 0, z_P part 1, ... Where an `order` [O] is stored, y[o] is number order[o] of that.
    """

    carrier = "base"
    bias: nn.Parameter | None
    order: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = False, groups: int | None = None,
        device: Device = None, dtype: Dtype = None,
    ) -> None:  # fmt: skip
        """`groups` None: an order is stored; until one is loaded it changes nothing."""
        super().__init__()
        self.in_features, self.out_features, self.rank, self.groups = in_features, out_features, rank, groups or 1
        self.base = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.rest = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        own = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own)
        stored = torch.arange(out_features, dtype=torch.int32, device=device) if groups is None else None
        self.register_buffer("order", stored)

    @classmethod
    def from_parts(
        cls, base_RI: torch.Tensor, rest_NR: torch.Tensor, bias_O: torch.Tensor | None,
        order_O: torch.Tensor | None = None, groups: int = 1,
    ) -> PivotedLinear:  # fmt: skip
        """Wrap pivot rows, coefficients of the others and a bias in its natural order (kept, not copied).

        Raises ValueError where `order_O` is no permutation or comes with groups, or `groups` does not divide R and N.
        """
        (rank, in_features), (others, inner) = base_RI.shape, rest_NR.shape
        seen = f"base {tuple(base_RI.shape)}, rest {tuple(rest_NR.shape)}, groups {groups}"
        if inner != rank or rank % groups or others % groups:
            raise ValueError(f"seen {seen}; wanted base [R, I], rest [N, R] and groups that divide R and N")
        if order_O is not None and (groups != 1 or not is_permutation(order_O, rank + others)):
            raise ValueError(f"seen {seen} and an order of {len(order_O)}; wanted a permutation of R + N, and groups 1")
        stored = None if order_O is not None else groups
        module = cls(in_features, rank + others, rank, bias_O is not None, stored, device="meta")
        module.base.weight, module.rest.weight = _frozen(base_RI), _frozen(rest_NR)
        module.bias = None if bias_O is None else _frozen(bias_O)
        module.order = None if order_O is None else order_O.to(torch.int32)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., O]."""
        y = self._with_rest(self.base(x))
        if self.order is not None:
            y = y.index_select(-1, self.order)
        # In place: y is new in any case, and keeps its dtype where autocast makes it narrower than the bias.
        return y if self.bias is None else y.add_(self.bias)

    def _with_rest(self, z_P: torch.Tensor) -> torch.Tensor:
        """z_P [..., R] -> [..., O], not yet in order; the two parts are free again when this ends."""
        z_N: torch.Tensor = self.rest(z_P)
        if self.groups == 1:
            return torch.cat((z_P, z_N), -1)
        return torch.cat([torch.unflatten(z, -1, (self.groups, -1)) for z in (z_P, z_N)], -1).flatten(-2)

    @torch.no_grad()
    def plus(
        self, left_OS: torch.Tensor, right_SI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> PivotedLinear | nn.Linear:
        """The pivots stay, and as many rows join them as the product takes out of their span."""
        base_RI, rest_NR, right_SI = self.base.weight.double(), self.rest.weight.double(), right_SI.double()
        order_O = self._whole_order()
        left_zS = left_OS.double()[order_O.argsort()]
        left_RS, left_NS = left_zS[: self.rank], left_zS[self.rank :]
        base_RI = base_RI + left_RS @ right_SI
        outside_NS = left_NS - rest_NR @ left_RS  # of each other row, what its pivots do not account for
        rows_J, others = _spanning_rows(outside_NS, torch.finfo(torch.float32).eps * float(left_OS.norm()))
        if self.rank + len(rows_J) >= min(self.in_features, self.out_features):
            return self._dense_plus(left_OS.double(), right_SI, bias_O)
        share_NJ = outside_NS @ torch.linalg.pinv(outside_NS[rows_J])
        base_PI = torch.cat((base_RI, rest_NR[rows_J] @ base_RI + outside_NS[rows_J] @ right_SI))
        rest_NP = torch.cat((rest_NR - share_NJ @ rest_NR[rows_J], share_NJ), 1)[others]
        moved = torch.cat((torch.arange(self.rank, device=others.device), self.rank + torch.cat((rows_J, others))))
        dtype = self.base.weight.dtype
        return PivotedLinear.from_parts(base_PI.to(dtype), rest_NP.to(dtype), bias_O, moved.argsort()[order_O])

    def _whole_order(self) -> torch.Tensor:
        """The order [O] that is stored, or that which the groups are."""
        if self.order is not None:
            return self.order.long()
        z_O = torch.arange(self.out_features, device=self.base.weight.device)
        parts = z_O[: self.rank], z_O[self.rank :]
        return torch.cat([torch.unflatten(part, 0, (self.groups, -1)) for part in parts], 1).flatten()

    def merged(self, dtype: Dtype = None) -> torch.Tensor:
        base_RI, rest_NR = _wide(self.base.weight), _wide(self.rest.weight)
        parts = [torch.unflatten(w, 0, (self.groups, -1)) for w in (base_RI, rest_NR @ base_RI)]
        w_OI = torch.cat(parts, 1).flatten(0, 1)
        w_OI = w_OI if self.order is None else w_OI.index_select(0, self.order)
        return w_OI.to(dtype or self.base.weight.dtype)

    def has_permutation(self) -> bool:
        """Whether the order, where one is stored and in memory, is a permutation."""
        return self.order is None or self.order.is_meta or is_permutation(self.order, self.out_features)


class RemovedLinear(StoredLinear):
    """y = 0: a linear of a sub-layer that is gone. See `modules.skip_removed`."""

    carrier = ""
    rank = 0
    bias = None
    weight: torch.Tensor

    def __init__(self, in_features: int, out_features: int, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # Not read. On disk it has the dense layer's name and another shape, so that nothing else loads in its place.
        self.register_buffer("weight", torch.zeros(1, 1, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> zeros [..., O]."""
        return x.new_zeros(*x.shape[:-1], self.out_features)

    def plus(self, left_OS: torch.Tensor, right_SI: torch.Tensor, bias_O: torch.Tensor | None) -> RemovedLinear:
        """Itself: nothing asks a sub-layer that is gone."""
        return self

    def merged(self, dtype: Dtype = None) -> torch.Tensor:
        return torch.zeros(
            self.out_features, self.in_features, device=self.weight.device, dtype=dtype or self.weight.dtype
        )


PARTS = {2: ("gate", "up"), 3: ("q", "k", "v")}
"""Linears in a joined matrix -> their names."""


class JoinedLinear(nn.Module):
    """One matrix of the native layer as the linears that it holds, each of which may have a form of its own.

    y is what they give, side by side; with a `head_dim` they take turns, that many numbers of each.
    """

    weight: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, parts: int, bias: bool = False, head_dim: int | None = None,
        device: Device = None, dtype: Dtype = None,
    ) -> None:  # fmt: skip
        """`out_features` of the whole matrix, of which each part has the same share."""
        super().__init__()
        self.head_dim = head_dim
        for name in PARTS[parts]:
            self.add_module(name, nn.Linear(in_features, out_features // parts, bias, device, dtype))
        # Not read. On disk it has the name of the whole matrix and another shape, so that nothing else loads in its place.
        self.register_buffer("weight", torch.zeros(1, 1, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., O]."""
        return joined([part(x) for part in self.children()], self.head_dim, x.dim() - 1)


def joined(parts: Sequence[torch.Tensor], head_dim: int | None, dim: int) -> torch.Tensor:
    """Tensors side by side along `dim`, or in turns of `head_dim` of each."""
    if head_dim is None:
        return torch.cat(list(parts), dim)
    return torch.cat([torch.unflatten(part, dim, (-1, head_dim)) for part in parts], dim + 1).flatten(dim, dim + 1)


def _spanning_rows(w_NS: torch.Tensor, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of rows of `w_NS` that span all but for `least`, each the farthest from the span so far; and the others."""
    left_NS, rows = w_NS.clone(), []
    for _ in range(min(w_NS.shape)):
        length_N = left_NS.norm(dim=1)
        row = int(length_N.argmax())
        if float(length_N[row]) <= least:
            break
        rows.append(row)
        unit_S = left_NS[row] / length_N[row]
        left_NS -= torch.outer(left_NS @ unit_S, unit_S)
    rest = torch.ones(len(w_NS), dtype=torch.bool, device=w_NS.device)
    rest[rows] = False
    return torch.tensor(rows, dtype=torch.long, device=w_NS.device), rest.nonzero().flatten()


def is_permutation(order: torch.Tensor, size: int) -> bool:
    """Whether `order` holds each of 0 .. size - 1 once."""
    return torch.equal(order.long().sort().values.cpu(), torch.arange(size))


def _wide(w: torch.Tensor) -> torch.Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
