"""JSON that strangers wrote: no more of it is read than a limit, and it means one thing only or is refused.

Stricter than `json.loads`: UTF-8 alone, no name twice in an object, no NaN or Infinity, and a bound on how many values there
are, for a byte of JSON can become a hundred of Python objects.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from streamlap.errors import one_line, shown

MOST_VALUES = 2_000_000
"""In one text, brackets and commas in its strings counted too; the largest index known has a tenth of them."""
MOST_DIGITS = 40
PIECE_BYTES = 1 << 20


def read_limited(path: Path, most: int) -> bytes:
    """The bytes of a file. Raises ValueError where there are more than `most`, and what the system raises."""
    pieces, count = [], 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):  # not `most` at once, for which Python would take all the memory first
            pieces.append(piece)
            count += len(piece)
            if count > most:
                raise ValueError(f"more than {most:,} bytes")
    return b"".join(pieces)


def parse_json(raw: bytes, most_values: int = MOST_VALUES) -> Any:
    """What `raw` says. Raises ValueError, with a short reason on one line, for all that is not plain JSON."""
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > most_values:
        raise ValueError(f"more than {most_values:,} values")
    try:
        return _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} 0x{raw[error.start]:02x} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(one_line(str(error))) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(twice)} stands twice in one object")
    return table


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(digits)} is too large")
    return number


def _int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int)
