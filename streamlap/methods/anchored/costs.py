"""What an anchored sub-layer takes, from shapes alone. Bounds on memory, counts of the large products.

n is the width of what the sub-layer reads, f of what its last linear reads, w of what is left of it, d of the stream, r a rank.
Each bound is that of one moment, and what is freed before it does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamlap.linalg.gram import LARGE
from streamlap.linalg.moments import HELD_TOKENS, chunk_tokens
from streamlap.linalg.obs import ROUNDS
from streamlap.linalg.pivot import BLOCK as PIVOTS
from streamlap.linalg.pivot import POOL
from streamlap.linalg.subspace import BLOCK
from streamlap.linalg.triangles import PANEL
from streamlap.methods.base import Cost, Layout, Layouts, Natives, ParameterBudget

Moment = tuple[int, int]
"""Bytes that the work holds, and bytes that wait for it, which on a GPU lie in RAM."""

SINGLE = 0.74
"""An eigen-problem in float32 takes as long as one of so much of its size in float64: 5.0 s for 12.7 s at 4096."""

WIDE, RUN = 8, 4
"""Bytes of a number in float64, to which a decomposition may have to go; most bytes of one in the compute dtype."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A sub-layer, and one thing that it may become."""

    inputs: int
    """n."""
    last: tuple[int, int]
    """d, f."""
    width: int
    """w."""
    ranks: Sequence[tuple[tuple[int, int], int]]
    """Shape and rank of what is cut to one, of the linears that read the input."""
    last_rank: int
    """Of the last linear; 0 where it keeps its own."""
    edits: int
    """Bytes of what the linears that read the input become, as stored and, where that is another dtype, as it runs."""
    last_edit: int
    """Bytes of what the last one becomes."""
    item: int
    """Bytes of a weight as it runs."""
    gained: bool
    """Whether its outputs are multiplied, so that a copy of it is as it acts behind that."""

    @property
    def prunes(self) -> bool:
        return self.width < self.last[1]

    @property
    def weighs(self) -> bool:
        """Whether the rows that are left are copied, each times what it counts; more rows than columns are not."""
        return self.prunes and self.width <= self.inputs


def anchored_cost(
    reads: Sequence[str], last: str, natives: Natives, layouts: Layouts, budget: ParameterBudget, moves: bool,
    together: bool = False,
) -> Cost:  # fmt: skip
    """The cost of one layout; of several, that of comparing them and of building the costliest.

    Args: reads, roles that read the sub-layer's input; last, the role that writes its output; moves, whether the linears that
    read the input are moved first; together, whether their subspaces are all found, and wait, before the first is stored; what
    was seen of the input is then gone before the last linear is fitted.
    """
    found = [_shapes(reads, last, natives, layout, budget) for layout in layouts.values()]
    (d, f), n, item = natives[last].shape, found[0].inputs, budget.itemsize
    rows = sum(native.shape[0] for native in (natives[role] for role in reads))
    inputs = _item(n) * n * n + moves * (2 * _item(n) * n * n + _item(n) * n * rows + RUN * _numbers(natives))
    first, last_sums = _first_sums(n, f, any(shape.prunes for shape in found)), max(map(_last_sums, found))
    compared, held = len(found) > 1, 4 * HELD_TOKENS * (f + d)
    reading, writing = [(first, held * moves)], [(last_sums, held)]
    for shape in found:
        waits = held + 2 * item * d * shape.width * shape.prunes
        building = _building_together(shape, compared) if together else _building_apart(shape)
        reading += [(_removing(shape), 0), *((work, waits + more) for work, more in building)]
        writing += [(work, waits + more) for work, more in _building_last(shape)]
    if compared:
        lasts = sum(d * (item * shape.width + _item(f) * d * (shape.last_rank > 0)) for shape in found)
        rank = max((rank for shape in found for _, rank in shape.ranks), default=0)
        bases = _item(n) * (len(reads) * rank * (f + n) + n * n)  # and the Gram, beside an eigen-problem
        reading += [
            (max(map(_removing, found)), lasts),
            (max(_finding((f, n), rank, shape.weighs) for shape in found), lasts + bases),
        ]
        reading += [(_trying(shape, item), lasts + bases + held) for shape in found]
    left = 0 if together else inputs
    moments = [(inputs + work, waits) for work, waits in reading] + [(left + work, waits) for work, waits in writing]
    on_its_way = 4 * HELD_TOKENS * f  # held-out tokens in one piece; where nothing goes elsewhere, the work counts it
    return Cost(
        workspace_bytes=max(work for work, _ in moments), capture_bytes=max(inputs + first, left + last_sums),
        waiting_bytes=max(waiting for _, waiting in moments) + on_its_way, both_bytes=max(map(sum, moments)),
        flops=max(_flops(shape) for shape in found) if f <= LARGE else 0,
        flops32=max(_flops(shape) for shape in found) if f > LARGE else 0,
        flops_per_token=n * n + max(shape.width**2 + 2 * d * shape.width + shape.prunes * f * f for shape in found),
        decompositions=max((_decompositions(shape) for shape in found), key=len),
    )  # fmt: skip


