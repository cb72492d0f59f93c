"""The modules that stand in a compressed layer in place of an `nn.Linear`. Imports torch only.

Each is made of plain `nn.Linear` parts, so that adapters and quantisers see them, and says which part carries the dense
layer's own names on disk. This file is copied as it is into every output folder.

Shape suffixes: O out, I in, R rank, N = O - R; leading dimensions of activations are written `...`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`up` [O, R] and `down` [R, I], whose product is the dense matrix, in the dtype of the parts."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Names on disk are welcome too: a Trainer resumes by handing the saved file to load_state_dict as it is, and
        # would otherwise go on with the old weights after no more than a warning.
        for leaf in {"weight", "bias"} - self._parameters.keys():
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

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.up.weight, self.down.weight

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
        # In place: y is new in any case, and keeps its dtype where autocast makes it narrower than the bias.
        return y if self.bias is None else y.add_(self.bias)

    def _with_rest(self, z_P: torch.Tensor) -> torch.Tensor:
        """z_P [..., R] -> [..., O], in order; the two parts are free again when this ends."""
        z_N: torch.Tensor = self.rest(z_P)
        if self.groups == 1:
            y = torch.cat((z_P, z_N), -1)
            return y if self.order is None else y.index_select(-1, self.order)
        return torch.cat([torch.unflatten(z, -1, (self.groups, -1)) for z in (z_P, z_N)], -1).flatten(-2)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        base_RI = self.base.weight
        eye_RR = torch.eye(self.rank, dtype=base_RI.dtype, device=base_RI.device)
        return self._with_rest(eye_RR).T, base_RI

    def merged(self, dtype: Dtype = None) -> torch.Tensor:
        base_RI, rest_NR = _wide(self.base.weight), _wide(self.rest.weight)
        parts = [torch.unflatten(w, 0, (self.groups, -1)) for w in (base_RI, rest_NR @ base_RI)]
        w_OI = torch.cat(parts, 1).flatten(0, 1)
        w_OI = w_OI if self.order is None else w_OI.index_select(0, self.order)
        return w_OI.to(dtype or self.base.weight.dtype)

    def has_permutation(self) -> bool:
        """Whether the order, where one is stored and in memory, is a permutation."""
        return self.order is None or self.order.is_meta or is_permutation(self.order, self.out_features)


def with_product(
    module: StoredLinear, left_OS: torch.Tensor, right_SI: torch.Tensor, bias_O: torch.Tensor | None
) -> LowRankLinear | nn.Linear:
    """What computes module(x) + left right x, with `bias_O` as its bias, in the dtype of `module`.

    Both products are kept whole, so the rank grows by S. Where two factors of that rank have no fewer numbers than one matrix
    has, it is that matrix.
    """
    up_OR, down_RI = module.factors()
    up_OR = torch.cat((up_OR, left_OS.to(up_OR)), 1)
    down_RI = torch.cat((down_RI, right_SI.to(down_RI)), 0)
    out_features, in_features = module.out_features, module.in_features
    if len(down_RI) * (out_features + in_features) < out_features * in_features:
        return LowRankLinear.from_factors(up_OR, down_RI, bias_O)
    dense = nn.Linear(in_features, out_features, bias_O is not None, device="meta")
    dense.weight = _frozen((_wide(up_OR) @ _wide(down_RI)).to(up_OR.dtype))
    if bias_O is not None:
        dense.bias = _frozen(bias_O)
    return dense


def is_permutation(order: torch.Tensor, size: int) -> bool:
    """Whether `order` holds each of 0 .. size - 1 once."""
    return torch.equal(order.long().sort().values.cpu(), torch.arange(size))


def _wide(w: torch.Tensor) -> torch.Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
