"""Whole numbers out of a .npy file. What its header promises is held against the file's size before memory is taken for it.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamlap.errors import shown

READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,
}
"""Version of the format -> what reads a header of it. 3.0 is 2.0 with names of fields in UTF-8, and numbers have no fields."""
Integers = npt.NDArray[np.integer]


@dataclass(frozen=True, kw_only=True)
class IntegerFile:
    """The array in a .npy file, of one or two axes, of which parts can be read."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[np.integer]
    offset: int
    """Bytes before the first number."""
    by_columns: bool
    """Whether the numbers of a column lie side by side (Fortran order), so that no part of a row can be read alone."""

    @classmethod
    def open(cls, path: Path) -> IntegerFile:
        """From the header alone. Raises TypeError for other arrays, ValueError where it is none, and what numpy raises."""
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in READERS:
                raise ValueError(f"format version {version}; numpy.save writes (1, 0) for numbers")
            shape, by_columns, dtype = READERS[version](file)
            offset = file.tell()
        if dtype.hasobject:
            raise TypeError("pickled Python objects, which can run code when opened; wanted whole numbers")
        if len(shape) not in (1, 2) or dtype.kind not in "iu" or 0 in shape:
            raise TypeError(f"{shown(str(dtype))[1:-1]} {shown(shape)}; wanted whole numbers of shape [T] or [N, L]")
        wanted, found = math.prod(shape) * dtype.itemsize, path.stat().st_size - offset
        if any(type(size) is not int or size < 0 for size in shape) or wanted != found:
            raise ValueError(f"shape {shown(shape)} of {dtype} takes {shown(wanted)} bytes, and the file has {found}")
        return cls(path=path, shape=shape, dtype=dtype, offset=offset, by_columns=by_columns and len(shape) == 2)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def read(self) -> Integers:
        """All of it."""
        with self.path.open("rb") as file:
            array: Integers = np.lib.format.read_array(file, allow_pickle=False)
        return array

    def spans(self, starts: Iterable[int], length: int) -> Iterator[Integers]:
        """`length` numbers from each of the places, counted row after row, fewer at the end. Of a file by columns all is read.

        Nothing is mapped: the pages of a mapping count as memory of the process.
        """
        if self.by_columns:
            numbers = self.read().ravel()
            yield from (numbers[start : start + length] for start in starts)
            return
        size = self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            for start in starts:
                wanted = min(length, self.count - start) * size
                file.seek(self.offset + start * size)
                raw = file.read(wanted)
                if len(raw) != wanted:
                    raise ValueError(f"it ends before its number {self.count}")
                yield np.frombuffer(raw, self.dtype)


def read_integers(path: Path) -> Integers:
    """The array in `path`, of one or two axes. Raises as `IntegerFile.open` does."""
    return IntegerFile.open(path).read()
