"""A Gram S = sum x x' and what is made of it, in one square array.

S is symmetric and all that is made of it is triangular or symmetric, so one array holds both: S above the diagonal, its
diagonal apart, and on and below the diagonal first what rounding took from the sums, then L with L L' = S, then L^-1, then
S^-1. Each takes the place of the one before. Everything goes in panels of columns (see `triangles`), so that beside the
array memory holds a few panels, and the bits do not depend on how much memory there is.

Shape suffixes: T tokens, I in, O out, P columns of a panel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution
from streamlap.linalg.triangles import (
    invert_lower,
    panels,
    put_lower,
    small_factor,
    solve_in_place,
    solve_triangular,
    square_lower,
)

LARGE = 1024
"""Problems of more columns are summed and solved in float32: in half the time and memory, on most GPUs in a hundredth of the
time."""

DAMPING = 1e-3
"""Share of the mean diagonal that is added to a Gram before it is inverted."""

MOST_DAMPING = 1e-1
"""Where `DAMPING` is not enough, it grows tenfold up to this. A Gram that is still indefinite then is no sum of squares."""

LEAST_DAMPING = 1e-12
"""What damping of nothing grows to."""

LEFT = 1e-7
"""Least share of its own power that an input is damped by in float32: less would be lost in its rounding. It matters for inputs
of ten thousand times the mean power and more."""


def solve_dtype(columns: int) -> torch.dtype:
    """The dtype to sum and solve in."""
    return torch.float32 if columns > LARGE else torch.float64


class Gram:
    """S [I, I]. `square_II` has it above the diagonal; below is room."""

    def __init__(self, square_II: torch.Tensor, diagonal_I: torch.Tensor) -> None:
        self._square_II, self.diagonal_I = square_II, diagonal_I

    @classmethod
    def of(cls, matrix_II: torch.Tensor) -> Gram:
        """Of a whole symmetric matrix, in a copy."""
        return cls(matrix_II.clone(), matrix_II.diagonal().clone())

    def __len__(self) -> int:
        return len(self.diagonal_I)

    @property
    def dtype(self) -> torch.dtype:
        return self._square_II.dtype

    @property
    def level(self) -> float:
        """Mean of the diagonal, of which damping is a share. 1 where it is 0, with all inputs dead, or negative by rounding."""
        mean = float(self.diagonal_I.mean())
        return 1.0 if mean <= 0 else mean

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """S as a matrix of its own."""
        whole_II = torch.empty_like(self._square_II, dtype=dtype or self.dtype)
        for at in panels(len(self)):
            whole_II[at] = self.rows(at)
        return whole_II

    def rows(self, at: slice) -> torch.Tensor:
        """Rows of a panel [P, I]."""
        return torch.cat([self._square_II[: at.start, at].T, self._corner(at), self._square_II[at, at.stop :]], dim=1)

    def to(self, dtype: torch.dtype) -> Gram:
        """The same in `dtype`: itself where it is in that already."""
        return self if dtype == self.dtype else self.copy(dtype)

    def copy(self, dtype: torch.dtype) -> Gram:
        """With room below S of its own."""
        return Gram(self.dense(dtype), self.diagonal_I.to(dtype))

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """While the block lasts S waits in RAM, so that what has nothing to do with it has all memory of its device."""
        device, self._square_II = self._square_II.device, self._square_II.cpu()
        try:
            yield
        finally:
            self._square_II = self._square_II.to(device)

    def times(self, t_OI: torch.Tensor) -> torch.Tensor:
        """T S [O, I], in the dtype of T."""
        return torch.cat([self._times(t_OI, at, t_OI.dtype) for at in panels(len(self))], dim=1)

    def metric(self, t_OI: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """T S T' [O, O], in `dtype`, or that of T. T is widened in panels."""
        dtype = dtype or t_OI.dtype
        made = (product(self._times(t_OI, at, dtype), t_OI[:, at].to(dtype).T) for at in panels(len(self)))
        return functools.reduce(torch.Tensor.add_, made)

    def _times(self, t_OI: torch.Tensor, at: slice, dtype: torch.dtype) -> torch.Tensor:
        rows_PI = self.rows(at).to(dtype)
        if t_OI.dtype == dtype:
            return product(t_OI, rows_PI.T)
        parts = (product(t_OI[:, part].to(dtype), rows_PI[:, part].T) for part in panels(len(self)))
        return functools.reduce(torch.Tensor.add_, parts)

    def _corner(self, at: slice) -> torch.Tensor:
        upper_PP = self._square_II[at, at].triu(1)
        return upper_PP + upper_PP.T + torch.diag(self.diagonal_I[at])

    def ridge(self, damping: float) -> torch.Tensor:
        """[I]: what is added to the diagonal: damping * mean(diag), the one damping rule of the package.

        A dead input (diagonal 0) gets no more than the others: in a Gram of small numbers a 1 there would outweigh every live
        one. In float32 an input of huge power gets `LEFT` of it, where that is more: less would drown in its rounding.
        """
        ridge_I = torch.full_like(self.diagonal_I, damping * self.level)
        return ridge_I if self.dtype == torch.float64 else torch.maximum(ridge_I, LEFT * self.diagonal_I)

    def cholesky(self, damping: float = DAMPING) -> Solution[Factor]:
        """L of L L' = S + ridge, in the lower half. A note says where it needed more damping than asked for.

        Raises NumericalError where even MOST_DAMPING leaves it indefinite.
        """
        used = damping
        while (factor := self.factor(used)) is None:
            if used >= MOST_DAMPING:
                raise NumericalError(
                    f"a Gram of size {len(self)} is not positive definite after damping of {used:g}; wanted finite statistics "
                    "of the inputs. Take more calibration text, or dtype float32."
                )
            used = min(max(10 * used, LEAST_DAMPING), MOST_DAMPING)
        return Solution(factor, notes=damping_notes(len(self), used, damping))

    def factor(self, damping: float) -> Factor | None:
        """The same with exactly this damping; None where there is none. Left-looking, panel by panel."""
        square_II, ridge_I = self._square_II, self.ridge(damping)
        for at in panels(len(self)):
            done = slice(0, at.start)
            left_PI = square_II[at, done].contiguous()
            corner_PP = self._corner(at) - product(left_PI, left_PI.T)
            corner_PP.diagonal().add_(ridge_I[at])
            factor_PP = small_factor(corner_PP)
            if factor_PP is None:
                return None
            put_lower(square_II, at, factor_PP)
            for below in panels(len(self)):
                if below.start > at.start:
                    rest = square_II[at, below].T - product(square_II[below, done], left_PI.T)
                    square_II[below, at] = solve_triangular(factor_PP, rest.T, upper=False).T
        return Factor(square_II, ridge_I)


def damping_notes(size: int, used: float, asked: float) -> tuple[str, ...]:
    if used <= asked:
        return ()
    return (f"damping {used:g} where {asked:g} was not enough for a Gram of size {size}",)


class Factor:
    """L [I, I], the lower half of a square array."""

    def __init__(self, square_II: torch.Tensor, ridge_I: torch.Tensor) -> None:
        self._square_II, self.ridge_I = square_II, ridge_I

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """L as a matrix of its own."""
        return self._square_II.tril().to(dtype)

    def solve(self, b_IO: torch.Tensor) -> torch.Tensor:
        """S^-1 b, in the place of b."""
        return solve_in_place(self._square_II, b_IO)

    def inverse(self) -> Inverse:
        """S^-1, in the place of L."""
        invert_lower(self._square_II)
        square_lower(self._square_II)
        return Inverse(self._square_II)


class Inverse:
    """M = S^-1 [I, I], symmetric, on and below the diagonal of a square array."""

    def __init__(self, square_II: torch.Tensor) -> None:
        self._square_II = square_II

    @property
    def diagonal_I(self) -> torch.Tensor:  # noqa: N802
        return self._square_II.diagonal()

    def rows(self, at_Q: torch.Tensor) -> torch.Tensor:
        """[Q, I]."""
        rows_QI = self._square_II[at_Q]
        for at in panels(rows_QI.shape[1]):
            beyond_QP = torch.arange(at.start, at.stop, device=at_Q.device) > at_Q[:, None]
            torch.where(beyond_QP, self._square_II[at, at_Q].T, rows_QI[:, at], out=rows_QI[:, at])
        return rows_QI

    def subtract(self, half_QI: torch.Tensor) -> None:
        """M -= H' H."""
        for at in panels(len(self._square_II)):
            left_QP = half_QI[:, at].contiguous()
            change_PP = product(left_QP.T, left_QP)
            put_lower(self._square_II, at, self._square_II[at, at] - change_PP)
            for below in panels(len(self._square_II)):
                if below.start > at.start:
                    self._square_II[below, at] -= product(half_QI[:, below].T, left_QP)


def squares(x_TI: torch.Tensor) -> torch.Tensor:
    """x' x as a matrix, in the dtype of x."""
    x_IT = x_TI.T.contiguous()  # of which every panel lies in one piece
    made_II = x_TI.new_empty(len(x_IT), len(x_IT))
    for at in panels(len(x_IT)):
        made_II[at, at.start :] = product(x_IT[at], x_IT[at.start :].T)
        made_II[at, : at.start] = made_II[: at.start, at].T
    return made_II
