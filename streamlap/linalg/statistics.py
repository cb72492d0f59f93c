"""Streaming statistics of a linear's inputs. Each equals its one-shot formula, whatever the batches and their order.

Shape suffixes: T tokens, I in.
"""

from __future__ import annotations

import math

import torch

ZERO_SCALE = 1e-4
"""Scale of a channel that was never active (as in LoRAP's published code)."""

ROW_BLOCK = 256
"""Tokens that are widened at a time, so that the memory of an update does not depend on the batch."""

LARGE = 2.0**59
"""In float32 there is room for the sum of the squares of `ROW_BLOCK` numbers below that."""


def all_finite(x: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite. The extremes tell, in one pass that copies nothing."""
    if not x.is_floating_point() or not x.numel():
        return True
    wide = x if x.dtype.itemsize > 1 else x.float()  # torch compares no numbers of 8 bits
    return all(map(math.isfinite, torch.stack(torch.aminmax(wide)).tolist()))


def reaches(x: torch.Tensor, size: float) -> bool:
    """Whether a number is at least so large. NaN is not."""
    if not x.numel() or torch.finfo(x.dtype).max < size:
        return False
    return any(abs(end) >= size for end in torch.stack(torch.aminmax(x)).tolist())


class Energy:
    """Uncentred second moment of every input channel: sum of x_j^2 over all tokens, in float64."""

    def __init__(self) -> None:
        self.sum_I: torch.Tensor | None = None
        self.tokens = 0

    def update(self, x_TI: torch.Tensor) -> None:
        # The square of a half-precision number has few enough digits for float32; so has, to 1e-7, the sum of a block of them.
        # Of bfloat16, which reaches as far as float32 does, it may be too large.
        wide = torch.float32 if x_TI.dtype.itemsize == 2 and not reaches(x_TI, LARGE) else torch.float64
        for x in torch.split(x_TI, ROW_BLOCK):
            square_I = x.to(wide, copy=True).square_().sum(dim=0).double()
            self.sum_I = square_I if self.sum_I is None else self.sum_I.add_(square_I)
        self.tokens += x_TI.shape[0]

    @property
    def finite(self) -> bool:
        """Whether every number that came was: one that was not shows in the sum of its channel."""
        return self.sum_I is not None and all_finite(self.sum_I)

    @property
    def dead(self) -> int:
        """Channels that were never active. At least one update must have come."""
        assert self.sum_I is not None, "no tokens were seen"
        return int((self.sum_I == 0).sum())

    def scale(self) -> torch.Tensor:
        """d_j = sqrt(mean x_j^2), [I] float64; a dead channel weighs `ZERO_SCALE`. At least one update must have come."""
        assert self.sum_I is not None, "no tokens were seen"
        scale_I = (self.sum_I / self.tokens).sqrt()
        return torch.where(scale_I == 0, torch.full_like(scale_I, ZERO_SCALE), scale_I)
