"""What a computation has to say beside its result: that a Gram took more damping, that inputs were dead.

Functions stay tensors in, tensors out. Who wants to know opens `collected` around them; where nobody does, a note goes nowhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_OPEN: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(text: str) -> None:
    """Say it to the innermost `collected`, once."""
    notes = _OPEN.get()
    if notes is not None and text not in notes:
        notes.append(text)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """The notes of the block, in their order; those around it hear nothing of them."""
    notes: list[str] = []
    token = _OPEN.set(notes)
    try:
        yield notes
    finally:
        _OPEN.reset(token)


@contextlib.contextmanager
def under(name: str) -> Iterator[None]:
    """Put `name` before the notes of the block."""
    with collected() as notes:
        yield
    for text in notes:
        note(f"{name}: {text}")
