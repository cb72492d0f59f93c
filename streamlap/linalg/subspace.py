"""The rank-R map W' nearest to a linear T on the inputs that it really gets, and its factors.

It minimises |(T - W') S^1/2|_F, S the Gram of the inputs. With G = T S T' = U e U' the answer is W' = U_R (U_R' T): no inverse
is needed, and the eigenvalues that are left out are its error. Where T has more rows than columns, the same subspace is found
from an eigen-problem of the size of the columns.

Shape suffixes: O out, I in, R rank, N rows that are served or fitted again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.anchor import root, root_if_any
from streamlap.linalg.gram import MOST_DAMPING, Gram, squares
from streamlap.linalg.lowrank import eigh, orthonormal
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.storage import as_stored, balanced
from streamlap.linalg.triangles import panels, solve_right

DROWNED = {torch.float32: 2e-6, torch.float64: 2e-12}
"""Share of the largest eigenvalue below which a dtype cannot tell an eigenvalue from rounding."""

BLOCK = 2048
"""Rows of T that are widened at a time."""

PULL = 1e-6
"""What a refit adds to the Gram, as a share of its mean diagonal: in directions that no token went, it follows T itself."""


@dataclass(frozen=True)
class Subspace:
    """W' = basis_OR @ map_RI, for several ranks at once: its first R columns and rows are the answer for rank R."""

    basis_OR: torch.Tensor
    """Its columns are orthonormal on the rows that it was found for, multiplied by their gain."""
    map_RI: torch.Tensor
    energies: torch.Tensor
    """All min(O, I) energies, descending. The sum of those beyond R is the squared error of rank R, in units of the Gram."""

    def error(self, rank: int) -> float:
        """Relative error of a rank: the share of the energy that it leaves out."""
        total = float(self.energies.sum())
        return float(self.energies[rank:].sum()) / total if total > 0 else 0.0


def subspace(
    t_OI: torch.Tensor, gram: Gram, rank: int, root_II: torch.Tensor | None = None,
    serves: torch.Tensor | None = None, gain_O: torch.Tensor | None = None,
) -> Solution[Subspace]:  # fmt: skip
    """The best rank-R subspace of the map T on inputs with Gram S, and the error of rank R.

    Full-covariance low rank, as in SVD-LLM (Wang et al. 2024, arXiv 2403.07378) without its whitening inverse: one
    eigen-decomposition of size min(O, I). It is done in the dtype of the arguments, the wider one, or in float64 where the
    energy of rank R would drown in the rounding of float32.

    Args: gram positive semi-definite; 1 <= rank <= min(O, I); root_II the root of the Gram where it is known; serves the
    rows of T that the subspace is best for, all where it is None; gain_O, what each row is multiplied by before it counts.
    Energies and error are those of the served rows, multiplied. Any other row is the best combination of map_RI.
    """
    kind = torch.promote_types(t_OI.dtype, gram.dtype)
    found = _find(t_OI, gram, rank, root_II, serves, gain_O, kind)
    if found is None:
        found = _find(t_OI, gram, rank, None, serves, gain_O, torch.float64)
        assert found is not None, "float64 is wide enough"
    value, notes = found.value, found.notes
    value = Subspace(value.basis_OR.to(kind), value.map_RI.to(kind), value.energies.to(kind))
    if len(value.basis_OR) != len(t_OI):
        fitted = refit(t_OI, value.map_RI, gram)
        value, notes = replace(value, basis_OR=fitted.value), joined(notes, fitted.notes)
    return Solution(value, error=value.error(rank), notes=notes)


def _find(
    t_OI: torch.Tensor, gram: Gram, rank: int, root_II: torch.Tensor | None, serves: torch.Tensor | None,
    gain_O: torch.Tensor | None, dtype: torch.dtype,
) -> Solution[Subspace] | None:  # fmt: skip
    """The same in this dtype, and where there are more columns than served rows with these rows alone; None where float32
    is too narrow."""
    if (len(t_OI) if serves is None else len(serves)) > t_OI.shape[1]:
        return _of_columns(t_OI, gram, rank, root_II, serves, gain_O, dtype)
    t_NI = t_OI if serves is None else t_OI[serves]
    if gain_O is not None:
        t_NI = t_NI.to(dtype) * (gain_O if serves is None else gain_O[serves]).to(dtype)[:, None]
    metric_NN = gram.metric(t_NI, dtype)
    with gram.resting():
        energies, vectors = _spectrum(metric_NN)
    del metric_NN
    energies = energies.flip(0).clamp_min(0.0)
    if dtype == torch.float32 and not _is_clear(energies, rank):
        return None
    basis_NR = vectors[:, -rank:].flip(1)
    del vectors
    map_RI = _mapped(basis_NR, t_NI)
    return Solution(Subspace(_without(gain_O, serves, basis_NR), map_RI, energies))