def _shapes(reads: Sequence[str], last: str, natives: Natives, layout: Layout, budget: ParameterBudget) -> Shapes:
    forms = {role: layout.get(role, natives[role]) for role in (*reads, last)}
    return Shapes(
        inputs=natives[reads[0]].shape[1], last=natives[last].shape, width=forms[last].shape[1],
        ranks=[(forms[role].shape, forms[role].rank) for role in reads if forms[role].rank], last_rank=forms[last].rank,
        edits=(budget.itemsize + RUN * budget.converts) * sum(forms[role].parameters(budget.itemsize) for role in reads),
        last_edit=budget.itemsize * forms[last].parameters(budget.itemsize), gained=budget.gained,
        item=RUN if budget.converts else budget.itemsize,
    )  # fmt: skip


def _numbers(natives: Natives) -> int:
    """Of the linears of a whole layer: those that were read may have to stay beside what they became."""
    return sum(native.shape[0] * native.shape[1] for native in natives.values())


def _item(width: int) -> int:
    """Bytes of a number in a problem of that many columns."""
    return 4 if width > LARGE else WIDE


def _sums(w: int, d: int, widened: bool = False) -> int:
    """A Gram and a cross-Gram, in float32 with what rounding takes from them; tokens that wait, where they are not in float32
    also as they are widened; panels of their product, of their sum and of the tokens."""
    lost = (2 * w * d + 4 * PANEL * w) if w > LARGE else 0
    waiting = chunk_tokens(w) * (4 * (w + d) + 2 * w * widened)
    return _item(w) * w * (w + d) + lost + waiting + 4 * min(PANEL, w) * (2 * max(w, d) + chunk_tokens(w))


def input_sum_bytes(n: int) -> int:
    """The Gram of what a sub-layer reads, while it is summed."""
    return _sums(n, 0, widened=True)


def low_rank_cost(cuts: Sequence[tuple[tuple[int, int], int]], held: int) -> Cost:
    """Of the closed form alone: linears of these shapes cut to these ranks one by one, each on the Gram of its inputs.

    Args: held, bytes of what was made of them and of all others.
    """
    small = [(shape, rank) for shape, rank in cuts if shape[1] <= LARGE]
    large = [(shape, rank) for shape, rank in cuts if shape[1] > LARGE]
    most = max(
        _item(shape[1]) * shape[1] ** 2 + max(_finding(shape, rank), _refitting(shape, rank)) for shape, rank in cuts
    )
    sums = held + max(_sums(shape[1], 0, widened=True) for shape, _ in cuts)
    inputs = {shape[1] for shape, _ in cuts}
    return Cost(
        workspace_bytes=held + most, capture_bytes=sums, both_bytes=held + most,
        flops=sum(_cut_flops(*cut) for cut in small), flops32=sum(_cut_flops(*cut) for cut in large),
        flops_per_token=sum(width**2 for width in inputs),
        decompositions=tuple(int(SINGLE * min(s)) if min(s) > LARGE else min(s) for s, _ in cuts),
    )  # fmt: skip


def _first_sums(n: int, f: int, prunes: bool) -> int:
    """Of the inputs of a sub-layer, and in the same pass of its last linear's, which come in float32."""
    return input_sum_bytes(n) + prunes * _sums(f, 0)


def _last_sums(shape: Shapes) -> int:
    """Of the last linear's, with the edits before it as they run."""
    return _sums(shape.width, shape.last[0]) + shape.edits


