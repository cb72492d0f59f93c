"""Sums over tokens of products, as exact for a billion of them as for a thousand: in float64, or in float32 with what rounding
takes from each sum beside it.

Shape suffixes: T tokens, I in, A anchor.
"""

from __future__ import annotations

import torch

from streamlap.linalg.gram import Gram, solve_dtype
from streamlap.linalg.products import product
from streamlap.linalg.triangles import panels


def total(x_TI: torch.Tensor, dtype: torch.dtype | None = None) -> float:
    """The sum of all numbers, made in `dtype`, with the same bits on any number of threads: each row is summed, a panel at a
    time, and then the rows. In one sum of a large array to one number the parts depend on how many threads share it."""
    return float(torch.stack([x_TI[:, at].sum(dim=1, dtype=dtype) for at in panels(x_TI.shape[1])]).sum(dim=0).sum())


class Sum:
    """A sum of products b' a [I, A] over tokens, as exact for a billion of them as for a thousand: in float64, or in float32
    with what rounding takes from each sum beside it (Kahan), of which eight bits do."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.total = torch.zeros(shape, dtype=solve_dtype(shape[0]), device=device)
        wide = self.total.dtype == torch.float64
        self._lost = None if wide else torch.zeros_like(self.total, dtype=torch.bfloat16)

    def add(self, b_IT: torch.Tensor, a_AT: torch.Tensor) -> None:
        """The products are in the dtype of a and b."""
        for at in panels(len(b_IT)):
            _add(self.total[at], None if self._lost is None else self._lost[at], product(b_IT[at], a_AT.T))


class GramSum:
    """The sum of x' x [I, I], as exact, above the diagonal; what rounding takes from it is below, where S is not needed."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._square_II = torch.zeros(size, size, dtype=solve_dtype(size), device=device)
        wide = self._square_II.dtype == torch.float64
        self._lost = [None if wide else torch.zeros_like(self._square_II[at, at]) for at in panels(size)]
        """Of the squares on the diagonal, which S fills whole."""

    @property
    def diagonal_I(self) -> torch.Tensor:  # noqa: N802
        return self._square_II.diagonal()

    def add(self, x_IT: torch.Tensor) -> None:
        """The products are in the dtype of x."""
        for number, at in enumerate(panels(len(x_IT))):
            self._add(number, at, product(x_IT[at], x_IT[at.start :].T))

    def gram(self) -> Gram:
        """S, in the memory of this sum, which ends here."""
        square_II, self._lost = self._square_II, []
        del self._square_II
        return Gram(square_II, square_II.diagonal().clone())

    def _add(self, number: int, at: slice, more: torch.Tensor) -> None:
        square_II, lost, size = self._square_II, self._lost[number], len(more)
        _add(square_II[at, at], lost, more[:, :size])
        _add(square_II[at, at.stop :], None if lost is None else square_II[at.stop :, at].T, more[:, size:])


def _add(total: torch.Tensor, lost: torch.Tensor | None, more: torch.Tensor) -> None:
    if lost is None:
        total.add_(more)
    else:
        _kahan(total, lost, more)


def _kahan(total: torch.Tensor, lost: torch.Tensor, more: torch.Tensor) -> None:
    """total += more, which is overwritten; `lost` is what rounding has added too much so far."""
    more.sub_(lost)
    after = total + more
    torch.sub(after, total, out=total)
    lost.copy_(total.sub_(more))
    total.copy_(after)
