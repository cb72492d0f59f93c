"""Host memory that a device copies from and to by itself: one slab of exact size, for all that a run moves.

torch rounds such memory up to powers of two and keeps it for good. A slab is mapped once, registered with the device's driver,
lent out in rooms of one size, and given back at the end. Every part of it begins at a page.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import queue
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from streamlap.accelerator.devices import Accelerator, plain_room
from streamlap.errors import first_line

log = logging.getLogger(__name__)


PATIENCE = 10.0
"""Seconds: a thread that has just done its work may hold what it worked on for a moment."""


def paged(count: int) -> int:
    """What a part of `count` bytes takes: drivers register whole pages."""
    return -(-count // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclass(frozen=True, kw_only=True)
class SlabSizes:
    """The parts of a slab, bytes; see `paged`."""

    buffer: int
    """What a layer is read into."""
    room: int = 0
    """A batch of hidden states."""
    rooms: int = 0

    @property
    def total(self) -> int:
        return self.buffer + self.rooms * self.room


class Slab:
    """The memory; made by `open_slab`. Raises MemoryError."""

    def __init__(self, sizes: SlabSizes) -> None:
        self._bytes = np.frombuffer(_mapped(sizes.total), np.uint8)
        self._room, self._free = sizes.room, queue.SimpleQueue[int]()
        self.memory = torch.from_numpy(self._bytes)
        self.buffer = self.memory[: sizes.buffer]
        for number in range(sizes.rooms):
            self._free.put(sizes.buffer + number * sizes.room)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A room, which is free again as soon as no tensor of its memory is left. May be asked by any thread."""
        try:
            begin = self._free.get(timeout=PATIENCE)
        except queue.Empty:
            log.warning(
                "more batches are on their way than the schedule counts; one goes through memory like any other"
            )
            return plain_room(shape, dtype)
        count = math.prod(shape) * dtype.itemsize
        assert count <= self._room, f"{count} bytes in a room of {self._room}"
        piece = self._bytes[begin : begin + count]  # an object of its own, which the tensor's storage holds
        weakref.finalize(piece, self._free.put, begin).atexit = False
        return torch.from_numpy(piece).view(dtype).view(shape)


@contextlib.contextmanager
def open_slab(accelerator: Accelerator, sizes: SlabSizes) -> Iterator[Slab]:
    """A slab while the block lasts. Tensors may outlive it: their memory stays, and is like any other then.

    Where the driver does not register it, copies from it are slower and as right; a warning says so.
    """
    slab = Slab(sizes)
    registered = _register(accelerator, slab.memory)
    try:
        yield slab
    finally:
        with contextlib.suppress(RuntimeError):  # of a driver that is gone; what went wrong before has been said
            if registered:
                accelerator.unregister(slab.memory)


def _register(accelerator: Accelerator, memory: torch.Tensor) -> bool:
    """Whether it is."""
    try:
        accelerator.register(memory)
    except RuntimeError as error:
        log.warning("%d MiB of memory cannot be pinned (%s); copies to the GPU are slower. Raise the limit on locked memory "
                    "(ulimit -l).", memory.nbytes >> 20, first_line(error))  # fmt: skip
        return False
    return True


def _mapped(count: int) -> mmap.mmap:
    """So many bytes that begin at a page. Raises MemoryError."""
    try:
        return mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {count:,} bytes in one piece: {error.strerror}") from error
