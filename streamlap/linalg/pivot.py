"""A rank-R matrix stored as R of its own rows and a map from these to the others: R (O + I - R) numbers instead of R (O + I).

Identity-block storage (PIFA, Zhao et al. 2025, arXiv 2501.19090): with pivot rows P and the others N, W'_N = C W'_P, so
y_N = C y_P.

Shape suffixes: O out, I in, R rank (pivots), N the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamlap.linalg.anchor import root
from streamlap.linalg.gram import Gram
from streamlap.linalg.lowrank import solver_threads
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.subspace import DROWNED
from streamlap.linalg.triangles import panels, solve_triangular

BLOCK = 64
"""Fewest pivots that several bases choose together before the span of these is projected out."""

BLOCKS = 4
"""Most rounds that this takes: each moves all bases through memory."""

POOL = 4
"""Rows that a round chooses from, for each pivot that it takes."""


def pivot_rows(basis_OR: torch.Tensor, groups: int = 1) -> Solution[torch.Tensor]:
    """R rows, [R] ascending, that span all rows of a basis: those that Gaussian elimination with row pivoting chooses.

    With `groups`, the O rows are so many equal runs (heads), and each gives R / groups of them: an order that stays inside each
    run can be folded into the matrix that reads them. Where a run has too few independent rows for that, as a dead head has,
    some pivots add nothing to the span: the error is their share. Without groups it is 0, of any basis whose columns are
    independent. Raises ValueError where `groups` does not divide R and O.
    """
    rows, rank = basis_OR.shape
    if rank % groups or rows % groups:
        raise ValueError(f"{groups} groups divide neither or one of {rows} rows and {rank} pivots")
    if groups == 1:
        with solver_threads(basis_OR.device):
            pivots = torch.linalg.lu_factor_ex(basis_OR).pivots  # a singular basis has rows to choose from too
        order = _swapped(pivots.tolist(), rows)
        return Solution(torch.tensor(order[:rank], device=basis_OR.device).sort().values)
    return _grouped(basis_OR, groups)


def _swapped(pivots: list[int], rows: int) -> list[int]:
    """The order of rows after LAPACK's exchanges (1-based)."""
    order = list(range(rows))
    for place, other in enumerate(pivots):
        order[place], order[other - 1] = order[other - 1], order[place]
    return order


def shared_pivot_rows(bases: Sequence[torch.Tensor]) -> Solution[torch.Tensor]:
    """R rows, [R] ascending, that serve several bases [O, R] of orthonormal columns at once, as gate and up of one FFN.

    Greedy, in rounds: a row's score is the product, over the bases, of the energy that it has left in each. A round takes rows
    from a pool of the best and projects their span out. (Pivots of the sum of two bases serve neither: they give coefficients
    of hundreds.) The bases are worked in: what they were is gone.
    """
    rows, rank = bases[0].shape
    chosen, notes = list[int](), tuple[str, ...]()
    block = max(BLOCK, -(-rank // BLOCKS))
    while True:
        count = min(block, rank - len(chosen))
        score_O = torch.stack([_energies(basis) for basis in bases]).prod(0)
        score_O[chosen] = -1.0
        pool = score_O.topk(min(POOL * count, rows - len(chosen))).indices
        picked = pool[_spread_rows([basis[pool] for basis in bases], count)[0]]
        chosen += picked.tolist()
        if len(chosen) == rank:
            return Solution(torch.tensor(sorted(chosen), device=bases[0].device), notes=notes)
        notes = joined(notes, *(_project_out(basis, basis[picked]) for basis in bases))


def _energies(basis_OR: torch.Tensor) -> torch.Tensor:
    """[O]: the squared length of each row."""
    return torch.cat([basis_OR[at].square().sum(1) for at in panels(len(basis_OR))])


def _grouped(basis_OR: torch.Tensor, groups: int) -> Solution[torch.Tensor]:
    """Elimination group after group: the span of the rows that one group gives is projected out of those after it."""
    rows, rank = basis_OR.shape
    quota, run = rank // groups, rows // groups
    left, chosen, notes = basis_OR.clone(), [], tuple[str, ...]()
    drowned, idle = DROWNED[basis_OR.dtype] * float(_energies(basis_OR).max()), 0
    for first in range(0, rows, run):
        picked, (added_Q,) = _spread_rows([left[:run]], quota)
        idle += int((added_Q <= drowned).sum())
        chosen.append(picked + first)
        taken_QR, left = left[picked], left[run:]
        notes = joined(notes, _project_out(left, taken_QR))
    return Solution(torch.cat(chosen), error=idle / rank, notes=notes)


def _project_out(basis_OR: torch.Tensor, taken_QR: torch.Tensor) -> tuple[str, ...]:
    """Take from every row of the basis, in place, its part in the span of the rows `taken_QR`; gives notes."""
    factor_QQ = root(Gram.of(product(taken_QR, taken_QR.T)))
    span_QR = solve_triangular(factor_QQ.value, taken_QR, upper=False)
    for at in panels(len(basis_OR)):
        basis_OR[at] -= product(product(basis_OR[at], span_QR.T), span_QR)
    return factor_QQ.notes


def _spread_rows(parts: Sequence[torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` rows, ascending, that are far from each other's span in every part: pivots of Cholesky factors of their Grams.

    And [parts, count], in the order in which they were chosen: the energy that each had left beside those before it.
    """
    grams = [product(part, part.T) for part in parts]
    factors = [gram.new_zeros(len(gram), count) for gram in grams]
    left = torch.stack([gram.diagonal() for gram in grams])
    chosen, added = list[int](), list[torch.Tensor]()
    for step in range(count):
        score_O = left.prod(0)
        score_O[chosen] = -1.0
        best = int(score_O.argmax())
        chosen.append(best)
        added.append(left[:, best].clone())
        for gram, factor, diagonal in zip(grams, factors, left, strict=True):
            column = gram[:, best] - factor[:, :step] @ factor[best, :step]
            factor[:, step] = column / diagonal[best].clamp_min(torch.finfo(diagonal.dtype).tiny).sqrt()
            diagonal.sub_(factor[:, step].square()).clamp_(min=0.0)
    return torch.tensor(sorted(chosen), device=parts[0].device), torch.stack(added, dim=1)


def others(pivots_R: torch.Tensor, rows: int) -> torch.Tensor:
    """The rows that are not pivots, ascending."""
    mask = torch.ones(rows, dtype=torch.bool, device=pivots_R.device)
    mask[pivots_R] = False
    return mask.nonzero()[:, 0]


def output_order(pivots_R: torch.Tensor, rows: int) -> torch.Tensor:
    """[O] int32: y[o] = z[order[o]] for z = (y_P, y_N)."""
    return torch.cat([pivots_R, others(pivots_R, rows)]).argsort().to(torch.int32)


def folded_order(pivots_R: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """[O]: the row of the matrix at each place of a folded module's output: in every group its pivots, then the rest."""
    rest = others(pivots_R, rows)
    return torch.cat([pivots_R.view(groups, -1), rest.view(groups, -1)], dim=1).flatten()
