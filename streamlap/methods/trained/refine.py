"""Refinement: a rebuilt layer trained, alone, to give on the compressed stream what the dense layer gives on the dense one.

This is training, by gradients through one layer at a time. What is kept is the best state on tokens that no step has seen,
measured as it will be stored; where no state is better than the start, the layer stays as it was.

Shape suffixes: B batch, L length, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from streamlap.linalg.statistics import all_finite
from streamlap.methods.trained.base import Pair, RunLayer
from streamlap.methods.trained.steps import BestSteps, HeldLoss, Pace, check_pace, check_share, distances, mean, scale


@dataclass(frozen=True, kw_only=True)
class Refine(Pace):
    """Knobs of the training. In float32 it holds of each parameter: itself, its gradient, and the two moments of AdamW."""

    held_bytes: ClassVar[int] = 16
    state_bytes: ClassVar[int] = 12

    epochs: int = 25
    patience: float = 0.5
    """Share of the epochs without a gain on held-out tokens, over those before, after which it ends."""

    def __post_init__(self) -> None:
        check_pace("refine", self)
        check_share("refine", "patience", self.patience)

    def start(self, parameters: Iterable[tuple[str, torch.Tensor]], run: RunLayer, steps: int) -> Refining:
        return Refining(self, parameters, run, steps)


class Refining(BestSteps):
    """The training of one layer: its float32 masters, AdamW, and the best that came of it; see `trained.base.Training`."""

    def __init__(self, knobs: Refine, start: Iterable[tuple[str, torch.Tensor]], run: RunLayer, steps: int) -> None:
        self.knobs, self._run = knobs, run
        self.dtypes: dict[str, torch.dtype] = {}
        masters: dict[str, torch.Tensor] = {}
        for name, tensor in start:
            self.dtypes[name] = tensor.dtype
            masters[name] = tensor.detach().to(torch.float32, copy=True).requires_grad_()
        super().__init__(knobs, masters, {name: scale(master) for name, master in masters.items()}, steps)

    @property
    def ends(self) -> bool:
        """Whether there is nothing more to do: all epochs done, no gain for long, or numbers out of bounds."""
        # Not over the start: the first epochs, at high rates, lie above it more often than not, and the last ones far below.
        done = self.held[1:] or [0.0]
        waited = len(done) - 1 - done.index(min(done))
        most = self.knobs.patience * self.knobs.epochs
        return self.epoch >= self.knobs.epochs or waited >= most or not math.isfinite(self.held[-1])

    @property
    def rounded(self) -> dict[str, torch.Tensor]:
        """The masters as they would be stored."""
        return {name: master.detach().to(self.dtypes[name]) for name, master in self.masters.items()}

    @torch.no_grad()
    def measure(self, held: Iterable[Pair]) -> float:
        """Loss on held-out tokens of the parameters as they would be stored, over what a layer that does nothing has."""
        self._adam.zero_grad()
        values, found = {name: tensor.float() for name, tensor in self.rounded.items()}, HeldLoss()
        for x_BLD, target_BLD in held:
            found.update(x_BLD, target_BLD, self._run(values, x_BLD))
        return self.noted(found)

    def step(self, place: int, pair: Pair) -> None:
        """The step of that number in this epoch, along the gradients of the loss on `pair`."""
        x_BLD, target_BLD = pair
        self._adam.zero_grad()
        loss = mean(distances(target_BLD, self._run(self.masters, x_BLD))) / self._update
        loss.backward()  # type: ignore[no-untyped-call]
        self.move(place)

    def finish(self) -> dict[str, torch.Tensor]:
        """The best, in the storage dtype; nothing where the start was never bettered, or where the best is not finite."""
        return self.best if all(map(all_finite, self.best.values())) else {}
