"""Files -> windows of tokens. Text is read as far as it is wanted, and of token ids (.npy) only the windows that are wanted.

Shape suffixes: T tokens, N windows, L length.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from streamlap.data.pieces import tokens_of
from streamlap.data.text import check_file, is_ids, read_text
from streamlap.data.tokenizer import Encoder
from streamlap.errors import BudgetError, RecipeError, first_line
from streamlap.system.budget import free_ram, show_size
from streamlap.system.meters import ram_bytes
from streamlap.untrusted.npy import IntegerFile, Integers

DEFAULT_LENGTH = 2048
CHECKED_BYTES = 64 << 20
"""Of each file of ids so much is checked for ids out of range, and each window that is used. To read ten gigabytes would take a
minute, also of `plan`; a file of another tokenizer shows itself sooner."""

LEAST_ROOM = 16 << 20
"""Bytes that tokens may take also under a cap that leaves none: the plan begins with them, and says how large a cap the model
needs."""
BLOCK = 1 << 20
"""Ids that are read at a time to check them."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """For which model files are read, and how."""

    folder: Path
    """Where the tokenizer lies."""
    vocabulary: int
    context: int
    """The model's bounds on ids and on the length of a window."""
    text_column: str | None = None
    """Where the text of a row is; None looks for the usual names."""
    trust_remote_code: bool = False
    """Whether a tokenizer that is code in the folder may run."""
    max_ram: int | None = None
    """Cap in bytes on all that the process holds; None is what is free."""
    advice: str = "--limit TOKENS"
    """What takes less memory, for the message where it is too little."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a file holds, in rows, inside which windows are cut."""

    path: Path
    rows: int
    length: int
    """Tokens in a row."""
    read: Callable[[Iterable[int], int], Iterator[Integers]]
    """(places, counted row after row; number) -> so many ids from each place."""
    held: int = 0
    """Bytes in memory."""
    ready_made: bool = False
    """Whether the rows are the file's own."""

    def windows(self, length: int, stride: int) -> int:
        return self.rows * self._in_a_row(length, stride)

    def start(self, window: int, length: int, stride: int) -> int:
        """The place of the first token of a window."""
        row, place = divmod(window, self._in_a_row(length, stride))
        return row * self.length + place * stride

    def windows_within(self, most: int, length: int, stride: int) -> int:
        """The windows that `most` tokens give, none of which is counted twice."""
        full, rest = divmod(most, self.covered(self._in_a_row(length, stride), length, stride))
        more = (rest - length) // stride + 1 if rest >= length else 0
        return min(self.windows(length, stride), full * self._in_a_row(length, stride) + more)

    def covered(self, windows: int, length: int, stride: int) -> int:
        """Tokens in the first so many windows, each counted once."""
        full, rest = divmod(windows, in_a_row := self._in_a_row(length, stride))
        return full * ((in_a_row - 1) * stride + length) + ((rest - 1) * stride + length if rest else 0)

    def _in_a_row(self, length: int, stride: int) -> int:
        return (self.length - length) // stride + 1


