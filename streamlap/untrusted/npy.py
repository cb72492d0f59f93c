"""Whole numbers out of a .npy file. What its header promises is held against the file's size before memory is taken for it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamlap.errors import shown


def read_integers(path: Path) -> npt.NDArray[np.integer]:
    """The array in `path`, of one or two axes. Raises ValueError where it is none, and what numpy and the system raise."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"format version {version}; numpy.save writes (1, 0) for numbers")
        shape, _, dtype = readers[version](file)
        if dtype.hasobject:
            raise TypeError("pickled Python objects, which can run code when opened; wanted whole numbers")
        if len(shape) not in (1, 2) or dtype.kind not in "iu" or 0 in shape:
            raise TypeError(f"{shown(str(dtype))[1:-1]} {shown(shape)}; wanted whole numbers of shape [T] or [N, L]")
        wanted, found = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
        if any(type(size) is not int or size < 0 for size in shape) or wanted != found:
            raise ValueError(f"shape {shown(shape)} of {dtype} takes {shown(wanted)} bytes, and the file has {found}")
        file.seek(0)
        array: npt.NDArray[np.integer] = np.lib.format.read_array(file, allow_pickle=False)
        return array