def _removing(shape: Shapes) -> int:
    """The Gram with its inverse; the last linear; for one round rows of the inverse, and what they are divided by; panels; what
    the last linear is in the metric of the Gram."""
    if not shape.prunes:
        return 0
    (d, f), out = shape.last, -(-shape.last[1] // ROUNDS)
    metric = d * d * (shape.last_rank > 0)
    acting = RUN * d * f * shape.gained
    return acting + _item(f) * (f * f + d * f + 2 * out * (f + d) + 3 * PANEL * f + 2 * metric) + 4 * WIDE * out * out


def _trying(shape: Shapes, itemsize: int) -> int:
    """One layout on the held-out tokens: the factors of one linear, and of all as they are stored and run; the last linear,
    which may be cut first; what they give."""
    (d, _), n, w = shape.last, shape.inputs, shape.width
    factors = max((_item(n) * rank * (w + 2 * n) for _, rank in shape.ranks), default=0)
    stored = itemsize * sum(rank * (w + n) for _, rank in shape.ranks)
    cut = _item(w) * (5 * d * d + d * w) * (shape.last_rank > 0)
    return factors + max(stored, shape.edits) + max(cut, 4 * HELD_TOKENS * (w + 3 * d)) + 4 * d * w


def _building_together(shape: Shapes, compared: bool) -> list[Moment]:
    """Linears that share an input. Where layouts were compared the subspaces are known. Rows are chosen for all together; then
    one after another is stored."""
    moments, item, n = list[Moment](), _item(shape.inputs), shape.inputs
    if shape.ranks:
        waits = sum(item * rank * (rows + n) for (rows, _), rank in shape.ranks)
        storing = [item * rank * (rows + n) + _refitting((rows, n), rank) for (rows, _), rank in shape.ranks]
        finding = [_finding((shape.last[1], n), rank, shape.weighs) for _, rank in shape.ranks]
        moments += [(sum(_choosing(*each) for each in shape.ranks), waits), (shape.edits + max(storing), waits)]
        moments += [(max(finding), waits + item * n * n)] * (not compared)
    return moments


def _building_apart(shape: Shapes) -> list[Moment]:
    """The same where each subspace is stored before the next one is found."""
    n, moments = shape.inputs, list[Moment]()
    for each, rank in shape.ranks:
        making = max(_choosing(each, rank), _refitting(each, rank))
        moments += [(shape.edits + _finding(each, rank), _item(n) * n * n)]
        moments += [(shape.edits + _item(n) * rank * sum(each) + making, 0)]
    return moments


def _building_last(shape: Shapes) -> list[Moment]:
    """The last linear: its Gram with the factor, what it becomes and what it was, and what both give of held-out tokens; where
    it is cut to a rank, that, and what is fitted again; and its error, once the Gram is gone."""
    d, w, rank = shape.last[0], shape.width, shape.last_rank
    gram, map_, was = _item(w) * w * w, _item(w) * w * d, (shape.item + 2 * RUN * shape.gained) * w * d
    given = _item(w) * (4 * HELD_TOKENS * d + PANEL * (HELD_TOKENS + 2 * d))
    work = [(gram + map_ + was + given, 0), (gram + map_ + shape.last_edit, 0)]
    if rank:
        work += [(map_ + max(_finding((d, w), rank), shape.last_edit + _refitting((d, w), rank)), gram)]
        work += [(gram + map_ + shape.last_edit + _item(w) * rank * (2 * w + PANEL), 0)]
    work += [(shape.last_edit + RUN * w * d + 4 * HELD_TOKENS * (w + 4 * d), 0)]
    return [(shape.edits + each, waits) for each, waits in work]


def _choosing(shape: tuple[int, int], rank: int) -> int:
    """A basis in which rows are chosen; of the pool that a round chooses from, the rows, their Gram and its factor."""
    rows, columns = shape
    pool = min(rows, max(POOL * PIVOTS, rank + POOL))
    return _item(columns) * (rank * rows + pool * (rank + 2 * pool) + 2 * PANEL * rank)


def _finding(shape: tuple[int, int], rank: int, weighed: bool = False) -> int:
    """A subspace: of the smaller side the squares, LAPACK's copies, and of columns the root; the map in blocks; basis and map.
    Either may have to go to float64. Where rows are `weighed`, the map as it counts."""
    (rows, columns), small = shape, min(shape)
    if rows <= columns:
        solving = WIDE * (5 * small * small + rank * rows)
        mapping = (WIDE + _item(columns)) * rank * (rows + columns) + 2 * WIDE * PANEL * (rows + columns)
        return max(solving, mapping) + weighed * WIDE * small * columns
    blocks = 2 * WIDE * BLOCK * columns + weighed * WIDE * small * columns
    return WIDE * (6 * small * small + rank * columns) + blocks + _item(columns) * rank * rows


def _refitting(shape: tuple[int, int], rank: int) -> int:
    """What is fitted to stored rows again: their own Gram and its roots; the map in blocks; the rest."""
    rows, columns = shape
    return WIDE * 4 * rank * rank + _item(columns) * (rank * (2 * columns + 3 * BLOCK + 2 * rows) + BLOCK * columns)


def _decompositions(shape: Shapes) -> tuple[int, ...]:
    sizes = [min(each) for each, _ in shape.ranks] + [min(shape.last[0], shape.width)] * (shape.last_rank > 0)
    return tuple(int(SINGLE * size) if size > LARGE else size for size in sizes)


def _flops(shape: Shapes) -> int:
    """Of each rank the squares of the map, products of the size of the smaller side, bases and what is fitted again. Of the
    last linear's Gram factor and solve; where channels go, also factor and inverse of the one before, and what each channel
    takes from that."""
    (d, f), w = shape.last, shape.width
    cuts = [*shape.ranks, *([((d, w), shape.last_rank)] if shape.last_rank else [])]
    cut = sum(_cut_flops(each, rank) for each, rank in cuts)
    return cut + w**3 // 3 + 2 * d * w * w + (f**3 + f * (f + 2 * d) * (f - w) if shape.prunes else 0)


def _cut_flops(shape: tuple[int, int], rank: int) -> int:
    """Of a linear cut to a rank."""
    large, small = max(shape), min(shape)
    found = 2 * small**2 * (large // 2 + 2 * small + 3 * rank)
    return found + 4 * shape[0] * shape[1] * rank + 2 * shape[0] * rank**2
