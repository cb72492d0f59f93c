"""What all training of a layer shares: the loss on a token, float32 masters that AdamW moves, and their state on the disk.

Shape suffixes: B batch, L length, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamlap.errors import RecipeError, shown
from streamlap.linalg.rows import rows_out

MOST_EPOCHS = 10_000

BETAS = (0.9, 0.95)
LEAST_SIZE = 1e-3
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_whole(method: str, name: str, value: Any, least: int, most: int, what: str = "") -> None:
    """Raise RecipeError where a knob is no whole number in these bounds, both included."""
    if type(value) is not int or not least <= value <= most:
        raise RecipeError(f"{method}: {name} is {shown(value)}; wanted a whole number{what}, {least} to {most}.")


def check_share(method: str, name: str, value: Any, least: float | None = None, most: float = 1.0) -> None:
    """Raise RecipeError where a knob is no number of at most `most` and above 0, or of at least `least`."""
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not (value > 0 if least is None else least <= value) or not value <= most:
        low = "above 0" if least is None else f"of at least {least:g}"
        raise RecipeError(f"{method}: {name} is {shown(value)}; wanted a number {low} and at most {most:g}.")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a layer is trained, and how fast."""

    epochs: int = 10
    """Times that every window is seen, at most."""
    learning_rate: float = 1e-2
    """Highest, as a share of each tensor's scale; from there it falls to nothing along a cosine."""
    warm_up: float = 0.1
    """Share of the steps in which it rises to that."""
    seed: int = 0
    """Of the order of the windows, and of what else is drawn."""

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step of so many: it rises in a line, and falls to nothing along a cosine."""
        rising = max(1, round(self.warm_up * steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def check_pace(method: str, knobs: Any) -> None:
    """Raise RecipeError where a knob of `Pace` is out of bounds."""
    check_whole(method, "epochs", knobs.epochs, 1, MOST_EPOCHS, " of epochs")
    if type(knobs.seed) is not int or not 0 <= knobs.seed < 2**20:
        raise RecipeError(f"{method}: seed is {shown(knobs.seed)}; wanted a whole number from 0 and below 2^20.")
    for name in ("learning_rate", "warm_up"):
        check_share(method, name, getattr(knobs, name))


def distances(target_BLD: torch.Tensor, y_BLD: torch.Tensor, first: int = 1) -> torch.Tensor:
    """Mean squared distance of each token from `first` on, over the mean square of its target [B, L - first]; where some
    targets are out, [T] of the others.

    What follows is a norm, so an error counts by its share of the stream. The first token of a window is an attention sink,
    whose hidden state is far larger than any other. By default it is left out. The steps of `loraprune` count it: else they
    would remove the channels that make the sink.
    """
    target_BLD, y_BLD = target_BLD[:, first:].float(), y_BLD[:, first:].float()
    if bool((out_BL := rows_out(target_BLD)).any()):
        target_BLD, y_BLD = target_BLD[~out_BL], y_BLD[~out_BL]
    size_BL = target_BLD.square().mean(dim=-1).clamp_min(1e-12)
    return (target_BLD - y_BLD).square().mean(dim=-1) / size_BL


def mean(found: torch.Tensor) -> torch.Tensor:
    """Of all tokens; 0 where there is none."""
    return found.mean() if found.numel() else found.sum()


def scale(tensor: torch.Tensor) -> float:
    """Root mean square; of a tensor of zeros, such as a bias may be, a little more, so that it can grow."""
    return max(float(tensor.detach().square().mean().sqrt()), LEAST_SIZE)


class HeldLoss:
    """The loss on held-out tokens, over what a layer that does nothing has."""

    def __init__(self) -> None:
        self.missed = self.wanted = self.tokens = 0.0

    def update(self, x_BLD: torch.Tensor, target_BLD: torch.Tensor, y_BLD: torch.Tensor) -> None:
        """One window: before the layer, where it should come to, where it comes to."""
        self.missed += float(distances(target_BLD, y_BLD).double().sum())
        before_BL = distances(target_BLD, x_BLD)
        self.wanted, self.tokens = self.wanted + float(before_BL.double().sum()), self.tokens + before_BL.numel()

    @property
    def update_size(self) -> float:
        """Mean of what a layer that does nothing misses by."""
        return self.wanted / self.tokens or 1.0

    @property
    def value(self) -> float:
        return self.missed / (self.update_size * self.tokens) if self.tokens else math.nan


class Steps:
    """Masters in float32, each at a rate of its own; AdamW; and the losses on held-out tokens. See `trained.base.Training`."""

    def __init__(self, pace: Pace, masters: Mapping[str, torch.Tensor], sizes: Mapping[str, float], steps: int) -> None:
        self.pace, self.masters, self._steps = pace, dict(masters), steps
        # Each at a rate of its own: a step changes every tensor by the same share, whatever the scale of its numbers.
        groups = [{"params": [master], "size": sizes[name]} for name, master in self.masters.items()]
        # Fused: in one pass over each tensor, with nothing held beside it.
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
        self.held: list[float] = []
        """Loss on held-out tokens at the start and after each epoch."""
        self._update = 1.0

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.held) - 1

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.pace.epochs * self._steps

    def order(self, layer: int, numbers: Sequence[int]) -> list[int]:
        """The sequences of these numbers, shuffled: a step takes one."""
        generator = torch.Generator().manual_seed((self.pace.seed << 40) + (layer << 20) + self.epoch)
        return [numbers[place] for place in torch.randperm(len(numbers), generator=generator).tolist()]

    def step_number(self, place: int) -> int:
        """Of all steps, that of this number in the coming epoch."""
        return self.epoch * self._steps + place

    def begin(self, loss: float) -> None:
        """Take down the loss before the first epoch."""
        self.held.append(loss)

    def noted(self, held: HeldLoss) -> float:
        """The loss, which those of the steps are taken relative to."""
        if held.tokens:
            self._update = held.update_size
        return held.value

    def move(self, place: int) -> None:
        """Along the gradients that were left."""
        rate = self.pace.rate(self.step_number(place), self.total)
        for group in self._adam.param_groups:
            group["lr"] = rate * group["size"]
        self._adam.step()

    def parts(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """What `state` holds: part -> name -> tensor. A master that nothing reads has no moments, as that of the norm before an
        attention that is gone."""
        moved = {name: self._adam.state[master] for name, master in self.masters.items() if master in self._adam.state}
        return {"master": self.masters, **{part: {name: own[part] for name, own in moved.items()} for part in MOMENTS}}

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next epoch needs."""
        rows = ((f"{part} {name}", tensor) for part, table in self.parts().items() for name, tensor in table.items())
        return {key: tensor.detach() for key, tensor in rows} | {"held": torch.tensor(self.held, dtype=torch.float64)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state`, unless it belongs to a training that began otherwise than this one, to the last bit."""
        held = state["held"].tolist()
        if held[0] == self.held[0]:
            self.held = held
            self.take(state)

    def take(self, state: Mapping[str, torch.Tensor]) -> None:
        """The numbers of a state that is this training's own."""
        for name, master in self.masters.items():
            master.detach().copy_(state[f"master {name}"])
            if f"{MOMENTS[0]} {name}" in state:
                moments = {part: state[f"{part} {name}"].to(master.device) for part in MOMENTS}
                done = torch.tensor(float(self.epoch * self._steps), device=master.device)
                self._adam.state[master] = {"step": done, **moments}


class BestSteps(Steps):
    """The same, with what served held-out tokens best."""

    best: dict[str, torch.Tensor]
    """Empty while nothing is better than the start, unless the start itself was kept."""

    def __init__(self, pace: Pace, masters: Mapping[str, torch.Tensor], sizes: Mapping[str, float], steps: int) -> None:
        super().__init__(pace, masters, sizes, steps)
        self.best = {}

    @property
    def rounded(self) -> dict[str, torch.Tensor]:
        """The masters as they are kept."""
        return {name: master.detach() for name, master in self.masters.items()}

    def keep(self) -> None:
        """Have the masters, as they are now, be the best."""
        self.best = {name: tensor.clone() for name, tensor in self.rounded.items()}

    def close_epoch(self, loss: float) -> None:
        """Take down the loss after an epoch, and the masters where it is the least so far."""
        if loss < min(self.held):
            self.keep()
        self.held.append(loss)

    def parts(self) -> dict[str, Mapping[str, torch.Tensor]]:
        return {**super().parts(), "best": self.best}

    def take(self, state: Mapping[str, torch.Tensor]) -> None:
        super().take(state)
        best = {name: state.get(f"best {name}") for name in self.masters}
        self.best = {name: tensor.to(self.masters[name].device) for name, tensor in best.items() if tensor is not None}
