"""Recovery: a rebuilt layer trained, alone, to give on the compressed stream what the dense layer gives on the dense one.

This is training, by gradients through one layer at a time. What is kept is the best state on tokens that no step has seen,
measured as it will be stored; where no state is better than the start, the layer stays as it was.

Shape suffixes: B batch, L length, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from streamlap.errors import RecipeError, shown
from streamlap.linalg.rows import rows_out
from streamlap.linalg.statistics import all_finite
from streamlap.methods.base import Pair, RunLayer
from streamlap.methods.trained.rates import warm_cosine

MOST_EPOCHS = 10_000

BETAS = (0.9, 0.95)
LEAST_SIZE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Refine:
    """Knobs of the training. In float32 it holds of each parameter: itself, its gradient, and the two moments of AdamW."""

    held_bytes: ClassVar[int] = 16
    state_bytes: ClassVar[int] = 12

    epochs: int = 25
    """Times that every calibration sequence is seen, at most."""
    learning_rate: float = 1e-2
    """Highest, as a share of each tensor's root mean square; from there it falls to nothing along a cosine."""
    warm_up: float = 0.1
    """Share of the steps in which it rises to that."""
    patience: float = 0.5
    """Share of the epochs without a gain on held-out tokens, over those before, after which it ends."""
    seed: int = 0
    """Of the order of the sequences."""

    def __post_init__(self) -> None:
        if type(self.epochs) is not int or not 1 <= self.epochs <= MOST_EPOCHS:
            raise RecipeError(
                f"refine: epochs is {shown(self.epochs)}; wanted a whole number of epochs, 1 to {MOST_EPOCHS}."
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**20:
            raise RecipeError(f"refine: seed is {shown(self.seed)}; wanted a whole number from 0 and below 2^20.")
        for name, most in (("learning_rate", 1.0), ("warm_up", 1.0), ("patience", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise RecipeError(f"refine: {name} is {shown(value)}; wanted a number above 0 and at most {most:g}.")

    def start(self, parameters: Iterable[tuple[str, torch.Tensor]], run: RunLayer, steps: int) -> Refining:
        return Refining(self, parameters, run, steps)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step of so many."""
        return self.learning_rate * warm_cosine(step, steps, self.warm_up)


def distances(target_BLD: torch.Tensor, y_BLD: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each token, over the mean square of its target [B, L - 1]; where some targets are out, [T] of
    the others.

    What follows is a norm, so an error counts by its share of the stream. The first token of a window is left out: models
    park attention on it, in numbers far larger than any other.
    """
    target_BLD, y_BLD = target_BLD[:, 1:].float(), y_BLD[:, 1:].float()
    if bool((out_BL := rows_out(target_BLD)).any()):
        target_BLD, y_BLD = target_BLD[~out_BL], y_BLD[~out_BL]
    size_BL = target_BLD.square().mean(dim=-1).clamp_min(1e-12)
    return (target_BLD - y_BLD).square().mean(dim=-1) / size_BL


class Refining:
    """The training of one layer: its float32 masters, AdamW, and the best that came of it; see `base.Training`."""

    def __init__(self, knobs: Refine, start: Iterable[tuple[str, torch.Tensor]], run: RunLayer, steps: int) -> None:
        self.knobs, self._run, self._steps = knobs, run, steps
        self.dtypes: dict[str, torch.dtype] = {}
        self.masters: dict[str, torch.Tensor] = {}
        for name, tensor in start:
            self.dtypes[name] = tensor.dtype
            self.masters[name] = tensor.detach().to(torch.float32, copy=True).requires_grad_()
        # Each at a rate of its own: a step changes every tensor by the same share, whatever the scale of its numbers.
        groups = [{"params": [master], "size": _size(master)} for master in self.masters.values()]
        # Fused: in one pass over each tensor, with nothing held beside it.
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
        self.best: dict[str, torch.Tensor] = {}
        """Parameters in their storage dtype; empty while nothing is better than the start."""
        self.held: list[float] = []
        """Loss on held-out tokens at the start and after each epoch."""
        self._update = 1.0

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.held) - 1

    @property
    def ends(self) -> bool:
        """Whether there is nothing more to do: all epochs done, no gain for long, or numbers out of bounds."""
        # Not over the start: the first epochs, at high rates, lie above it more often than not, and the last ones far below.
        done = self.held[1:] or [0.0]
        waited = len(done) - 1 - done.index(min(done))
        most = self.knobs.patience * self.knobs.epochs
        return self.epoch >= self.knobs.epochs or waited >= most or not math.isfinite(self.held[-1])

    def order(self, layer: int, numbers: Sequence[int]) -> list[int]:
        """The sequences of these numbers, shuffled: a step takes one."""
        generator = torch.Generator().manual_seed((self.knobs.seed << 40) + (layer << 20) + self.epoch)
        return [numbers[place] for place in torch.randperm(len(numbers), generator=generator).tolist()]

    @property
    def rounded(self) -> dict[str, torch.Tensor]:
        """The masters as they would be stored."""
        return {name: master.detach().to(self.dtypes[name]) for name, master in self.masters.items()}

    @torch.no_grad()
    def measure(self, held: Iterable[Pair]) -> float:
        """Loss on held-out tokens of the parameters as they would be stored, over what a layer that does nothing has."""
        self._adam.zero_grad()
        values = {name: tensor.float() for name, tensor in self.rounded.items()}
        missed = wanted = tokens = 0.0
        for x_BLD, target_BLD in held:
            missed += float(distances(target_BLD, self._run(values, x_BLD)).double().sum())
            before_BL = distances(target_BLD, x_BLD)
            wanted, tokens = wanted + float(before_BL.double().sum()), tokens + before_BL.numel()
        if not tokens:
            return math.nan
        self._update = wanted / tokens or 1.0
        return missed / (self._update * tokens)

    def step(self, place: int, pair: Pair) -> None:
        """The step of that number in this epoch, along the gradients of the loss on `pair`."""
        x_BLD, target_BLD = pair
        self._adam.zero_grad()
        found = distances(target_BLD, self._run(self.masters, x_BLD))
        loss = (found.mean() if found.numel() else found.sum()) / self._update
        loss.backward()  # type: ignore[no-untyped-call]
        rate = self.knobs.rate(self.epoch * self._steps + place, self.knobs.epochs * self._steps)
        for group in self._adam.param_groups:
            group["lr"] = rate * group["size"]
        self._adam.step()

    def begin(self, loss: float) -> None:
        """Take down the loss before the first epoch."""
        self.held.append(loss)

    def close_epoch(self, loss: float) -> None:
        """Take down the loss after an epoch, and the parameters where it is the least so far."""
        if loss < min(self.held):
            self.best = {name: tensor.clone() for name, tensor in self.rounded.items()}
        self.held.append(loss)

    def finish(self) -> dict[str, torch.Tensor]:
        """The best, in the storage dtype; nothing where the start was never bettered, or where the best is not finite."""
        return self.best if all(map(all_finite, self.best.values())) else {}

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next epoch needs."""
        parts = {"master": self.masters, "best": self.best}
        for part in ("exp_avg", "exp_avg_sq"):
            parts[part] = {name: self._adam.state[master][part] for name, master in self.masters.items()}
        state = {f"{part} {name}": tensor.detach() for part, table in parts.items() for name, tensor in table.items()}
        return state | {"held": torch.tensor(self.held, dtype=torch.float64)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state`, unless it belongs to a training that began otherwise than this one, to the last bit."""
        held = state["held"].tolist()
        if held[0] != self.held[0]:
            return
        self.held = held
        for name, master in self.masters.items():
            master.detach().copy_(state[f"master {name}"])
            moments = {part: state[f"{part} {name}"].to(master.device) for part in ("exp_avg", "exp_avg_sq")}
            done = torch.tensor(float(self.epoch * self._steps), device=master.device)
            self._adam.state[master] = {"step": done, **moments}
        best = {name: state.get(f"best {name}") for name in self.masters}
        self.best = {name: tensor.to(self.masters[name].device) for name, tensor in best.items() if tensor is not None}


def _size(tensor: torch.Tensor) -> float:
    """Root mean square; of a tensor of zeros, such as a bias may be, a little more, so that it can grow."""
    return max(float(tensor.detach().square().mean().sqrt()), LEAST_SIZE)
