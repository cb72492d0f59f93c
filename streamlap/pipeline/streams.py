"""What this process holds of the calibration set: its windows, and where their hidden states are on each stream.

Two streams may go through the layers: the compressed one, and the dense model's beside it.

Shape suffixes: N windows, L length, B batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from streamlap.families.stream import ModelStream, batch_of
from streamlap.linalg.moments import fitted_sequences, held_sequences
from streamlap.planning.schedule import Schedule
from streamlap.store.hidden import HiddenBank

LayerPart = Callable[[torch.Tensor], torch.Tensor]
"""x_BLD -> y_BLD: a layer, or a sub-layer of it."""


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """One generation of a stream: generation k is the input of layer k, or of its second sub-layer."""

    bank: HiddenBank
    generation: int

    def read(self, numbers: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """Batches x_BLD in order; of the sequences of these numbers alone, where they are given."""
        return self.bank.read(self.generation, numbers)

    def pick(self, number: int) -> torch.Tensor:
        """One sequence [1, L, D]."""
        return self.bank.pick(self.generation, [number])


@dataclass(kw_only=True, eq=False)
class Source:
    """Hidden states as a pass wants them: read from where they are kept, then taken through `part` of the layer, if any.

    The first pass over all of them may also store what it has computed (`keep`), so that later ones need not do so again.
    """

    states: HiddenStates
    part: LayerPart | None = None
    onward: LayerPart | None = None
    """A further part of the layer, through which they go before they are kept."""
    keep: HiddenStates | None = None
    """Where the first pass over all of them writes the result; None where nothing is to be written, or once it is."""
    weight_NL: torch.Tensor | None = None
    """Filled by that pass with the weight of each token there, 1 / root mean square; see `observe.evenly`."""

    def kept(self) -> None:
        """Mark the write to `keep` as done. Without an `onward` part, later passes read from there, through no part."""
        assert self.keep is not None, "nothing was to be kept"
        if self.onward is None:
            self.states, self.part = self.keep, None
        self.keep = self.onward = None


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The calibration windows: as they were given, and behind them those that were redrawn, none of which is held out."""

    tokens_NL: torch.Tensor
    redrawn: int = 0

    @property
    def held(self) -> Sequence[int]:
        """Numbers of those that are held out."""
        return held_sequences(*self._given_NL)

    @property
    def fitted(self) -> Sequence[int]:
        """Numbers of those that are fitted to: the others, and all that were redrawn. One that was given alone is both."""
        return fitted_sequences(*self._given_NL, self.redrawn)

    @property
    def shape_NL(self) -> tuple[int, int]:  # noqa: N802
        sequences, length = self.tokens_NL.shape
        return sequences, length

    @property
    def _given_NL(self) -> tuple[int, int]:  # noqa: N802
        sequences, length = self.shape_NL
        return sequences - self.redrawn, length


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The windows, and the banks of their hidden states."""

    windows: Windows
    compressed: HiddenBank
    dense: HiddenBank | None = None
    """The dense model's stream between layers, where layers are made beside it; as durable as the compressed one."""
    between: HiddenBank | None = None
    """The compressed stream between the sub-layers of the layer in hand, where they are rebuilt one after another."""
    gradients: HiddenBank | None = None
    """Gradients of the dense model's language-model loss, where they are asked for, on the disk alone; see `gradients`."""

    @property
    def lasting(self) -> tuple[HiddenBank, ...]:
        """What a layer begins with and leaves to the next."""
        return (self.compressed,) if self.dense is None else (self.compressed, self.dense)

    @property
    def banks(self) -> tuple[HiddenBank, ...]:
        others = (bank for bank in (self.between, self.gradients) if bank is not None)
        return (*self.lasting, *others)

    def settle(self) -> None:
        """Wait until what the next layer begins with is on the disk."""
        for bank in self.lasting:
            bank.settle()

    def drop(self, generation: int) -> None:
        """A generation that no layer begins with any more, and the gradient behind its layer."""
        for bank in self.lasting:
            bank.drop(generation)
        if self.gradients is not None:
            self.gradients.drop(generation + 1)

    def drop_between(self, index: int) -> None:
        """What lies between the sub-layers of a layer that is done."""
        if self.between is not None:
            self.between.drop(index)


def open_streams(
    stream: ModelStream, windows: Windows, schedule: Schedule, folder: Path, beside_dense: bool, between: bool
) -> Streams:
    """The banks in the memory that the schedule gives them; of the dense stream, and of what lies between sub-layers, where
    these are asked for. The latter is in `folder` only where no memory is: a run that dies begins its layer anew."""
    tokens_NL = windows.tokens_NL
    compressed = open_bank(stream, tokens_NL, schedule, folder)
    if not beside_dense:
        return Streams(windows=windows, compressed=compressed)
    dense = open_bank(stream, tokens_NL, schedule, folder, "dense")
    if not between:
        return Streams(windows=windows, compressed=compressed, dense=dense)
    within = replace(schedule, tier=schedule.between or schedule.tier)
    return Streams(
        windows=windows, compressed=compressed, dense=dense,
        between=open_bank(stream, tokens_NL, within, folder if within.tier == "disk" else None, "between"),
    )  # fmt: skip


def open_bank(
    stream: ModelStream, tokens_NL: torch.Tensor, schedule: Schedule, folder: Path | None, name: str = "hidden"
) -> HiddenBank:
    """Hidden states in `folder`, if there is one, and in the memory that the schedule gives them."""
    sequences, length = tokens_NL.shape
    return HiddenBank(
        (sequences, length, stream.width), stream.dtype, batch_of(length),
        folder=folder, tier=schedule.tier, accelerator=stream.accelerator, name=name,
    )  # fmt: skip
