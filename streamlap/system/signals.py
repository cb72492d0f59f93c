"""Stops on request: a signal, or a time that is up, is honoured at the next commit; a second SIGINT stops at once."""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from types import FrameType

from streamlap.errors import Interrupted, RecipeError, shown

log = logging.getLogger(__name__)

SECONDS = (86_400, 3_600, 60, 1)
"""In a day, an hour, a minute, a second."""


def parse_time(text: str | float | None, what: str) -> float:
    """`3h50m`, `90s`, or a number of seconds -> seconds; None is for ever. Raises RecipeError that names `what`."""
    if text is None:
        return math.inf
    seconds = 0.0
    if not isinstance(text, str):
        endless = isinstance(text, int) and abs(text) >= 2**63
        if isinstance(text, Real) and not isinstance(text, bool) and not endless:
            seconds = float(text)
    elif parts := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text):
        seconds = sum(float(count or 0) * unit for count, unit in zip(parts.groups(), SECONDS, strict=True))
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    if not 0 < seconds < math.inf:
        raise RecipeError(f"{what} is {shown(text)}; wanted a time like 3h50m, 45m or 90s.")
    return seconds


class Stops:
    """What a run asks between two commits. Made by `stop_requests`."""

    def __init__(self, deadline: float, again: str) -> None:
        self._deadline, self._again = deadline, again
        self.asked: list[int] = []
        """The signals that came so far."""

    def due(self, moved: bool = True) -> bool:
        """Whether to stop here. Time that is up counts only where this run has `moved` on: else one that is given too little,
        again and again, would never end."""
        return bool(self.asked) or (moved and time.monotonic() >= self._deadline)

    def stopped(self, where: str) -> Interrupted:
        """What to raise then."""
        return Interrupted(f"stopped {where}; go on with: {self._again}")


@contextmanager
def stop_requests(deadline: float, again: str) -> Iterator[Stops]:
    """Notes SIGINT and SIGTERM for the block; the old handlers return at its end.

    Outside the main thread, where Python allows no handlers, only the deadline counts.

    Args: deadline, on the clock of `time.monotonic`, which no change of the system's time moves; again, the command that goes
    on.
    """
    stops = Stops(deadline, again)
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return

    struck = threading.Event()

    def note(number: int, _: FrameType | None) -> None:
        if struck.is_set():
            return  # the commit under way is being waited for; a third may not tear the lock from it
        if stops.asked and number == signal.SIGINT:
            struck.set()
            raise KeyboardInterrupt  # no Exception, which logging and other libraries may swallow where it strikes
        stops.asked.append(number)
        log.warning("stopping at the next commit (%s); press Ctrl-C to stop at once", signal.strsignal(number))

    with handlers(note):
        try:
            yield stops
        except KeyboardInterrupt as stop:
            raise Interrupted(f"stopped at once; what was committed is kept, go on with: {again}") from stop


class Stopped(BaseException):
    """A signal came where nothing is under way that could be finished first."""


@contextmanager
def stops_at_once() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped` for the block: no KeyboardInterrupt, which command line libraries turn into an exit
    code of their own. Inside it `stop_requests` has the word."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(signal.strsignal(number))

    with handlers(stop):
        yield


@contextmanager
def handlers(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """`handle` has SIGINT and SIGTERM for the block."""
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            if handler is not None:  # one that was not set from Python
                signal.signal(number, handler)
