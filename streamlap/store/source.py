"""Shards -> tensors. Only headers are kept; each tensor is read by `preadv` into its own memory, and no file stays mapped.

A mapped shard counts into the process's memory for as long as the map is open; a positioned read costs its buffer alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from streamlap.errors import CheckpointError, few
from streamlap.linalg.statistics import all_finite
from streamlap.store.header import Header, TensorInfo, byte_view, file_stamp, read_header
from streamlap.store.shards import Shards, files_in, find_shards
from streamlap.untrusted.paths import checked

CHUNK_BYTES = 1 << 26
"""Bytes in one read; a multiple of every item size."""
TURNED_BYTES = 1 << 22
"""Of a matrix that is stored by its columns, what is turned at a time."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Pieces of a shard that stand for all of its data, and their size."""

logger = logging.getLogger(__name__)


class TensorSource(Protocol):
    """Anything tensors can be read from by name. The pipeline asks for nothing more."""

    headers: dict[str, Header]

    def names(self) -> Iterable[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str) -> torch.Tensor: ...


class SafetensorsHeaders:
    """The tensors of a checkpoint as its headers tell of them; the weights themselves are elsewhere.

    `place` is what messages call the checkpoint, `shards` comes from `find_shards`, `headers` has each of them by name. Of a
    tensor that stands in several shards the last one counts, as in transformers; the index has to list it.
    Raises CheckpointError when a tensor stands twice without that, or where one is read that only the index has.
    """

    def __init__(self, place: str, shards: Shards, headers: dict[str, Header]) -> None:
        self.place, self.headers, self._chosen = place, headers, shards.chosen
        shards.tell(place)
        self._tensors: dict[str, TensorInfo] = {}
        found_in: dict[str, str] = {}
        for shard in shards.files:
            for name, info in headers[shard].tensors.items():
                if name in self._tensors and name not in shards.index:
                    raise CheckpointError(
                        f"tensor {name!r} stands in {found_in[name]} and in {shard}, and {shards.chosen} lists none; wanted it "
                        "once."
                    )
                self._tensors[name], found_in[name] = info, shard
        self._absent = {name: shard for name, shard in shards.index.items() if name not in found_in}
        self._tell_overruled({name for name, shard in shards.index.items() if found_in.get(name, shard) != shard})

    def _tell_overruled(self, names: set[str]) -> None:
        if names:
            logger.warning("%s: tensors are read from another shard than %s says, as the last one counts in transformers "
                           "(%d in all): %s.", self.place, self._chosen, len(names), few(names))  # fmt: skip
        if self._absent:
            logger.warning("%s: %s lists tensors that are not where it says, nor elsewhere (%d in all): %s.",
                           self.place, self._chosen, len(self._absent), few(self._absent))  # fmt: skip

    def names(self) -> Iterable[str]:
        return self._tensors

    def info(self, name: str) -> TensorInfo:
        if name in self._absent:
            raise CheckpointError(
                f"{self._chosen} says that tensor {name!r} is in {self._absent[name]}, and it is not there; wanted both of one "
                "checkpoint."
            )
        if name not in self._tensors:
            raise CheckpointError(
                f"tensor {name!r} is missing from {self.place}; wanted it in one of its shards, or a config.json without it."
            )
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """Raises CheckpointError: there is nothing to read from."""
        raise CheckpointError(
            f"tensor {self.info(name).name!r} cannot be read: the weights of {self.place} were not fetched, only their "
            "headers; wanted the shards in a folder. Fetch them with `hf download` or name a local folder."
        )


class SafetensorsFolder(SafetensorsHeaders):
    """A local checkpoint folder: a whole file, or shards behind an index.

    Raises CheckpointError at once when a shard is missing, truncated, lies in its header, or lies outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        shards = find_shards(folder, files_in(folder), str(folder))
        headers = {shard: read_header(checked(folder, folder / shard)) for shard in shards.files}
        super().__init__(str(folder), shards, headers)

    def read(self, name: str) -> torch.Tensor:
        """See `read_tensor`."""
        return read_tensor(self.info(name))


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor in its stored dtype, in memory of its own. Non-finite numbers raise CheckpointError."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    read_into(info, byte_view(tensor))
    require_finite(tensor, info.name, info.path.name)
    return tensor


def require_finite(tensor: torch.Tensor, name: str, file: str) -> None:
    """Raise CheckpointError where a float tensor holds NaN or infinities."""
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor.float())).sum())
        raise CheckpointError(
            f"tensor {name!r} in {file} has {bad} NaN or infinite entries of {tensor.numel()}; "
            "wanted finite weights. Take the checkpoint from its source again, or mend it."
        )


def read_into(info: TensorInfo, view: memoryview, first: int = 0) -> None:
    """Fill `view` with the tensor's bytes from number `first`, by positioned reads; the pages read are dropped from the page
    cache."""
    handle = _open(info)
    try:
        _read_all(handle, info, view, drop=True, first=first)
    except OSError as error:
        raise CheckpointError(f"{info.path.name}: {error.strerror} while reading tensor {info.name!r}.") from error
    finally:
        os.close(handle)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one file, which is our own. Raises CheckpointError where it is damaged or not there."""
    tensors = {}
    for name, info in read_header(path).tensors.items():
        tensors[name] = torch.empty(info.shape, dtype=info.dtype)
        read_into(info, byte_view(tensors[name]))
    return tensors