def best_basis(metric_OO: torch.Tensor, rank: int) -> torch.Tensor:
    """[O, R], orthonormal: U of the best U U' T, where T S T' is that metric."""
    return _spectrum(metric_OO)[1][:, -rank:]


def _mapped(basis_NR: torch.Tensor, t_NI: torch.Tensor) -> torch.Tensor:
    """U' T [R, I], in the dtype of U; T is widened in panels."""
    if t_NI.dtype == basis_NR.dtype:
        return product(basis_NR.T, t_NI)
    return torch.cat([product(basis_NR.T, t_NI[:, at].to(basis_NR.dtype)) for at in panels(t_NI.shape[1])], dim=1)


def _of_columns(
    t_OI: torch.Tensor, gram: Gram, rank: int, root_II: torch.Tensor | None, serves: torch.Tensor | None,
    gain_O: torch.Tensor | None, dtype: torch.dtype,
) -> Solution[Subspace] | None:  # fmt: skip
    """T goes through in blocks of rows: all but the basis has the size of the Gram."""
    factor = root(gram.to(dtype)) if root_II is None else Solution(root_II)
    root_II, notes = factor.value, factor.notes
    square_II = functools.reduce(torch.Tensor.add_, map(squares, row_blocks(t_OI, dtype, serves, gain_O)))
    energies, vectors = _spectrum(product(product(root_II.T, square_II), root_II))
    energies = energies.flip(0).clamp_min(0.0)
    into_IR = product(root_II, vectors[:, -rank:].flip(1))
    del root_II, factor, vectors
    if _is_clear(energies, rank):
        into_IR *= energies[:rank].rsqrt()
        basis_OR = into_IR.new_empty(len(t_OI), rank, dtype=gram.dtype)
        for block_OR, t in zip(torch.split(basis_OR, BLOCK), row_blocks(t_OI, dtype), strict=True):
            block_OR.copy_(product(t, into_IR))
        return Solution(Subspace(basis_OR, product(into_IR.T, square_II), energies), notes=notes)
    if dtype == torch.float32:
        return None
    basis_NR = orthonormal(torch.cat([product(t, into_IR) for t in row_blocks(t_OI, dtype, serves, gain_O)]))
    parts = zip(torch.split(basis_NR, BLOCK), row_blocks(t_OI, dtype, serves, gain_O), strict=True)
    map_RI = functools.reduce(torch.Tensor.add_, (product(basis.T, t) for basis, t in parts))
    return Solution(Subspace(_without(gain_O, serves, basis_NR), map_RI, energies), notes=notes)


def _without(gain_O: torch.Tensor | None, serves: torch.Tensor | None, basis_NR: torch.Tensor) -> torch.Tensor:
    """The basis of served rows that were multiplied, for these rows as they are."""
    if gain_O is None:
        return basis_NR
    return basis_NR / (gain_O if serves is None else gain_O[serves]).to(basis_NR.dtype)[:, None]


