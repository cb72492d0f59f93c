"""What may stand in place of an `nn.Linear` in a compressed layer, one class a form: its shape, its parameters, its row in
config.json, the module that computes with it, and the way back from a row and from a module.

A row has the key of its form (none for a dense one) with what belongs to it, and besides

    "out", "in"   another width of the output, of the input
    "bias": 1     a bias where the dense linear has none

Imports torch and `linears`. This file is copied as it is into every output folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import Repr
from typing import ClassVar

import torch
from torch import nn

from .linears import LowRankLinear, PivotedLinear, RemovedLinear

INDEX_ITEMSIZE = 4
"""Bytes of one number of a stored order: it is int32."""

_REPR = Repr()
_REPR.maxstring, _REPR.maxdict, _REPR.maxlist = 120, 8, 8
short = _REPR.repr
"""What stands in a file as messages show it; no file can make them long."""

WANTED = "at most one of 'rank' and 'pivots' (it may have 'groups'), and 'out', 'in' or 'bias'; or 'removed' alone"

HEAD_CUTS = {"out_heads", "in_heads"}
"""Keys of forms that version 0.4 wrote and no other."""


@dataclass(frozen=True)
class Form(ABC):
    """A linear map of (out, in) `shape`, with a bias or without, in one way to store it."""

    shape: tuple[int, int]
    bias: bool = False
    rank: int = 0
    """0 where it is not cut."""

    kind: ClassVar[str]
    """What `inspect` calls it."""
    keys: ClassVar[tuple[str, ...]] = ()
    """Keys of its own in a row; the first, which must be there, tells the form."""
    also: ClassVar[tuple[str, ...]] = ("out", "in", "bias")
    """What else its row may have."""

    @classmethod
    @abstractmethod
    def from_row(cls, row: Mapping[str, int], shape: tuple[int, int], bias: bool) -> Form:
        """The form that a row describes; `check` says whether there can be one."""

    @classmethod
    @abstractmethod
    def from_module(cls, module: nn.Module) -> Form: ...

    @abstractmethod
    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """The module, its numbers not yet set."""

    @property
    @abstractmethod
    def own(self) -> dict[str, int]:
        """Its part of the row."""

    @property
    @abstractmethod
    def weights(self) -> int:
        """Numbers that are stored, bias and order apart."""

    def parameters(self, itemsize: int) -> int:
        """What is stored, in weights of `itemsize` bytes: an order counts as the weights that would take its bytes."""
        return self.weights + self.shape[0] * self.bias

    def row(self, native: Dense) -> dict[str, int]:
        """The row in config.json of this form in place of the dense linear `native`; empty where it is the same."""
        widths = zip(("out", "in"), self.shape, native.shape, strict=True)
        changed = {key: new for key, new, old in widths if new != old}
        return self.own | changed | ({"bias": 1} if self.bias and not native.bias else {})

    @abstractmethod
    def check(self, path: str) -> None:
        """Raise ValueError, naming `path`, where no module can have this form.

        Of every form but the dense one the carrier must have another shape than [out, in]: with the dense layer's name and its
        shape it would load where it must not.
        """


@dataclass(frozen=True)
class Dense(Form):
    """A plain `nn.Linear`."""

    kind = "dense"

    @classmethod
    def from_row(cls, row: Mapping[str, int], shape: tuple[int, int], bias: bool) -> Dense:
        return cls(shape, bias)

    @classmethod
    def from_module(cls, module: nn.Module) -> Dense:
        assert isinstance(module, nn.Linear)
        return cls((module.out_features, module.in_features), module.bias is not None)

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Linear:
        return nn.Linear(self.shape[1], self.shape[0], self.bias, device, dtype)

    @property
    def own(self) -> dict[str, int]:
        return {}

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def check(self, path: str) -> None:
        """There can always be one."""


@dataclass(frozen=True)
class LowRank(Form):
    """Two factors, [out, rank] and [rank, in]."""

    kind = "low_rank"
    keys = ("rank",)

    @classmethod
    def from_row(cls, row: Mapping[str, int], shape: tuple[int, int], bias: bool) -> LowRank:
        return cls(shape, bias, row["rank"])

    @classmethod
    def from_module(cls, module: nn.Module) -> LowRank:
        assert isinstance(module, LowRankLinear)
        return cls((module.out_features, module.in_features), module.bias is not None, module.rank)

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRankLinear:
        return LowRankLinear(self.shape[1], self.shape[0], self.rank, self.bias, device, dtype)

    @property
    def own(self) -> dict[str, int]:
        return {"rank": self.rank}

    @property
    def weights(self) -> int:
        return self.rank * sum(self.shape)

    def check(self, path: str) -> None:
        check_size(path, "rank", self.rank, self.shape[1] - 1)


@dataclass(frozen=True)
class Pivoted(Form):
    """The rank's number of rows as they are, the pivots, and of each other row a coefficient for each of them."""

    groups: int | None = None
    """In how many equal runs pivots and others take turns; None where an order is stored instead."""
    kind = "pivoted"
    keys = ("pivots", "groups")

    @classmethod
    def from_row(cls, row: Mapping[str, int], shape: tuple[int, int], bias: bool) -> Pivoted:
        return cls(shape, bias, row["pivots"], row.get("groups"))

    @classmethod
    def from_module(cls, module: nn.Module) -> Pivoted:
        assert isinstance(module, PivotedLinear)
        groups = module.groups if module.order is None else None
        return cls((module.out_features, module.in_features), module.bias is not None, module.rank, groups)

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PivotedLinear:
        return PivotedLinear(self.shape[1], self.shape[0], self.rank, self.bias, self.groups, device, dtype)

    @property
    def own(self) -> dict[str, int]:
        return {"pivots": self.rank} | ({} if self.groups is None else {"groups": self.groups})

    @property
    def weights(self) -> int:
        return self.rank * (sum(self.shape) - self.rank)

    def parameters(self, itemsize: int) -> int:
        order = index_parameters(self.shape[0], itemsize) if self.groups is None else 0
        return super().parameters(itemsize) + order

    def check(self, path: str) -> None:
        out, width_in = self.shape
        check_size(path, "pivots", self.rank, min(out - 1, width_in))
        groups = 1 if self.groups is None else self.groups
        check_size(path, "groups", groups, min(self.rank, out - self.rank))
        if self.rank % groups or (out - self.rank) % groups:
            wanted = f"a divisor of {self.rank} and {out - self.rank}"
            raise ValueError(f"streamlap module {short(path)}: seen groups = {groups}; wanted {wanted}")


