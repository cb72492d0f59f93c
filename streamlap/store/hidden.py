"""Calibration hidden states between layers: generation k is the input of decoder layer k, [sequences N, length L, width D].

On disk a generation is one flat file, complete or absent. It is stored as it was computed, because computing it again on resume
need not give the same bits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from streamlap.errors import ResumeMismatch, StreamlapError
from streamlap.store.header import byte_view
from streamlap.store.sink import disk_error, durable


class HiddenStates(Protocol):
    """A bank of generations, read and written in batches of sequences."""

    def read(self, generation: int) -> Iterator[torch.Tensor]: ...
    def write(self, generation: int, batches: Iterable[torch.Tensor]) -> None: ...
    def drop(self, generation: int) -> None: ...


class RamBank:
    """Generations as lists of batches in memory: nothing survives the process."""

    def __init__(self) -> None:
        self._generations: dict[int, list[torch.Tensor]] = {}

    def read(self, generation: int) -> Iterator[torch.Tensor]:
        yield from self._generations[generation]

    def write(self, generation: int, batches: Iterable[torch.Tensor]) -> None:
        self._generations[generation] = [x_BLD.cpu() for x_BLD in batches]

    def drop(self, generation: int) -> None:
        self._generations.pop(generation, None)


class DiskBank:
    """Generations as files in `folder`; one batch of `batch` sequences is in memory at a time."""

    def __init__(self, folder: Path, shape_NLD: tuple[int, int, int], dtype: torch.dtype, batch: int) -> None:
        self.folder, self.shape_NLD, self.dtype, self.batch = folder, shape_NLD, dtype, batch

    @property
    def nbytes(self) -> int:
        """Bytes of one generation; two exist while a layer is being done."""
        sequences, length, width = self.shape_NLD
        return sequences * length * width * self.dtype.itemsize

    def _path(self, generation: int) -> Path:
        return self.folder / f"hidden-{generation:05d}.bin"

    def read(self, generation: int) -> Iterator[torch.Tensor]:
        """Batches [B, L, D] in order. Raises ResumeMismatch when the generation is not whole."""
        path = self._path(generation)
        found = path.stat().st_size if path.exists() else 0
        if found != self.nbytes:
            raise ResumeMismatch(
                f"{path} has {found} bytes of hidden states; wanted {self.nbytes}. It was changed from outside: "
                "start over with --overwrite."
            )
        sequences, length, width = self.shape_NLD
        handle = os.open(path, os.O_RDONLY)
        try:
            for first in range(0, sequences, self.batch):
                rows = min(self.batch, sequences - first)
                x_BLD = torch.empty(rows, length, width, dtype=self.dtype)
                view = byte_view(x_BLD)
                done, start = 0, first * self.nbytes // sequences
                while done < len(view):
                    done += _read_some(handle, view[done:], start + done, path)
                yield x_BLD
        finally:
            os.close(handle)

    def write(self, generation: int, batches: Iterable[torch.Tensor]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        with durable(self._path(generation), self.nbytes) as file:
            for x_BLD in batches:
                file.write(byte_view(x_BLD.cpu().contiguous()))

    def drop(self, generation: int) -> None:
        self._path(generation).unlink(missing_ok=True)

    def remove(self) -> None:
        """No generation is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_some(handle: int, view: memoryview, start: int, path: Path) -> int:
    try:
        count = os.preadv(handle, [view], start)
    except OSError as error:
        raise StreamlapError(f"{path} cannot be read: {error.strerror}. Mend that and run again to resume.") from error
    if not count:
        raise StreamlapError(f"{path} ended at byte {start}: it was cut while in use. Start over with --overwrite.")
    return count
