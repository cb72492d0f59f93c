"""Meters and the heap: seconds by phase, peak memory, free disk, and memory that goes back when it is freed."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from streamlap.errors import BudgetError

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 1 << 20


def steady_heap() -> None:
    """Have every block of a MiB or more mapped on its own, so that freeing it gives its memory back at once (glibc).

    By default glibc raises that limit to 32 MiB as blocks are freed; the tensors of one layer after another then come
    from a heap with ever other holes, and the peak of a long run creeps up by whole layers.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def reset_peak_ram() -> None:
    """Let the kernel count this process's peak anew, where it offers that (Linux)."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")


def peak_ram_bytes() -> int:
    """Highest resident set of this process since `reset_peak_ram`; the present one where the kernel does not tell."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def peak_vram_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def existing_ancestor(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def require_disk(path: Path, wanted: int, purpose: str) -> None:
    """Raise BudgetError unless the file system under `path` has `wanted` bytes free."""
    free = shutil.disk_usage(existing_ancestor(path)).free
    if free < wanted:
        raise BudgetError(
            f"{purpose} takes {wanted:,} bytes under {path}, and {free:,} are free. Free some space, choose another "
            "folder or --work, or use fewer --samples."
        )


class PhaseClock:
    """Seconds spent in each named phase; a phase entered again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
