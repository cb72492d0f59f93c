"""The rank-R map nearest to a linear on the inputs that it really gets, and its storage with an identity block.

`min |(T - W') S^1/2|_F`, S the Gram of the inputs. With G = T S T' = U e U' the answer is W' = U_R (U_R' T): no inverse is
needed, and the eigenvalues that are left out are its error. Where T has more rows than columns the same subspace is found on
the side of the columns, in an eigen-problem of their number.

Shape suffixes: O out, I in, R rank, N rows that are fitted again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.anchor import MOST_DAMPING, level, root, root_if_any, solve_right
from streamlap.linalg.lowrank import eigh, orthonormal
from streamlap.linalg.moments import squares
from streamlap.linalg.notes import note
from streamlap.linalg.products import product
from streamlap.linalg.storage import as_stored, balanced

DROWNED = {torch.float32: 2e-6, torch.float64: 2e-12}
"""Share of the largest eigenvalue below which a dtype no longer tells one from another."""

PULL = 1e-6
"""Weight of the directions of which the Gram says nothing, as a share of the mean: there a refit follows T itself."""


@dataclass(frozen=True)
class Subspace:
    """W' = basis_OR @ map_RI, of every rank at once: the first R columns and rows are the answer for rank R."""

    basis_OR: torch.Tensor
    """Orthonormal columns, on the rows that it was found for."""
    map_RI: torch.Tensor
    energies: torch.Tensor
    """All min(O, I) energies, descending; sum beyond R is the squared error of rank R, in units of the Gram."""

    def error(self, rank: int) -> float:
        """Relative error of a rank: the share of the energy that it leaves out."""
        return tail(self.energies, rank)


def tail(energies: torch.Tensor, rank: int) -> float:
    total = float(energies.sum())
    return float(energies[rank:].sum()) / total if total > 0 else 0.0


def subspace(
    t_OI: torch.Tensor, gram_II: torch.Tensor, rank: int, root_II: torch.Tensor | None = None,
    serves: torch.Tensor | None = None,
) -> Subspace:  # fmt: skip
    """The best rank-R subspace of the map T on inputs with Gram S. One eigen-decomposition of size min(O, I).

    In the dtype of its arguments; where the last energy that counts would drown in the rounding of float32, in float64.
    Args: gram_II positive semi-definite; 1 <= rank <= min(O, I); root_II that of the Gram where it is known; serves, the
    rows of T that it is to be best for, all if None. The energies are theirs; any other row is the best that the map allows.
    METHODS: full-covariance low rank, as in SVD-LLM (Wang et al. 2024, arXiv 2403.07378) without its whitening inverse.
    """
    t_NI = t_OI if serves is None else t_OI[serves]
    by_rows = t_NI.shape[0] <= t_NI.shape[1]
    found = _of_rows(t_NI, gram_II, rank) if by_rows else _of_columns(t_NI, gram_II, rank, root_II, t_OI)
    if t_OI.dtype == torch.float32 and not _is_clear(found.energies, rank):
        del found
        exact = subspace(t_OI.double(), gram_II.double(), rank, serves=serves)
        return Subspace(exact.basis_OR.float(), exact.map_RI.float(), exact.energies.float())
    if len(found.basis_OR) == len(t_OI):
        return found
    return Subspace(refit(t_OI, found.map_RI, gram_II), found.map_RI, found.energies)


def _of_rows(t_NI: torch.Tensor, gram_II: torch.Tensor, rank: int) -> Subspace:
    energies, vectors = _spectrum(product(product(t_NI, gram_II), t_NI.T))
    basis_NR = vectors[:, -rank:].flip(1)
    return Subspace(basis_NR, product(basis_NR.T, t_NI), energies.flip(0).clamp_min(0.0))


def _of_columns(
    t_NI: torch.Tensor, gram_II: torch.Tensor, rank: int, root_II: torch.Tensor | None, t_OI: torch.Tensor
) -> Subspace:
    """The squares of T come first: after that everything but two products has the size of the Gram."""
    root_II = root(gram_II) if root_II is None else root_II
    square_II = squares(t_NI)
    energies, vectors = _spectrum(product(product(root_II.T, square_II), root_II))
    energies = energies.flip(0).clamp_min(0.0)
    into_IR = product(root_II, vectors[:, -rank:].flip(1))
    if _is_clear(energies, rank):
        into_IR *= energies[:rank].rsqrt()
        return Subspace(product(t_OI, into_IR), product(into_IR.T, square_II), energies)
    basis_NR = orthonormal(product(t_NI, into_IR))
    return Subspace(basis_NR, product(basis_NR.T, t_NI), energies)


