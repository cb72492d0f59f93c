"""One thread beside the loop, and batches fetched one ahead of their use.

Work is done in the order in which it was given, so that what must be on the disk first is there first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from streamlap.errors import StreamlapError

T = TypeVar("T")


class Worker:
    """Runs calls in a thread of its own, in order; without `overlap` at once, in the caller's. The results are the same.

    Leaving the block waits for all calls; leaving it by an exception cancels those that have not begun.
    """

    def __init__(self, overlap: bool, name: str = "streamlap") -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name) if overlap else None
        self._name = name
        self.seconds = 0.0
        """Time spent in calls so far."""

    @property
    def overlap(self) -> bool:
        return self._pool is not None

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Have `call(*args)` run. What it raises comes out of the future's `result()`, or here where nothing overlaps."""
        if self._pool is not None:
            try:
                return self._pool.submit(self._timed, call, *args)
            except RuntimeError as error:  # no thread to be had, or the pool's own is gone
                raise StreamlapError(
                    f"the thread {self._name!r} beside the loop cannot run ({error}); wanted one more thread. What is "
                    "committed is kept: raise the limit on processes (ulimit -u) or give --no-overlap, and run again to resume."
                ) from error
        done: Future[T] = Future()
        done.set_result(self._timed(call, *args))
        return done

    def _timed(self, call: Callable[..., T], *args: Any) -> T:
        start = time.perf_counter()
        try:
            return call(*args)
        except SystemExit as error:  # from a thread it would end the loop, and the process as if all were done
            raise StreamlapError(
                f"the thread {self._name!r} beside the loop was ended ({error!r}); wanted it to finish its work. What is "
                "committed is kept: run again to resume."
            ) from error
        finally:
            self.seconds += time.perf_counter() - start

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=error is not None)


def ahead(items: Iterable[T], worker: Worker) -> Iterator[T]:
    """The same items, each made in the worker's thread while the one before it is in use."""
    if not worker.overlap:
        yield from items
        return
    iterator, end = iter(items), object()
    coming: Future[Any] = worker.submit(next, iterator, end)
    while (item := coming.result()) is not end:
        coming = worker.submit(next, iterator, end)
        yield item
        del item
