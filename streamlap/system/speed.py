"""How fast this machine is: what a forecast of seconds divides FLOP and bytes by. A second or two to measure, kept for a month.

Each rate is the best of a few tries, for whatever comes between makes a try slower and never faster. The random numbers have
a generator of their own, so that measuring moves no other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamlap.errors import BudgetError, CheckpointError, StreamlapError
from streamlap.linalg.lowrank import eigh
from streamlap.linalg.products import product
from streamlap.untrusted.json import read_limited

log = logging.getLogger(__name__)

CACHE_SECONDS = 30 * 86400.0
"""Age at which a measurement is too old: a disk fills up, a driver is replaced."""

CACHE_BYTES = 1 << 20

TRIES = 4
PATIENCE = 0.5
"""Seconds after which a computation is not tried again, however slow."""
DISK_PATIENCE = 1.5
"""Seconds after which no further piece is read or written."""

CPU_MATMUL = {"tokens": 512, "columns": 2048, "rows": 2048}
"""Enough for the full rate of a CPU, in milliseconds. A GPU needs the larger default."""
DISK_BYTES, PIECE_BYTES, UPLOAD_BYTES = 1 << 28, 1 << 26, 1 << 27


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Rates of this machine, measured."""

    matmul: float
    """FLOP/s of a forward's product in the compute dtype on the device; a multiply-add is two."""
    matmul64: float
    """FLOP/s of a solver's product in float64."""
    matmul32: float
    """FLOP/s of the same in float32."""
    eigh: float
    """n^3 per second of an eigen-decomposition of n x n numbers in float64 on the device, with the solver's threads."""
    read: float
    """Bytes/s from a file into memory, nothing of it in the page cache."""
    write: float
    """Bytes/s from memory into a file, until they are on the disk."""
    upload: float
    """Bytes/s from pinned memory to the device; on a CPU from memory to memory."""


def calibrated(device: str, dtype: torch.dtype, folder: Path) -> Speed:
    """`measure`, or what it gave within the last month for this device, dtype, number of threads, torch and file system.

    It is kept in `$XDG_CACHE_HOME/streamlap/machine.json`, by default under ~/.cache. A cache that cannot be read or
    written only costs the time to measure again.
    """
    place, key = _cache_file(), _key(device, dtype, folder)
    entries = _load(place)
    if key not in entries:
        entries[key] = asdict(measure(device, dtype, folder)) | {"measured": time.time()}
        _store(place, entries)
    return Speed(**{field.name: entries[key][field.name] for field in fields(Speed)})


def measure(device: str, dtype: torch.dtype, folder: Path) -> Speed:
    """All rates, the disk's for the file system of `folder`, which need not exist yet. Takes a second or two.

    Raises BudgetError when the disk is full, StreamlapError when nothing can be written there.
    """
    sizes: dict[str, Any] = CPU_MATMUL if torch.device(device).type == "cpu" else {}
    with _written(_existing(folder), DISK_BYTES) as (path, write):
        read = read_rate(path, DISK_BYTES)
    return Speed(
        matmul=matmul_rate(device, dtype, **sizes),
        matmul64=matmul_rate(device, torch.float64, multiply=product, **sizes),
        matmul32=matmul_rate(device, torch.float32, multiply=product, **sizes),
        eigh=eigh_rate(device),
        read=read,
        write=write,
        upload=upload_rate(device),
    )


def matmul_rate(
    device: str, dtype: torch.dtype, tokens: int = 2048, columns: int = 4096, rows: int = 4096,
    multiply: Callable[..., torch.Tensor] = torch.matmul,
) -> float:  # fmt: skip
    """FLOP/s of a linear of shape [rows, columns] on that many tokens."""
    x, w = (_random(device, count, columns).to(dtype) for count in (tokens, rows))
    return 2 * tokens * columns * rows / _seconds(lambda: multiply(x, w.T), device)


def eigh_rate(device: str, size: int = 2048) -> float:
    """size^3 per second of a float64 eigen-decomposition as the solvers do it."""
    x = _random(device, size, size).double()
    gram = x @ x.T
    return size**3 / _seconds(lambda: eigh(gram), device)


