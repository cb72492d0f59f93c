"""Tokens whose numbers went bad: rows of hidden states with a NaN or an infinity are left out from there on.

A row that is out is NaN in every entry. So its first entry tells, without a pass over the batch, and hidden states on the disk
still tell after a resume. For a forward such rows become zero, so that no later token of their sequence is harmed, and in the
output they are NaN again.

Shape suffixes: B batch, L length, D width, N windows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.statistics import all_finite

MOST_OUT = 0.1
"""Share of the calibration tokens that may be out: the others still stand for the text."""


def finite_rows(x: torch.Tensor) -> torch.Tensor:
    """[...] of [..., D]: whether every entry of a row is finite."""
    return torch.isfinite(x).all(dim=-1)


def marked(x: torch.Tensor) -> torch.Tensor:
    """x with every row out that has a number which is not finite; x itself where none has."""
    return x if all_finite(x) else x.masked_fill(~finite_rows(x)[..., None], torch.nan)


def rows_out(x: torch.Tensor) -> torch.Tensor:
    """[...] of [..., D]: which rows are out."""
    return x[..., 0].isnan()


def any_out(*parts: torch.Tensor) -> torch.Tensor | None:
    """[...] of several [..., D]: which rows are out in any of them; None where none is."""
    out = torch.stack([rows_out(x) for x in parts]).any(dim=0)
    return out if bool(out.any()) else None


def blanked(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """x with zeros in the rows `out`; x itself where that is None."""
    return x if out is None else x.masked_fill(out[..., None], 0.0)


def struck(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """x with the rows `out` out too; x itself where that is None."""
    return x if out is None else x.masked_fill(out[..., None], torch.nan)


def carried(
    run: Callable[[torch.Tensor], torch.Tensor], x_BLD: torch.Tensor, out_BL: torch.Tensor | None
) -> torch.Tensor:
    """What `run` makes of x. Rows that are out stay out and touch no other; rows that go bad in `run` are out after it."""
    return marked(struck(run(blanked(x_BLD, out_BL)), out_BL))


def paired(x_BLD: torch.Tensor, target_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer is trained on: x with zeros where either is out, and the target, out where either is."""
    out_BL = any_out(x_BLD, target_BLD)
    return (x_BLD, target_BLD) if out_BL is None else (blanked(x_BLD, out_BL), struck(target_BLD, out_BL))


def require_few(out_NL: torch.Tensor, most: float, where: str) -> None:
    """Raise NumericalError where more than the share `most` of all tokens are out after `where`."""
    count, total = int(out_NL.sum()), out_NL.numel()
    if count > most * total:
        raise NumericalError(
            f"{where}: the numbers of {count} of {total} tokens ({count / total:.1%}) are NaN or infinite; wanted "
            f"{f'at most {most:.0%}' if most else 'none'}. Take dtype float32 or bfloat16; if it is one of these already, the "
            "checkpoint is broken."
        )
