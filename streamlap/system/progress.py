"""The bar: phase, bytes a second, memory and the time still to go, every second, where stderr is a terminal.

TQDM_DISABLE and HF_HUB_DISABLE_PROGRESS_BARS switch it off.

The time to go comes from the layers done so far, those of earlier runs included, so it does not start anew on resume.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from streamlap.accelerator import vram
from streamlap.system.meters import bytes_moved, ram_bytes

TICK_SECONDS = 1.0
FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}, {postfix}"
RECENT = 8
"""Layers whose mean is the forecast for those to come."""
SWITCHES = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")


class _Bar(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0  # no thread of tqdm's own, which would outlive the bar


class Shown:
    """A stream, until it cannot be written any more: a terminal that is gone, or a log on a full disk, ends what is shown, and
    not the run. Nothing is raised, for tqdm would keep its lock, and the next bar of the process would wait for ever."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._gone = stream, False

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, action: str, *text: str) -> None:
        try:
            if not self._gone:
                getattr(self._stream, action)(*text)
        except OSError:
            self._gone = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Progress:
    """A bar over `depth` layers from layer `first`; `seconds` are those that the layers before took."""

    def __init__(self, name: str, depth: int, first: int = 0, seconds: tuple[float, ...] = ()) -> None:
        quiet = any(os.environ.get(switch, "").upper() in {"1", "ON", "YES", "TRUE"} for switch in SWITCHES)
        terminal, self._shown = sys.stderr.isatty(), Shown(sys.stderr)
        self._bar = _Bar(
            total=depth, initial=first, desc=name, bar_format=FORMAT, disable=quiet or not terminal, file=self._shown
        )
        self._name, self._depth, self._lines = name, depth, not quiet and not terminal
        self._seconds, self._left = list(seconds), depth - first
        self._phase, self._began, self._moved = "start", time.perf_counter(), sum(bytes_moved())
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True, name="progress")

    def phase(self, name: str, place: int = 0, of: int = 0) -> None:
        """What the layer in hand is at; of repeated work also how far."""
        self._phase = f"{name} {place + 1}/{of}" if of else name

    def next(self) -> None:
        """A layer is done."""
        now, rate = time.perf_counter(), self._rate()
        self._seconds.append(now - self._began)
        self._began, self._left, self._moved = now, self._left - 1, sum(bytes_moved())
        self._bar.update()
        if self._lines:
            place = f"{self._name} {self._depth - self._left}/{self._depth}"
            line = f"{place} in {self._seconds[-1]:.1f} s, {rate}, {self._memory()}, {self._eta()}"
            tqdm.write(line, file=self._shown)

    def seconds_left(self) -> float | None:
        """Forecast for the layers to come, less what the one in hand has taken; None before the first is done."""
        if not self._seconds:
            return None
        recent = self._seconds[-RECENT:]
        return max(0.0, self._left * sum(recent) / len(recent) - (time.perf_counter() - self._began))

    def describe(self) -> str:
        """What the bar says after its picture."""
        return f"{self._phase}, {self._rate()}, {self._memory()}, {self._eta()}"

    def _rate(self) -> str:
        elapsed = max(time.perf_counter() - self._began, 1e-3)
        return f"{(sum(bytes_moved()) - self._moved) / elapsed / 1e6:.0f} MB/s"

    def _memory(self) -> str:
        device = f", VRAM {vram.allocated() / 2**30:.2f} GiB" if vram.in_use() else ""
        return f"RSS {ram_bytes() / 2**30:.2f} GiB{device}"

    def _eta(self) -> str:
        left = self.seconds_left()
        return f"ETA {tqdm.format_interval(left)}" if left is not None else "ETA after this layer"

    def _tick(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            self._bar.set_postfix_str(self.describe())

    def __enter__(self) -> Progress:
        if not self._bar.disable:
            self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        if self._ticker.is_alive():
            self._ticker.join()
        self._bar.close()