def upload_rate(device: str) -> float:
    """Bytes/s into the device's memory; from pinned memory, unless the device is the CPU itself."""
    away = torch.device(device).type != "cpu"
    source = torch.ones(UPLOAD_BYTES, dtype=torch.uint8, pin_memory=away)
    target = torch.empty_like(source, device=device)
    return UPLOAD_BYTES / _seconds(lambda: target.copy_(source, non_blocking=away), device)


def read_rate(path: Path, nbytes: int) -> float:
    """Bytes/s of reading the first `nbytes` of a file, or as far as `DISK_PATIENCE` goes. Its page cache is dropped first.

    Raises CheckpointError when the file cannot be read or is empty.
    """
    ones: Any = np.ones(min(PIECE_BYTES, nbytes), dtype=np.uint8)  # not empty, so that its pages are there already
    buffer = memoryview(ones)
    try:
        with path.open("rb", buffering=0) as file:
            _drop_cache(file.fileno())
            done, start = 0, time.perf_counter()
            while done < nbytes and time.perf_counter() - start < DISK_PATIENCE:
                count = os.preadv(file.fileno(), [buffer[: nbytes - done]], done)
                if not count:
                    break
                done += count
            seconds = time.perf_counter() - start
            _drop_cache(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror} while timing reads; wanted a readable file.") from error
    if not done:
        raise CheckpointError(f"{path} is empty; wanted a file with bytes to time reads by.")
    return done / seconds


def write_rate(folder: Path, nbytes: int = DISK_BYTES) -> float:
    """Bytes/s of writing `nbytes`, or as many as `DISK_PATIENCE` allows, to a temporary file in `folder`, synced."""
    with _written(folder, nbytes) as (_, rate):
        return rate


@contextlib.contextmanager
def _written(folder: Path, nbytes: int) -> Iterator[tuple[Path, float]]:
    """A temporary file that is on the disk, gone after the block, and the bytes/s at which it got there."""
    piece = memoryview(np.random.default_rng(0).bytes(min(PIECE_BYTES, nbytes)))  # no file system can squeeze these
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".streamlap-", suffix=".tmp", buffering=0) as file:
            done, start = 0, time.perf_counter()
            while done < nbytes and time.perf_counter() - start < DISK_PATIENCE:
                done += file.write(piece[: nbytes - done])
                os.fsync(file.fileno())
            yield Path(file.name), done / (time.perf_counter() - start)
    except OSError as error:
        kind = BudgetError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StreamlapError
        raise kind(
            f"{folder}: {error.strerror} while timing writes of {nbytes:,} bytes; wanted room for them and leave to write. "
            "Free some space or choose another folder."
        ) from error


def _drop_cache(handle: int) -> None:
    with contextlib.suppress(OSError):
        os.fsync(handle)  # pages that are not on the disk yet would stay
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(work: Callable[[], object], device: str) -> float:
    """The shortest time of one call, of up to `TRIES`."""
    if torch.device(device).type != "cpu":
        work()  # starts the device's libraries and clocks, which may take longer than `PATIENCE`
    _synchronise(device)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < TRIES and (not times or time.perf_counter() - begun < PATIENCE):
        start = time.perf_counter()
        work()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronise(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def _random(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _key(device: str, dtype: torch.dtype, folder: Path) -> str:
    parts = [_cpu_model(), f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", str(dtype)]
    if torch.device(device).type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join([*parts, f"file system {_existing(folder).stat().st_dev}"])


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return platform.processor() or platform.machine()


def _cache_file() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen if os.path.isabs(chosen) else os.path.expanduser("~/.cache")) / "streamlap" / "machine.json"


def _load(place: Path) -> dict[str, dict[str, float]]:
    """The entries that are whole and young enough; any other is as if it were not there."""
    try:
        table = json.loads(read_limited(place, CACHE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: row for key, row in table.items() if _usable(row)} if isinstance(table, dict) else {}


def _usable(row: Any) -> bool:
    names = {"measured", *(field.name for field in fields(Speed))}
    if not isinstance(row, dict) or set(row) != names:
        return False
    good = all(isinstance(number, float) and math.isfinite(number) and number > 0 for number in row.values())
    return good and 0 <= time.time() - row["measured"] < CACHE_SECONDS


def _store(place: Path, entries: dict[str, dict[str, float]]) -> None:
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        if not place.is_absolute():
            raise FileNotFoundError(errno.ENOENT, "no home folder", str(place))  # expanduser left the ~ as it was
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        log.info("the rates of this machine cannot be kept (%s), and will be measured again", error)