class TokenReader:
    """Files -> their tokens, with one tokenizer and one measure of memory for all of them.

    Raises RecipeError for a file that is missing, empty, of no kind that is read, or whose rows are no such windows.
    """

    def __init__(self, paths: Sequence[Path], settings: ReadSettings, length: int | None) -> None:
        for path in paths:
            check_file(path)
        self.settings = settings
        self._ids = {path: open_ids(path) for path in paths if is_ids(path)}
        lengths = {self._length(path, length) for path in paths}
        if len(lengths) > 1:
            raise RecipeError(f"{', '.join(map(str, paths))} have windows of different lengths; set --length.")
        self.length = lengths.pop()
        texts = [path for path in paths if path not in self._ids]
        self._encoder = Encoder(settings.folder, texts[0], settings.trust_remote_code) if texts else None
        held = ram_bytes()
        self._held, self._taken = held, 0
        self._room = max(LEAST_ROOM, free_ram() if settings.max_ram is None else settings.max_ram - held)

    def read(self, path: Path, most: int | None, token_bytes: float = 4) -> Tokens:
        """The tokens of a file; of a text the first `most`. A text is held as int32, of ids nothing is held.

        `token_bytes` says what each token of a text will take in all. Raises BudgetError once that is too much.
        """
        found = self._open_rows(path) if path in self._ids else self._tokenise(path, most, token_bytes)
        if found.length < self.length:
            raise RecipeError(
                f"{path} has {found.length} tokens, less than one window of {self.length}; give more text."
            )
        return found

    def claim(self, count: int) -> None:
        """Count so many bytes as taken. Raises BudgetError where there is no room for them."""
        self._require(count)
        self._taken += count

    def _require(self, count: float) -> None:
        if self._taken + count > self._room:
            cap, held = self.settings.max_ram, show_size(self._held)
            seen = "no cap is set" if cap is None else f"--max-ram is {show_size(cap)}"
            raise BudgetError(
                f"{seen} and the process holds {held}; the tokens of the text and their windows take more than the "
                f"{show_size(self._room)} that are left. Use {self.settings.advice}, or more memory."
            )

    def _length(self, path: Path, length: int | None) -> int:
        """Tokens in a window of a file, checked."""
        context = self.settings.context
        rows = self._ids[path].shape if path in self._ids else ()
        if len(rows) == 2:
            length = length or rows[1]
            if rows[1] % length:
                raise RecipeError(
                    f"{path} has rows of {rows[1]} tokens; --length {length} does not divide that. "
                    f"{_fitting(rows[1], min(length, context))}"
                )
        length = length or min(DEFAULT_LENGTH, context)
        if length < 2:
            raise RecipeError(f"{path}: length is {length}; wanted windows of at least 2 tokens.")
        if length > context:
            advice = _fitting(length, context) if len(rows) == 2 else f"Choose --length {context} or less."
            raise RecipeError(f"{path}: length is {length}, and the model's context is {context}. {advice}")
        return length

    def _tokenise(self, path: Path, most: int | None, token_bytes: float) -> Tokens:
        assert self._encoder is not None, "a text among the paths"
        held = array("i")  # grows in place, as a list of tensors would not
        for ids_T in tokens_of(read_text(path, self.settings.text_column), self._encoder, path):
            wanted_T = ids_T if most is None else ids_T[: most - len(held)]
            self._check_text(wanted_T, path)
            self._require((len(held) + len(wanted_T)) * token_bytes)
            held.frombytes(wanted_T.astype(np.int32).tobytes())
            if len(held) == most:
                break
        tokens_T = np.frombuffer(held, np.int32)

        def read(starts: Iterable[int], count: int) -> Iterator[Integers]:
            return (tokens_T[start : start + count] for start in starts)

        return Tokens(path=path, rows=1, length=len(tokens_T), read=read, held=tokens_T.nbytes)

    def _check_text(self, ids_T: Integers, path: Path) -> None:
        highest, vocabulary = int(ids_T.max(initial=0)), self.settings.vocabulary
        if highest >= vocabulary:
            assert self._encoder is not None, "its ids"
            raise RecipeError(
                f"{path} has the token {self._encoder.token(highest)} (id {highest}), which is in the tokenizer in "
                f"{self.settings.folder}, and not in the model's vocabulary of 0 to {vocabulary - 1}. Use the tokenizer that "
                "the model was trained with, or take the token out of the text, or give token ids as .npy."
            )

    def _open_rows(self, path: Path) -> Tokens:
        file = self._ids[path]
        rows, length = file.shape if len(file.shape) == 2 else (1, file.count)
        held = 2 * file.count * file.dtype.itemsize * file.by_columns  # as it is stored, and row after row
        self._require(held)

        def read(starts: Iterable[int], count: int) -> Iterator[Integers]:
            return self._checked(file, starts, count)

        some = min(file.count, CHECKED_BYTES // file.dtype.itemsize)
        block = min(some, BLOCK)
        for _ in read(range(0, some, block), block):
            pass
        return Tokens(path=path, rows=rows, length=length, read=read, held=held, ready_made=len(file.shape) == 2)

    def _checked(self, file: IntegerFile, starts: Iterable[int], count: int) -> Iterator[Integers]:
        """The spans of a file of ids. Raises RecipeError for one with an id that the model has not."""
        try:
            for ids_T in file.spans(starts, count):
                low, high = int(ids_T.min()), int(ids_T.max())
                if low < 0 or high >= self.settings.vocabulary:
                    raise RecipeError(
                        f"{file.path}: token ids from {low} to {high}; the model's vocabulary has 0 to "
                        f"{self.settings.vocabulary - 1}. Were they made with another tokenizer?"
                    )
                yield ids_T
        except (OSError, ValueError) as error:
            raise RecipeError(f"{file.path} cannot be read: {first_line(error)}.") from error


def _fitting(row: int, most: int) -> str:
    """What to do about rows of which windows of `most` tokens, or some fewer, are to be cut."""
    length = next((length for length in range(most, 1, -1) if row % length == 0), None)
    longest = "" if length is None else f"Choose --length {length}, or "
    return f"{longest or 'To have other windows, '}save the ids flat, as one row after another."


def open_ids(path: Path) -> IntegerFile:
    """A file of token ids, of which only the header is read. Raises RecipeError where it is none."""
    try:
        return IntegerFile.open(path)
    except TypeError as error:
        raise RecipeError(f"{path} holds {error}.") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or first_line(error)}.") from error
    except Exception as error:  # numpy raises a different one for every way to damage a header
        raise RecipeError(
            f"{path} is not a .npy array ({first_line(error)}); wanted token ids saved by numpy.save."
        ) from error


