"""Rows of JSON or of a table -> the text of each. No chat template is applied: the turns of a talk are lines of plain text.

A row is a string, or an object with one of

    text                                        a string
    messages, or conversations, conversation    a list of {role, content} or {from, value}
    prompt, completion (or response)            two strings
    instruction, input (or none), output        three strings
    instruction, context (or none), response    the same
    question, answer                            two strings

A row whose text is null is skipped. Of several texts in a row, each but the empty ones is a line or more of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from streamlap.errors import RecipeError, first_line, one_line, shown

COLUMNS = (
    ("text",), ("messages",), ("conversations",), ("conversation",), ("prompt", "completion"), ("prompt", "response"),
    ("instruction", "input", "output"), ("instruction", "output"), ("instruction", "context", "response"),
    ("instruction", "response"), ("question", "answer"),
)  # fmt: skip
"""Where the text of a row is; the first of which a row has all."""
HOLDERS = ("data", "rows", "train", "examples")
"""Names under which one object around everything has the list of rows."""

MOST_CHARACTERS = 64 << 20
"""In one row. A longer one is a file of another kind, and would have to be held as a whole."""
PIECE_CHARACTERS = 1 << 16
BATCH_BYTES, MOST_ROWS = 4 << 20, 1024
"""What is read of a table at a time."""

HALF = re.compile("[\ud800-\udfff]")
"""One of a pair of escapes in JSON that mean one character: what is left where a program cut a text between them."""
WHITESPACE = re.compile(r"[ \t\r\n]*")
CUT_SHORT = 16
"""Characters from the end of what is there, within which a fault in JSON may be that the rest has not been read yet."""


def join_rows(rows: Iterable[str]) -> Iterator[str]:
    """The text that rows of it make: a newline between two."""
    for place, row in enumerate(rows):
        if place:
            yield "\n"
        yield row


def row_text(row: Any, column: str | None, place: int) -> str | None:
    """The text of row number `place`, or None where it is null. Raises ValueError, worded to follow the name of a file."""
    where = f"row {place}"
    if row is None or isinstance(row, str):
        text = row
    elif isinstance(row, dict):
        values = [row[name] for name in text_columns(row, column, f"has in {where} the columns")]
        texts = [text for value in values if (text := _text_of(value, where)) is not None]
        text = "\n".join(text for text in texts if text or len(texts) == 1) if texts else None
    else:
        raise ValueError(f"has {shown(row)} as {where}; wanted a string, or an object with a text field.")
    if text is not None and len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"has {len(text):,} characters in {where}; wanted at most {MOST_CHARACTERS:,}. Cut it into rows."
        )
    if text is not None and (half := HALF.search(text)):
        raise ValueError(
            f"has {shown(half[0])} in {where}, half of a character; wanted whole ones. Take it out of the row."
        )
    return text


def text_columns(names: Iterable[str], column: str | None, seen: str) -> tuple[str, ...]:
    """Those of the names that hold a row's text."""
    names = list(names)
    for group in COLUMNS if column is None else ((column,),):
        if set(group) <= set(names):
            return group
    wanted = "text, messages or conversations" if column is None else shown(column)
    raise ValueError(
        f"{seen} {one_line(', '.join(map(str, names)), 200) or 'none'}; wanted {wanted}. Say which of them is the "
        "text: --text-column NAME (text_column in Python and in a recipe)."
    )


