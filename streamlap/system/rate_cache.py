"""Rates of this machine that were measured within the last month, in `$XDG_CACHE_HOME/streamlap/machine.json`, by default under
~/.cache. A cache that cannot be read or written only costs the time to measure again.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from streamlap.untrusted.json import read_limited

log = logging.getLogger(__name__)

CACHE_SECONDS = 30 * 86400.0
"""Age at which a measurement is too old: a disk fills up, a driver is replaced."""

CACHE_BYTES = 1 << 20


class Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Rates = TypeVar("Rates", bound=Dataclass)


def kept(key: str, kind: type[Rates], measure: Callable[[], Rates]) -> Rates:
    """The rates under `key`, a dataclass of numbers above 0; measured, and put there, where they are not."""
    place = cache_file()
    entries, names = load(place), [field.name for field in fields(kind)]
    row = entries.get(key)
    if row is None or set(row) != {"measured", *names}:
        row = asdict(measure()) | {"measured": time.time()}
        _store(place, load(place) | {key: row})
    return kind(**{name: row[name] for name in names})


def cache_file() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen if os.path.isabs(chosen) else os.path.expanduser("~/.cache")) / "streamlap" / "machine.json"


def load(place: Path) -> dict[str, dict[str, float]]:
    """The entries that are whole and young enough; any other is as if it were not there."""
    try:
        table = json.loads(read_limited(place, CACHE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: row for key, row in table.items() if _usable(row)} if isinstance(table, dict) else {}


def _usable(row: Any) -> bool:
    if not isinstance(row, dict) or "measured" not in row:
        return False
    good = all(isinstance(number, float) and math.isfinite(number) and number > 0 for number in row.values())
    return good and 0 <= time.time() - row["measured"] < CACHE_SECONDS


def _store(place: Path, entries: dict[str, Any]) -> None:
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        if not place.is_absolute():
            raise FileNotFoundError(errno.ENOENT, "no home folder", str(place))  # expanduser left the ~ as it was
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        log.info("the rates of this machine cannot be kept (%s), and will be measured again", error)
