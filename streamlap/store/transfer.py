"""Batches on their way to a CUDA device and back, beside the computation: on streams of their own, from and to pinned memory.

On a CPU nothing moves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch


def upload_ahead(batches: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """The same batches on `device`; the copy of the next one runs while the one before it is computed on."""
    if device.type != "cuda":
        yield from batches
        return
    stream = _stream(device, "upload")
    coming: tuple[torch.Tensor, torch.cuda.Event] | None = None
    for x in batches:
        with torch.cuda.stream(stream):
            copy = x.to(device, non_blocking=True), stream.record_event()
        if coming is not None:
            yield _arrived(*coming)
        coming = copy
    if coming is not None:
        yield _arrived(*coming)


@functools.cache
def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    """One for each device and direction, for the life of the process: torch caches freed blocks by stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _arrived(x: torch.Tensor, event: torch.cuda.Event) -> torch.Tensor:
    """`x`, which computation queued from now on may read; its memory is not given away before that is done."""
    current = torch.cuda.current_stream(x.device)
    current.wait_event(event)
    x.record_stream(current)
    return x


class Download:
    """A contiguous copy of `x` in RAM, begun at once on a stream of its own; `x` itself where it is there already."""

    def __init__(self, x: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if x.device.type != "cuda":
            self._copy = x.cpu().contiguous()
            return
        stream = _stream(x.device, "download")
        stream.wait_stream(torch.cuda.current_stream(x.device))
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            self._copy.copy_(x, non_blocking=True)
            x.record_stream(stream)
            self._event = stream.record_event()

    def wait(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy
