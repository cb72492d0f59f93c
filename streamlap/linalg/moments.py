"""Second moments of what a linear reads, and of that against what it should give: all that a closed form needs of the tokens.

Each equals its one-shot formula, whatever the batches. Products are float32 where the tokens are narrower than float64, and
each covers a fixed number of tokens; their sums are as exact for a billion tokens as for a thousand, see `sums`.

Shape suffixes: T tokens, I in, A anchor (out, or in of the dense stream).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from streamlap.linalg.gram import Gram
from streamlap.linalg.statistics import all_finite
from streamlap.linalg.sums import GramSum, Sum

CHUNK_TOKENS, WIDEST = 4096, 16384
"""Tokens in one product, half as many where they have more inputs. Fixed, and counted across updates: the bits do not depend
on the batches."""


def chunk_tokens(width: int) -> int:
    return CHUNK_TOKENS if width <= WIDEST else CHUNK_TOKENS // 2


class Moments:
    """S = sum x x' [I, I], and C' = sum x t' [I, A] where every token x comes with its anchor t."""

    def __init__(self) -> None:
        self.tokens = 0
        self._gram: GramSum | None = None
        self._cross: Sum | None = None
        self._chunk: list[torch.Tensor] = []
        """Tokens that wait until a chunk is full, and their anchors, [I, T] and [A, T], so that a panel lies in one piece.
        Copied, since the caller may use its memory again."""
        self._waiting = 0

    def update(self, x_TI: torch.Tensor, anchor_TA: torch.Tensor | None = None) -> None:
        """Take in tokens and the anchor of each; none where S alone is wanted."""
        given = [x_TI, x_TI[:, :0] if anchor_TA is None else anchor_TA]
        assert len(given[1]) == len(x_TI), "every token has one anchor"
        self.tokens += len(x_TI)
        while len(given[0]):
            most = chunk_tokens(x_TI.shape[1])
            if not self._chunk:
                self._chunk = [rows.new_empty(rows.shape[1], most) for rows in given]
            count = min(most - self._waiting, len(given[0]))
            for held, rows in zip(self._chunk, given, strict=True):
                assert held.dtype == rows.dtype, "one dtype from the first token to the last"
                held[:, self._waiting : self._waiting + count] = rows[:count].T
            given = [rows[count:] for rows in given]
            self._waiting += count
            if self._waiting == most:
                self._add()

    def finish(self) -> tuple[Gram, torch.Tensor]:
        """S, and C' [I, A] in the dtype to solve in; the sums end here. At least one token must have come."""
        self._flush()
        assert self._gram is not None, "no tokens were seen"
        assert self._cross is not None, "no tokens were seen"
        gram, cross_IA = self._gram.gram(), self._cross.total
        self._gram = self._cross = None
        return gram, cross_IA

    @property
    def finite(self) -> bool:
        """Whether all tokens and their products were finite; one bad number shows in every sum of its row."""
        self._flush()
        if self._gram is None or self._cross is None:
            return True
        return all(map(all_finite, (self._gram.diagonal_I, self._cross.total[0])))

    def _flush(self) -> None:
        """Sum the tokens that wait, and free the memory that they waited in."""
        if self._waiting:
            self._add()
        self._chunk = []

    def _add(self) -> None:
        wide = functools.reduce(torch.promote_types, [held.dtype for held in self._chunk], torch.float32)
        for held in self._chunk:
            held[:, self._waiting :] = 0  # which adds nothing, and a chunk in one piece needs no copy
        x_IT, anchor_AT = (held.to(wide) for held in self._chunk)
        self._waiting = 0
        if self._gram is None or self._cross is None:
            self._gram, self._cross = GramSum(len(x_IT), x_IT.device), Sum((len(x_IT), len(anchor_AT)), x_IT.device)
        self._gram.add(x_IT)
        self._cross.add(x_IT, anchor_AT)


HELD_TOKENS = 4096
"""Most rows that are held out to choose by."""

HELD_SEQUENCES = 8
"""One sequence of so many is held out, until as many tokens are as a choice needs."""


def held_sequences(total: int, length: int, tokens: int = HELD_TOKENS) -> Sequence[int]:
    """Numbers (from 0) of the sequences that no sub-layer is fitted to: every eighth, or the last of fewer, until they have so
    many tokens. A single one serves for both."""
    held = range(HELD_SEQUENCES - 1, total, HELD_SEQUENCES) or [total - 1]
    return held[: -(-tokens // length)]


def fitted_sequences(total: int, length: int, more: int = 0) -> Sequence[int]:
    """Numbers of all others, and of so many `more` behind them."""
    held = set(held_sequences(total, length))
    others = [number for number in range(total) if number not in held] or list(held)
    return [*others, *range(total, total + more)]


class Sample:
    """Held-out tokens: rows (x, t) that no sum has seen, the first `limit` that come, to choose by. They wait in RAM."""

    def __init__(self, limit: int) -> None:
        self.limit, self._rows, self._count = limit, list[tuple[torch.Tensor, torch.Tensor]](), 0

    def update(self, x_TI: torch.Tensor, anchor_TA: torch.Tensor) -> None:
        room = self.limit - self._count
        if room > 0:
            self._rows.append((x_TI[:room].to("cpu", copy=True), anchor_TA[:room].to("cpu", copy=True)))
            self._count += min(room, len(x_TI))

    @functools.cached_property
    def power(self) -> float:
        """Mean square length of the anchors, of which an error is a share. Fixed when it is first asked for."""
        return float(torch.cat([anchor.double().square().sum(dim=1) for _, anchor in self._rows]).mean())

    @property
    def tokens(self) -> int:
        """Rows that are kept."""
        return self._count

    @property
    def finite(self) -> bool:
        """Whether all rows are."""
        return all(all_finite(rows) for pair in self._rows for rows in pair)

    @property
    def x_TI(self) -> torch.Tensor:  # noqa: N802
        return torch.cat([x for x, _ in self._rows])

    @property
    def anchor_TA(self) -> torch.Tensor:  # noqa: N802
        return torch.cat([anchor for _, anchor in self._rows])
