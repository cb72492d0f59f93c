"""Weights in the dtype in which they are written. What is too large for it is balanced between two factors or is an error.

What is too small for it becomes zero: beside the other numbers of its row it is nothing.

Shape suffixes: O out, I in, R rank.
"""

from __future__ import annotations

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.solution import Solution
from streamlap.linalg.statistics import all_finite


def as_stored(x: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """x in `dtype`. Raises NumericalError, naming `what` and its largest number, where it has no finite form there."""
    stored = x.to(dtype)
    if not all_finite(stored):
        if not all_finite(x):
            raise NumericalError(
                f"{what}: it has numbers that are NaN or infinite before it is stored; wanted finite ones. Take more "
                "calibration text, or dtype float32."
            )
        raise NumericalError(
            f"{what}: the largest number is {float(x.abs().max()):.4g}; wanted at most {torch.finfo(dtype).max:.5g}, as "
            f"{dtype} has it. Convert the checkpoint to bfloat16 or float32 and compress that."
        )
    return stored


def balanced(
    up_OR: torch.Tensor, down_RI: torch.Tensor, dtype: torch.dtype, what: str
) -> Solution[tuple[torch.Tensor, torch.Tensor]]:
    """Two factors in `dtype`. At each rank where one is too large for it, a power of two moves to the other, which leaves their
    product as it is, and a note names `what`. So does the NumericalError that is raised where that is not enough."""
    notes: tuple[str, ...] = ()
    sizes = torch.stack([up_OR.abs().amax(dim=0).double(), down_RI.abs().amax(dim=1).double()])
    over_R = ~torch.isfinite(sizes.to(dtype)).all(dim=0)
    if bool(over_R.any()):
        tall_R, wide_R = sizes.clamp_min(torch.finfo(torch.float32).tiny).log2()
        shift_R = torch.where(over_R, torch.exp2(((tall_R - wide_R) / 2).round()), 1.0)
        up_OR, down_RI = up_OR.double() / shift_R, down_RI.double() * shift_R[:, None]
        notes = (f"{what}: {int(over_R.sum())} ranks balanced for {dtype}",)
    return Solution((as_stored(up_OR, dtype, what), as_stored(down_RI, dtype, what)), notes=notes)
