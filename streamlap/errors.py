"""Every error that streamlap raises on purpose.

    StreamlapError      exit 1   anything below, caught at once
      CheckpointError   exit 3   a tensor or shard is missing, truncated, of another shape or dtype, not finite
      UnsupportedModel  exit 3   model_type or layout not known; says what was found and what is known
      RecipeError       exit 2   a knob out of range, unusable calibration text, an output folder that cannot be used
      BudgetError       exit 4   it does not fit (disk, memory); says which knob to turn
      ResumeMismatch    exit 5   the output folder belongs to another recipe, model, tokens or process
      NumericalError    exit 6   activations or decompositions that are not finite
      Interrupted       exit 75  stopped on request at a commit; run again to resume

A message names the tensor or flag, the value seen, the value wanted, and the next step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class StreamlapError(Exception):
    """The base of all of them; `exit_code` is what the command line ends with."""

    exit_code = 1


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
    return lines[0] if lines else type(error).__name__


def whole(error: BaseException, limit: int = 400) -> str:
    """All that a library said, on one line, behind the name of its error: some put the reason last."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"
