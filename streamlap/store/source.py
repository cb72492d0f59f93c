"""Shards -> tensors. Only headers are kept; each tensor is read by `preadv` into its own memory, and no file stays mapped.

A mapped shard counts into the process's memory for as long as the map is open; a positioned read costs its buffer alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from streamlap.errors import CheckpointError
from streamlap.store.header import Header, TensorInfo, byte_view, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
CHUNK_BYTES = 1 << 26


class TensorSource(Protocol):
    """Anything tensors can be read from by name. The pipeline asks for nothing more."""

    headers: dict[str, Header]

    def names(self) -> Iterable[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str) -> torch.Tensor: ...


class SafetensorsFolder:
    """A local checkpoint folder: one `model.safetensors`, or shards behind an index.

    Raises CheckpointError at once when a shard is missing, truncated, lies in its header, or lies outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shards = _shard_names(folder)
        self.headers = {shard: read_header(folder / shard) for shard in sorted(set(shards.values()))}
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
                    f"{INDEX_NAME} says that tensor {name!r} is in {shard}, and it is not there. Fetch both files again."
                )

    def names(self) -> Iterable[str]:
        return self._tensors

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(
                f"tensor {name!r} is missing from {self.folder}; wanted it in one of its shards, or a config.json without it."
            )
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, in memory of its own. Non-finite numbers raise CheckpointError."""
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        view, offset = byte_view(tensor), 0
        for chunk in read_chunks(info):
            view[offset : offset + len(chunk)] = chunk
            offset += len(chunk)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"tensor {name!r} in {info.path.name} has {bad} NaN or infinite entries of {info.numel}; "
                "wanted finite weights. Fetch the checkpoint again or repair it."
            )
        return tensor


def read_chunks(info: TensorInfo) -> Iterator[bytes]:
    """The tensor's bytes in pieces of at most `CHUNK_BYTES`; the pages read are dropped from the page cache."""
    try:
        handle = os.open(info.path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{info.path.name}: {error.strerror} while reading tensor {info.name!r}.") from error
    try:
        offset = info.begin
        while offset < info.end:
            chunk = os.pread(handle, min(CHUNK_BYTES, info.end - offset), offset)
            if not chunk:
                raise CheckpointError(f"{info.path.name} ended inside tensor {info.name!r}: it was cut while in use.")
            yield chunk
            offset += len(chunk)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, info.begin, info.nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{info.path.name}: {error.strerror} while reading tensor {info.name!r}.") from error
    finally:
        os.close(handle)


def _shard_names(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name; a single file gives {"": "model.safetensors"}."""
    if (folder / INDEX_NAME).is_file():
        return _read_index(folder)
    if (folder / SINGLE_NAME).is_file():
        return {"": SINGLE_NAME}
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened; wanted "
            "safetensors. Convert once where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    raise CheckpointError(f"{folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}; wanted a safetensors checkpoint.")


def _read_index(folder: Path) -> dict[str, str]:
    try:
        table = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(shard) for name, shard in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{INDEX_NAME} cannot be parsed ({error!r}); wanted an object with weight_map."
        ) from error
    for name, shard in pairs.items():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX_NAME} puts tensor {name!r} into {shard!r}; wanted a .safetensors file inside {folder}. "
                "Do not trust it."
            )
        if not os.path.isfile(folder / shard):  # unlike Path.is_file, no for a name that no file can have
            raise CheckpointError(
                f"shard {shard} is missing; {INDEX_NAME} wants it for tensor {name!r}. Fetch it again."
            )
    return pairs
