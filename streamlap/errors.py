"""Every error that streamlap raises on purpose.

    StreamlapError      exit 1   anything below, caught at once
      CheckpointError   exit 3   a tensor or shard is missing, truncated, of another shape or dtype, not finite
      UnsupportedModel  exit 3   model_type or layout not known; says what was found and what is known
      RecipeError       exit 2   a knob out of range, unusable calibration text, an output folder that cannot be used
      BudgetError       exit 4   it does not fit (disk, memory); says which knob to turn
      ResumeMismatch    exit 5   the output folder belongs to another recipe, model, tokens or process
      NumericalError    exit 6   activations or decompositions that are not finite
      Interrupted       exit 75  stopped on request at a commit; run again to resume

A message names the tensor or flag, the value seen, the value wanted, and the next step. Values out of files that strangers
wrote go through `shown`, so that no file can make a message long or put a line of its own into it.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Collection, Iterator

LONGEST = 4000
"""Characters in the longest message."""
FEW = 3
"""Names that a message lists of many."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8
_REPR.maxlevel = 3


class StreamlapError(Exception):
    """The base of all of them; `exit_code` is what the command line ends with."""

    exit_code = 1

    def __str__(self) -> str:
        return _cut(super().__str__(), LONGEST)


class CheckpointError(StreamlapError):
    exit_code = 3


class UnsupportedModel(StreamlapError):
    exit_code = 3


class RecipeError(StreamlapError):
    exit_code = 2


class BudgetError(StreamlapError):
    exit_code = 4


class ResumeMismatch(StreamlapError):
    exit_code = 5


class NumericalError(StreamlapError):
    exit_code = 6


class Interrupted(StreamlapError):
    exit_code = 75


def shown(value: object, limit: int = 120) -> str:
    """A value out of a foreign file as messages show it: its repr, shortened; line ends and control characters are escaped."""
    try:
        return _cut(_REPR.repr(value), limit)
    except ValueError:  # a whole number with more digits than Python writes out
        return f"{type(value).__name__} of many digits"


def few(names: Collection[str]) -> str:
    """The first names and the number of the others; each is escaped."""
    first = ", ".join(shown(name)[1:-1] for name in sorted(names)[:FEW])
    return first if len(names) <= FEW else f"{first} and {len(names) - FEW:,} more"


def counted(number: int, noun: str) -> str:
    """A number with what it counts: 1 shard, 2 shards."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def one_line(text: str, limit: int = 400) -> str:
    """Foreign text on one line, its control characters escaped."""
    words = " ".join(text[: 8 * limit].split())
    return _cut("".join(char if char.isprintable() else repr(char)[1:-1] for char in words), limit)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Say `where` in what is raised in the block over its numbers: a solve knows of tensors, not of layers."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{where}: {error}") from error


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: the first of its message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0]) if lines else type(error).__name__


def whole(error: BaseException, limit: int = 400) -> str:
    """All that a library said, on one line, behind the name of its error: some put the reason last, and some say nothing."""
    text = one_line(str(error), limit)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
