"""What a method is: a frozen dataclass of its knobs that says what it must see and which edits follow.

A method knows numbers and one layer; it never sees a file, a token or another layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from streamlap.families import Family
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.statistics import Energy

Statistic = Energy
Shapes = Mapping[str, tuple[int, int]]
"""Path in the layer -> (out, in) of the dense linear there."""
Layout = dict[str, dict[str, int]]
"""Path in the layer -> row of config.json's modules table: {"rank": r}, {"out": o}, {"in": i}."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the edits of one layer take."""

    workspace_bytes: int = 0
    """Most memory held at one time beside the weights and the finished edits."""
    flops: int = 0
    """Floating-point operations of products in float64."""
    decompositions: tuple[int, ...] = ()
    """Sizes of the symmetric eigen-problems, in float64."""


class Method(Protocol):
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
