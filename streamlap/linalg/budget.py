"""LoRAP's formulas between ratios, ranks and widths. How many parameters a form stores, the form itself says (`loader.forms`).

Symbols as in LoRAP (Li, Tang & Zhang 2024, arXiv 2404.09695): s ratio removed, alpha share of (v, o) against (q, k),
f FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass


def break_even(rows: int, columns: int) -> float:
    """The rank mn / (m + n) at which two factors store as much as the dense m x n matrix."""
    return rows * columns / (rows + columns)


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


def removal_keeping(width: int, kept: int, protect: float) -> Removal:
    """The same where it is known how many channels stay."""
    begin = int(width * protect)
    return Removal(begin=begin, end=begin + width - kept, width=width)
