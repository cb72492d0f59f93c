"""Batches on their way to a device, beside the computation. On a CPU nothing moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from streamlap.accelerator.devices import Accelerator


def upload_ahead(batches: Iterable[torch.Tensor], accelerator: Accelerator) -> Iterator[torch.Tensor]:
    """The same batches on the device; the copy of the next one runs while the one before it is computed on.

    When the next batch is asked for, no copy is under way, and none of the memory that was copied from is held here.
    """
    if not accelerator.away:
        yield from batches
        return
    here: torch.Tensor | None = None
    for x in batches:
        landing = accelerator.upload(x)
        del x
        if here is not None:
            yield here
        here = landing.wait()
    if here is not None:
        yield here
