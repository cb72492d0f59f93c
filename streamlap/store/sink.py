"""Tensors -> shards. A shard has its final name only once all of it is on the disk.

Order: write to a temporary name, fsync, rename, fsync the folder. The writer streams, so a shard never has to be in memory
whole, and the same tensors always give the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from streamlap.errors import BudgetError, CheckpointError, ResumeMismatch, StreamlapError, first_line
from streamlap.store.header import DTYPE_NAMES, TensorInfo, byte_view, read_header
from streamlap.store.shards import INDEX_NAME
from streamlap.store.source import CHUNK_BYTES, forget, read_chunks, require_finite

STATE_FOLDER = ".streamlap"
"""Where a run keeps what it needs to go on, in its output."""


@dataclass(frozen=True)
class Joined:
    """Tensors that are written as one, row by row: one after the other, or in turns of `run` rows of each."""

    parts: tuple[torch.Tensor | TensorInfo, ...]
    run: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def runs(self) -> Iterator[torch.Tensor | TensorInfo]:
        """What is written, in its order."""
        if self.run is None:
            yield from self.parts
            return
        for first in range(0, self.parts[0].shape[0], self.run):
            for part in self.parts:
                yield rows_of(part, first, self.run)


def rows_of(entry: torch.Tensor | TensorInfo, first: int, count: int) -> torch.Tensor | TensorInfo:
    """Some rows of what can be written, which lie together where they are on the disk."""
    if isinstance(entry, torch.Tensor):
        return entry[first : first + count]
    width = entry.nbytes // entry.shape[0]
    begin = entry.place(first * width)[0]
    return replace(entry, shape=(count, *entry.shape[1:]), begin=begin, end=begin + count * width, run=0, step=0)


TensorEntry = torch.Tensor | TensorInfo | Joined
"""What can be written: a tensor, the place of one in another file, which is copied as bytes, or several of them as one."""


SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
"""What all `shard_names` look like."""


def shard_names(depth: int) -> list[str]:
    """The first shard holds what lies outside the layers, then one shard a layer; all names are known up front."""
    return [f"model-{number:05d}-of-{depth + 1:05d}.safetensors" for number in range(1, depth + 2)]


class DurableFile:
    """A file that is written under a temporary name and gets its own, `path`, when it is whole and on the disk.

    Till then it lies in the state folder of its run, where there is one, so that what a death leaves lies where it is looked
    for and goes at the end; else beside `path`.

    Each step raises BudgetError when the disk is full and StreamlapError for any other fault of the disk.
    """

    def __init__(self, path: Path, wanted_bytes: int = 0) -> None:
        self.path, self._wanted = path, wanted_bytes
        states = (
            path.with_name(path.name + STATE_FOLDER),
            path.parent / STATE_FOLDER,
        )  # of a survey's file; of a folder
        self._temporary = next(filter(Path.is_dir, states), path.parent) / f"{path.name}.tmp"
        with self._faults():
            self._file = self._temporary.open("wb")

    def write(self, data: bytes | memoryview) -> None:
        with self._faults():
            self._file.write(data)

    def seal(self) -> None:
        """Sync the file, give it its name, sync the folder."""
        with self._faults():
            self._file.flush()
            os.fsync(self._file.fileno())
            forget(self._file.fileno())
            self._file.close()
            self._temporary.replace(self.path)
            fsync_folder(self.path.parent)

    def discard(self) -> None:
        """Take away what has no name yet; nothing after `seal`."""
        with contextlib.suppress(OSError):  # what is in the way was raised where it was first met
            self._file.close()
        with contextlib.suppress(OSError):  # the run that goes on writes over it
            self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(error, self.path, self._wanted) from error


@contextlib.contextmanager
def durable(path: Path, wanted_bytes: int = 0) -> Iterator[DurableFile]:
    """A DurableFile that is sealed at the end of the block, and gone when the block fails."""
    file = DurableFile(path, wanted_bytes)
    try:
        yield file
        file.seal()
    finally:
        file.discard()


def disk_error(error: OSError, path: Path, wanted_bytes: int = 0, resumes: bool = True) -> StreamlapError:
    """Args: resumes, whether the same command goes on from what is on the disk, and does not begin anew."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BudgetError(
            f"the disk under {path.parent} is full while writing {path.name}"
            + (f" ({wanted_bytes:,} bytes)" if wanted_bytes else "")
            + ". Free some space and run the same command again"
            + (": it resumes after the last finished layer." if resumes else ".")
        )
    again = "run again to resume" if resumes else "run the same command again"
    return StreamlapError(f"cannot write {path}: {error.strerror or error}. Mend that and {again}.")


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


