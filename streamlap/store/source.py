"""Shards -> tensors. Only headers are kept; each tensor is read by `preadv` into its own memory, and no file stays mapped.

A mapped shard counts into the process's memory for as long as the map is open; a positioned read costs its buffer alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from streamlap.errors import CheckpointError, shown
from streamlap.linalg.statistics import all_finite
from streamlap.store.foreign import describe_foreign
from streamlap.store.header import Header, TensorInfo, byte_view, check_name, file_stamp, read_header
from streamlap.untrusted.paths import INDEX_BYTES, checked, read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
PICKLE_INDEX = "pytorch_model.bin.index.json"
CHUNK_BYTES = 1 << 26
"""Bytes in one read; a multiple of every item size."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Pieces of a shard that stand for all of its data, and their size."""


class TensorSource(Protocol):
    """Anything tensors can be read from by name. The pipeline asks for nothing more."""

    headers: dict[str, Header]

    def names(self) -> Iterable[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str) -> torch.Tensor: ...


class SafetensorsHeaders:
    """The tensors of a checkpoint as its headers tell of them; the weights themselves are elsewhere.

    `place` is what messages call the checkpoint, `shards` comes from `find_shards`, `headers` has each of them by name.
    Raises CheckpointError when a tensor stands twice, or not where the index has it.
    """

    def __init__(self, place: str, shards: Mapping[str, str], headers: dict[str, Header]) -> None:
        self.place, self.headers = place, headers
        self._tensors: dict[str, TensorInfo] = {}
        for header in self.headers.values():
            for name, info in header.tensors.items():
                if name in self._tensors:
                    first = self._tensors[name].path.name
                    raise CheckpointError(f"tensor {name!r} stands in {first} and in {info.path.name}; wanted it once.")
                self._tensors[name] = info
        for name, shard in shards.items():
            if name and name not in self.headers[shard].tensors:
                raise CheckpointError(
                    f"{INDEX_NAME} says that tensor {name!r} is in {shard}, and it is not there; wanted both of one "
                    "checkpoint."
                )

    def names(self) -> Iterable[str]:
        return self._tensors

    def info(self, name: str) -> TensorInfo:
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
    """A local checkpoint folder: one `model.safetensors`, or shards behind an index.

    Raises CheckpointError at once when a shard is missing, truncated, lies in its header, or lies outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        shards = find_shards(folder, files_in(folder), str(folder))
        headers = {shard: read_header(checked(folder, folder / shard)) for shard in sorted(set(shards.values()))}
        super().__init__(str(folder), shards, headers)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, in memory of its own. Non-finite numbers raise CheckpointError."""
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        read_into(info, byte_view(tensor))
        require_finite(tensor, name, info.path.name)
        return tensor


def require_finite(tensor: torch.Tensor, name: str, file: str) -> None:
    """Raise CheckpointError where a float tensor holds NaN or infinities."""
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor.float())).sum())
        raise CheckpointError(
            f"tensor {name!r} in {file} has {bad} NaN or infinite entries of {tensor.numel()}; "
            "wanted finite weights. Take the checkpoint from its source again, or mend it."
        )


def read_into(info: TensorInfo, view: memoryview) -> None:
    """Fill `view` with the tensor's bytes, by positioned reads; the pages read are dropped from the page cache."""
    handle = _open(info)
    try:
        _read_all(handle, info, view, drop=True)
    except OSError as error:
        raise CheckpointError(f"{info.path.name}: {error.strerror} while reading tensor {info.name!r}.") from error
    finally:
        os.close(handle)


def _read_all(handle: int, info: TensorInfo, view: memoryview, drop: bool = False) -> None:
    """Fill `view` with the bytes of `info`, however few come at a time; `drop` them from the page cache as they come."""
    done = 0
    while done < info.nbytes:
        count = os.preadv(handle, [view[done : done + CHUNK_BYTES]], info.begin + done)
        if not count:
            raise CheckpointError(f"{info.path.name} ended inside tensor {info.name!r}: it was cut while in use.")
        if drop:
            forget(handle, info.begin + done, count)
        done += count


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
                begin = info.begin + rows[first] * width
                piece = replace(info, begin=begin, end=begin + (place - first) * width)
                _read_all(handle, piece, view[first * width : place * width])
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
    for begin in range(info.begin, info.end, CHUNK_BYTES):
        piece = replace(info, begin=begin, end=min(begin + CHUNK_BYTES, info.end))
        read_into(piece, byte_view(buffer)[: piece.nbytes])
        yield buffer[: piece.nbytes]


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


def files_in(folder: Path) -> set[str]:
    """Names of the files right in `folder`; none where there is no such folder."""
    return {path.name for path in folder.glob("*") if os.path.isfile(path)}


def find_shards(folder: Path, files: Collection[str], place: str) -> dict[str, str]:
    """Tensor name -> shard file name; a single file gives {"": "model.safetensors"}.

    `files` are the names in the checkpoint `place`. Of these only the index need lie in `folder`.
    Raises CheckpointError when there are no safetensors, or not all that the index names.
    """
    if INDEX_NAME in files:
        return _read_index(folder, files, place)
    if SINGLE_NAME in files:
        return {"": SINGLE_NAME}
    pickles = sorted(name for name in files if Path(name).suffix in PICKLE_SUFFIXES or name == PICKLE_INDEX)
    if pickles:
        names = ", ".join(shown(name)[1:-1] for name in pickles[:3])
        raise CheckpointError(
            f"{place} holds only pickled weights ({names}), which can run code when opened; wanted "
            "safetensors. Convert once where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    if reason := describe_foreign(folder, files, place):
        raise CheckpointError(reason)
    others = sorted(name for name in files if name.endswith(".safetensors"))
    seen = f" ({', '.join(shown(name)[1:-1] for name in others[:3])} is there)" if others else ""
    advice = (
        f" A file that is whole by itself is to be called {SINGLE_NAME}." if len(others) == 1
        else " Shards need their index." if others else ""
    )  # fmt: skip
    raise CheckpointError(
        f"{place} holds neither {INDEX_NAME} nor {SINGLE_NAME}{seen}; wanted a safetensors checkpoint.{advice}"
    )


def _read_index(folder: Path, files: Collection[str], place: str) -> dict[str, str]:
    table = read_object(folder, INDEX_NAME, INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise CheckpointError(f"{INDEX_NAME} has weight_map {shown(table)}; wanted tensor name -> shard file name.")
    for name, shard in table.items():
        if not check_name(name) or not check_name(shard) or "\\" in shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{INDEX_NAME} puts tensor {shown(name)} into {shown(shard)}; wanted a .safetensors file inside {place}. "
                "Do not trust it."
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX_NAME} puts tensor {name!r} into {shown(shard)}; wanted a .safetensors file. Pickled weights can run "
                "code when opened, and no other kind is read."
            )
        if shard not in files:
            raise CheckpointError(
                f"shard {shown(shard)[1:-1]} is missing; {INDEX_NAME} wants it for tensor {name!r}. Fetch it from where "
                "the others came."
            )
    return table
