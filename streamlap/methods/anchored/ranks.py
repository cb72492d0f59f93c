"""Ranks that use a budget up: how a sub-layer shares its stored parameters between its linears.

A site is a linear in identity-block or two-factor storage. Its rank grows in steps; where a rank would store no less than the
dense matrix, the site stays dense. Sites get equal shares of what their dense forms store. What rounding leaves over goes to
single steps, the dearest that still fits first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamlap.errors import RecipeError
from streamlap.loader.forms import Dense, Form, LowRank, Pivoted

STORAGES = ("pivoted", "factors")


@dataclass(frozen=True, kw_only=True)
class RankSite:
    """A linear, or several of one shape that are to have one rank (`copies`); biases are not counted."""

    name: str
    shape: tuple[int, int]
    """(out, in)."""
    itemsize: int
    """Bytes of a weight."""
    storage: str = "pivoted"
    groups: int | None = None
    """Runs of rows whose pivots are chosen alike, so that no order is stored; None where one is."""
    copies: int = 1

    def at(self, rank: int | None) -> Form:
        """The form at a rank; None is dense."""
        if rank is None:
            return Dense(self.shape)
        if self.storage == "factors":
            return LowRank(self.shape, rank=rank)
        return Pivoted(self.shape, rank=rank, groups=self.groups)

    def stored(self, rank: int | None) -> int:
        """Parameters at a rank."""
        return self.copies * self.at(rank).parameters(self.itemsize)

    @property
    def step(self) -> int:
        """Ranks are multiples of it."""
        return self.groups or 1 if self.storage == "pivoted" else 1

    @property
    def most(self) -> int:
        """The largest rank that stores less than the dense matrix, 0 where none does."""
        rank = (min(self.shape) - 1) // self.step * self.step
        while rank > 0 and self.stored(rank) >= self.stored(None):
            rank -= self.step
        return rank

    def rank_within(self, budget: float) -> int | None:
        """The largest rank whose parameters fit the budget; None where the dense matrix does."""
        if self.stored(None) <= budget:
            return None
        low, high = 0, self.most // self.step
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.stored(middle * self.step) <= budget else (low, middle - 1)
        return low * self.step


def share_ranks(sites: Sequence[RankSite], budget: int) -> dict[str, int | None]:
    """Rank of every site, None where it stays dense; together they store at most `budget` parameters and nearly all of it.

    Raises RecipeError where a site would be left without a rank.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        fits = sum(site.stored(rank) for site, rank in _at(sites, share)) <= budget
        low, high = (share, high) if fits else (low, share)
    ranks = {site.name: rank for site, rank in _at(sites, high if high == low else low)}
    _spend(sites, ranks, budget)
    for site in sites:
        if ranks[site.name] == 0:
            raise RecipeError(
                f"{budget} parameters for {', '.join(site.name for site in sites)} leave {site.name} {list(site.shape)} no "
                f"rank; wanted at least {site.step}. Choose a lower ratio."
            )
    return ranks


def _at(sites: Sequence[RankSite], share: float) -> list[tuple[RankSite, int | None]]:
    return [(site, site.rank_within(share * site.stored(None))) for site in sites]


def _spend(sites: Sequence[RankSite], ranks: dict[str, int | None], budget: int) -> None:
    """Raise single ranks while something is left over, the dearest step that fits first."""
    left = budget - sum(site.stored(ranks[site.name]) for site in sites)
    while True:
        steps = [(site, _next(site, ranks[site.name])) for site in sites if ranks[site.name] is not None]
        costs = [(site.stored(rank) - site.stored(ranks[site.name]), site, rank) for site, rank in steps]
        fitting = [row for row in costs if 0 < row[0] <= left]
        if not fitting:
            return
        cost, site, rank = max(fitting, key=lambda row: row[0])
        ranks[site.name], left = rank, left - cost


def _next(site: RankSite, rank: int | None) -> int | None:
    assert rank is not None
    return rank + site.step if rank + site.step <= site.most else None
