"""How a total of parameters is shared between parts, each of which has its own curve of loss.

A part that keeps the share k of its parameters loses a (1 - k)^p, p >= 1: nothing at k = 1, and ever more as k falls. The sum
of the losses is least where one more parameter would gain the same in every part. Far from where they were measured the curves
promise too much, and followed all the way they make a model worse; so each share stays near the uniform one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAST, MOST = 0.6, 1.6
"""Bounds on a share, as multiples of the uniform one."""

TINY = 1e-12
"""A loss below this is no more than rounding."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss a (1 - keep)^p."""

    scale: float
    power: float

    def loss(self, keep: float) -> float:
        return float(self.scale * (1.0 - keep) ** self.power)

    def keep_at(self, slope: float) -> float:
        """The share above which the loss falls by less than `slope` per share kept; 0 where it always does."""
        steepest = max(self.scale, TINY) * self.power  # at keep 0
        if slope >= steepest:
            return 0.0
        return 1.0 if self.power == 1.0 else 1.0 - (slope / steepest) ** (1.0 / (self.power - 1.0))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the parts that share the total."""

    parameters: int
    """Those of its dense form."""
    curve: Curve


def fit_curve(points: Sequence[tuple[float, float]]) -> Curve:
    """The curve through measured points (keep, loss), by least squares on the logarithms. Two points with p >= 1 lie on it.

    It is a straight line (p = 1) for a single point, and where the losses do not grow as less is kept.
    """
    rows = [(math.log(1.0 - keep), math.log(max(loss, TINY))) for keep, loss in points if keep < 1.0]
    assert rows, "a curve needs a point at which something was cut"
    mean_x, mean_y = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in rows)
    power = sum((x - mean_x) * (y - mean_y) for x, y in rows) / spread if spread > 0 else 1.0
    power = max(1.0, power)
    return Curve(scale=math.exp(mean_y - power * mean_x), power=power)


def allocate(parts: Sequence[Part], total: int) -> list[int]:
    """Parameters of every part, `total` together, with the least sum of losses inside the bounds.

    By bisection on the gain of one more parameter. Where losses are straight lines, several parts jump at one value of it; what
    the jump leaves over or lacks is shared by all of them in proportion.
    """
    uniform = total / sum(part.parameters for part in parts)
    bounds = LEAST * uniform, min(1.0, MOST * uniform)

    def spend(log_price: float) -> list[float]:
        price = math.exp(log_price)
        keeps = (part.curve.keep_at(price * part.parameters) for part in parts)
        return [min(max(keep, bounds[0]), bounds[1]) * part.parameters for keep, part in zip(keeps, parts, strict=True)]

    cheap, dear = -200.0, 200.0
    for _ in range(100):
        middle = (cheap + dear) / 2
        cheap, dear = (middle, dear) if sum(spend(middle)) > total else (cheap, middle)
    low, high = spend(dear), spend(cheap)
    gap = sum(high) - sum(low)
    place = min(1.0, max(0.0, (total - sum(low)) / gap)) if gap > 0 else 0.0
    return whole_numbers([a + place * (b - a) for a, b in zip(low, high, strict=True)], total)


def whole_numbers(amounts: Sequence[float], total: int) -> list[int]:
    """The amounts rounded down; what that leaves of `total` goes, one each, to those that lost most by it."""
    counts = [math.floor(amount) for amount in amounts]
    order = sorted(range(len(counts)), key=lambda place: counts[place] - amounts[place])
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts
