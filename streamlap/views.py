"""What a method may see of a half of a layer: sums and rows of what goes through it on both streams, token by token.

Shape suffixes: B batch, L length, D hidden, I in, A anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from streamlap.engine import Engine
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.anchor import working
from streamlap.linalg.moments import Moments, Sample, take_means
from streamlap.meters import PhaseClock
from streamlap.methods.base import Seen
from streamlap.methods.costs import HELD_TOKENS
from streamlap.store.hidden import HiddenBank

T = TypeVar("T")
Rows = tuple[torch.Tensor, torch.Tensor]
"""Of a batch: x [B, L, I] and its anchors [B, L, A], of no width where none are needed."""

HELD_SEQUENCES = 8
"""One sequence of so many is held out, until `HELD_TOKENS` are."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the hidden states of one stream are."""

    bank: HiddenBank
    generation: int

    def read(self) -> Iterator[torch.Tensor]:
        return self.bank.read(self.generation)


@dataclass(kw_only=True)
class View:
    """One half of a layer as its methods see it; see `HalfView`."""

    engine: Engine
    clock: PhaseClock
    layer: StreamLayer
    index: int
    half: str
    dense: Place
    """The dense stream before the half."""
    goal: Place
    """The dense stream after it."""
    stream: Place
    """The compressed stream before it."""
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def inputs(self) -> Seen:
        normed = self.layer.normed

        def look(dense_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
            return normed(self.half, x_BLD), normed(self.half, dense_BLD)

        return self.once("inputs", lambda: self._collect(look, self.dense, self.stream))

    def input_gram(self) -> torch.Tensor:
        def look(x_BLD: torch.Tensor) -> Rows:
            return self.layer.normed(self.half, x_BLD), x_BLD[..., :0]

        return self.once("input gram", lambda: self._collect(look, self.stream).gram_II)

    def middles(self, edits: Sequence[Edit], centred: bool = False) -> Seen:
        with self.layer.tried(edits):
            return self._collect(self._middles_look(centred), self.goal, self.stream, centred=centred)

    def held_middles(self, edits: Sequence[Edit], centred: bool = False) -> Sample:
        with self.layer.tried(edits):
            sample = self._gather(self._middles_look(centred), self.goal, self.stream, fitted=False)[1]
        return sample.centred() if centred else sample

    def middle_gram(self, edits: Sequence[Edit], centred: bool = False) -> torch.Tensor:
        def look(goal_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
            x_BLI, _ = self._middles_look(centred)(goal_BLD, x_BLD)
            return x_BLI, goal_BLD[..., :0]

        with self.layer.tried(edits):
            return self._collect(look, self.goal, self.stream, centred=centred).gram_II

    def _middles_look(self, centred: bool) -> Callable[..., Rows]:
        """Of the middle, with the weights of the tokens as a last column where means are to be taken off."""

        def look(goal_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
            x_BLI, missing_BLD = self._middle(goal_BLD, x_BLD)
            return torch.cat([x_BLI, evenly(goal_BLD.float())], dim=-1), missing_BLD

        return look if centred else self._middle

    def _middle(self, goal_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
        """What the last linear reads, and what is missing from the stream, its own bias apart."""
        bias_O = self.layer.linear(self.layer.family.last(self.half)).bias
        goal_BLD = goal_BLD.float()
        missing_BLD = goal_BLD - x_BLD.float()
        if bias_O is not None:
            missing_BLD = missing_BLD - bias_O.float()
        weight_BL1 = evenly(goal_BLD)
        return self.layer.middle(self.half, x_BLD).float() * weight_BL1, missing_BLD * weight_BL1

    def remember(self, name: Hashable, made: object) -> None:
        self._made[name] = made

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def _collect(self, look: Callable[..., Rows], *places: Place, centred: bool = False) -> Seen:
        """Sums over the tokens that are fitted to, and rows of those that are held out; means taken off both where the last
        column of x is the weight of a token."""
        moments, sample = self._gather(look, *places)
        if not centred:
            gram_II, cross_AI = working(moments.gram_II, moments.cross_AI)
            return Seen(gram_II=gram_II, cross_AI=cross_AI, held=sample)
        means = take_means(moments)
        gram_II, cross_AI = working(moments.gram_II[:-1, :-1], moments.cross_AI[:, :-1])
        return Seen(gram_II=gram_II, cross_AI=cross_AI, held=sample.less(*means), means=means)

    def _gather(self, look: Callable[..., Rows], *places: Place, fitted: bool = True) -> tuple[Moments, Sample]:
        """Sums over (x, anchor) of every sequence, or where its turn comes its rows; without `fitted` these alone."""

        def attempt() -> tuple[Moments, Sample]:
            self.engine.heap.trim()
            moments, sample, number = Moments(), Sample(HELD_TOKENS), 0
            total = self.stream.bank.shape_NLD[0]
            for batches in self.engine.together(*(place.read() for place in places), phase="capture"):
                for parts in zip(*(torch.split(x_BLD, self.engine.ladder.micro) for x_BLD in batches), strict=True):
                    turns = [is_held(number + turn, total) for turn in range(1, len(parts[0]) + 1)]
                    number += len(turns)
                    if not fitted:
                        parts = tuple(x_BLD[turns] for x_BLD in parts)
                        turns = [held for held in turns if held]
                    if not turns or (sample.full and not fitted):
                        continue
                    for held, x_LI, anchor_LA in zip(turns, *look(*parts), strict=True):
                        (sample if held and not sample.full else moments).update(x_LI, anchor_LA)
            if fitted and not moments.tokens:  # a single sequence: nothing is left to hold out
                moments.update(sample.x_TI, sample.anchor_TA)
            return moments, sample

        with self.clock.phase("capture"):
            return self.engine.ladder.climb("capture", self.index, attempt)


def evenly(goal_BLD: torch.Tensor) -> torch.Tensor:
    """[B, L, 1]: what a token counts. What follows is a norm, so an error counts by its share of the stream, or a few huge
    tokens would be all that counts."""
    return goal_BLD.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()


def is_held(number: int, total: int) -> bool:
    """Whether the `number`th sequence (from 1) of `total` is held out: every eighth, or the last of fewer."""
    return number % HELD_SEQUENCES == 0 or (total < HELD_SEQUENCES and number == total)


def held_sequences(total: int, length: int) -> list[int]:
    """Numbers (from 0) of the sequences that no half was fitted to; a single one serves for both."""
    held = [number for number in range(total) if is_held(number + 1, total)]
    return held[: -(-HELD_TOKENS // length)]