@dataclass(frozen=True)
class Removed(Form):
    """Nothing: every linear of a sub-layer that is gone has this form. What is stored is a mark of one number."""

    kind = "removed"
    keys = ("removed",)
    also = ()

    @classmethod
    def from_row(cls, row: Mapping[str, int], shape: tuple[int, int], bias: bool) -> Removed:
        return cls(shape)

    @classmethod
    def from_module(cls, module: nn.Module) -> Removed:
        assert isinstance(module, RemovedLinear)
        return cls((module.out_features, module.in_features))

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RemovedLinear:
        return RemovedLinear(self.shape[1], self.shape[0], device, dtype)

    @property
    def own(self) -> dict[str, int]:
        return {"removed": 1}

    @property
    def weights(self) -> int:
        return 1

    def check(self, path: str) -> None:
        if self.shape == (1, 1):
            raise ValueError(
                f"streamlap module {short(path)}: seen a removed linear of one number; wanted a larger one"
            )


FORMS: tuple[type[Form], ...] = (LowRank, Pivoted, Removed)
"""Those that have a key of their own in a row."""
MODULES: dict[type[nn.Module], type[Form]] = {
    LowRankLinear: LowRank,
    PivotedLinear: Pivoted,
    RemovedLinear: Removed,
}


def index_parameters(rows: int, itemsize: int) -> int:
    """What an int32 order of `rows` numbers counts as among weights of `itemsize` bytes: the bytes that it takes."""
    return -(-INDEX_ITEMSIZE * rows // itemsize)


def form_of(module: nn.Module) -> Form:
    """The form of a module of a compressed or native layer."""
    form = next((form for kind, form in MODULES.items() if isinstance(module, kind)), Dense)
    return form.from_module(module)


def read_row(path: str, row: Mapping[str, int], native: Dense) -> Form:
    """The form that the row at `path` puts in place of `native`. Raises ValueError for a row that does not fit it."""
    kind = next((kind for kind in FORMS if kind.keys[0] in row), Dense)
    if not row or row.keys() - {*kind.keys, *kind.also}:
        hint = " Version 0.4 alone reads cuts of value heads." if row.keys() & HEAD_CUTS else ""
        raise ValueError(f"streamlap module {short(path)}: seen {short(dict(row))}; wanted {WANTED}.{hint}")
    for key, width in zip(("out", "in"), native.shape, strict=True):
        check_size(path, key, row.get(key, width), width)
    if kind is Removed:
        check_size(path, "removed", row["removed"], 1)
    for key in kind.keys[1:]:
        if row.get(key, 1) is None:  # null, which `from_row` would take for a key that is not there
            check_size(path, key, row[key], max(native.shape))
    if "bias" in row:
        check_size(path, "bias", row["bias"], 1)
        if native.bias:
            raise ValueError(
                f"streamlap module {short(path)}: seen a bias; wanted none, as the dense linear has its own"
            )
    shape = row.get("out", native.shape[0]), row.get("in", native.shape[1])
    form = kind.from_row(row, shape, native.bias or "bias" in row)
    form.check(path)
    return form


def check_size(path: str, key: str, size: int, most: int) -> None:
    if type(size) is not int or not 1 <= size <= most:
        raise ValueError(f"streamlap module {short(path)}: seen {key} = {short(size)}; wanted an integer 1..{most}")


def kind_of(form: Form, native: Dense) -> str:
    """dense, low_rank, pivoted, removed, or pruned: a dense one of another width."""
    return "pruned" if isinstance(form, Dense) and form.shape != native.shape else form.kind
