"""The rank-R map W' nearest to a linear T on the inputs that it really gets, and its factors.

It minimises |(T - W') S^1/2|_F, S the Gram of the inputs. With G = T S T' = U e U' the answer is W' = U_R (U_R' T): no inverse
is needed, and the eigenvalues that are left out are its error. Where T has more rows than columns, the same subspace is found
from an eigen-problem of the size of the columns.

Shape suffixes: O out, I in, R rank, N rows that are fitted again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.anchor import root, root_if_any
from streamlap.linalg.gram import MOST_DAMPING, Gram, squares
from streamlap.linalg.lowrank import eigh, orthonormal
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.storage import as_stored, balanced
from streamlap.linalg.triangles import solve_right

DROWNED = {torch.float32: 2e-6, torch.float64: 2e-12}
"""Share of the largest eigenvalue below which a dtype cannot tell an eigenvalue from rounding."""

PULL = 1e-6
"""What a refit adds to the Gram, as a share of its mean diagonal: in directions that no token went, it follows T itself."""


@dataclass(frozen=True)
class Subspace:
    """W' = basis_OR @ map_RI, for several ranks at once: its first R columns and rows are the answer for rank R."""

    basis_OR: torch.Tensor
    """Its columns are orthonormal on the rows that it was found for."""
    map_RI: torch.Tensor
    energies: torch.Tensor
    """All min(O, I) energies, descending. The sum of those beyond R is the squared error of rank R, in units of the Gram."""

    def error(self, rank: int) -> float:
        """Relative error of a rank: the share of the energy that it leaves out."""
        total = float(self.energies.sum())
        return float(self.energies[rank:].sum()) / total if total > 0 else 0.0


def subspace(
    t_OI: torch.Tensor, gram: Gram, rank: int, root_II: torch.Tensor | None = None,
    serves: torch.Tensor | None = None,
) -> Solution[Subspace]:  # fmt: skip
    """The best rank-R subspace of the map T on inputs with Gram S, and the error of rank R.

    Full-covariance low rank, as in SVD-LLM (Wang et al. 2024, arXiv 2403.07378) without its whitening inverse: one
    eigen-decomposition of size min(O, I). It is done in the dtype of the arguments, or in float64 where the energy of rank R
    would drown in the rounding of float32.

    Args: gram positive semi-definite; 1 <= rank <= min(O, I); root_II the root of the Gram where it is known; serves the
    rows of T that the subspace is best for, all where it is None. Energies and error are those of the served rows. Any other
    row is the best combination of map_RI.
    """
    t_NI = t_OI if serves is None else t_OI[serves]
    by_rows = t_NI.shape[0] <= t_NI.shape[1]
    found = _of_rows(t_NI, gram, rank) if by_rows else _of_columns(t_NI, gram, rank, root_II, t_OI)
    value, notes = found.value, found.notes
    if t_OI.dtype == torch.float32 and not _is_clear(value.energies, rank):
        del found, value
        exact = subspace(t_OI.double(), gram, rank, serves=serves)
        wide, notes = exact.value, joined(notes, exact.notes)
        value = Subspace(wide.basis_OR.float(), wide.map_RI.float(), wide.energies.float())
    elif len(value.basis_OR) != len(t_OI):
        fitted = refit(t_OI, value.map_RI, gram)
        value, notes = replace(value, basis_OR=fitted.value), joined(notes, fitted.notes)
    return Solution(value, error=value.error(rank), notes=notes)


def _of_rows(t_NI: torch.Tensor, gram: Gram, rank: int) -> Solution[Subspace]:
    energies, vectors = _spectrum(gram.metric(t_NI))
    basis_NR = vectors[:, -rank:].flip(1)
    return Solution(Subspace(basis_NR, product(basis_NR.T, t_NI), energies.flip(0).clamp_min(0.0)))


def _of_columns(
    t_NI: torch.Tensor, gram: Gram, rank: int, root_II: torch.Tensor | None, t_OI: torch.Tensor
) -> Solution[Subspace]:
    """The squares of T come first: after that everything but two products has the size of the Gram."""
    factor = root(gram.to(t_NI.dtype)) if root_II is None else Solution(root_II)
    root_II, notes = factor.value, factor.notes
    square_II = squares(t_NI)
    energies, vectors = _spectrum(product(product(root_II.T, square_II), root_II))
    energies = energies.flip(0).clamp_min(0.0)
    into_IR = product(root_II, vectors[:, -rank:].flip(1))
    if _is_clear(energies, rank):
        into_IR *= energies[:rank].rsqrt()
        return Solution(Subspace(product(t_OI, into_IR), product(into_IR.T, square_II), energies), notes=notes)
    basis_NR = orthonormal(product(t_NI, into_IR))
    return Solution(Subspace(basis_NR, product(basis_NR.T, t_NI), energies), notes=notes)


