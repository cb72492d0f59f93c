"""A layer rebuilt half by half, beside the dense model: what `pipeline` does for the anchored methods of a recipe.

Two streams go through a layer: x, where the dense model is, and x^, where the compressed one is. A half is rebuilt to add to x^
what brings it to where x will be. Between the halves both streams are kept in banks of their own, which need not outlive the
process: a run that dies begins its layer anew.

Shape suffixes: B batch, L length, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from streamlap.engine import Engine, open_bank
from streamlap.errors import NumericalError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.linalg.anchor import working
from streamlap.linalg.moments import Moments, Sample
from streamlap.meters import PhaseClock
from streamlap.methods.base import Built, Candidates, Comparable, Seen, by_kin
from streamlap.methods.costs import HELD_TOKENS
from streamlap.sizing import Schedule
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

    def middles(self, edits: Sequence[Edit]) -> Seen:
        with self.layer.tried(edits):
            return self._collect(self._middle, self.goal, self.stream)

    def held_middles(self, edits: Sequence[Edit]) -> Sample:
        with self.layer.tried(edits):
            return self._gather(self._middle, self.goal, self.stream, fitted=False)[1]

    def middle_gram(self, edits: Sequence[Edit]) -> torch.Tensor:
        def look(goal_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
            return self.layer.middle(self.half, x_BLD).float() * evenly(goal_BLD.float()), goal_BLD[..., :0]

        with self.layer.tried(edits):
            return self._collect(look, self.goal, self.stream).gram_II

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

    def _collect(self, look: Callable[..., Rows], *places: Place) -> Seen:
        """Sums over the tokens that are fitted to, and rows of those that are held out."""
        moments, sample = self._gather(look, *places)
        gram_II, cross_AI = working(moments.gram_II, moments.cross_AI)
        return Seen(gram_II=gram_II, cross_AI=cross_AI, held=sample)

    def _gather(self, look: Callable[..., Rows], *places: Place, fitted: bool = True) -> tuple[Moments, Sample]:
        """Sums over (x, anchor) of every sequence, or where its turn comes its rows; without `fitted` these alone."""

        def attempt() -> tuple[Moments, Sample]:
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


@dataclass(frozen=True, kw_only=True)
class Banks:
    """The streams beside the compressed one, which `Engine.hidden` holds."""

    dense: HiddenBank
    """The dense stream between layers; as durable as the compressed one."""
    dense_middle: HiddenBank
    middle: HiddenBank
    """Both streams between the halves of the layer in hand."""

    @property
    def all(self) -> tuple[HiddenBank, ...]:
        return self.dense, self.dense_middle, self.middle

    def drop_middles(self, index: int) -> None:
        """What lies between the halves of a layer that is done."""
        self.dense_middle.drop(index)
        self.middle.drop(index)


def open_banks(stream: ModelStream, tokens_NL: torch.Tensor, schedule: Schedule, folder: Path | None) -> Banks:
    """The banks in the memory that the schedule gives them. What lies between halves is in `folder` only where no memory is."""
    between = folder if schedule.tier == "disk" else None
    return Banks(
        dense=open_bank(stream, tokens_NL, schedule, folder, "dense"),
        dense_middle=open_bank(stream, tokens_NL, schedule, between, "dense-middle"),
        middle=open_bank(stream, tokens_NL, schedule, between, "middle"),
    )


HalfErrors = dict[str, dict[str, float]]
"""Half -> method -> how far its output is from the target on held-out tokens, see `held_error`."""


def rebuild_layer(
    engine: Engine, banks: Banks, layer: StreamLayer, index: int, candidates: Mapping[str, Candidates],
    clock: PhaseClock, ready: Callable[[], None],
) -> tuple[list[Edit], HalfErrors]:  # fmt: skip
    """Both halves of a layer, rebuilt and applied; the compressed stream is then at `banks.middle`, before the second half.

    `ready` is called before the first solve. Gives the edits, and the errors of all methods by half.
    """
    before, between, after = (
        Place(bank=banks.dense, generation=index), Place(bank=banks.dense_middle, generation=index),
        Place(bank=banks.dense, generation=index + 1),
    )  # fmt: skip
    with clock.phase("dense"), engine.claim("propagate"):
        engine.carry(half_of(layer, "attention"), index, before.read(), banks.dense_middle, index)
    ready()
    edits: list[Edit] = []
    errors: HalfErrors = {}
    for half, dense, goal, bank in (
        ("attention", before, between, engine.hidden),
        ("ffn", between, after, banks.middle),
    ):
        if half == "ffn":
            with clock.phase("dense"), engine.claim("propagate"):
                engine.carry(half_of(layer, "ffn"), index, between.read(), banks.dense, index + 1)
        view = View(
            engine=engine, clock=clock, layer=layer, index=index, half=half, dense=dense, goal=goal,
            stream=Place(bank=bank, generation=index),
        )  # fmt: skip
        with clock.phase("solve"), engine.claim("solve"):
            built, errors[half] = rebuild(view, candidates[half])
        layer.apply(built.edits)
        edits += built.edits
        if half == "attention":
            with clock.phase("propagate"), engine.claim("propagate"):
                engine.carry(half_of(layer, half), index, engine.hidden.read(index), banks.middle, index)
    return edits, errors


def half_of(layer: StreamLayer, half: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x_BLD: layer.run_half(half, x_BLD)


def rebuild(view: View, candidates: Candidates) -> tuple[Built, dict[str, float]]:
    """The best of the methods for a half, by its error on held-out tokens; and the errors of all, by name."""
    best: Built | None = None
    errors: dict[str, float] = {}
    try:
        for rivals in by_kin(candidates):
            for name, (method, layout) in foremost(view, rivals, errors).items():
                built = method.build(view, layout)
                errors[name] = built.error
                if best is None or built.error < best.error:
                    best = built
    except NumericalError as error:
        raise NumericalError(f"{view.layer.prefix} {view.half}: {error}") from error
    assert best is not None, "no method for a half"
    return best, errors


def foremost(view: View, rivals: Candidates, errors: dict[str, float]) -> Candidates:
    """Of several methods of one kin the one that looks best; `errors` learns how they look."""
    method, _ = next(iter(rivals.values()))
    if len(rivals) == 1 or not isinstance(method, Comparable):
        return rivals
    found = method.compare(view, {name: layout for name, (_, layout) in rivals.items()})
    errors.update(found)
    best = min(found, key=lambda name: found[name])
    return {best: rivals[best]}
