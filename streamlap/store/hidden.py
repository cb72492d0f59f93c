"""Hidden states between layers: generation k is the input of decoder layer k, [sequences N, length L, width D].

A generation is kept in the first tier that the budget allows: the device's memory, RAM, disk. With a folder it is on the disk
in any case, one flat file, complete or absent, so that a killed run can go on; the faster tier then saves reading it. It is
stored as it was computed, because computing it again on resume need not give the same bits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from streamlap.accelerator.devices import Accelerator, Cpu, Landing, Room, plain_room
from streamlap.errors import ResumeMismatch, StreamlapError
from streamlap.store.header import byte_view
from streamlap.store.sink import DurableFile, fsync_folder, make_folder, remove_file
from streamlap.store.worker import Worker

IN_FLIGHT = 2
"""Batches that may wait for the disk while the next is computed."""

TWO_AT_ONCE = "two generations of a bank are read side by side, and memory keeps one"

INLINE = Worker(overlap=False)
HOST = Cpu(torch.device("cpu"))


class HiddenBank:
    """Generations of one run, read and written in order, `batch` sequences at a time.

    Args: folder, where generations lie on the disk, None where nothing has to outlive the process; tier, where the newest
    generation stays: vram, the device's memory, ram, or disk, to read it from there; accelerator, the device that batches come
    from and go to; name, that of its files.
    """

    def __init__(
        self, shape_NLD: tuple[int, int, int], dtype: torch.dtype, batch: int, *,
        folder: Path | None = None, tier: str = "ram", accelerator: Accelerator = HOST, name: str = "hidden",
    ) -> None:  # fmt: skip
        assert folder is not None or tier != "disk", "a bank without any tier"
        self.shape_NLD, self.dtype, self.batch = shape_NLD, dtype, batch
        self.folder, self._tier, self._accelerator, self._name = folder, tier, accelerator, name
        self._room: Room = plain_room
        self._kept: list[torch.Tensor | Landing] = []
        self._kept_generation = -1
        self._made = False  # the folder, by this process
        self._file: DurableFile | None = None
        self._sealed: Future[None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one generation. The disk holds two while a layer is done; in a cache the new one replaces the old."""
        sequences, length, width = self.shape_NLD
        return sequences * length * width * self.dtype.itemsize

    def use(self, room: Room) -> None:
        """Take host memory for batches from `room` from now on."""
        self._room = room

    def read(self, generation: int, numbers: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """Batches [B, L, D] in order: in the device's memory where they stay there, else in the host's; of the sequences of
        these `numbers` alone, where they are given. No batch that was given is held here when the next is asked for, but where
        it stays. Raises ResumeMismatch when the generation is not whole.

        Memory keeps one generation, so two of one bank are never read side by side."""
        if numbers is not None:
            for first in range(0, len(numbers), self.batch):
                yield self.pick(generation, numbers[first : first + self.batch])
            return
        if generation == self._kept_generation:
            kept = self._kept
            for place in range(len(kept)):
                yield landed(kept[place])
                assert self._kept is kept, TWO_AT_ONCE
            return
        kept, self._kept_generation = [], -1
        self._kept = kept
        if self._tier == "disk":
            yield from self._read_file(generation)
            return
        for x_BLD in self._read_file(generation):
            # at its place at once, since `write` may be replacing what was read before
            kept.append(self._accelerator.move(x_BLD) if self._tier == "vram" else x_BLD)
            del x_BLD
            yield landed(kept[-1])
            assert self._kept is kept, TWO_AT_ONCE
        self._kept_generation = generation

    def pick(self, generation: int, numbers: Sequence[int]) -> torch.Tensor:
        """The sequences of these numbers [B, L, D], at most a batch, in their order, from wherever they are; in memory where
        `read` gives them. Nothing is kept of it."""
        kept = generation == self._kept_generation
        rows = [landed(self._kept[number // self.batch])[number % self.batch] for number in numbers] if kept else []
        if kept and self._tier == "vram":
            return torch.stack(rows)
        x_BLD = self._room((len(numbers), *self.shape_NLD[1:]), self.dtype)
        if kept:
            return torch.stack(rows, out=x_BLD)
        handle = self._open(generation)
        try:
            for place, number in enumerate(numbers):
                self._read_rows(handle, generation, number, x_BLD[place : place + 1])
        finally:
            os.close(handle)
        return self._accelerator.move(x_BLD) if self._tier == "vram" else x_BLD

    def write(self, generation: int, batches: Iterable[torch.Tensor], writer: Worker = INLINE) -> None:
        """Take in a generation. Its file is whole once `writer` has come to the end of what it was given here.

        A batch may be computed from the same batch of the generation before or behind it, which it replaces in the cache.
        """
        same_place = abs(self._kept_generation - generation) == 1
        if not same_place:
            self._kept = []
        file = self._file = writer.submit(self._create, generation).result() if self.folder is not None else None
        pending: deque[Future[None]] = deque()
        try:
            for place, x_BLD in enumerate(batches):
                if self._tier == "vram":
                    self._kept[place : place + 1] = [x_BLD]
                if self._tier == "vram" and file is None:
                    continue
                copy = self._accelerator.download(x_BLD, self._room)
                del x_BLD
                if self._tier == "ram":
                    self._kept[place : place + 1] = [copy]
                if file is not None:
                    pending.append(writer.submit(_write_batch, file, copy))
                    if len(pending) > IN_FLIGHT:
                        pending.popleft().result()
                del copy  # its room may be the one that the next batch goes to
            for done in pending:
                done.result()
        except BaseException:
            self._kept, self._kept_generation = [], -1  # half of them are of this generation
            if file is not None:
                writer.submit(file.discard).result()  # now: leaving by an error cancels what is only queued
            raise
        self._kept_generation = generation if self._tier != "disk" else -1
        self._sealed = writer.submit(self._seal, file) if file is not None else None

    def settle(self) -> None:
        """Wait until the generation written last has its name on the disk."""
        if self._sealed is not None:
            self._sealed.result()

    def close(self) -> None:
        """Take away the file that was cut short, if any, and take no more rooms. To be called when no writer is at work."""
        self._room = plain_room
        if self._file is not None:
            self._file.discard()

    def has(self, generation: int) -> bool:
        """Whether a generation is on the disk."""
        return self.folder is not None and self._path(generation).exists()

    def drop(self, generation: int) -> None:
        if generation == self._kept_generation:
            self._kept, self._kept_generation = [], -1
        if self.folder is not None:
            remove_file(self._path(generation))

    def _path(self, generation: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self._name}-{generation:05d}.bin"

    def _create(self, generation: int) -> DurableFile:
        assert self.folder is not None
        if not self._made:
            make_folder(self.folder)
            self._made = True
        return DurableFile(self._path(generation), self.nbytes)

    def _seal(self, file: DurableFile) -> None:
        try:
            file.seal()
        finally:
            file.discard()

    def _read_file(self, generation: int) -> Iterator[torch.Tensor]:
        handle, (sequences, *shape_LD) = self._open(generation), self.shape_NLD
        try:
            for first in range(0, sequences, self.batch):
                shape_BLD = min(self.batch, sequences - first), *shape_LD
                yield self._read_rows(handle, generation, first, self._room(shape_BLD, self.dtype))
        finally:
            os.close(handle)

    def _open(self, generation: int) -> int:
        """The file of a generation, which is whole."""
        self.settle()
        path = self._path(generation)
        if not path.exists():
            raise ResumeMismatch(
                f"{path} is not there; wanted hidden states of this run. If the folder of --work was moved, move it back. Else "
                "start over in another folder."
            )
        found = path.stat().st_size
        if found != self.nbytes:
            raise ResumeMismatch(
                f"{path} has {found} bytes of hidden states; wanted {self.nbytes}. It was changed from outside: "
                "start over in another folder."
            )
        return os.open(path, os.O_RDONLY)

    def _read_rows(self, handle: int, generation: int, first: int, x_BLD: torch.Tensor) -> torch.Tensor:
        """Fill `x_BLD` with the sequences from `first` on."""
        view = byte_view(x_BLD)
        done, start = 0, first * self.nbytes // self.shape_NLD[0]
        while done < len(view):
            done += _read_some(handle, view[done:], start + done, self._path(generation))
        return x_BLD


def remove_hidden(folder: Path) -> None:
    """No generation of any bank in this folder is needed any more."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        fsync_folder(folder.parent)


def landed(kept: torch.Tensor | Landing) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept.wait()


def _write_batch(file: DurableFile, batch: Landing) -> None:
    file.write(byte_view(batch.wait()))


def _read_some(handle: int, view: memoryview, start: int, path: Path) -> int:
    try:
        count = os.preadv(handle, [view], start)
    except OSError as error:
        raise StreamlapError(f"{path} cannot be read: {error.strerror}. Mend that and run again to resume.") from error
    if not count:
        raise StreamlapError(f"{path} ended at byte {start}: it was cut while in use. Start over in another folder.")
    return count
