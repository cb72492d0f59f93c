"""The bar: what it says, when it is silent, and that nothing of it stays."""

from __future__ import annotations

import errno
import io
import re
import sys
import threading
import time

import pytest
import torch

from streamlap.accelerator import vram
from streamlap.system import progress
from streamlap.system.progress import RECENT, Progress

pytestmark = pytest.mark.usefixtures("no_thread_stays")

SWITCHES = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time and bytes moved, set by hand."""

    now = 0.0
    moved = 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(progress, "bytes_moved", lambda: (clock.moved, 0))
    monkeypatch.setattr(progress, "ram_bytes", lambda: 3 << 29)
    return clock


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have switched bars off."""
    for switch in SWITCHES:
        monkeypatch.delenv(switch, raising=False)


# --- the time to go ------------------------------------------------------------------------------------------------------


def test_before_the_first_layer_is_done_nothing_is_foretold(clock: Clock) -> None:
    bar = Progress("compress", 4)
    clock.now = 10.0
    assert bar.seconds_left() is None
    assert bar.describe().endswith("ETA after this layer")


def test_the_time_to_go_comes_from_the_layers_done(clock: Clock) -> None:
    bar = Progress("compress", 4)
    clock.now = 10.0
    bar.next()
    assert bar.seconds_left() == 30.0
    clock.now = 14.0
    assert bar.seconds_left() == 26.0, "the layer in hand counts down"
    clock.now = 30.0
    bar.next()
    assert bar.seconds_left() == 2 * (10 + 20) / 2
    clock.now = 500.0
    assert bar.seconds_left() == 0.0, "a layer that takes long gives no time below zero"


def test_only_the_last_layers_foretell(clock: Clock) -> None:
    bar = Progress("compress", 100, first=0)
    for seconds in [1000.0] * 5 + [2.0] * RECENT:
        clock.now += seconds
        bar.next()
    assert bar.seconds_left() == (100 - 5 - RECENT) * 2.0


def test_a_resumed_run_knows_the_time_from_the_layers_before(clock: Clock) -> None:
    bar = Progress("compress", 10, first=6, seconds=(3.0,) * 6)
    assert bar.seconds_left() == 12.0
    clock.now = 11.0
    bar.next()
    assert bar.seconds_left() == pytest.approx(3 * (6 * 3 + 11) / 7)


# --- what it says --------------------------------------------------------------------------------------------------------


def test_it_says_phase_speed_memory_and_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vram, "in_use", lambda: False)
    bar = Progress("compress", 3, first=1, seconds=(60.0,))
    bar.phase("capture", 1, 5)
    clock.now, clock.moved = 4.0, 500_000_000
    assert bar.describe() == "capture 2/5, 125 MB/s, RSS 1.50 GiB, ETA 01:56"
    bar.phase("solve")
    assert bar.describe() == "solve, 125 MB/s, RSS 1.50 GiB, ETA 01:56"


def test_the_speed_is_that_of_the_layer_in_hand(clock: Clock) -> None:
    bar = Progress("compress", 3)
    clock.now, clock.moved = 1.0, 900_000_000
    bar.next()
    clock.now, clock.moved = 3.0, 1_000_000_000
    assert ", 50 MB/s, " in bar.describe()


def test_memory_of_a_gpu_is_said_too(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vram, "in_use", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 << 29)
    clock.now = 1.0
    assert ", RSS 1.50 GiB, VRAM 2.50 GiB, " in Progress("compress", 3).describe()


# --- where it says it ----------------------------------------------------------------------------------------------------


def run_bar(stream: io.StringIO, patch: pytest.MonkeyPatch) -> str:
    """What a bar over three layers, of which one was done before, writes; with a terminal it ticks at least once."""
    patch.setattr(sys, "stderr", stream)
    patch.setattr(progress, "TICK_SECONDS", 0.005)
    with Progress("compress", 3, first=1, seconds=(60.0,)) as bar:
        bar.phase("capture", 0, 2)
        deadline = time.monotonic() + (10 if stream.isatty() else 0)
        while "capture 1/2" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
        bar.next()
    return stream.getvalue()


@pytest.mark.usefixtures("loud")
def test_on_a_terminal_it_is_a_bar_that_moves_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    said = run_bar(Terminal(), monkeypatch)
    assert "compress 1/3 |" in said
    assert re.search(r"capture 1/2, \d+ MB/s, RSS \d\.\d\d GiB.*, ETA 0[12]:\d\d", said)
    assert "compress 2/3 |" in said


@pytest.mark.usefixtures("loud")
def test_elsewhere_it_is_one_line_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    said = run_bar(io.StringIO(), monkeypatch)
    assert re.fullmatch(r"compress 2/3 in \d+\.\d s, \d+ MB/s, RSS \d\.\d\d GiB.*, ETA 00:\d\d\n", said)


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("value", ["1", "true", "ON", "yes"])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_either_switch_silences_it(
    monkeypatch: pytest.MonkeyPatch, switch: str, value: str, stream: type[io.StringIO]
) -> None:
    monkeypatch.setenv(switch, value)
    quiet = stream()
    monkeypatch.setattr(sys, "stderr", quiet)
    threads = threading.active_count()
    with Progress("compress", 3) as bar:
        assert threading.active_count() == threads
        bar.next()
    assert quiet.getvalue() == ""


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize("value", ["0", "", "off", "false"])
def test_a_switch_that_says_no_leaves_it_on(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for switch in SWITCHES:
        monkeypatch.setenv(switch, value)
    assert "compress 2/3" in run_bar(io.StringIO(), monkeypatch)


@pytest.mark.usefixtures("loud")
def test_its_thread_ends_with_the_block_also_where_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does tqdm's own monitor stay, which it starts for other bars."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    before, inside = set(threading.enumerate()), set()

    def fail_in_the_block() -> None:
        with Progress("compress", 3):
            inside.update(threading.enumerate())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_in_the_block()
    assert {thread.name for thread in inside - before} == {"progress"}
    assert set(threading.enumerate()) == before


# --- no one there to read it ---------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A terminal that is closed after a while, or a log whose disk is full."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal, self.is_gone = terminal, False

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str, /) -> int:
        if self.is_gone:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


@pytest.mark.usefixtures("loud")
@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_outlives_what_it_is_shown_on(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    file = Gone(terminal)
    monkeypatch.setattr(sys, "stderr", file)
    bar = Progress("compress", 3)
    with bar:
        bar.next()
        shown = file.getvalue()
        file.is_gone = True
        bar._bar.last_print_t = 0  # so that the bar is due
        bar.next()
        file.is_gone = False
        bar.next()
    assert shown
    assert file.getvalue() == shown, "it is tried once"
    monkeypatch.setattr(sys, "stderr", Terminal())
    other = threading.Thread(target=lambda: Progress("next", 2).next(), daemon=True)
    other.start()
    other.join(10)
    assert not other.is_alive(), "tqdm's lock is free for the next bar"
