"""An edited layer trained: a method of `methods.trained` joined to the streams, the budget and the disk.

After each epoch all that the next one needs is on the disk. A run that dies edits the layer again, finds it, and goes on there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamlap.errors import CheckpointError, NumericalError
from streamlap.linalg.moments import held_sequences
from streamlap.linalg.rows import paired
from streamlap.methods.base import Pair, Trained, Training
from streamlap.pipeline.hand import LayerInHand
from streamlap.pipeline.session import Session
from streamlap.pipeline.sublayers import places
from streamlap.store.sink import ShardFolder
from streamlap.store.source import read_tensors

Trace = dict[str, float]
"""Loss on held-out tokens at the start and at the best, and the epochs that were done."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """The sequences of both streams around one layer, to train it on and to judge it by."""

    hand: LayerInHand
    held: Sequence[int]
    train: Sequence[int]

    @classmethod
    def of(cls, hand: LayerInHand) -> Lessons:
        sequences, length, _ = hand.streams.compressed.shape_NLD
        held = held_sequences(sequences, length)
        train = [number for number in range(sequences) if number not in set(held)] or held
        return cls(hand=hand, held=held, train=train)

    def pairs(self, numbers: Iterable[int]) -> Iterator[Pair]:
        """The sequences of these numbers, one by one: no result depends on how many fit into a forward. Tokens that are out of
        either stream are so in the target, and zero before the layer."""
        hand = self.hand
        _, _, target = places(hand)
        move = hand.runner.stream.accelerator.move
        for number in numbers:
            yield paired(*(move(states.pick(number)) for states in (hand.compressed, target)))


def train_layer(hand: LayerInHand, method: Trained, session: Session) -> Trace:
    """Train the layer, and put the best of it, if it is better than the start on held-out tokens, in the layer's place.

    Raises Interrupted after an epoch where a stop is due.
    """
    hand.streams.drop_between(hand.index)  # it is stale
    with hand.clock.phase("refine"), hand.runner.claim("refine"):
        lessons, layer = Lessons.of(hand), hand.layer
        training = method.start(layer.stored_parameters(), layer.with_parameters, len(lessons.train))
        path = state_path(session.state, hand.index)
        training.begin(training.measure(lessons.pairs(lessons.held)))
        if not math.isfinite(training.held[0]):
            raise NumericalError(
                f"{layer.prefix}: the loss on held-out tokens is {training.held[0]} before training; wanted a number. Take "
                "more windows, or dtype float32."
            )
        take_up(training, path)
        while not training.ends:
            train_epoch(training, lessons, method.epochs)
            training.close_epoch(training.measure(lessons.pairs(lessons.held)))
            ShardFolder(path.parent).write(path.name, training.state())
            if session.stops.due() and not training.ends:
                raise session.stops.stopped(f"in layer {hand.index} after {training.epoch} of {method.epochs} epochs")
        layer.replace(training.finish())
    return {"start": training.held[0], "best": min(training.held), "epochs": training.epoch}


def train_epoch(training: Training, lessons: Lessons, epochs: int) -> None:
    """Every training sequence once."""
    order = training.order(lessons.hand.index, lessons.train)
    for place, pair in enumerate(lessons.pairs(order)):
        done = training.epoch * len(order) + place
        lessons.hand.runner.progress.phase("refine", done, len(order) * epochs)
        training.step(place, pair)


def state_path(state: Path, index: int) -> Path:
    """Where the state of a layer's training is between two epochs."""
    return state / f"refine-{index:05d}.safetensors"


def take_up(training: Training, path: Path) -> None:
    """Go on from the state of a run that died, where there is one and it began where this one does."""
    try:
        state = read_tensors(path)
    except CheckpointError:  # none, or one that is damaged: without it the same comes out, only later
        return
    training.load(state)
