"""Text in pieces -> the tokens of all of it. A text of any size goes through in the memory of one piece.

A tokenizer looks around, so a piece gets the end of the one before it as well. Where both agree on some tokens in a row, in the
middle of that row, the second takes over: from there on it says what it would say of the whole text. Where they agree nowhere,
as on one word of a hundred thousand letters, the text is cut.

Shape suffixes: T tokens; 3 for id, first character, character behind the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from streamlap.data.tokenizer import Encoder, Ids

PIECE = 1 << 16
"""Characters in a piece. A token takes hundreds of bytes on its way, and there may be three for a character."""
OVERLAPS = (1 << 11, 1 << 14)
"""Characters of the piece before, and those that are tried next."""
AGREED = 16
"""Tokens in a row that make sure of it."""


def tokens_of(pieces: Iterable[str], encoder: Encoder, of: Path) -> Iterator[Ids]:
    """The ids of a text, some of them at a time, [T], without special tokens; `of` is what messages call it.

    A tokenizer that does not say where its tokens stand (one that is Python) gets pieces that end at a line end, each alone.
    """
    cut = resized(pieces, PIECE)
    return _joined(cut, encoder, of) if encoder.gives_places else _line_by_line(cut, encoder, of)


def resized(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The same text in pieces of `size` characters, the last one shorter."""
    parts: list[str] = []
    count = 0
    for piece in pieces:
        start = 0
        while count + len(piece) - start >= size:
            end = start + size - count
            yield "".join([*parts, piece[start:end]])
            parts, count, start = [], 0, end
        if start < len(piece):
            parts.append(piece[start:])
            count += len(parts[-1])
    if parts:
        yield "".join(parts)


def _line_by_line(pieces: Iterable[str], encoder: Encoder, of: Path) -> Iterator[Ids]:
    rest = ""
    for piece in pieces:
        text = rest + piece
        end = text.rfind("\n") + 1 or max(text.rfind(" "), 0) or len(text)
        yield encoder.ids(text[:end], of)
        rest = text[end:]
    if rest:
        yield encoder.ids(rest, of)


def _joined(pieces: Iterable[str], encoder: Encoder, of: Path) -> Iterator[Ids]:
    text, end = "", 0
    left_T3 = np.zeros((0, 3), np.int64)  # up to character `end`, before which `text` ends: what has not been given out
    for piece in pieces:
        keep, right_T3 = _take_over(text, end, left_T3, piece, encoder, of)
        yield left_T3[:keep, 0]
        text, end, left_T3 = (text + piece)[-OVERLAPS[-1] :], end + len(piece), right_T3
    yield left_T3[:, 0]


def _take_over(text: str, end: int, left_T3: Ids, piece: str, encoder: Encoder, of: Path) -> tuple[int, Ids]:
    """How many of the tokens on the left stand, and those of the piece that come behind them."""
    for overlap in OVERLAPS if text else ():
        start = end - min(overlap, len(text))
        right_T3 = encoder.places(text[-overlap:] + piece, of) + np.array([0, start, start])
        first = int(np.searchsorted(left_T3[:, 1], start))
        common_T3 = right_T3[: int(np.searchsorted(right_T3[:, 2], end, side="right"))]
        if found := agreement(left_T3[first:].tolist(), common_T3.tolist()):
            return first + found[0], right_T3[found[1] :]
    return len(left_T3), encoder.places(piece, of) + np.array([0, end, end])


def agreement(left: list[list[int]], right: list[list[int]]) -> tuple[int, int] | None:
    """The middle of the first `AGREED` tokens in a row that are in both: where it is on the left and on the right."""
    first = {tuple(token): place for place, token in reversed(list(enumerate(right)))}
    run, other = 0, -1
    for place, token in enumerate(left):
        if run and other + 1 < len(right) and right[other + 1] == token:
            run, other = run + 1, other + 1
        else:
            other = first.get(tuple(token), -1)
            run = int(other >= 0)
        if run == AGREED:
            return place - AGREED // 2 + 1, other - AGREED // 2 + 1
    return None