def read_windows(
    paths: Sequence[Path], settings: ReadSettings, length: int | None = None, stride: int | None = None,
    limit: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The windows of the files in order, [N, L] int64; the last partial window of each file is left out.

    Args: length, tokens in a window (default 2048, the model's context, or the rows of an .npy); stride, tokens from the start
    of one to the start of the next, where they overlap; limit, tokens to use at most, each counted once where windows overlap,
    behind which nothing is read.
    Raises as `TokenReader` does, RecipeError where the numbers do not fit each other, and BudgetError where the windows do not
    fit.
    """
    reader = TokenReader(paths, settings, length)
    length, step = reader.length, stride or reader.length
    if stride is not None and stride >= length:
        raise RecipeError(f"stride is {stride}; wanted less than the window's {length} tokens.")
    if limit is not None and limit < length:
        raise RecipeError(f"limit is {limit} tokens; wanted at least one window of {length}.")
    found: list[Tokens] = []
    count, left = 0, limit
    for path in paths:
        if left is not None and left < length:
            break
        most = None if left is None else left - (left - length) % step  # what is behind the last window is not read
        tokens = reader.read(path, most, 4 + 8 * length / step)
        windows = tokens.windows(length, step) if left is None else tokens.windows_within(left, length, step)
        reader.claim(tokens.held + windows * length * 8)
        found.append(tokens)
        count += windows
        left = None if left is None else left - tokens.covered(windows, length, step)
    return gather(found, range(count), length, step)


def gather(sources: Sequence[Tokens], rows: Iterable[int], length: int, stride: int) -> torch.Tensor:
    """The windows of these numbers, ascending, of all that the sources have together, [N, L] int64."""
    rows = list(rows)
    windows_NL = torch.empty(len(rows), length, dtype=torch.int64)
    out_NL, first, done = windows_NL.numpy(), 0, 0
    for tokens in sources:
        last = first + tokens.windows(length, stride)
        own = rows[done : bisect_left(rows, last)]
        for ids_L in tokens.read((tokens.start(row - first, length, stride) for row in own), length):
            out_NL[done] = ids_L
            done += 1
        first = last
    return windows_NL