def row_blocks(
    t_OI: torch.Tensor, dtype: torch.dtype, rows: torch.Tensor | None = None, gain_O: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """The rows of T, or those that are named, in `dtype`, each multiplied by its gain, some at a time."""
    if gain_O is not None:
        gain_N = gain_O if rows is None else gain_O[rows]
        gains = (gain.to(dtype)[:, None] for gain in torch.split(gain_N, BLOCK))
        return (t * gain for t, gain in zip(row_blocks(t_OI, dtype, rows), gains, strict=True))
    if rows is None:
        return (t.to(dtype) for t in torch.split(t_OI, BLOCK))
    return (t_OI[some].to(dtype) for some in torch.split(rows, BLOCK))


def energies_of(t_OI: torch.Tensor, gram: Gram) -> torch.Tensor:
    """[O]: the energy of what each row of T gives, the diagonal of T S T'."""
    return torch.cat([(gram.times(t) * t).sum(dim=1) for t in row_blocks(t_OI, gram.dtype)])


def _is_clear(energies: torch.Tensor, rank: int) -> bool:
    """Whether the energy of rank R is more than the rounding of the largest one, so that one may divide by it."""
    return float(energies[rank - 1]) > DROWNED[energies.dtype] * float(energies[0])


def _spectrum(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not bool(torch.isfinite(metric.sum())):
        raise NumericalError(
            f"a Gram of size {len(metric)} has entries that are NaN or infinite; wanted finite statistics of the inputs. "
            "Try dtype float32 in the recipe."
        )
    return eigh(metric)


def two_factors(
    found: Subspace,
    gram: Gram,
    t_OI: torch.Tensor,
    dtype: torch.dtype,
    what: str = "a low-rank map",
    rows: torch.Tensor | None = None,
) -> Solution[tuple[torch.Tensor, torch.Tensor]]:
    """(up_OR, down_RI) in `dtype`, equal in scale; `up` is fitted to `down` as it is after rounding, for the named rows of T.

    The error is that of the subspace, without the rounding. Raises NumericalError, naming `what`, where `dtype` cannot hold
    them.
    """
    norm_R = found.map_RI.norm(dim=1)
    scale_R = norm_R.clamp_min(float(norm_R.max()) * 1e-12).clamp_min(torch.finfo(norm_R.dtype).tiny).rsqrt()
    down_RI = as_stored(found.map_RI * scale_R[:, None], dtype, what)
    up = refit(t_OI, down_RI, gram, rows)
    pair = balanced(up.value, down_RI, dtype, what)
    return Solution(pair.value, error=found.error(len(down_RI)), notes=joined(up.notes, pair.notes))


def refit(
    t_OI: torch.Tensor, base_RI: torch.Tensor, gram: Gram, rows: torch.Tensor | None = None
) -> Solution[torch.Tensor]:
    """The C [N, R] for which C base is nearest to T, or to the named rows of it, in the metric of S:
    T S base' (base S base')^-1.

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
    fit, notes = found
    grown = [f"pull {pull:.0e} where {PULL:.0e} was not enough for a Gram of size {len(gram)}"] if pull > PULL else []
    count = len(t_OI) if rows is None else len(rows)
    fitted_NR = base_RI.new_empty(count, len(base_RI))
    with gram.resting():
        for block_NR, t in zip(torch.split(fitted_NR, BLOCK), row_blocks(t_OI, base_RI.dtype, rows), strict=True):
            block_NR.copy_(fit(t))
    return Solution(fitted_NR, notes=joined(notes, grown))


def _metric(
    base_RI: torch.Tensor, gram: Gram, pull: float
) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[str, ...]] | None:
    """What fits rows of T, and notes; None where base S base' is indefinite."""
    half_IR = gram.times(base_RI).add_(base_RI, alpha=pull * gram.level).T
    # Rows of a low-rank map are far from orthogonal: their own Gram has to be float64.
    parts = (product(base_RI[:, at].double(), half_IR[at].double()) for at in panels(len(half_IR)))
    with gram.resting():
        return _fit(half_IR, functools.reduce(torch.Tensor.add_, parts))


def _fit(
    half_IR: torch.Tensor, gram_RR: torch.Tensor
) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[str, ...]] | None:
    """The same from S base' and base S base', which may be overwritten."""
    # A ridge should weigh as much for a small row as for a large one.
    scale_R = gram_RR.diagonal().clamp_min(torch.finfo(half_IR.dtype).tiny).rsqrt()
    scaled_RR = gram_RR.clone() if half_IR.dtype == torch.float64 else gram_RR
    scaled_RR.mul_(scale_R).mul_(scale_R[:, None])
    factor = root_if_any(Gram(scaled_RR, scaled_RR.diagonal().clone()))
    if factor is None:
        return None
    scale_R, factor_RR = scale_R.to(half_IR.dtype), factor.value.to(half_IR.dtype)

    def fit(t_NI: torch.Tensor) -> torch.Tensor:
        wanted_NR = product(t_NI, half_IR)
        fitted_NR = solve_right(factor_RR, wanted_NR * scale_R) * scale_R
        if fitted_NR.dtype == torch.float64:
            # The ridge pulled this towards 0. A second solve, for what is missing, undoes that; in float32 it would add
            # rounding.
            fitted_NR += solve_right(factor_RR, (wanted_NR - product(fitted_NR, gram_RR)) * scale_R) * scale_R
        return fitted_NR

    return fit, factor.notes
