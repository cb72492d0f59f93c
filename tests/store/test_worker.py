"""One thread beside the loop: the same results in the same order as without it, and nothing left over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from streamlap.store.worker import Worker, ahead

pytestmark = pytest.mark.usefixtures("no_thread_stays")

PATIENCE = 30.0
"""Seconds until a test gives up on another thread."""


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "the other thread never came to it"
        time.sleep(0.001)


@pytest.mark.parametrize("overlap", [True, False])
def test_calls_are_done_in_the_order_given(overlap: bool) -> None:
    done: list[int] = []

    def call(number: int) -> int:
        time.sleep(0.01 if number % 2 == 0 else 0)
        done.append(number)
        return number * number

    with Worker(overlap) as worker:
        results = [worker.submit(call, number) for number in range(10)]
    assert done == list(range(10))
    assert [result.result() for result in results] == [number * number for number in range(10)]


def test_with_overlap_another_thread_does_it_and_it_has_a_name() -> None:
    with Worker(True, "reader") as worker:
        name = worker.submit(lambda: threading.current_thread().name).result()
    assert name.startswith("reader")


def test_without_overlap_the_caller_does_it_at_once() -> None:
    done: list[threading.Thread] = []
    with Worker(False) as worker:
        worker.submit(lambda: done.append(threading.current_thread()))
        assert done == [threading.current_thread()]


class Gone(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


@pytest.mark.parametrize("kind", [ValueError, Gone])
@pytest.mark.parametrize("overlap", [True, False])
def test_what_a_call_raises_comes_out(overlap: bool, kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind("this went wrong")

    with Worker(overlap) as worker:
        with pytest.raises(kind, match="this went wrong"):
            worker.submit(fail).result()
        assert worker.submit(lambda: 7).result() == 7, "the next call is done all the same"


def test_leaving_the_block_waits_for_all_calls() -> None:
    done: list[int] = []
    with Worker(True) as worker:
        for number in range(5):
            worker.submit(lambda number=number: (time.sleep(0.01), done.append(number)))
    assert done == [0, 1, 2, 3, 4]


def leave_by_an_error(done: list[int], pending: list[Future[None]]) -> None:
    """A block that fails while the first of three calls is under way, which ends once the last is cancelled."""
    begun = threading.Event()

    def first() -> None:
        begun.set()
        wait_until(lambda: len(pending) == 3 and pending[-1].cancelled())
        done.append(0)

    with Worker(True) as worker:
        pending.append(worker.submit(first))
        pending.extend(worker.submit(done.append, number) for number in (1, 2))
        assert begun.wait(PATIENCE)
        raise ValueError("the loop failed")


def test_leaving_by_an_error_cancels_what_has_not_begun() -> None:
    done: list[int] = []
    pending: list[Future[None]] = []
    with pytest.raises(ValueError, match="the loop failed"):
        leave_by_an_error(done, pending)
    assert done == [0], "only the call that was under way came to its end"
    assert [call.cancelled() for call in pending] == [False, True, True]


@pytest.mark.parametrize("overlap", [True, False])
def test_the_time_in_calls_adds_up_also_where_they_fail(overlap: bool) -> None:
    def fail() -> None:
        time.sleep(0.02)
        raise ValueError

    with Worker(overlap) as worker:
        worker.submit(time.sleep, 0.02).result()
        with pytest.raises(ValueError):  # noqa: PT011
            worker.submit(fail).result()
    assert 0.04 <= worker.seconds < PATIENCE


# --- ahead ---------------------------------------------------------------------------------------------------------------


class Source:
    """Yields 0, 1, ...; notes what was made, by whom, and whether it was closed."""

    def __init__(self, count: int, fail_at: int | None = None) -> None:
        self.made: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.closed = False
        self.items = self._run(count, fail_at)

    def _run(self, count: int, fail_at: int | None) -> Iterator[int]:
        try:
            for number in range(count):
                if number == fail_at:
                    raise ValueError("no such item")
                self.made.append(number)
                self.threads.add(threading.current_thread())
                yield number
        finally:
            self.closed = True


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_ahead_gives_the_same_items(overlap: bool, count: int) -> None:
    source = Source(count)
    with Worker(overlap) as worker:
        assert list(ahead(source.items, worker)) == list(range(count))
    assert source.closed
    assert (threading.current_thread() in source.threads) == (not overlap and count > 0)


def test_one_item_is_made_while_the_one_before_it_is_in_use_and_no_more() -> None:
    source = Source(5)
    with Worker(True) as worker:
        for number in ahead(source.items, worker):
            following = list(range(min(number + 2, 5)))
            wait_until(lambda: source.made == following)  # noqa: B023
            time.sleep(0.01)
            assert source.made == following


def test_without_overlap_nothing_is_made_before_its_turn() -> None:
    source = Source(5)
    with Worker(False) as worker:
        for number in ahead(source.items, worker):
            assert source.made == list(range(number + 1))


@pytest.mark.parametrize("overlap", [True, False])
def test_an_error_comes_in_the_place_of_its_item(overlap: bool) -> None:
    seen: list[int] = []
    with Worker(overlap) as worker, pytest.raises(ValueError, match="no such item"):
        seen.extend(ahead(Source(5, fail_at=3).items, worker))
    with Worker(overlap) as worker:
        items = ahead(Source(5, fail_at=3).items, worker)
        assert [next(items), next(items), next(items)] == [0, 1, 2]


@pytest.mark.parametrize("overlap", [True, False])
def test_ahead_may_be_left_in_the_middle_and_begun_anew(overlap: bool) -> None:
    """As where memory ran out in the middle of a pass over the hidden states."""
    left, again = Source(5), Source(5)
    with Worker(overlap) as worker:
        items = ahead(left.items, worker)
        assert [next(items), next(items)] == [0, 1]
        del items
        assert list(ahead(again.items, worker)) == [0, 1, 2, 3, 4]
        assert left.made in ([0, 1], [0, 1, 2])
    left.items = iter(())
    assert left.closed, "something still holds the first pass"
