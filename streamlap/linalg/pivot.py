"""A rank-R matrix stored as R of its own rows and a map from these to the others: R (O + I - R) numbers instead of R (O + I).

Identity-block storage (PIFA, Zhao et al. 2025, arXiv 2501.19090): with pivot rows P and the others N, W'_N = C W'_P, so
y_N = C y_P.

Shape suffixes: O out, I in, R rank (pivots), N the rest.
"""

from __future__ import annotations

import torch


def pivot_rows(basis_OR: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """R rows, [R] ascending, that span all rows of a basis: those that Gaussian elimination with row pivoting chooses.

    With `groups`, R / groups rows out of each of as many equal runs of rows: a permutation that stays inside each run (a head)
    can then be folded into the matrix that reads them. Raises ValueError where groups do not divide R and O.
    """
    rows, rank = basis_OR.shape
    if rank % groups or rows % groups:
        raise ValueError(f"{groups} groups divide neither or one of {rows} rows and {rank} pivots")
    if groups == 1:
        _, pivots = torch.linalg.lu_factor(basis_OR)
        return torch.tensor(_swapped(pivots.tolist(), rows)[:rank], device=basis_OR.device).sort().values
    return _grouped(basis_OR, groups)


def _swapped(pivots: list[int], rows: int) -> list[int]:
    """The order of rows after LAPACK's exchanges (1-based)."""
    order = list(range(rows))
    for place, other in enumerate(pivots):
        order[place], order[other - 1] = order[other - 1], order[place]
    return order


def _grouped(basis_OR: torch.Tensor, groups: int) -> torch.Tensor:
    """Elimination group after group: what the rows already taken span is projected out, and LU pivots on what is left."""
    rows, rank = basis_OR.shape
    quota, run = rank // groups, rows // groups
    left, chosen = basis_OR.clone(), []
    for group in range(groups):
        part = left[group * run : (group + 1) * run]
        picked = _spread_rows(part, quota)
        chosen.append(picked + group * run)
        q_RQ = torch.linalg.qr(part[picked].T).Q
        left = left - (left @ q_RQ) @ q_RQ.T
    return torch.cat(chosen)


def _spread_rows(part_OR: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows far from each other's span: pivots of a Cholesky factorisation of their Gram, ascending."""
    gram = part_OR @ part_OR.T
    diagonal = gram.diagonal().clone()
    factor = gram.new_zeros(len(gram), count)
    chosen: list[int] = []
    for step in range(count):
        best = int(diagonal.argmax())
        chosen.append(best)
        column = gram[:, best] - factor[:, :step] @ factor[best, :step]
        factor[:, step] = column / diagonal[best].clamp_min(1e-300).sqrt()
        diagonal = (diagonal - factor[:, step].square()).clamp_min(0.0)
        diagonal[chosen] = -1.0
    return torch.tensor(sorted(chosen), device=part_OR.device)


def others(pivots_R: torch.Tensor, rows: int) -> torch.Tensor:
    """The rows that are no pivots, ascending."""
    mask = torch.ones(rows, dtype=torch.bool, device=pivots_R.device)
    mask[pivots_R] = False
    return mask.nonzero()[:, 0]


def output_order(pivots_R: torch.Tensor, rows: int) -> torch.Tensor:
    """[O] int32: y[o] = z[order[o]] for z = (y_P, y_N)."""
    return torch.cat([pivots_R, others(pivots_R, rows)]).argsort().to(torch.int32)


def folded_order(pivots_R: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """[O]: the natural row that stands at each place of the output of a folded module: in every group pivots, then the rest."""
    rest = others(pivots_R, rows)
    return torch.cat([pivots_R.view(groups, -1), rest.view(groups, -1)], dim=1).flatten()
