"""Solves with a Gram, damped as far as it needs, and the map that is best for a linear on the inputs it will really get.

Shape suffixes: T tokens, O out, I in.
"""

from __future__ import annotations

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.lowrank import solver_threads
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution

DAMPING = 1e-3
"""Share of the mean diagonal that is added to a Gram before it is inverted."""

MOST_DAMPING = 1e-1
"""Where `DAMPING` is not enough, it grows tenfold up to this. A Gram that is still indefinite then is no sum of squares."""

RIDGES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""Damping for a root: the first with which the root exists. A Gram of fewer tokens than inputs, summed from float32 products,
has eigenvalues slightly below zero, by their rounding."""

MARGIN = 100.0
"""A root counts as existing where it exists with this many times less damping: with barely enough it amplifies rounding."""

LARGE = 1024
"""Problems of more columns are solved in float32: in half the time and memory, on most GPUs in a hundredth of the time."""

LEAF = 512
"""Columns of a triangle that are solved or inverted in one piece."""

LEFT = 1e-5
"""Smallest share of an input's power, beside what the inputs before it explain, that a float32 factor has right to 1 %."""


def working(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the dtype to solve in: float64, or float32 where one of them has more than `LARGE` columns."""
    large = max(tensor.shape[-1] for tensor in tensors) > LARGE
    return [tensor.to(torch.float32 if large else torch.float64) for tensor in tensors]


def damped(gram_II: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """A copy of a Gram with damping * mean(diag) added to its diagonal: the one damping rule of the package.

    A dead input (diagonal 0) gets no more than the others: in a Gram of small numbers a 1 there would outweigh every live one.
    """
    copy_II = gram_II.clone()
    copy_II.diagonal().add_(damping * level(gram_II))
    return copy_II


def level(gram_II: torch.Tensor) -> float:
    """Mean of the diagonal, of which damping is a share. 1 where it is 0, as every input is dead, or negative by rounding."""
    mean = float(gram_II.diagonal().mean())
    return 1.0 if mean <= 0 else mean


def cholesky(gram_II: torch.Tensor, damping: float = DAMPING) -> Solution[torch.Tensor]:
    """Lower factor of the damped Gram. A note says where it needed more damping than asked for.

    Raises NumericalError where even MOST_DAMPING leaves it indefinite.
    """
    return _enough(gram_II, damping)[0]


def _enough(gram_II: torch.Tensor, damping: float) -> tuple[Solution[torch.Tensor], float]:
    """The factor of `cholesky`, and the damping that it took."""
    factor_II, used = _grow(gram_II, damping)
    if factor_II is None:
        raise NumericalError(
            f"a Gram of size {len(gram_II)} is not positive definite after damping of {used:g}; wanted finite statistics "
            "of the inputs. Take more calibration text, or dtype float32."
        )
    return Solution(factor_II, notes=_damping_notes(gram_II, used, damping)), used


def root(gram_II: torch.Tensor) -> Solution[torch.Tensor]:
    """L of L L' = S, lower, with no more damping than it needs. Raises NumericalError as `cholesky` does."""
    if (found := root_if_any(gram_II)) is not None:
        return found
    factor = cholesky(gram_II.double(), RIDGES[-1])
    return Solution(factor.value.to(gram_II.dtype), notes=factor.notes)


def root_if_any(gram_II: torch.Tensor) -> Solution[torch.Tensor] | None:
    """`root`, or None where even MOST_DAMPING leaves S indefinite.

    Singular Grams are common here, so there is a note only where it took more than the damping of a solve.
    """
    wide_II = gram_II.double()
    ridge = next((ridge for ridge in RIDGES if _factor(wide_II, ridge / MARGIN) is not None), RIDGES[-1])
    factor_II, used = _grow(wide_II, ridge)
    if factor_II is None:
        return None
    return Solution(factor_II.to(gram_II.dtype), notes=_damping_notes(gram_II, used, DAMPING))


def _grow(gram_II: torch.Tensor, damping: float) -> tuple[torch.Tensor | None, float]:
    """The factor with the first damping that is enough, from this one on tenfold, and that damping; None where none is up to
    MOST_DAMPING."""
    while (factor_II := _factor(gram_II, damping)) is None and damping < MOST_DAMPING:
        damping = min(max(10 * damping, RIDGES[0]), MOST_DAMPING)
    return factor_II, damping


def _damping_notes(gram_II: torch.Tensor, used: float, asked: float) -> tuple[str, ...]:
    if used <= asked:
        return ()
    return (f"damping {used:g} where {asked:g} was not enough for a Gram of size {len(gram_II)}",)


def _factor(gram_II: torch.Tensor, damping: float) -> torch.Tensor | None:
    """The factor with exactly this damping; None where there is none. A float32 Gram is factored in float64 where in float32 it
    is indefinite, or what an input adds to those before it is mostly rounding."""
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
    """b S^-1 for S = L L'. Solved in blocks, so that nearly all the work is matrix products."""
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
    """L^-1 b, for a factor that is lower or, with `upper`, upper."""
    with solver_threads(factor_II.device):
        x_IO: torch.Tensor = torch.linalg.solve_triangular(factor_II, b_IO, upper=upper)
    return x_IO


def triangular_inverse(factor_II: torch.Tensor) -> torch.Tensor:
    """L^-1, which is lower too."""
    made_II = torch.zeros_like(factor_II)
    _invert(factor_II, made_II)
    return made_II


def _invert(factor_II: torch.Tensor, made_II: torch.Tensor) -> None:
    """In halves, so that nearly all the work is matrix products."""
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
) -> Solution[torch.Tensor]:
    """What W must become to give t instead of W x: (C + lambda W)(S + lambda)^-1, with C = sum t x'.

    The full-rank minimiser of sum |t - W' x|^2, with a ridge that pulls towards W: where the tokens say nothing, W stays.
    """
    factor, used = _enough(gram_II, damping)
    moved_OI = solve_right(factor.value, torch.add(cross_OI, w_OI, alpha=used * level(gram_II)))
    return Solution(moved_OI, notes=factor.notes)


def best_step(w_OI: torch.Tensor, delta_OI: torch.Tensor, x_TI: torch.Tensor, target_TO: torch.Tensor) -> float:
    """The b in [0, 1] for which W + b Delta is nearest to the target on held-out tokens.

    The error is a parabola in b, so its minimum is known without a grid.
    """
    x_TI = x_TI.to(delta_OI.dtype)
    moved_TO = product(x_TI, delta_OI.T)
    missing_TO = target_TO.to(delta_OI.dtype) - product(x_TI, w_OI.T)
    # Sums of rows first: the bits of one sum over everything depend on the number of threads.
    power, gain = (float((rows_TO * moved_TO).sum(dim=1).sum()) for rows_TO in (moved_TO, missing_TO))
    return min(1.0, max(0.0, gain / power)) if power > 0 else 0.0
