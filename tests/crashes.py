"""A process that dies at a commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from streamlap.store.journal import Journal


class Crash(BaseException):
    """The process is gone: nothing that tidies up may catch this."""


def crash_after(layers: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """`run` dies where it would commit the layer after the first `layers`."""
    append, done = Journal.append, []

    def count(journal: Journal, line: dict[str, Any]) -> None:
        if len(done) == layers:
            raise Crash
        append(journal, line)
        done.append(line)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", count)
        with pytest.raises(Crash):
            run()