def _is_clear(energies: torch.Tensor, rank: int) -> bool:
    """Whether the last energy that counts is more than the rounding of the largest, so that one may divide by it."""
    return float(energies[rank - 1]) > DROWNED[energies.dtype] * float(energies[0])


def _spectrum(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not bool(torch.isfinite(gram.sum())):
        raise NumericalError(
            f"a Gram of size {len(gram)} has entries that are NaN or infinite; wanted finite statistics of the inputs. "
            "Try dtype float32 in the recipe."
        )
    return eigh(symmetric(gram))


def symmetric(gram: torch.Tensor) -> torch.Tensor:
    """The symmetric part: rounding may leave a product slightly askew."""
    return (gram + gram.mT).div_(2)


def two_factors(
    found: Subspace, gram_II: torch.Tensor, t_OI: torch.Tensor, dtype: torch.dtype, what: str = "a low-rank map"
) -> tuple[torch.Tensor, torch.Tensor]:
    """up_OR and down_RI in `dtype`, their scale shared; after `down` is rounded, `up` is fitted again to what it became.

    Raises NumericalError, naming `what`, where there are no such factors in `dtype`.
    """
    norm_R = found.map_RI.norm(dim=1)
    scale_R = norm_R.clamp_min(float(norm_R.max()) * 1e-12).clamp_min(torch.finfo(norm_R.dtype).tiny).rsqrt()
    down_RI = as_stored(found.map_RI * scale_R[:, None], dtype, what)
    return balanced(refit(t_OI, down_RI, gram_II), down_RI, dtype, what)


def refit(t_NI: torch.Tensor, base_RI: torch.Tensor, gram_II: torch.Tensor) -> torch.Tensor:
    """The C [N, R] for which C base is nearest to T in the metric of S: T S base' (base S base')^-1.

    Raises NumericalError where S is so far from a sum of squares that no pull towards T itself makes up for it.
    """
    base_RI, pull = base_RI.to(gram_II.dtype), PULL
    while (found := _metric(base_RI, gram_II, pull)) is None:
        if pull >= MOST_DAMPING:
            raise NumericalError(
                f"a Gram of size {len(gram_II)} is not positive definite on {len(base_RI)} rows; wanted finite statistics of "
                "the inputs. Take more calibration text, or dtype float32."
            )
        pull *= 10  # what float32 sums of few tokens, or of equal ones, have below zero
    half_IR, gram_RR, scale_R, factor_RR = found
    if pull > PULL:
        note(f"pull {pull:.0e} where {PULL:.0e} was not enough for a Gram of size {len(gram_II)}")
    wanted_NR = product(t_NI.to(half_IR.dtype), half_IR)
    fitted_NR = solve_right(factor_RR, wanted_NR * scale_R) * scale_R
    if fitted_NR.dtype == torch.float64:
        # The ridge pulled this towards 0; solving again for what it left out takes that back, where it is not all rounding.
        fitted_NR += solve_right(factor_RR, (wanted_NR - product(fitted_NR, gram_RR)) * scale_R) * scale_R
    return fitted_NR


def _metric(
    base_RI: torch.Tensor, gram_II: torch.Tensor, pull: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """S base', base S base', the scale of its rows and the root of what is scaled by it; None where that is indefinite."""
    half_IR = product(gram_II, base_RI.T).add_(base_RI.T, alpha=pull * level(gram_II))
    # Rows of a low-rank map are far from orthogonal: their own Gram has to be float64.
    gram_RR = symmetric(product(base_RI.double(), half_IR.double()))
    # A ridge should weigh as much for a small row as for a large one.
    scale_R = gram_RR.diagonal().clamp_min(torch.finfo(half_IR.dtype).tiny).rsqrt()
    factor_RR = root_if_any(gram_RR * scale_R * scale_R[:, None])
    return None if factor_RR is None else (half_IR, gram_RR, scale_R.to(half_IR.dtype), factor_RR.to(half_IR.dtype))
