"""How a total of parameters is shared out where each part loses by a curve of its own.

A part that keeps the share k of its parameters loses a (1 - k)^p, p >= 1: nothing at k = 1, more and more the less is kept. The
sum of the losses is least where one more parameter would win the same everywhere. Measured curves promise too much far from
where they were measured, and undamped they are known to make a model worse; so each share stays near the uniform one.
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
        """The share from which on keeping more wins less than `slope` for each share kept; 0 where it always does."""
        steepest = max(self.scale, TINY) * self.power  # at keep 0
        if slope >= steepest:
            return 0.0
        return 1.0 if self.power == 1.0 else 1.0 - (slope / steepest) ** (1.0 / (self.power - 1.0))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is given a share."""

    parameters: int
    """Of its dense form."""
    curve: Curve


def fit_curve(points: Sequence[tuple[float, float]]) -> Curve:
    """The curve through measured (keep, loss), by least squares on the logarithms; through two points exactly, if p >= 1.

    Of a single point, or where the losses do not grow as less is kept, it is the straight line.
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

    Bisection on the win of one more parameter; where losses are straight lines many parts jump at one such value, and what lies
    between before and after is given to them in equal measure.
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
    """The amounts rounded down, and what that leaves of `total`, one each, to those that lost most by it."""
    counts = [math.floor(amount) for amount in amounts]
    order = sorted(range(len(counts)), key=lambda place: counts[place] - amounts[place])
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts
