"""Triangular matrices in the lower half of a square array, worked on in place and in panels; what is above the diagonal stays.

Shape suffixes: I in, O out, P columns of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from streamlap.linalg.lowrank import solver_threads
from streamlap.linalg.products import product

PANEL = 1024
"""Columns that are worked on at a time."""


def panels(size: int) -> Iterator[slice]:
    return (slice(first, min(first + PANEL, size)) for first in range(0, size, PANEL))


def invert_lower(square_II: torch.Tensor) -> None:
    """L^-1 in the place of L, from the last panel to the first."""
    order = list(panels(len(square_II)))
    for at in reversed(order):
        corner_PP = solve_triangular(square_II[at, at], torch.eye(at.stop - at.start).to(square_II), upper=False)
        right_IP = product(square_II[at.stop :, at], corner_PP)
        for below in order:
            if below.start > at.start:
                before, inside = slice(at.stop, below.start), slice(below.start - at.stop, below.stop - at.stop)
                made_PP = product(square_II[below, below].tril(), right_IP[inside])
                made_PP += product(square_II[below, before], right_IP[: inside.start])
                square_II[below, at] = made_PP.neg_()
        put_lower(square_II, at, corner_PP)


def square_lower(square_II: torch.Tensor) -> None:
    """R' R in the place of R, from the first panel of rows to the last."""
    for at in panels(len(square_II)):
        left_IP = square_II[at.start :, at].clone()
        left_IP[: at.stop - at.start].tril_()
        for before in panels(at.start):
            square_II[at, before] = product(left_IP.T, square_II[at.start :, before])
        put_lower(square_II, at, product(left_IP.T, left_IP))


def put_lower(square_II: torch.Tensor, at: slice, made_PP: torch.Tensor) -> None:
    """The lower half of a square on the diagonal; S stays above it."""
    square_II[at, at] = made_PP.tril() + square_II[at, at].triu(1)


def small_factor(gram_PP: torch.Tensor) -> torch.Tensor | None:
    """The factor of a panel's square, made in float64."""
    with solver_threads(gram_PP.device):
        factor_PP, info = torch.linalg.cholesky_ex(gram_PP.double())
    factor_PP = factor_PP.to(gram_PP.dtype)
    return factor_PP if int(info) == 0 and bool(torch.isfinite(factor_PP.diagonal()).all()) else None


def solve_triangular(factor_II: torch.Tensor, b_IO: torch.Tensor, upper: bool) -> torch.Tensor:
    """L^-1 b, for a factor that is lower or, with `upper`, upper; the other half is not looked at."""
    with solver_threads(factor_II.device):
        x_IO: torch.Tensor = torch.linalg.solve_triangular(factor_II, b_IO, upper=upper)
    return x_IO


def solve_right(factor_II: torch.Tensor, b_OI: torch.Tensor) -> torch.Tensor:
    """b S^-1 for S = L L', of which only the lower half is looked at."""
    return solve_in_place(factor_II, b_OI.T.clone(memory_format=torch.contiguous_format)).T


def solve_in_place(factor_II: torch.Tensor, x_IO: torch.Tensor) -> torch.Tensor:
    """S^-1 x for S = L L', in the place of x. In panels, so that nearly all is matrix products."""
    order = list(panels(len(factor_II)))
    for at in order:
        x_IO[at] -= product(factor_II[at, : at.start], x_IO[: at.start])
        x_IO[at] = solve_triangular(factor_II[at, at], x_IO[at], upper=False)
    for at in reversed(order):
        x_IO[at] -= product(factor_II[at.stop :, at].T, x_IO[at.stop :])
        x_IO[at] = solve_triangular(factor_II[at, at].T, x_IO[at], upper=True)
    return x_IO
