"""Every formula between ratios, ranks, widths and parameters. The writer, the report and the loader read the results.

Symbols as in LoRAP (Li, Tang & Zhang 2024, arXiv 2404.09695): s ratio removed, alpha share of (v, o) against (q, k),
f FFN width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

INDEX_ITEMSIZE = 4
"""Bytes of one number of a stored index: it is int32."""


def break_even(rows: int, columns: int) -> float:
    """The rank mn / (m + n) at which two factors store as much as the dense m x n matrix."""
    return rows * columns / (rows + columns)


def low_rank_parameters(rows: int, columns: int, rank: int) -> int:
    return rank * (rows + columns)


def pivoted_parameters(rows: int, columns: int, rank: int) -> int:
    """r pivot rows of n numbers, and r coefficients for each other row. A stored order comes on top (`index_parameters`)."""
    return rank * (rows + columns - rank)


def pivot_rank(rows: int, columns: int, keep: float) -> int:
    """The largest r whose pivoted form has at most `keep` of the mn numbers of the dense matrix: the smaller root of
    r (m + n - r) = keep mn, rounded down. At keep = 1 it is min(m, n)."""
    both = rows + columns
    return math.floor((both - math.sqrt(both * both - 4 * keep * rows * columns)) / 2)


def index_parameters(rows: int, itemsize: int) -> int:
    """The weights of `itemsize` bytes that take as many bytes as an int32 index of `rows` numbers; it counts as so many."""
    return -(-INDEX_ITEMSIZE * rows // itemsize)


def lorap_pair_ranks(rows: int, columns: int, ratio: float, alpha: float) -> tuple[int | None, int | None]:
    """Ranks (weak, strong) of two matrices of m x n entries at `ratio` removed together; None means dense.

    LoRAP gives (v, o) alpha times the parameters of (q, k), for h x h matrices; with m = n = h this is that rule
    to the integer, since break_even(h, h) = h / 2. In a grouped-query layer q and o are one such pair, k and v another:
    each pair has equal parameter counts, so that the pairs' budgets add up to (1 - s) of the attention's parameters.
    """
    even, keep = break_even(rows, columns), 1.0 - ratio
    uniform = int(keep * even)
    strong = int(uniform * 2 * alpha / (1 + alpha))
    if strong < even:
        return int(uniform * 2 / (1 + alpha)), strong
    weak = int(keep * 2 * even) - int(even)
    return (weak if weak < even else None), None


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Positions [begin, end) of the channels to remove, in ascending order of their score."""

    begin: int
    end: int
    width: int

    @property
    def kept(self) -> int:
        return self.width - (self.end - self.begin)


def lorap_removal(width: int, ratio: float, protect: float) -> Removal:
    """Which sorted positions of `width` FFN channels go: the lowest `protect` share stays, the next `ratio` share is removed.

    LoRAP: the least important 1 % are kept, [int(f * 0.01), int((s + 0.01) * f)) are removed.
    """
    return Removal(begin=int(width * protect), end=min(int((ratio + protect) * width), width), width=width)
