"""Stops on request: a first SIGINT or SIGTERM is noted and honoured at the next commit, a second SIGINT stops at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from streamlap.errors import Interrupted

log = logging.getLogger(__name__)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether a stop was asked for; the old handlers return at the end.

    Outside the main thread, where Python allows no handlers, it always says no.
    """
    requested: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, _: FrameType | None) -> None:
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # no Exception, which logging and other libraries may swallow where it strikes
        requested.append(number)
        log.warning(
            "stopping after this layer is committed (%s); press Ctrl-C to stop at once", signal.strsignal(number)
        )

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requested)
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped at once; what was committed is kept, run the same command again to resume") from stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
