"""What an anchored sub-layer takes, from shapes alone. Bounds on memory, counts of the large products.

n is the width of what the sub-layer reads, f of what its last linear reads, w of what is left of it, d of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamlap.linalg.gram import LARGE
from streamlap.linalg.moments import CHUNK_TOKENS, HELD_TOKENS
from streamlap.linalg.obs import ROUNDS
from streamlap.linalg.triangles import PANEL
from streamlap.methods.base import Cost, Layout, Layouts, Natives

SINGLE = 0.8
"""An eigen-problem in float32 takes as long as one of so much of its size in float64."""


def anchored_cost(reads: Sequence[str], last: str, natives: Natives, layouts: Layouts) -> Cost:
    """The cost of one layout; of several, that of comparing them and of building the costliest.

    While channels are removed, a last linear is held for each layout. From then on the factors of the other linears have the
    rows of all channels.

    Args: reads, roles that read the sub-layer's input; last, the role that writes its output.
    """
    costs = [_layout_cost(reads, last, natives, layout) for layout in layouts.values()]
    if len(costs) == 1:
        return costs[0]
    d, f = natives[last].shape
    whole, lasts = (_itemsize(f) * d * f * count for count in (len(reads), len(layouts)))
    aims = _aim_bytes([natives[role].shape for role in reads])
    removing = _removal_bytes(f, d) + lasts
    cutting = _itemsize(f) * f * f + lasts + _rank_bytes(f, d)
    return Cost(
        workspace_bytes=max(aims + removing, whole + max(aims + cutting, *(cost.workspace_bytes for cost in costs))),
        capture_bytes=whole + max(cost.capture_bytes for cost in costs),
        flops=max(cost.flops for cost in costs), flops32=max(cost.flops32 for cost in costs),
        flops_per_token=max(cost.flops_per_token for cost in costs),
        decompositions=max((cost.decompositions for cost in costs), key=len),
    )  # fmt: skip


def _layout_cost(reads: Sequence[str], last: str, natives: Natives, layout: Layout) -> Cost:
    (d, f), n = natives[last].shape, natives[reads[0]].shape[1]
    w = layout[last].shape[1] if last in layout else f
    prunes = w < f
    after = {role: layout[role].shape for role in (*reads, last) if role in layout and layout[role].rank}
    capture = _sum_bytes(f, d) + _row_bytes(f, d)
    aims = _aim_bytes([natives[role].shape for role in reads])
    work = max(
        capture,
        _removal_bytes(f, d) if prunes else 0,
        max((_rank_bytes(*shape) for role, shape in after.items() if role != last), default=0),
        _itemsize(w) * (w * w + 6 * d * w) + (_rank_bytes(d, w) if last in after else 0) + _row_bytes(w, d),
    )
    flops = sum(_rank_flops(*shape) for shape in after.values()) + _last_flops(d, w, f, prunes)
    return Cost(
        workspace_bytes=aims + work, capture_bytes=capture,
        flops=flops if f <= LARGE else 0, flops32=flops if f > LARGE else 0,
        flops_per_token=n * n + w * w + 2 * d * w + (f * f if prunes else 0),
        decompositions=tuple(_eigh_size(min(shape)) for shape in after.values()),
    )  # fmt: skip


def _aim_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """The Gram of a sub-layer's input, what moves the linears that read it, and these."""
    n = shapes[0][1]
    return _itemsize(n) * (3 * n * n + n * sum(rows for rows, _ in shapes))


def _itemsize(width: int) -> int:
    """Bytes of a number in a problem of that many columns."""
    return 4 if width > LARGE else 8


def _sum_bytes(width: int, d: int) -> int:
    """A Gram and a cross-Gram; in float32 the latter with what rounding takes from it, and panels of what it takes from the
    former."""
    large = width > LARGE
    return _itemsize(width) * width * width + 8 * d * width + large * 4 * PANEL * width


def _row_bytes(width: int, d: int) -> int:
    """Tokens that wait, widened, three panels of their product, and those that are held out."""
    panel = 3 * 4 * width * min(PANEL, width)
    return 8 * CHUNK_TOKENS * (width + d) + panel + 8 * (width + d) * HELD_TOKENS


def _removal_bytes(f: int, d: int) -> int:
    """The Gram with its inverse; the last linear and its change; rows of the inverse for one round, of each four copies."""
    return _itemsize(f) * (f * f + 3 * d * f + 4 * f * -(-f // ROUNDS))


def _rank_bytes(rows: int, columns: int) -> int:
    """Metric, root, vectors and LAPACK's squares of the smaller side; bases, what is left of them, and coefficients."""
    small, item = min(rows, columns), _itemsize(columns)
    return 8 * 5 * small * small + item * (columns * columns + 8 * rows * columns)


def _eigh_size(size: int) -> int:
    return int(SINGLE * size) if size > LARGE else size


def _rank_flops(rows: int, columns: int) -> int:
    """Metric, Gram, subspace, fit of the rest: about six products of the matrix by its small side."""
    return 6 * 2 * rows * columns * min(rows, columns)


def _last_flops(d: int, w: int, f: int, prunes: bool) -> int:
    """Factor and solve of the last linear's Gram; where channels go, also factor and inverse of the one before, and what each
    channel takes from that."""
    return w**3 // 3 + 2 * d * w * w + (f**3 + f * (f + 2 * d) * (f - w) if prunes else 0)
