"""What a method may see of a half of a layer: sums and rows of what goes through it on both streams, token by token.

Shape suffixes: B batch, L length, D hidden, I in, A anchor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from streamlap.errors import NumericalError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.table import Half
from streamlap.linalg.anchor import working
from streamlap.linalg.moments import Moments, Sample, take_means
from streamlap.linalg.notes import note
from streamlap.linalg.rows import any_out, blanked, finite_rows
from streamlap.methods.anchored.costs import HELD_TOKENS
from streamlap.methods.base import Seen
from streamlap.pipeline.runner import Engine
from streamlap.store.hidden import HiddenBank
from streamlap.system.meters import PhaseClock

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

    @property
    def _parts(self) -> Half:
        return self.layer.family.halves[self.half]

    def inputs(self) -> Seen:
        normed = self.layer.normed

        def look(dense_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
            return normed(self.half, x_BLD), normed(self.half, dense_BLD)

        return self.once("inputs", lambda: self._collect(look, self.dense, self.stream, site=self._parts.reads))

    def input_gram(self) -> torch.Tensor:
        def look(x_BLD: torch.Tensor) -> Rows:
            return self.layer.normed(self.half, x_BLD), x_BLD[..., :0]

        return self.once("input gram", lambda: self._collect(look, self.stream, site=self._parts.reads).gram_II)

    def middles(self, edits: Sequence[Edit], centred: bool = False) -> Seen:
        with self.layer.tried(edits):
            look = self._middles_look(centred)
            return self._collect(look, self.goal, self.stream, site=self._parts.writes, centred=centred)

    def held_middles(self, edits: Sequence[Edit], centred: bool = False) -> Sample:
        with self.layer.tried(edits):
            sample = self._gather(self._middles_look(centred), self.goal, self.stream, fitted=False)[1]
        return sample.centred() if centred else sample

    def middle_gram(self, edits: Sequence[Edit], centred: bool = False) -> torch.Tensor:
        def look(goal_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
            x_BLI, _ = self._middles_look(centred)(goal_BLD, x_BLD)
            return x_BLI, goal_BLD[..., :0]

        with self.layer.tried(edits):
            return self._collect(look, self.goal, self.stream, site=self._parts.writes, centred=centred).gram_II

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

    def _note_dead(self, site: str, gram_II: torch.Tensor) -> None:
        """Inputs that no token ever moved from zero: they draw no rank, and channels of them go first. What is not cut keeps
        its weight for them, of which the calibration says nothing."""
        if dead := int((gram_II.diagonal() == 0).sum()):
            note(self.layer.family.dead_inputs(site, dead))

    def remember(self, name: Hashable, made: object) -> None:
        self._made[name] = made

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def _collect(self, look: Callable[..., Rows], *places: Place, site: str, centred: bool = False) -> Seen:
        """Sums over the tokens that are fitted to, and rows of those that are held out; means taken off both where the last
        column of x is the weight of a token. `site` is what reads x."""
        moments, sample = self._gather(look, *places)
        self.once(("dead", site), lambda: self._note_dead(site, moments.gram_II))
        if not centred:
            gram_II, cross_AI = working(moments.gram_II, moments.cross_AI)
            return Seen(gram_II=gram_II, cross_AI=cross_AI, held=sample)
        means = take_means(moments)
        gram_II, cross_AI = working(moments.gram_II[:-1, :-1], moments.cross_AI[:, :-1])
        return Seen(gram_II=gram_II, cross_AI=cross_AI, held=sample.less(*means), means=means)

    def _gather(self, look: Callable[..., Rows], *places: Place, fitted: bool = True) -> tuple[Moments, Sample]:
        """Sums over (x, anchor) of every sequence, or where its turn comes its rows; without `fitted` these alone.

        Tokens that are out in one of the streams are left out, and so are those that `look` makes something of that is not
        finite. These are searched for only where the sums show that there are some, which is nearly never.
        """
        with self.clock.phase("capture"):
            for careful in (False, True):
                attempt = functools.partial(self._sums, look, places, fitted, careful)
                moments, sample, out_NL = self.engine.ladder.climb("capture", self.index, attempt)
                if moments.finite and sample.finite:
                    break
            else:
                raise NumericalError("products of activations overflow; wanted finite ones. Scale the model.")
        self.engine.leave_out("what is fitted to", out_NL)
        if not sample.tokens:
            raise NumericalError(
                "no token of the windows that are held out is finite; wanted some to choose by. Take more windows, or dtype "
                "float32."
            )
        return moments, sample

    def _sums(
        self, look: Callable[..., Rows], places: Sequence[Place], fitted: bool, careful: bool
    ) -> tuple[Moments, Sample, torch.Tensor]:
        """One attempt at `_gather`, and the tokens [N, L] that it left out; `careful`, whether it looks at every row."""
        self.engine.heap.trim()
        moments, sample, number = Moments(), Sample(HELD_TOKENS), 0
        total, out_NL = self.stream.bank.shape_NLD[0], torch.zeros_like(self.engine.out_NL)
        for batches in self.engine.together(*(place.read() for place in places), phase="capture"):
            for parts in zip(*(torch.split(x_BLD, self.engine.ladder.micro) for x_BLD in batches), strict=True):
                first, number = number, number + len(parts[0])
                numbers = [n for n in range(first, number) if fitted or is_held(n + 1, total)]
                if not numbers or (sample.full and not fitted):
                    continue
                if not fitted:
                    parts = tuple(x_BLD[[n - first for n in numbers]] for x_BLD in parts)
                out_BL = any_out(*parts)
                x_BLI, anchor_BLA = look(*(blanked(x_BLD, out_BL) for x_BLD in parts))
                if careful:
                    bad_BL = ~(finite_rows(x_BLI) & finite_rows(anchor_BLA))
                    out_BL = bad_BL if out_BL is None else out_BL | bad_BL
                if out_BL is not None:
                    out_NL[numbers] = out_BL.cpu()
                for place, n in enumerate(numbers):
                    good = slice(None) if out_BL is None else ~out_BL[place]
                    into = sample if is_held(n + 1, total) and not sample.full else moments
                    into.update(x_BLI[place][good], anchor_BLA[place][good])
        if fitted and not moments.tokens and sample.tokens:  # a single sequence: nothing is left to hold out
            moments.update(sample.x_TI, sample.anchor_TA)
        return moments, sample, out_NL


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
