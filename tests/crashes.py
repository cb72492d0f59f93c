"""What befalls a run: it dies at a commit, something happens in one of its layers, or memory has no room for hidden states."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from faults import Crash, Disk

from streamlap.errors import Interrupted
from streamlap.families.stream import batch_of
from streamlap.pipeline import layers
from streamlap.pipeline.layer_in_hand import LayerEdits, LayerInHand
from streamlap.planning import schedule
from streamlap.planning.schedule import Schedule, make_schedule
from streamlap.planning.workload import Workload


def crash_after(lines: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """`run` dies where it would commit what comes after so many layers, or shards of an export."""
    with monkeypatch.context() as patch:
        Disk(patch, at=lines + 1, kinds={"write"}, name="journal.jsonl")
        with pytest.raises(Crash):
            run()


def dies_at(module: Any, name: str, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """`run` dies where it calls that function of a module."""
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()


def stopped_at(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], message: str
) -> None:
    """`run` is asked to stop where it calls that function of a module, and says so."""
    real = getattr(module, name)

    def asked(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, asked)
        with pytest.raises(Interrupted, match=message):
            run()


def in_layer(index: int, patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """`act` happens while the loop of a compression is at that layer, before it is edited."""
    edit_layer = layers.edit_layer

    def edit(hand: LayerInHand, before: Future[Any], job: layers.Job) -> LayerEdits:
        if hand.index == index:
            act()
        return edit_layer(hand, before, job)

    patch.setattr(layers, "edit_layer", edit)


def keep_on_disk(patch: pytest.MonkeyPatch) -> None:
    """Hidden states are read from the disk, however much memory there is."""

    def schedules(work: Workload, overlap: bool) -> list[Schedule]:
        return [make_schedule(work, overlap, "disk", batch_of(work.length))]

    patch.setattr(schedule, "schedules", schedules)
