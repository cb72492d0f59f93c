"""Meters: seconds by phase, bytes moved, peak memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from streamlap.accelerator import vram

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peaks() -> None:
    """Count this process's peaks anew: RAM where the kernel offers that (Linux), VRAM where there is any."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")
    vram.reset_peak()


def ram_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_ram_bytes() -> int:
    """Highest resident set of this process since `reset_peaks`; the present one where the kernel does not tell."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return ram_bytes()


def peak_vram_bytes() -> int:
    """Most device memory that torch had given out at one time since `reset_peaks`."""
    return vram.peak()


def bytes_moved(pid: int | None = None) -> tuple[int, int]:
    """Bytes that a process, this one by default, has read and written so far, by any file; zeros where nothing counts them."""
    with contextlib.suppress(AttributeError, OSError, psutil.Error):
        counters = psutil.Process(pid).io_counters()
        return int(counters.read_chars), int(counters.write_chars)
    return 0, 0


class PhaseClock:
    """Seconds spent in each named phase; a phase entered again adds up, and one inside another is not in the other's time.
    `notice` is told the name of each that begins."""

    def __init__(self, notice: Callable[[str], None] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self._notice = notice
        self._inside = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start, before, self._inside = time.perf_counter(), self._inside, 0.0
        self._notice(name)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inside
            self._inside = before + spent
