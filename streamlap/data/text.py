"""Files -> their text, in pieces: no more of a file is read, unpacked or held than is asked for.

    .txt .text .md          the text itself
    .jsonl .ndjson .json    rows of JSON (`rows.py` says which)
    .parquet                rows of a table
    .gz .zst                over any of them but parquet, unpacked as a stream

Text is UTF-8. A byte order mark at its start is no part of it, and line ends become newlines, as Python reads them. A file is
checked as far as it is read.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from streamlap.data.rows import join_rows, json_rows, parquet_rows
from streamlap.errors import RecipeError, first_line

PLAIN, JSON, PARQUET = (".txt", ".text", ".md"), (".jsonl", ".ndjson", ".json"), ".parquet"
TEXT_SUFFIXES = (*PLAIN, *JSON, PARQUET)
IDS_SUFFIX = ".npy"
WANTED = f"text ({', '.join(TEXT_SUFFIXES)}; all but parquet also as .gz or .zst) or token ids ({IDS_SUFFIX})"

NAMED = "org/name[@revision][/configuration][:split]"
"""How a data set is called."""

PIECE_BYTES = 1 << 16


def endings(path: Path) -> tuple[str, str]:
    """What a file is called, in lower case: the ending that says what is in it, and that of its packing or nothing."""
    packing = path.suffix.lower()
    if packing not in PACKED_SUFFIXES:
        return packing, ""
    return Path(path.stem).suffix.lower(), packing


def is_text(path: Path) -> bool:
    """Whether a file has the name of a text that is read. A packed table is none: parts of it have to be found."""
    ending, packing = endings(path)
    return ending in TEXT_SUFFIXES and not (packing and ending == PARQUET)


def is_ids(path: Path) -> bool:
    """Whether a file is said to hold token ids, not text."""
    return path.suffix.lower() == IDS_SUFFIX


def check_file(path: Path) -> None:
    """Raise RecipeError unless there is such a file, with something in it, and an ending that is known."""
    if path.is_dir():
        raise RecipeError(f"{path} is a folder, not a file; wanted {WANTED}. Name its files one by one.")
    if path.exists() and not path.is_file():
        raise RecipeError(
            f"{path} is a pipe or a device, and a run that goes on reads its text again; wanted a file. Write what comes out "
            "of it into one."
        )
    if not path.is_file():
        raise RecipeError(f"{path} is not a file; wanted {WANTED}, or a data set of the hub: {NAMED}.")
    if path.stat().st_size == 0:
        raise RecipeError(f"{path} is empty; wanted text or token ids.")
    ending, packing = endings(path)
    if packing and ending in (PARQUET, IDS_SUFFIX):
        raise RecipeError(f"{path} is packed, and parts of it have to be found; wanted {ending}. Unpack it first.")
    if not is_text(path) and not is_ids(path):
        raise RecipeError(f"{path} ends in {ending + packing!r}; wanted {WANTED}.")


def read_text(path: Path, column: str | None = None) -> Iterator[str]:
    """The text of a file in pieces of any size. Rows are joined by newlines; `column` names where their text is.

    Raises RecipeError for what is not text, or holds none.
    """
    found = False
    try:
        for piece in _pieces(path, column):
            found = True
            yield piece
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise RecipeError(f"{path} cannot be unpacked ({first_line(error)}); wanted a whole gzip file.") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or first_line(error)}.") from error
    except ValueError as error:
        raise RecipeError(f"{path} {first_line(error)}") from error
    if not found:
        raise RecipeError(f"{path} holds no text: all of it is empty or null.")


def _pieces(path: Path, column: str | None) -> Iterator[str]:
    ending, packing = endings(path)
    if ending == PARQUET:
        yield from join_rows(parquet_rows(path, column))
        return
    with OPENERS[packing](path) as file:
        text = decode(file)
        yield from text if ending in PLAIN else join_rows(json_rows(text, column, holder=ending == ".json"))


@contextmanager
def _open_zstd(path: Path) -> Iterator[BinaryIO]:
    try:
        import zstandard
    except ImportError as error:
        raise RecipeError(f"{path} needs zstandard: pip install 'streamlap[zstd]'.") from error
    try:
        with path.open("rb") as packed:
            yield io.BufferedReader(ZstdFile(packed, zstandard.ZstdDecompressor()), PIECE_BYTES)
    except (zstandard.ZstdError, EOFError) as error:
        raise RecipeError(f"{path} cannot be unpacked ({first_line(error)}); wanted a whole zstd file.") from error


ZSTD_BYTES = 1 << 8
"""Packed bytes that are unpacked at a time. Of four of them zstd may make 128 KiB."""


class ZstdFile(io.RawIOBase):
    """What is in a zstd file, frame after frame. Raises EOFError where the last frame has no end: zstandard's own reader takes
    such a file, as a broken download leaves it, for a whole one."""

    def __init__(self, packed: BinaryIO, unpacker: Any) -> None:
        super().__init__()
        self._packed, self._unpacker, self._frame = packed, unpacker, None
        self._rest = self._found = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._found and self._feed():
            pass
        count = min(len(buffer), len(self._found))
        buffer[:count], self._found = self._found[:count], self._found[count:]
        return count

    def _feed(self) -> bool:
        """Unpack some more; whether there was more."""
        raw = self._rest or self._packed.read(ZSTD_BYTES)
        if not raw:
            if self._frame is not None:
                raise EOFError("it ends inside a frame")
            return False
        frame = self._frame or self._unpacker.decompressobj()
        self._found, self._rest = frame.decompress(raw), frame.unused_data
        self._frame = None if frame.eof else frame
        return True


OPENERS: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.GzipFile,
    ".zst": _open_zstd,
}
"""How a file is packed -> what opens it and unpacks it as it is read."""
PACKED_SUFFIXES = tuple(OPENERS)[1:]


def decode(file: BinaryIO) -> Iterator[str]:
    """Bytes -> text, some of it at a time. Raises ValueError for what is no UTF-8 text."""
    raw, done, count = _start(file)
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    while True:
        waiting = len(decoder.getstate()[0])
        try:
            text = newlines.decode(decoder.decode(raw, final=not raw), final=not raw)
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 text (byte {done - waiting + error.start}); convert it first.") from error
        if "\0" in text:
            raise ValueError(f"is not text: character {count + text.index(chr(0))} is NUL; wanted UTF-8 text.")
        if text:
            yield text
        if not raw:
            return
        done, count = done + len(raw), count + len(text)
        raw = file.read(PIECE_BYTES)


def _start(file: BinaryIO) -> tuple[bytes, int, int]:
    """The first bytes without a byte order mark, the place of the first of them, and of its character."""
    raw = file.read(PIECE_BYTES)
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ValueError("is not UTF-8 text but UTF-32 (byte 0); convert it first.")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("is not UTF-8 text but UTF-16 (byte 0); convert it first.")
    if raw.startswith(codecs.BOM_UTF8):
        return raw[3:] or file.read(PIECE_BYTES), 3, 0
    return raw, 0, 0
