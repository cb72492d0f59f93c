"""What a method is: a frozen dataclass of its knobs that says what it must see and which edits follow.

There are two kinds. A one-pass method (LoRAP's) takes its statistics from the dense layer and edits it. An anchored method
rebuilds one half of a layer, attention or FFN, so that it gives on the compressed stream what the dense model has there; where
several may rebuild a half, the one that comes nearest on held-out tokens does.

A method knows numbers and one layer; it never sees a file, a token or another layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch

from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.table import Family
from streamlap.linalg.moments import Sample
from streamlap.linalg.statistics import Energy

T = TypeVar("T")
A = TypeVar("A", bound="Anchored")
Statistic = Energy
Shapes = Mapping[str, tuple[int, int]]
"""Path in the layer -> (out, in) of the dense linear there."""
Layout = dict[str, dict[str, int]]
"""Path in the layer -> row of config.json's modules table: {"rank": r}, {"pivots": r}, {"out": o}, {"in": i}, ..."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the edits of one layer take."""

    workspace_bytes: int = 0
    """Most memory held at one time beside the weights and the finished edits."""
    flops: int = 0
    """Floating-point operations of products in float64."""
    flops32: int = 0
    """Of products in float32."""
    flops_per_token: int = 0
    """Of these, what each calibration token adds."""
    capture_bytes: int = 0
    """Most that these sums hold, with what is summed into them at a time."""
    decompositions: tuple[int, ...] = ()
    """Sizes of the symmetric eigen-problems in float64, or of as long ones."""


class OnePass(Protocol):
    def layout(self, family: Family, shapes: Shapes, target: float) -> Layout:
        """What each edited linear will become when `target` of the layer's linear parameters go; from shapes alone.

        Raises RecipeError when a site cannot reach the target. A path that stays dense is absent.
        """
        ...

    def paths(self, family: Family) -> tuple[str, ...]:
        """Every linear this method may edit; two methods of one recipe must not share any."""
        ...

    def cost(self, family: Family, shapes: Shapes, target: float) -> Cost:
        """What `edit` will take, from shapes alone."""
        ...

    def wants(self, layer: StreamLayer) -> dict[str, Statistic]:
        """Fresh statistics by site, to be filled by one dense pass over the layer."""
        ...

    def edit(self, layer: StreamLayer, stats: Mapping[str, Statistic], target: float) -> list[Edit]: ...


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One pass over a half: sums over most tokens, in the dtype to solve in, and rows of others to choose by."""

    gram_II: torch.Tensor
    cross_AI: torch.Tensor
    held: Sample
    means: tuple[torch.Tensor, torch.Tensor] | None = None
    """Of the inputs and of the anchors, taken off all of the above where a bias is to be fitted too."""


class HalfView(Protocol):
    """A half of a layer with both its streams, as a method sees it."""

    layer: StreamLayer
    half: str

    def input_gram(self) -> torch.Tensor:
        """S of `inputs` alone."""
        ...

    def inputs(self) -> Seen:
        """What the half's first linears read on the compressed stream, against what they read on the dense one."""
        ...

    def held_middles(self, edits: Sequence[Edit], centred: bool = False) -> Sample:
        """The held-out rows of `middles` alone; with `centred` less their own means."""
        ...

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made the first time only: what several methods of a half, or of a kin, need."""
        ...

    def remember(self, name: Hashable, made: object) -> None:
        """What `once` gives from now on."""
        ...

    def middle_gram(self, edits: Sequence[Edit], centred: bool = False) -> torch.Tensor:
        """S of `middles` alone, from the same tokens."""
        ...

    def middles(self, edits: Sequence[Edit], centred: bool = False) -> Seen:
        """What its last linear reads with these edits, against what the half has to add to the compressed stream to
        arrive where the dense model is, the bias of that linear apart. Each token is divided by the size of that stream; with
        `centred`, its share of the means is taken off it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a half may store."""

    parameters: int
    """In its linears, biases and indices included."""
    itemsize: int
    """Bytes of a weight: an index counts as the bytes that it takes."""
    head_dim: int
    """Numbers in one attention head."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A half rebuilt."""

    edits: list[Edit]
    error: float
    """How far it is from the target on held-out tokens, relative to the target; what several methods are compared by."""


class Anchored(Protocol):
    @property
    def half(self) -> str:
        """attention or ffn."""
        ...

    def layout(self, family: Family, shapes: Shapes, biased: Mapping[str, bool], budget: Budget) -> Layout:
        """As above. The parameters that it stores are at most the budget's and nearly as many."""
        ...

    def cost(self, family: Family, shapes: Shapes, layout: Layout) -> Cost: ...

    def build(self, view: HalfView, layout: Layout) -> Built: ...


@runtime_checkable
class Comparable(Anchored, Protocol):
    """A method that can tell cheaply which of several settings serves a half best, so that only that one is built."""

    @property
    def kin(self) -> Hashable:
        """Methods of the same kin differ in what they can be compared by, and in nothing else."""
        ...

    def compare(self, view: HalfView, layouts: Mapping[str, Layout]) -> dict[str, float]:
        """About how far from its target on held-out tokens each of its kin would bring the half, as `Built.error`."""
        ...

    def comparing(self, family: Family, shapes: Shapes, layouts: Mapping[str, Layout]) -> Cost:
        """What `compare` takes, and building one of them after it."""
        ...


Candidates = Mapping[str, tuple[Anchored, Layout]]
"""Methods for one half by name, with what each will make of it."""


def by_kin(candidates: Mapping[str, tuple[A, Layout]]) -> list[dict[str, tuple[A, Layout]]]:
    """Those that can be compared together, the others alone; in their order."""
    kins: dict[Hashable, dict[str, tuple[A, Layout]]] = {}
    for name, (method, layout) in candidates.items():
        kins.setdefault(method.kin if isinstance(method, Comparable) else name, {})[name] = method, layout
    return list(kins.values())