def _text_of(value: Any, where: str) -> str | None:
    """A string, or the contents of a talk, a line or more for each turn."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        turns = [_turn_text(turn, where) for turn in value]
        return "\n".join(turn for turn in turns if turn) or None
    raise ValueError(
        f"has {shown(value)} as the text of {where}; wanted a string, or a list of turns with role and content."
    )


def _turn_text(turn: dict[str, Any], where: str) -> str | None:
    """What is said in a turn, also where it is a list of parts: those of text. A turn may say nothing and call a tool."""
    said = turn.get("content", turn.get("value"))
    if isinstance(said, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in said]
        said = "\n".join(part for part in parts if isinstance(part, str))
    if isinstance(said, str) or (said is None and ("role" in turn or "from" in turn)):
        return said
    raise ValueError(f"has {shown(turn)} as a turn in {where}; wanted role and content, or from and value.")


# --- JSON ----------------------------------------------------------------------------------------------------------------


def json_rows(pieces: Iterable[str], column: str | None, holder: bool) -> Iterator[str]:
    """The texts of rows that follow each other, or are in one list; with `holder`, also a list in one object around it."""
    values = JsonValues(pieces)
    for place, row in enumerate(_rows(values, holder and column not in HOLDERS), 1):
        text = row_text(row, column, place)
        if text is not None:
            yield text


def _rows(values: JsonValues, holder: bool) -> Iterator[Any]:
    first = values.next_mark()
    if first == "[":
        yield from values.members()
        if values.next_mark():
            raise values.fault("something behind the list")
    elif first == "{" and holder:
        yield from _held_rows(values)
    while values.next_mark():
        yield values.value()


def _held_rows(values: JsonValues) -> Iterator[Any]:
    """The rows in one object around them, behind which nothing is read; or the object, which then is the first of the rows."""
    table = {}
    for name in values.names():
        if name in HOLDERS and values.next_mark() == "[":
            yield from values.members()
            values.close()
            return
        table[name] = values.value()
    yield table


class JsonValues:
    """Values out of JSON text that comes in pieces; no more than the value in hand is held, and at most `MOST_CHARACTERS`."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._text, self._place, self._lines = "", 0, 0

    def close(self) -> None:
        """Nothing comes behind this."""
        self._pieces, self._text, self._place = iter(()), "", 0

    def next_mark(self) -> str:
        """The next character but spaces, which stays; nothing at the end."""
        while True:
            self._place = WHITESPACE.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._grow():
                return ""

    def value(self) -> Any:
        """The next value, whole."""
        self.next_mark()
        more = True
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                fault = self.fault(error.msg, error.pos)
                near = error.pos > len(self._text) - CUT_SHORT or error.msg.startswith("Unterminated string")
                if not (near and self._grow()):
                    raise fault from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
                raise self.fault(first_line(error)) from error
            else:
                if more and type(value) in (int, float) and end > len(self._text) - CUT_SHORT:
                    more = self._grow()  # a number whose other digits have not been read yet is a number too
                    continue
                self._place = end
                if self._place > PIECE_CHARACTERS:
                    self._drop()
                return value

    def members(self) -> Iterator[Any]:
        """The values in a list that begins here, one by one."""
        for _ in self._between("[", "]"):
            yield self.value()

    def names(self) -> Iterator[str]:
        """The names in an object that begins here; behind each, the caller takes its value."""
        for _ in self._between("{", "}"):
            name = self.value()
            if not isinstance(name, str):
                raise self.fault("a name that is no string")
            self._take(":")
            yield name

    def fault(self, what: str, place: int | None = None) -> ValueError:
        line = self._lines + self._text.count("\n", 0, self._place if place is None else place) + 1
        return ValueError(
            f"is not JSON (line {line}: {what}); wanted an object with a text field in each line, or one list of them."
        )

    def _between(self, first: str, last: str) -> Iterator[None]:
        self._take(first)
        more = self.next_mark() != last
        while more:
            yield
            more = self.next_mark() != last
            if more:
                self._take(",")
        self._take(last)

    def _take(self, mark: str) -> None:
        if self.next_mark() != mark:
            raise self.fault(f"Expecting {mark!r}")
        self._place += 1

    def _grow(self) -> bool:
        """Twice as much of the text behind the present place, so that a long value is not tried too often."""
        self._drop()
        before = len(self._text)
        if before > MOST_CHARACTERS:
            raise ValueError(
                f"has more than {MOST_CHARACTERS:,} characters in one row (line {self._lines + 1}); wanted at most so many. "
                "Cut it into rows."
            )
        parts, count = [self._text], before
        while count < max(2 * before, PIECE_CHARACTERS) and (piece := next(self._pieces, "")):
            parts.append(piece)
            count += len(piece)
        self._text = "".join(parts)
        return count > before

    def _drop(self) -> None:
        """What lies behind."""
        self._lines += self._text.count("\n", 0, self._place)
        self._text, self._place = self._text[self._place :], 0


DECODER = json.JSONDecoder()


# --- tables --------------------------------------------------------------------------------------------------------------


def parquet_rows(path: Path, column: str | None) -> Iterator[str]:
    """The texts of a table's rows; only their columns are read, a few rows at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RecipeError(f"{path} needs pyarrow: pip install 'streamlap[parquet]'.") from error
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
            names = text_columns(table.schema_arrow.names, column, "has the columns")
            batches = table.iter_batches(_batch_rows(table.metadata), columns=list(names), use_threads=False)
            for place, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                text = row_text(row, column, place)
                if text is not None:
                    yield text
    except ArrowException as error:
        raise RecipeError(f"{path} is not a parquet file that can be read ({one_line(str(error))}).") from error


def _batch_rows(metadata: Any) -> int:
    """Rows that take about `BATCH_BYTES`, by the row groups' own count."""
    groups = [metadata.row_group(index) for index in range(min(metadata.num_row_groups, 8))]
    average = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return max(1, min(MOST_ROWS, int(BATCH_BYTES / max(1, average))))
