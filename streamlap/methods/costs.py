"""What an anchored half takes, from shapes alone. Bounds on memory, counts of the large products.

n is the width of what the half reads, w of what its last linear reads, d of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping

from streamlap.families import Family
from streamlap.linalg.moments import CHUNK_TOKENS, ROW_BLOCK
from streamlap.methods.base import Cost, Layout, Shapes

HELD_TOKENS = 4096
"""Most rows that are held out to choose by."""


def half_cost(family: Family, half: str, shapes: Shapes, layout: Layout) -> Cost:
    """The cost of one anchored method on one half."""
    parts = family.halves[half]
    reads, (last,) = family.sites[parts.reads], family.sites[parts.writes]
    (hidden, full), n = shapes[last], shapes[reads[0]][1]
    prunes = "in" in layout.get(last, {})
    w = layout.get(last, {}).get("in", full)
    widest = full if prunes else w
    sums = 8 * (2 * n * n + widest * widest + hidden * widest)
    rows = 4 * widest * (2 * CHUNK_TOKENS + min(ROW_BLOCK, widest)) + 4 * (widest + hidden) * HELD_TOKENS
    ranked = {path: layout[path] for path in (*reads, last) if {"rank", "pivots"} & layout.get(path, {}).keys()}
    after = {
        path: (layout[path].get("out", shapes[path][0]), layout[path].get("in", shapes[path][1])) for path in ranked
    }
    largest = max((rows_ * columns for rows_, columns in after.values()), default=0)
    solve = max(3 * widest * widest + 3 * hidden * widest, 6 * n * n + 5 * largest)
    return Cost(
        workspace_bytes=sums + rows + 8 * solve,
        capture_bytes=sums + rows,
        flops=sum(map(_linear_flops, after.values())) + _last_flops(hidden, w, full, prunes),
        flops_per_token=4 * n * n + (w * w + 2 * hidden * w) + (full * full if prunes else 0),
        decompositions=tuple(min(shape) for shape in after.values()),
    )


def _linear_flops(shape: tuple[int, int]) -> int:
    """Metric, Gram, subspace, fit of the rest: about six products of the matrix by its small side."""
    rows, columns = shape
    return 6 * 2 * rows * columns * min(rows, columns)


def _last_flops(hidden: int, w: int, full: int, prunes: bool) -> int:
    """Factor and solve of the last linear's Gram; where channels go, also the inverse and its updates."""
    return w**3 // 3 + 4 * hidden * w * w + (2 * full**3 if prunes else 0)


def largest_cost(costs: Mapping[str, Cost]) -> Cost:
    """Several methods tried on one half, one after another: the most memory, all the work."""
    return Cost(
        workspace_bytes=max(cost.workspace_bytes for cost in costs.values()),
        capture_bytes=max(cost.capture_bytes for cost in costs.values()),
        flops=sum(cost.flops for cost in costs.values()),
        flops_per_token=sum(cost.flops_per_token for cost in costs.values()),
        decompositions=tuple(size for cost in costs.values() for size in cost.decompositions),
    )
