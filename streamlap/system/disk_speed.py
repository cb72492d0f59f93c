"""How fast a disk is. It is measured in a file without a name, where one can be made without harm to others; where none can,
the rates are not known, and nothing fails for it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from streamlap.errors import CheckpointError
from streamlap.system.rate_cache import cache_file, kept

DISK_PATIENCE = 1.5
"""Seconds after which no further piece is read or written."""
DISK_BYTES, PIECE_BYTES = 1 << 28, 1 << 26
SPARE = 4
"""A disk is measured where it has so many times `DISK_BYTES` free: others write there too."""
IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that are no disks."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Rates of a disk."""

    read: float
    """Bytes/s from a file into memory, nothing of it in the page cache."""
    write: float
    """Bytes/s from memory into a file, until they are on the disk."""


def known_disk(work: Path | None) -> Disk | None:
    """Rates of the disk under `work`, which need not exist yet. Without it, or where nothing can be written there, of the disk
    under the cache or under $TMPDIR (default /var/tmp), first where that is the disk of the current folder. None where no disk
    can be measured.

    Kept for a month.
    """
    for folder in disk_folders(work):
        with contextlib.suppress(OSError):
            return kept(f"file system {folder.stat().st_dev}", Disk, functools.partial(measure_disk, folder))
    return None


def disk_folders(work: Path | None) -> list[Path]:
    """Where a disk may be measured, the best first."""
    others = map(_existing, (cache_file().parent, Path(os.environ.get("TMPDIR") or "/var/tmp")))
    here = _device(Path())
    found = sorted((path for path in others if path), key=lambda path: _device(path) != here)
    chosen = work and _existing(work)
    return [chosen, *found] if chosen else found


def measure_disk(folder: Path) -> Disk:
    """Both rates, by a file of `DISK_BYTES` or of what `DISK_PATIENCE` allows. It has no name, so nothing of it is ever left.

    Raises OSError where they cannot be written there, or not without filling the disk or memory.
    """
    if _in_memory(folder) or psutil.disk_usage(str(folder)).free < SPARE * DISK_BYTES:
        raise OSError(errno.ENOSPC, "no disk with room to spare", str(folder))
    piece = memoryview(np.random.default_rng(0).bytes(min(PIECE_BYTES, DISK_BYTES)))  # no file system can squeeze these
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        done, start = 0, time.perf_counter()
        while done < DISK_BYTES and time.perf_counter() - start < DISK_PATIENCE:
            done += file.write(piece[: DISK_BYTES - done])
            os.fsync(file.fileno())
        write = done / (time.perf_counter() - start)
        return Disk(read=_read_rate(file.fileno(), done), write=write)


def read_rate(path: Path, nbytes: int) -> float:
    """Bytes/s of reading the first `nbytes` of a file, or as far as `DISK_PATIENCE` goes. Its page cache is dropped first.

    Raises CheckpointError when the file cannot be read or is empty.
    """
    try:
        with path.open("rb", buffering=0) as file:
            rate = _read_rate(file.fileno(), nbytes)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror} while timing reads; wanted a readable file.") from error
    if not rate:
        raise CheckpointError(f"{path} is empty; wanted a file with bytes to time reads by.")
    return rate


def _read_rate(handle: int, nbytes: int) -> float:
    """The same of an open file; 0 where it is empty."""
    ones: Any = np.ones(min(PIECE_BYTES, nbytes), dtype=np.uint8)  # not empty, so that its pages are there already
    buffer = memoryview(ones)
    _drop_cache(handle)
    done, start = 0, time.perf_counter()
    while done < nbytes and time.perf_counter() - start < DISK_PATIENCE:
        count = os.preadv(handle, [buffer[: nbytes - done]], done)
        if not count:
            break
        done += count
    seconds = time.perf_counter() - start
    _drop_cache(handle)
    return done / seconds


def _drop_cache(handle: int) -> None:
    with contextlib.suppress(OSError):
        os.fsync(handle)  # pages that are not on the disk yet would stay
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _existing(path: Path) -> Path | None:
    """The path, or the nearest folder above it; None where that may not be looked at, and for one that is relative: without a
    home the cache is, and what would be found is the folder where this stands."""
    with contextlib.suppress(OSError):
        if path.is_absolute():
            return next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    return None


def _device(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_dev
    return None


def _in_memory(folder: Path) -> bool:
    """Whether what is written there stays in memory, as far as the system tells."""
    with contextlib.suppress(OSError):
        mounts = {Path(entry.mountpoint): entry.fstype for entry in psutil.disk_partitions(all=True)}
        whole = folder.resolve()
        return next((mounts[path] for path in (whole, *whole.parents) if path in mounts), "") in IN_MEMORY
    return False
