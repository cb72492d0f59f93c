"""The knobs that the anchored methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamlap.errors import RecipeError, shown
from streamlap.methods.anchored.ranks import STORAGES, RankSite, share_ranks

OUTPUTS = ("dense", "low_rank")

LEAST = 0.6
"""Share of their numbers that the other linears of a sub-layer must keep where the last one stays dense."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How far linears are moved from what they were towards what brings the compressed stream to the dense one, 0 to 1."""

    step: float | None = None
    """Of the last linear of the sub-layer. None is what serves held-out tokens best."""
    input_step: float | None = 0.0
    """Of those that read the sub-layer's input."""

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("input_step", self.input_step)):
            if value is not None and (isinstance(value, str) or not 0 <= value <= 1):
                raise RecipeError(
                    f"{name} is {shown(value)}; wanted a number from 0 to 1, or nothing to choose it by held-out tokens."
                )

    @property
    def moves_inputs(self) -> bool:
        return self.input_step != 0


@dataclass(frozen=True, kw_only=True)
class Knobs(Steps):
    """And what is stored of them."""

    output: str = "dense"
    """dense: the last linear, which is fitted to what the others became, keeps its full rank as long as they keep enough;
    low_rank: it takes its part of the cut."""
    storage: str = "pivoted"
    """pivoted: rows of the matrix and a map from them to the others; factors: two factors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, choices in (("output", self.output, OUTPUTS), ("storage", self.storage, STORAGES)):
            if value not in choices:
                raise RecipeError(f"{name} is {shown(value)}; wanted one of {', '.join(choices)}.")

    def ranks(self, others: Sequence[RankSite], last: RankSite, budget: int) -> dict[str, int | None]:
        """Of the linears of a sub-layer within what it may store; None, or no entry, stays dense."""
        rest = budget - last.stored(None)
        if self.output == "dense" and rest >= LEAST * sum(site.stored(None) for site in others):
            return share_ranks(others, rest)
        return share_ranks([*others, last], budget)
