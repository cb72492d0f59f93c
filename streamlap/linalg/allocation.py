"""How a total of parameters is shared between parts, each of which has its own curve of loss.

A part that keeps the share k of its parameters loses a (1/k - 1)^p: nothing at k = 1, and without bound as k falls. The sum of
the losses is least where one more parameter would gain the same in every part.

Measured is how far predictions move when one part is cut and all else is whole. That tells how parts compare. It does not tell
how their losses grow and add up when all are cut, since later parts mend some of what earlier ones lose. So the power is one
number for all, and each share stays near the uniform one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEAST, MOST = 0.7, 2.0
"""Bounds on a share, as multiples of the uniform one of the parts that are shared out together."""

POWER = 1.5
"""p. The larger, the nearer all shares are to the uniform one. What goes over what stays, 1/k - 1, falls with a part's loss to
the power of -1 / (p - 1) where little goes, and of -1 / (p + 1) where most does: deep cuts differ less than shallow ones."""

ROUNDS = 50
"""Most steps to the share at which a curve has a slope; a few will do."""

TINY = 1e-12
"""A loss below this is no more than rounding."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss a (1/keep - 1)^p."""

    scale: float

    def loss(self, keep: float) -> float:
        return float(self.scale * (1.0 / keep - 1.0) ** POWER) if keep > 0 else math.inf

    def keep_at(self, slope: float) -> float:
        """The share above which the loss falls by less than `slope` per share kept; 1 where it always does.

        With y = 1/keep - 1 the slope is a p y^(p - 1) (1 + y)^2. Its logarithm is convex in that of y and rises, so steps by
        Newton's method reach it from anywhere.
        """
        if slope <= 0:
            return 1.0
        wanted = math.log(slope) - math.log(max(self.scale, TINY) * POWER)
        log_y = wanted / (POWER + 1.0)
        for _ in range(ROUNDS):
            y = math.exp(log_y)
            step = ((POWER - 1.0) * log_y + 2.0 * math.log1p(y) - wanted) / (POWER - 1.0 + 2.0 * y / (1.0 + y))
            log_y -= step
            if abs(step) < 1e-12:
                break
        return 1.0 / (1.0 + math.exp(log_y))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the parts that share the total."""

    parameters: int
    """Those of its dense form."""
    curve: Curve


def fit_curve(points: Sequence[tuple[float, float]]) -> Curve:
    """The curve nearest to measured points (keep, loss), by least squares on the logarithms; a single one lies on it."""
    scales = [math.log(max(loss, TINY)) - POWER * math.log(1.0 / keep - 1.0) for keep, loss in points if 0 < keep < 1]
    assert scales, "a curve needs a point at which something was cut, and something stayed"
    return Curve(scale=math.exp(sum(scales) / len(scales)))


def allocate(parts: Sequence[Part], total: int) -> list[int]:
    """Parameters of every part, `total` together, with the least sum of losses inside the bounds.

    By bisection on the gain of one more parameter.
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
    return whole_numbers(spend(dear), total)


def allocate_kinds(
    kinds: Mapping[str, Sequence[Part]], total: int, floors: Mapping[str, float]
) -> dict[str, list[int]]:
    """The same of parts of several kinds. All parts of a kind together keep at least the share of them in `floors`, which is at
    most the uniform one: points of one kind tell less of another, the further the cuts are from them.

    A kind that would get less is given its floor, and that is shared out by itself. So the bounds on its shares are multiples
    of its floor, which may be lower than those of the uniform share. Those on the others are multiples of the share that is
    then left for all of them.
    """
    free, counts = dict(kinds), dict[str, list[int]]()
    while free:
        left = total - sum(map(sum, counts.values()))
        found = iter(allocate([part for parts in free.values() for part in parts], left))
        tried = {name: [next(found) for _ in parts] for name, parts in free.items()}
        sizes = {name: sum(part.parameters for part in parts) for name, parts in free.items()}
        low = [name for name, own in tried.items() if sum(own) < int(floors[name] * sizes[name])]
        if not low or len(low) == len(free):
            return {name: counts[name] if name in counts else tried[name] for name in kinds}
        for name in low:
            counts[name] = allocate(free.pop(name), int(floors[name] * sizes[name]))
    return counts


def whole_numbers(amounts: Sequence[float], total: int) -> list[int]:
    """The amounts rounded down; what that leaves of `total` goes, one each, to those that lost most by it."""
    counts = [math.floor(amount) for amount in amounts]
    order = sorted(range(len(counts)), key=lambda place: counts[place] - amounts[place])
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts
