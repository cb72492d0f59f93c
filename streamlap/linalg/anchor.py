"""What a linear should become before anything is cut from it: the map that is best on the inputs which it will really get.

Shape suffixes: T tokens, O out, I in.
"""

from __future__ import annotations

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.lowrank import solver_threads
from streamlap.linalg.notes import note
from streamlap.linalg.products import product

DAMPING = 1e-3
"""Share of the mean diagonal that is added to a Gram before it is inverted."""

MOST_DAMPING = 1e-1
"""Where that is not enough it grows tenfold up to this. A Gram that is indefinite then is no sum of squares."""

RIDGES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""The same where only a root is wanted: the first with which it exists. A Gram of fewer tokens than inputs, summed from float32
products, has eigenvalues as far below zero as those round."""

MARGIN = 100.0
"""A root exists where it does with so much less damping: just above the point where it fails it would amplify rounding."""

LARGE = 1024
"""Problems of more columns are solved in float32: in half the time and half the memory, on most GPUs in a hundredth."""

LEAF = 512
"""Columns of a triangle that are solved or inverted in one piece."""

LEFT = 1e-5
"""Share of an input's power, beside the inputs before it, that a factor in float32 still knows to a hundredth."""


def working(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same in the dtype to solve in: float64, or float32 where one of them has many columns."""
    large = max(tensor.shape[-1] for tensor in tensors) > LARGE
    return [tensor.to(torch.float32 if large else torch.float64) for tensor in tensors]


def damped(gram_II: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """A copy of a Gram with damping * mean(diag) added to its diagonal: the one damping rule of the package.

    A dead input (0) gets no more than the others: in a Gram of small numbers a 1 would outweigh all that is alive.
    """
    copy_II = gram_II.clone()
    copy_II.diagonal().add_(damping * level(gram_II))
    return copy_II


def level(gram_II: torch.Tensor) -> float:
    """Mean of the diagonal, what a share of damping is a share of; 1 where every input is dead, or less than that: power that
    is negative is the rounding of none."""
    mean = float(gram_II.diagonal().mean())
    return 1.0 if mean <= 0 else mean


def cholesky(gram_II: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Lower factor of the damped Gram, with more damping than asked for where it needs that, and a note then.

    Raises NumericalError where even MOST_DAMPING leaves it indefinite.
    """
    return enough(gram_II, damping)[0]


def enough(gram_II: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The factor of `cholesky`, and the damping that it took."""
    factor_II, used = _grow(gram_II, damping)
    if factor_II is None:
        raise NumericalError(
            f"a Gram of size {len(gram_II)} is not positive definite after damping of {used:g}; wanted finite statistics "
            "of the inputs. Take more calibration text, or dtype float32."
        )
    if used > damping:
        _note_damping(gram_II, used, damping)
    return factor_II, used


def root(gram_II: torch.Tensor) -> torch.Tensor:
    """L of L L' = S, lower, with no more damping than it needs. Raises NumericalError as `cholesky` does."""
    found_II = root_if_any(gram_II)
    return cholesky(gram_II.double(), RIDGES[-1]).to(gram_II.dtype) if found_II is None else found_II


def root_if_any(gram_II: torch.Tensor) -> torch.Tensor | None:
    """The same, or None where even MOST_DAMPING leaves S indefinite.

    Singular Grams are common here, so that only more than the damping of a solve is worth a note.
    """
    wide_II = gram_II.double()
    ridge = next((ridge for ridge in RIDGES if _factor(wide_II, ridge / MARGIN) is not None), RIDGES[-1])
    factor_II, used = _grow(wide_II, ridge)
    if factor_II is not None and used > DAMPING:
        _note_damping(gram_II, used, DAMPING)
    return None if factor_II is None else factor_II.to(gram_II.dtype)


def _grow(gram_II: torch.Tensor, damping: float) -> tuple[torch.Tensor | None, float]:
    """The factor with the first damping that does, from this one on tenfold; None where none does up to MOST_DAMPING."""
    while (factor_II := _factor(gram_II, damping)) is None and damping < MOST_DAMPING:
        damping = min(max(10 * damping, RIDGES[0]), MOST_DAMPING)
    return factor_II, damping


def _note_damping(gram_II: torch.Tensor, used: float, asked: float) -> None:
    note(f"damping {used:g} where {asked:g} was not enough for a Gram of size {len(gram_II)}")


def _factor(gram_II: torch.Tensor, damping: float) -> torch.Tensor | None:
    """In float32 only where that is exact enough: what is left of an input beside those before it must not be rounding."""
    damped_II = damped(gram_II, damping)
    with solver_threads(gram_II.device):
        factor_II, info = torch.linalg.cholesky_ex(damped_II)
    if gram_II.dtype == torch.float32 and (
        int(info) != 0 or bool((factor_II.diagonal().square() < LEFT * damped_II.diagonal()).any())
    ):
        del damped_II, factor_II
        factor_II = _factor(gram_II.double(), damping)
        return None if factor_II is None else factor_II.float()
    return factor_II if int(info) == 0 and bool(torch.isfinite(factor_II.diagonal()).all()) else None


def solve_right(factor_II: torch.Tensor, b_OI: torch.Tensor) -> torch.Tensor:
    """b S^-1 for S = L L'. Block after block, so that nearly all of it is products."""
    x_IO = b_OI.T.clone(memory_format=torch.contiguous_format)
    blocks = [slice(first, first + LEAF) for first in range(0, len(factor_II), LEAF)]
    for block in blocks:
        x_IO[block] -= product(factor_II[block, : block.start], x_IO[: block.start])
        x_IO[block] = solve_triangular(factor_II[block, block], x_IO[block], upper=False)
    for block in reversed(blocks):
        x_IO[block] -= product(factor_II[block.stop :, block].T, x_IO[block.stop :])
        x_IO[block] = solve_triangular(factor_II[block, block].T, x_IO[block], upper=True)
    return x_IO.T


def solve_triangular(factor_II: torch.Tensor, b_IO: torch.Tensor, upper: bool) -> torch.Tensor:
    """L^-1 b."""
    with solver_threads(factor_II.device):
        x_IO: torch.Tensor = torch.linalg.solve_triangular(factor_II, b_IO, upper=upper)
    return x_IO


def triangular_inverse(factor_II: torch.Tensor) -> torch.Tensor:
    """L^-1, lower too."""
    made_II = torch.zeros_like(factor_II)
    _invert(factor_II, made_II)
    return made_II


def _invert(factor_II: torch.Tensor, made_II: torch.Tensor) -> None:
    """By halves, so that nearly all of it is products."""
    size = len(factor_II)
    if size <= LEAF:
        made_II[:] = solve_triangular(factor_II, torch.eye(size).to(factor_II), upper=False)
        return
    done, rest = slice(size // 2), slice(size // 2, None)
    _invert(factor_II[done, done], made_II[done, done])
    _invert(factor_II[rest, rest], made_II[rest, rest])
    across = product(factor_II[rest, done], made_II[done, done])
    made_II[rest, done] = product(made_II[rest, rest], across).neg_()


def anchored(
    w_OI: torch.Tensor, gram_II: torch.Tensor, cross_OI: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """What W must become to give t instead of W x: (C + lambda W)(S + lambda)^-1, with C = sum t x'.

    The full-rank minimiser of sum |t - W' x|^2, with a ridge that pulls towards W itself: with few tokens it keeps W where they
    say nothing.
    """
    factor_II, used = enough(gram_II, damping)
    return solve_right(factor_II, torch.add(cross_OI, w_OI, alpha=used * level(gram_II)))


def best_step(w_OI: torch.Tensor, delta_OI: torch.Tensor, x_TI: torch.Tensor, target_TO: torch.Tensor) -> float:
    """The b in [0, 1] for which W + b Delta is nearest to the target on held-out tokens.

    0 leaves W as it is, 1 anchors it fully to the dense model; the error is a parabola in b, so no grid is needed.
    """
    x_TI = x_TI.to(delta_OI.dtype)
    moved_TO = product(x_TI, delta_OI.T)
    missing_TO = target_TO.to(delta_OI.dtype) - product(x_TI, w_OI.T)
    # Rows first: what one sum over all comes to depends on the number of threads.
    power, gain = (float((rows_TO * moved_TO).sum(dim=1).sum()) for rows_TO in (moved_TO, missing_TO))
    return min(1.0, max(0.0, gain / power)) if power > 0 else 0.0