NO_SYNC = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EROFS)
"""What is said of a parent that may be gone through but not read, or whose file system cannot sync folders."""


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it, so that its name is on the disk before anything is put into it.

    The name of a folder that is there is synced too: who made it may have died before. Raises StreamlapError or BudgetError.
    """
    if not folder.parent.exists():
        make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)
    except OSError as error:
        if folder.is_dir() and error.errno in NO_SYNC:
            return
        raise disk_error(error, folder) from error


def remove_file(path: Path) -> None:
    """Take a file away if it is there; on the disk its name may stay until its folder is synced."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    with durable(path, len(data)) as file:
        file.write(data)


class ShardFolder:
    """The output folder: one shard per decoder layer, an index at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, shard: str, tensors: Mapping[str, TensorEntry]) -> str:
        """Write one shard durably; returns its sha256. Tensors must be contiguous or are made so one at a time."""
        header, order = _build_header(tensors)
        digest = hashlib.sha256()
        total = len(header) + sum(_nbytes(tensors[name]) for name in order)
        with durable(self.folder / shard, total) as file:
            for piece in itertools.chain((memoryview(header),), *(_pieces(tensors[name]) for name in order)):
                file.write(piece)
                digest.update(piece)
        return digest.hexdigest()

    def require(self, shards: Iterable[str]) -> None:
        """Raise ResumeMismatch where one that a run has written is gone or cut short, before the run goes on."""
        for shard in shards:
            try:
                read_header(self.folder / shard)
            except CheckpointError as error:
                raise ResumeMismatch(
                    f"{first_line(error)} This run wrote it, and goes on behind it. Delete {self.folder} and give the first "
                    "command again."
                ) from error

    def seal(self, shards: Iterable[str]) -> None:
        """Write the index over `shards`. config.json, which makes the folder a model, is the caller's and comes later."""
        headers = [read_header(self.folder / shard) for shard in shards]
        weight_map = {name: header.path.name for header in headers for name in header.tensors}
        infos = [info for header in headers for info in header.tensors.values()]
        metadata = {"total_parameters": sum(i.numel for i in infos), "total_size": sum(i.nbytes for i in infos)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_durably(self.folder / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())


def shard_bytes(tensors: Mapping[str, TensorEntry]) -> int:
    """Size of the file that `ShardFolder.write` makes of these tensors; only their shapes and dtypes count."""
    return len(_build_header(tensors)[0]) + sum(map(_nbytes, tensors.values()))


def _nbytes(entry: TensorEntry) -> int:
    return entry.nbytes


def _build_header(tensors: Mapping[str, TensorEntry]) -> tuple[bytes, list[str]]:
    """Header bytes and the order of the data: wide dtypes first, so that every tensor begins aligned to its item size."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        entry = tensors[name]
        end = offset + _nbytes(entry)
        table[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, order


def _pieces(entry: TensorEntry) -> Iterator[memoryview]:
    """The entry's bytes; a generator, so that nothing is read or copied before its turn. Copies are checked on the way."""
    if isinstance(entry, Joined):
        for run in entry.runs():
            yield from _pieces(run)
    elif isinstance(entry, TensorInfo):
        for piece in read_chunks(entry):
            require_finite(piece.view(entry.dtype), entry.name, entry.path.name)
            yield byte_view(piece)
    else:
        rows = max(1, CHUNK_BYTES // max(1, entry.nbytes // max(1, len(entry)))) if entry.dim() else 1
        for part in torch.split(entry.detach(), rows) if entry.dim() and entry.numel() else (entry.detach(),):
            yield byte_view(part.cpu().contiguous())  # in pieces: from a GPU, or out of order, each is a copy
