"""A layer trained: a method of `methods.trained` joined to the streams, the budget and the disk.

After each epoch all that the next one needs is on the disk. A run that dies comes to the same start again, finds it, and goes
on there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from streamlap.errors import CheckpointError, NumericalError, located
from streamlap.linalg.products import Linears
from streamlap.linalg.rows import any_out, blanked, paired
from streamlap.methods.trained.base import Lesson, Pair, Trained, Training
from streamlap.pipeline.layer_in_hand import LayerInHand
from streamlap.pipeline.session import Session
from streamlap.store.sink import ShardFolder
from streamlap.store.source import read_tensors

T = TypeVar("T")
Trace = dict[str, float]
"""Loss on held-out tokens at the start, at the best or at the end, and the epochs that were done."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """The sequences of both streams around one layer, to train it on and to judge it by."""

    hand: LayerInHand
    held: Sequence[int]
    train: Sequence[int]

    @classmethod
    def of(cls, hand: LayerInHand) -> Lessons:
        return cls(hand=hand, held=hand.streams.windows.held, train=hand.streams.windows.fitted)

    def pairs(self, numbers: Iterable[int]) -> Iterator[Pair]:
        """The sequences of these numbers, one by one: no result depends on how many fit into a forward. Tokens that are out of
        either stream are so in the target, and zero before the layer."""
        hand = self.hand
        move = hand.runner.stream.accelerator.move
        for number in numbers:
            yield paired(*(move(states.pick(number)) for states in (hand.compressed, hand.next_dense)))

    def lessons(self, numbers: Iterable[int], reads_dense: bool, reads_gradient: bool) -> Iterator[Lesson]:
        """The same with the dense stream before the layer, and the gradient behind it, where these are asked for."""
        move = self.hand.runner.stream.accelerator.move
        numbers = list(numbers)
        for number, (x_BLD, target_BLD) in zip(numbers, self.pairs(numbers), strict=True):
            dense_BLD = gradient_BLD = target_BLD[..., :0]
            if reads_dense:
                dense_BLD = blanked(move(self.hand.dense.pick(number)), any_out(target_BLD))
            if reads_gradient:
                gradient_BLD = move(self.hand.gradient.pick(number))
                gradient_BLD = blanked(gradient_BLD, any_out(target_BLD, gradient_BLD))
            yield x_BLD, target_BLD, dense_BLD, gradient_BLD


def train_layer(hand: LayerInHand, method: Trained, session: Session) -> Trace:
    """Train an edited layer, and put the best of it, if it is better than the start on held-out tokens, in the layer's place.

    Raises Interrupted after an epoch where a stop is due.
    """
    hand.streams.drop_between(hand.index)  # it is stale
    with hand.clock.phase("refine"), hand.runner.claim("refine"), located(hand.layer.prefix):
        lessons, layer = Lessons.of(hand), hand.layer
        training = method.start(layer.stored_parameters(), layer.with_parameters, len(lessons.train))
        run_epochs(training, lessons, lessons.pairs, method.epochs, session)
        layer.replace(training.finish())
    return {"start": training.held[0], "best": min(training.held), "epochs": training.epoch}


def run_epochs(
    training: Training[T], lessons: Lessons, take: Callable[[Iterable[int]], Iterator[T]], epochs: int, session: Session
) -> None:
    """All epochs, from where a run that died has left them; `take` gives what is taught of the sequences of these numbers."""
    path = state_path(session.state, lessons.hand.index)
    with Linears():
        training.begin(training.measure(take(lessons.held)))
    if not math.isfinite(training.held[0]):
        raise NumericalError(
            f"the loss on held-out tokens is {training.held[0]} before training; wanted a number. Take more windows, or dtype "
            "float32."
        )
    take_up(training, path)
    while not training.ends:
        with Linears():
            train_epoch(training, lessons, take, epochs)
            training.close_epoch(training.measure(take(lessons.held)))
        ShardFolder(path.parent).write(path.name, training.state())
        if session.stops.due() and not training.ends:
            raise session.stops.stopped(f"in layer {lessons.hand.index} after {training.epoch} of {epochs} epochs")


def train_epoch(
    training: Training[T], lessons: Lessons, take: Callable[[Iterable[int]], Iterator[T]], epochs: int
) -> None:
    """Every training sequence once."""
    order = training.order(lessons.hand.index, lessons.train)
    for place, taught in enumerate(take(order)):
        done = training.epoch * len(order) + place
        lessons.hand.runner.progress.phase("refine", done, len(order) * epochs)
        training.step(place, taught)


def state_path(state: Path, index: int) -> Path:
    """Where the state of a layer's training is between two epochs."""
    return state / f"refine-{index:05d}.safetensors"


def take_up(training: Training[T], path: Path) -> None:
    """Go on from the state of a run that died, where there is one and it began where this one does."""
    try:
        state = read_tensors(path)
    except CheckpointError:  # none, or one that is damaged: without it the same comes out, only later
        return
    training.load(state)
