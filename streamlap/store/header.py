"""The header of one safetensors file, parsed and checked before a byte of its data is trusted.

Format: 8 bytes little-endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data
without holes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from streamlap.errors import CheckpointError, shown
from streamlap.untrusted.json import parse_json

MAX_HEADER_BYTES = 100_000_000
MAX_NAME = 512
"""Characters in the name of a tensor."""
MAX_DIMS = 8
POINTER = b"version https://git-lfs."
"""How a file begins that `git clone` left in the place of a large one."""
LFS_ADVICE = "Run git lfs pull in that clone, or fetch it with hf download"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, not copied."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies: `[begin, end)` are byte offsets from the start of the file.

    With a `step` it is in runs of `run` bytes, each of which begins so many bytes behind the one before; where it is
    `transposed`, these are its columns. `blank` bytes of zeros, which no file has, come first.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    run: int = 0
    step: int = 0
    transposed: bool = False
    blank: int = 0
    stamp: tuple[int, int] | None = None
    """Bytes and time of change of the file when its header was read, by which `source` sees that it was changed since."""

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def place(self, offset: int) -> tuple[int, int]:
        """Where in the file the byte `offset` of the tensor is, and how many of it follow there with that one. Not of one that
        is transposed."""
        offset -= self.blank
        if not self.step:
            return self.begin + offset, self.end - self.begin - offset
        number, inside = divmod(offset, self.run)
        return self.begin + number * self.step + inside, self.run - inside

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    path: Path
    tensors: dict[str, TensorInfo]
    file_bytes: int
    digest: str
    """sha256 of the raw header: with the file's size, a cheap fingerprint of the shard."""


def file_stamp(handle: int) -> tuple[int, int]:
    stat = os.fstat(handle)
    return stat.st_size, stat.st_mtime_ns


def _fault(path: Path, seen: str, wanted: str, advice: str = "Take it again from where it came") -> CheckpointError:
    return CheckpointError(f"{path.name}: {seen}; wanted {wanted}. {advice} ({path}).")


def read_header(path: Path) -> Header:
    """Parse and check the header of `path`.

    Raises CheckpointError when the file is missing, cut short, longer than its header says, or the header lies.
    """
    try:
        with path.open("rb") as file:
            stamp = file_stamp(file.fileno())
            header = parse_header(path, file, stamp[0])
            return replace(header, tensors={n: replace(info, stamp=stamp) for n, info in header.tensors.items()})
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror}); wanted a shard at {path}.") from error


def parse_header(path: Path, file: IO[bytes], size: int) -> Header:
    """Parse and check the header of a shard that is open at its first byte and `size` bytes long, wherever its bytes are.

    `path` is where the shard lies, or will lie once it is fetched. Raises CheckpointError as `read_header` does, and what
    `file` raises.
    """
    start = file.read(8)
    if start == POINTER[:8]:
        raise _fault(path, "the file is a pointer of Git LFS, and no weights", "the file it stands for", LFS_ADVICE)
    length = int.from_bytes(start, "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise _fault(path, f"header length {length} in a file of {size} bytes", "a whole safetensors file")
    raw = file.read(length)
    if len(raw) < length or not raw.startswith(b"{"):
        raise _fault(path, f"header of {length} bytes begins with {shown(raw[:8])}", "a JSON object")
    try:
        table = parse_json(raw)
    except ValueError as error:
        raise _fault(path, f"header is not JSON ({error})", "a JSON object") from error
    _check_metadata(path, table.pop("__metadata__", None))
    tensors = {name: _parse_row(path, name, row, 8 + length) for name, row in table.items()}
    _check_layout(path, tensors, 8 + length, size)
    return Header(path=path, tensors=tensors, file_bytes=size, digest=hashlib.sha256(raw).hexdigest())


def check_name(name: str) -> bool:
    """Whether messages may show a tensor's name as it is."""
    return len(name) <= MAX_NAME and name.isprintable()


def _check_metadata(path: Path, table: Any) -> None:
    """What the format allows there is text by name, or null; none of it is used."""
    if table is None:
        return
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise _fault(path, f"__metadata__ is {shown(table)}", "texts by name")


def _parse_row(path: Path, name: str, row: Any, data_start: int) -> TensorInfo:
    if not check_name(name):
        raise _fault(path, f"a tensor is called {shown(name)}", f"at most {MAX_NAME} printable characters")
    try:
        dtype, shape, (begin, end) = row["dtype"], row["shape"], row["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _fault(path, f"tensor {name!r} is described as {shown(row)}", "dtype, shape and data_offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        seen = f"tensor {name!r} has dtype {shown(dtype)}"
        raise _fault(path, seen, f"one of {', '.join(DTYPES)}", "Save it in one of them")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if any(type(number) is not int or not 0 <= number < 2**60 for number in numbers):
        seen = f"tensor {name!r} has shape {shown(shape)} and offsets {shown(begin)}, {shown(end)}"
        raise _fault(path, seen, "whole numbers")
    if len(shape) > MAX_DIMS:
        raise _fault(path, f"tensor {name!r} has {len(shape)} dimensions", f"at most {MAX_DIMS}")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise _fault(path, f"tensor {name!r}: {dtype} {shape} in {end - begin} bytes", "offsets that fit the shape")
    info = {"begin": data_start + begin, "end": data_start + end}
    return TensorInfo(name=name, path=path, dtype=DTYPES[dtype], shape=tuple(shape), **info)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """No hole, no overlap, and the file ends where the last tensor ends."""
    expected = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != expected:
            kind = "overlaps the tensor before it" if info.begin < expected else "leaves a hole before it"
            raise _fault(path, f"tensor {info.name!r} {kind} (byte {info.begin})", f"it to begin at byte {expected}")
        expected = info.end
    if expected != size:
        state = "truncated" if size < expected else "longer than its header says"
        raise _fault(path, f"file is {state}: {size} bytes", f"{expected} bytes")
