"""Buffers that a layer's tensors are read into, used again for every layer, and filled one layer ahead.

On a CPU that computes in the stored dtype the layer lives in its buffer and nothing is copied; so reading ahead takes two.
Elsewhere one is enough: what is taken from it is converted, copied or uploaded before the next layer is read into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future

import torch

from streamlap.accelerator.devices import Accelerator
from streamlap.store.header import TensorInfo, byte_view
from streamlap.store.source import read_into, require_finite
from streamlap.store.worker import Worker

ALIGNMENT = 256
"""Bytes; every tensor of a buffer begins at a multiple, as device kernels like it."""


def staged_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Size of the buffer that holds these tensors."""
    return sum(_padded(info.nbytes) for info in tensors)


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class Staging:
    """Takes turns with `buffers`, bytes in host memory, each of which holds a layer."""

    def __init__(self, buffers: Sequence[torch.Tensor], accelerator: Accelerator, reader: Worker) -> None:
        self._buffers, self._accelerator, self._reader, self._turn = buffers, accelerator, reader, 0
        self._coming: tuple[list[str], Future[torch.Tensor]] | None = None

    @property
    def lasting(self) -> bool:
        """Whether what was taken stays as it is while the next layer is read."""
        return self._accelerator.away or len(self._buffers) > 1 or not self._reader.overlap

    def prefetch(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Begin to read `tensors` into the next buffer, where reading overlaps; what was taken from it before is out of use."""
        if self._reader.overlap:
            self._begin(tensors)

    def _begin(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._turn = (self._turn + 1) % len(self._buffers)
        names = [info.name for info in tensors.values()]
        self._coming = names, self._reader.submit(_fill, self._buffers[self._turn], tensors)

    def take(self, tensors: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
        """The tensors in their stored dtype on the device: on a CPU as views of a buffer, which stay good until the buffer's
        next turn; on a GPU as views of one upload. Raises CheckpointError for numbers that are not finite."""
        if self._coming is None or self._coming[0] != [info.name for info in tensors.values()]:
            self.settle()
            self._begin(tensors)
        assert self._coming is not None
        buffer, self._coming = self._coming[1].result(), None
        views = _views(buffer, tensors)
        for name, info in tensors.items():
            require_finite(views[name], info.name, info.path.name)
        if not self._accelerator.away:
            return views
        return _views(self._accelerator.move(buffer[: staged_bytes(tensors.values())]), tensors)

    def settle(self) -> None:
        """Wait for what is being read, and forget it."""
        if self._coming is not None:
            self._coming[1].result()
            self._coming = None


def _fill(buffer: torch.Tensor, tensors: Mapping[str, TensorInfo]) -> torch.Tensor:
    view, offset = byte_view(buffer), 0
    for info in tensors.values():
        read_into(info, view[offset : offset + info.nbytes])
        offset += _padded(info.nbytes)
    return buffer


def _views(buffer: torch.Tensor, tensors: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    views, offset = {}, 0
    for name, info in tensors.items():
        views[name] = buffer[offset : offset + info.nbytes].view(info.dtype).view(info.shape)
        offset += _padded(info.nbytes)
    return views
