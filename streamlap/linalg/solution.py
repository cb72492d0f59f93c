"""What a computation gives back: its value, how far that is from exact, and what had to be done on the way to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Solution(Generic[T]):
    """A value, and what its computation knows about it."""

    value: T
    error: float = 0.0
    """The error that the computation knows of, relative where it does not say otherwise; 0 where it knows of none."""
    notes: tuple[str, ...] = ()
    """What differed from the plain case, one phrase each, such as more damping than was asked for. No phrase occurs twice."""


def joined(*groups: Iterable[str]) -> tuple[str, ...]:
    """The notes of all groups in their order, each only where it comes first."""
    return tuple(dict.fromkeys(itertools.chain(*groups)))