def _read_all(handle: int, info: TensorInfo, view: memoryview, drop: bool = False, first: int = 0) -> None:
    """Fill `view` with the bytes of `info` from number `first`, however few come at a time; `drop` them from the page cache as
    they come."""
    if info.transposed:
        _read_transposed(handle, info, view, first)
        return
    done = min(max(info.blank - first, 0), len(view))
    view[:done] = bytes(done)
    while done < len(view):
        begin, left = info.place(first + done)
        count = os.preadv(handle, [view[done : done + min(left, CHUNK_BYTES)]], begin)
        if not count:
            raise CheckpointError(f"{info.path.name} ended inside tensor {info.name!r}: it was cut while in use.")
        if drop:
            forget(handle, begin, count)
        done += count


def _read_transposed(handle: int, info: TensorInfo, view: memoryview, first: int) -> None:
    """The same of a matrix that is stored by its columns: blocks of rows, whose numbers are in pieces in the file."""
    (rows, columns), size, done = info.shape, info.dtype.itemsize, 0
    while done < len(view):
        row, inside = divmod(first + done, columns * size)
        count = min(max(1, TURNED_BYTES // (columns * size)), rows - row)
        place = replace(info, shape=(columns, count), begin=info.begin + row * size, run=count * size, transposed=False)
        block = torch.empty(columns, count, dtype=info.dtype)
        _read_all(handle, place, byte_view(block))
        piece = byte_view(block.t().contiguous())[inside : inside + len(view) - done]
        view[done : done + len(piece)] = piece
        done += len(piece)


def read_rows(info: TensorInfo, rows: list[int]) -> torch.Tensor:
    """Rows of a matrix, [len(rows), ...], in the order given; neighbours that follow each other are read at once.

    The pages stay in the page cache, since rows are asked for again; they give way where memory is short.
    """
    if rows and not 0 <= min(rows) <= max(rows) < info.shape[0]:
        raise CheckpointError(
            f"tensor {info.name!r} has rows 0 to {info.shape[0] - 1}; asked for {min(rows)} to {max(rows)}."
        )
    tensor = torch.empty(len(rows), *info.shape[1:], dtype=info.dtype)
    view, width, handle = byte_view(tensor), info.nbytes // info.shape[0], _open(info)
    try:
        first = 0
        for place in range(1, len(rows) + 1):
            if place == len(rows) or rows[place] != rows[place - 1] + 1:
                _read_all(handle, info, view[first * width : place * width], first=rows[first] * width)
                first = place
    except OSError as error:
        raise CheckpointError(f"{info.path.name}: {error.strerror} while reading tensor {info.name!r}.") from error
    finally:
        os.close(handle)
    require_finite(tensor, info.name, info.path.name)
    return tensor


def read_chunks(info: TensorInfo) -> Iterator[torch.Tensor]:
    """The tensor's bytes in pieces of at most `CHUNK_BYTES`, uint8, in one buffer that the next piece overwrites."""
    buffer = torch.empty(min(CHUNK_BYTES, info.nbytes), dtype=torch.uint8)
    for begin in range(0, info.nbytes, CHUNK_BYTES):
        piece = buffer[: min(CHUNK_BYTES, info.nbytes - begin)]
        read_into(info, byte_view(piece), begin)
        yield piece


def equal_numbers(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two stored tensors hold the same numbers in float32; read in pieces, and up to the first difference only."""
    if first.shape != second.shape:
        return False
    step = CHUNK_BYTES // max(first.dtype.itemsize, second.dtype.itemsize)
    for begin in range(0, first.numel, step):
        one, other = (_numbers(info, begin, min(begin + step, info.numel)) for info in (first, second))
        if not torch.equal(one, other):
            return False
    return True


def _numbers(info: TensorInfo, begin: int, end: int) -> torch.Tensor:
    """Some of the numbers of a tensor, in their order, as float32."""
    numbers = torch.empty(end - begin, dtype=info.dtype)
    read_into(info, byte_view(numbers), begin * info.dtype.itemsize)
    return numbers.float()


def _open(info: TensorInfo) -> int:
    try:
        handle = os.open(info.path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{info.path.name}: {error.strerror} while reading tensor {info.name!r}.") from error
    if info.stamp not in (None, file_stamp(handle)):
        os.close(handle)
        raise CheckpointError(
            f"{info.path.name} was changed while in use, before tensor {info.name!r} was read; wanted it as it was when this "
            f"run opened it. Put the file back and run again to resume, or start over ({info.path})."
        )
    return handle


def data_digest(header: Header) -> str:
    """sha256 over `SAMPLES` pieces of a shard's data, evenly spread: it tells two trainings of one architecture apart, whose
    headers are the same, without reading all of either."""
    digest, start = hashlib.sha256(), min((info.begin for info in header.tensors.values()), default=header.file_bytes)
    try:
        with header.path.open("rb") as file:
            for place in range(SAMPLES):
                file.seek(start + (header.file_bytes - start) * place // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
            forget(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{header.path.name}: cannot be read ({error.strerror}).") from error
    return digest.hexdigest()


def forget(handle: int, offset: int = 0, count: int = 0) -> None:
    """Drop these bytes of an open file (count 0: up to its end) from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, count, os.POSIX_FADV_DONTNEED)
