"""What this process holds of the calibration set: its windows, and where their hidden states are on each stream.

Two streams may go through the layers: the compressed one, and the dense model's beside it.

Shape suffixes: N windows, L length, B batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from streamlap.families.stream import ModelStream, batch_of
from streamlap.planning.schedule import Schedule
from streamlap.store.hidden import HiddenBank


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """One generation of a stream: generation k is the input of layer k, or of its second sub-layer."""

    bank: HiddenBank
    generation: int

    def read(self) -> Iterator[torch.Tensor]:
        """Batches x_BLD in order."""
        return self.bank.read(self.generation)

    def pick(self, number: int) -> torch.Tensor:
        """One sequence [1, L, D]."""
        return self.bank.pick(self.generation, [number])


@dataclass(frozen=True, kw_only=True)
class DenseBanks:
    """What is kept beside the compressed stream where sub-layers are rebuilt beside the dense model."""

    stream: HiddenBank
    """The dense model's hidden states between layers; as durable as the compressed ones."""
    middle: HiddenBank
    """The same between the sub-layers of the layer in hand."""
    compressed_middle: HiddenBank
    """The compressed stream there."""


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The windows, and the banks of their hidden states."""

    tokens_NL: torch.Tensor
    compressed: HiddenBank
    dense: DenseBanks | None = None

    @property
    def lasting(self) -> tuple[HiddenBank, ...]:
        """What a layer begins with and leaves to the next."""
        return (self.compressed,) if self.dense is None else (self.compressed, self.dense.stream)

    @property
    def banks(self) -> tuple[HiddenBank, ...]:
        if self.dense is None:
            return (self.compressed,)
        return self.compressed, self.dense.stream, self.dense.middle, self.dense.compressed_middle

    def settle(self) -> None:
        """Wait until what the next layer begins with is on the disk."""
        for bank in self.lasting:
            bank.settle()

    def drop(self, generation: int) -> None:
        """A generation that no layer begins with any more."""
        for bank in self.lasting:
            bank.drop(generation)

    def drop_middles(self, index: int) -> None:
        """What lies between the sub-layers of a layer that is done."""
        if self.dense is not None:
            self.dense.middle.drop(index)
            self.dense.compressed_middle.drop(index)


def open_streams(
    stream: ModelStream, tokens_NL: torch.Tensor, schedule: Schedule, folder: Path, beside_dense: bool
) -> Streams:
    """The banks in the memory that the schedule gives them. What lies between sub-layers is in `folder` only where no memory
    is: a run that dies begins its layer anew."""
    compressed = open_bank(stream, tokens_NL, schedule, folder)
    if not beside_dense:
        return Streams(tokens_NL=tokens_NL, compressed=compressed)
    between = folder if schedule.tier == "disk" else None
    dense = DenseBanks(
        stream=open_bank(stream, tokens_NL, schedule, folder, "dense"),
        middle=open_bank(stream, tokens_NL, schedule, between, "dense-middle"),
        compressed_middle=open_bank(stream, tokens_NL, schedule, between, "middle"),
    )
    return Streams(tokens_NL=tokens_NL, compressed=compressed, dense=dense)


def open_bank(
    stream: ModelStream, tokens_NL: torch.Tensor, schedule: Schedule, folder: Path | None, name: str = "hidden"
) -> HiddenBank:
    """Hidden states in `folder`, if there is one, and in the memory that the schedule gives them."""
    sequences, length = tokens_NL.shape
    return HiddenBank(
        (sequences, length, stream.width), stream.dtype, batch_of(length),
        folder=folder, tier=schedule.tier, accelerator=stream.accelerator, name=name,
    )  # fmt: skip
