"""A process that dies at a commit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from faults import Crash, Disk


def crash_after(layers: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """`run` dies where it would commit the layer after the first `layers`."""
    with monkeypatch.context() as patch:
        Disk(patch, at=layers + 1, kinds={"write"}, name="journal.jsonl")
        with pytest.raises(Crash):
            run()
