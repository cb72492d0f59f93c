"""A rebuilt layer, refined: `methods.refine_block` joined to the streams, the budget and the disk.

After each epoch all that the next one needs is on the disk. A run that dies rebuilds the layer, finds it, and goes on there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from streamlap.errors import CheckpointError, NumericalError
from streamlap.families.layer import StreamLayer
from streamlap.linalg.rows import paired
from streamlap.linalg.statistics import all_finite
from streamlap.methods.trained.refine import Pair, Refinement, Refiner
from streamlap.pipeline.observe import held_sequences
from streamlap.pipeline.runner import Engine
from streamlap.pipeline.sublayers import Banks
from streamlap.store.header import byte_view, read_header
from streamlap.store.journal import STATE_FOLDER
from streamlap.store.sink import ShardFolder
from streamlap.store.source import read_into
from streamlap.system.signals import Stops

Refined = dict[str, float]
"""Loss on held-out tokens at the start and at the best, and the epochs that were done."""


@dataclass(kw_only=True)
class Lessons:
    """The sequences of both streams around one layer, to train it on and to judge it by."""

    engine: Engine
    banks: Banks
    index: int

    def __post_init__(self) -> None:
        sequences, length, _ = self.banks.dense.shape_NLD
        self.held = held_sequences(sequences, length)
        self.train = [number for number in range(sequences) if number not in set(self.held)] or self.held

    def pairs(self, numbers: Iterable[int]) -> Iterator[Pair]:
        """The sequences of these numbers, one by one: no result depends on how many fit into a forward. Tokens that are out of
        either stream are so in the goal, and zero before the layer."""
        device = self.engine.stream.device
        for number in numbers:
            x_BLD = self.engine.hidden.pick(self.index, [number])
            yield paired(x_BLD.to(device), self.banks.dense.pick(self.index + 1, [number]).to(device))


def refine_layer(
    engine: Engine, banks: Banks, layer: StreamLayer, index: int, knobs: Refinement, out: Path, stops: Stops
) -> Refined:
    """Train the layer, and put the best of it, if it is better than the start on held-out tokens, in the layer's place.

    Raises Interrupted after an epoch where a stop is due.
    """
    lessons = Lessons(engine=engine, banks=banks, index=index)
    refiner = Refiner(knobs, layer.stored_parameters(), layer.with_parameters, len(lessons.train))
    path = state_path(out, index)
    refiner.held.append(refiner.measure(lessons.pairs(lessons.held)))
    if not math.isfinite(refiner.held[0]):
        raise NumericalError(
            f"{layer.prefix}: the loss on held-out tokens is {refiner.held[0]} before refinement; wanted a number. Take more "
            "windows, or dtype float32."
        )
    take_up(refiner, path)
    while not refiner.ends:
        train_epoch(refiner, lessons)
        refiner.close_epoch(refiner.measure(lessons.pairs(lessons.held)))
        ShardFolder(path.parent).write(path.name, refiner.state())
        if stops.due() and not refiner.ends:
            raise stops.stopped(f"in layer {index} after {refiner.epoch} of {knobs.epochs} epochs")
    if all(map(all_finite, refiner.best.values())):
        layer.replace(refiner.best)
    return {"start": refiner.held[0], "best": min(refiner.held), "epochs": refiner.epoch}


def train_epoch(refiner: Refiner, lessons: Lessons) -> None:
    """Every training sequence once."""
    order = refiner.knobs.order(lessons.index, refiner.epoch, lessons.train)
    for place, pair in enumerate(lessons.pairs(order)):
        steps = len(order) * refiner.knobs.epochs
        lessons.engine.progress.phase("refine", refiner.epoch * len(order) + place, steps)
        refiner.descend(place, pair)


def state_path(out: Path, index: int) -> Path:
    """Where the state of a layer's refinement is between two epochs."""
    return out / STATE_FOLDER / f"refine-{index:05d}.safetensors"


def take_up(refiner: Refiner, path: Path) -> None:
    """Go on from the state of a run that died, where there is one and it began where this one does."""
    try:
        found = read_header(path).tensors
    except CheckpointError:  # none, or one that is damaged: without it the same comes out, only later
        return
    state = {}
    for name, info in found.items():
        state[name] = torch.empty(info.shape, dtype=info.dtype)
        read_into(info, byte_view(state[name]))
    refiner.load(state)