def _is_clear(energies: torch.Tensor, rank: int) -> bool:
    """Whether the energy of rank R is more than the rounding of the largest one, so that one may divide by it."""
    return float(energies[rank - 1]) > DROWNED[energies.dtype] * float(energies[0])


def _spectrum(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not bool(torch.isfinite(metric.sum())):
        raise NumericalError(
            f"a Gram of size {len(metric)} has entries that are NaN or infinite; wanted finite statistics of the inputs. "
            "Try dtype float32 in the recipe."
        )
    return eigh(symmetric(metric))


def symmetric(made: torch.Tensor) -> torch.Tensor:
    """The symmetric part: rounding may leave a product slightly asymmetric."""
    return (made + made.mT).div_(2)


def two_factors(
    found: Subspace, gram: Gram, t_OI: torch.Tensor, dtype: torch.dtype, what: str = "a low-rank map"
) -> Solution[tuple[torch.Tensor, torch.Tensor]]:
    """(up_OR, down_RI) in `dtype`, equal in scale; `up` is fitted to `down` as it is after rounding.

    The error is that of the subspace, without the rounding. Raises NumericalError, naming `what`, where `dtype` cannot hold
    them.
    """
    norm_R = found.map_RI.norm(dim=1)
    scale_R = norm_R.clamp_min(float(norm_R.max()) * 1e-12).clamp_min(torch.finfo(norm_R.dtype).tiny).rsqrt()
    down_RI = as_stored(found.map_RI * scale_R[:, None], dtype, what)
    up = refit(t_OI, down_RI, gram)
    pair = balanced(up.value, down_RI, dtype, what)
    return Solution(pair.value, error=found.error(len(down_RI)), notes=joined(up.notes, pair.notes))


def refit(t_NI: torch.Tensor, base_RI: torch.Tensor, gram: Gram) -> Solution[torch.Tensor]:
    """The C [N, R] for which C base is nearest to T in the metric of S: T S base' (base S base')^-1.

    A note says where S took more than `PULL`. Raises NumericalError where S is so far from a sum of squares that even the pull
    of MOST_DAMPING is not enough.
    """
    base_RI, pull = base_RI.to(torch.promote_types(base_RI.dtype, gram.dtype)), PULL
    while (found := _metric(base_RI, gram, pull)) is None:
        if pull >= MOST_DAMPING:
            raise NumericalError(
                f"a Gram of size {len(gram)} is not positive definite on {len(base_RI)} rows; wanted finite statistics of "
                "the inputs. Take more calibration text, or dtype float32."
            )
        pull *= 10  # float32 sums of few tokens, or of equal ones, have eigenvalues so far below zero
    half_IR, gram_RR, scale_R, factor = found
    factor_RR = factor.value.to(half_IR.dtype)
    grown = [f"pull {pull:.0e} where {PULL:.0e} was not enough for a Gram of size {len(gram)}"] if pull > PULL else []
    wanted_NR = product(t_NI.to(half_IR.dtype), half_IR)
    fitted_NR = solve_right(factor_RR, wanted_NR * scale_R) * scale_R
    if fitted_NR.dtype == torch.float64:
        # The ridge pulled this towards 0. A second solve, for what is missing, undoes that; in float32 it would add rounding.
        fitted_NR += solve_right(factor_RR, (wanted_NR - product(fitted_NR, gram_RR)) * scale_R) * scale_R
    return Solution(fitted_NR, notes=joined(factor.notes, grown))


def _metric(
    base_RI: torch.Tensor, gram: Gram, pull: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Solution[torch.Tensor]] | None:
    """S base', G = base S base', the scale that makes the diagonal of G one, and the root of G so scaled; None where G is
    indefinite."""
    half_IR = gram.times(base_RI).add_(base_RI, alpha=pull * gram.level).T
    # Rows of a low-rank map are far from orthogonal: their own Gram has to be float64.
    gram_RR = symmetric(product(base_RI.double(), half_IR.double()))
    # A ridge should weigh as much for a small row as for a large one.
    scale_R = gram_RR.diagonal().clamp_min(torch.finfo(half_IR.dtype).tiny).rsqrt()
    factor = root_if_any(Gram.of(gram_RR * scale_R * scale_R[:, None]))
    return None if factor is None else (half_IR, gram_RR, scale_R.to(half_IR.dtype), factor)
