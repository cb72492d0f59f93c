"""The layer in hand: what every step of the loop is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from streamlap.errors import NumericalError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.gram import Gram
from streamlap.linalg.statistics import all_finite
from streamlap.pipeline.runner import LayerRunner
from streamlap.pipeline.streams import HiddenStates, Streams
from streamlap.planning.forecast import LayerPlan
from streamlap.system.meters import PhaseClock


@dataclass(frozen=True, kw_only=True)
class LayerInHand:
    """One layer in memory, with its plan, the streams around it, and what runs it."""

    runner: LayerRunner
    streams: Streams
    plan: LayerPlan
    layer: StreamLayer
    clock: PhaseClock
    inputs: list[Gram] = field(default_factory=list)
    """The Gram of what its first sub-layer reads, where it was summed while the stream was made."""

    @property
    def index(self) -> int:
        return self.plan.index

    @property
    def compressed(self) -> HiddenStates:
        """The compressed stream before the layer."""
        return HiddenStates(bank=self.streams.compressed, generation=self.index)

    @property
    def next_compressed(self) -> HiddenStates:
        """The same behind it."""
        return HiddenStates(bank=self.streams.compressed, generation=self.index + 1)

    @property
    def dense(self) -> HiddenStates:
        """The dense model's stream before the layer, where it is kept."""
        assert self.streams.dense is not None, "a run beside the dense model keeps its stream"
        return HiddenStates(bank=self.streams.dense, generation=self.index)

    @property
    def next_dense(self) -> HiddenStates:
        """The same behind it."""
        return replace(self.dense, generation=self.index + 1)

    @property
    def gradient(self) -> HiddenStates:
        """That of the dense model's language-model loss behind the layer, where it is asked for."""
        assert self.streams.gradients is not None, "a run whose importance goes by that loss keeps them"
        return HiddenStates(bank=self.streams.gradients, generation=self.index + 1)

    @property
    def between(self) -> HiddenStates:
        """The compressed stream between the sub-layers, where they are rebuilt."""
        assert self.streams.between is not None, "sub-layers are rebuilt one after another"
        return HiddenStates(bank=self.streams.between, generation=self.index)


@dataclass(frozen=True, kw_only=True)
class LayerEdits:
    """The edits of a layer, applied, and what there is to say of them."""

    edits: Sequence[Edit]
    out_NL: torch.Tensor
    """Tokens that were left out of something."""
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Sub-layer -> what was tried -> how far its output is from the target on held-out tokens."""
    notes: tuple[str, ...] = ()
    trace: Mapping[str, float] | None = None
    """Of a layer that was trained to them: its loss on held-out tokens at the start and at the end, and the epochs."""


def refuse_overflow(layer: StreamLayer, edits: Iterable[Edit]) -> None:
    """Raise NumericalError where an edit has no finite form in the storage dtype; nothing of it is written then."""
    for edit in edits:
        for name, tensor in edit.module.state_dict().items():
            if not all_finite(tensor):
                raise NumericalError(
                    f"{layer.prefix}.{layer.family.path(edit.role)}: {name} is not finite in {tensor.dtype}; wanted numbers "
                    f"that {tensor.dtype} can hold. Convert the checkpoint to bfloat16 or float32 and compress that."
                )
