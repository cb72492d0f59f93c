"""What the next layer reads, summed while its stream is made: one pass less over the hidden states.

Shape suffixes: N windows, L length, B batch, D hidden, I in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from streamlap.errors import StreamlapError
from streamlap.families.layer import StreamLayer
from streamlap.linalg.gram import Gram
from streamlap.linalg.moments import Moments
from streamlap.linalg.rows import any_out, blanked
from streamlap.pipeline.layer_in_hand import LayerInHand


def next_inputs(hand: LayerInHand, kwargs: Mapping[str, Any]) -> InputSum | None:
    """What sums the inputs of the next layer while its stream is made; `kwargs` are that layer's. None where no linear of its
    first sub-layer has a role."""
    if not next(iter(hand.runner.stream.family_of(hand.index + 1).sublayers.values())).roles:
        return None
    try:
        frame = hand.runner.stream.frame(hand.index + 1, kwargs)
    except StreamlapError:  # which comes again, once this layer is committed and that one is read
        return None
    return InputSum(frame, hand.streams.windows.fitted)


class InputSum:
    """The Gram of what the first sub-layer of a layer will read, summed while the stream before it is made."""

    def __init__(self, layer: StreamLayer, fitted: Sequence[int]) -> None:
        self._layer, self._moments = layer, Moments()
        self._name = next(iter(layer.family.sublayers))
        self._fitted = set(fitted)
        self._next = 0

    def see(self, x_BLD: torch.Tensor) -> None:
        """The next sequences of the stream."""
        out_BL = any_out(x_BLD)
        x_BLI = self._layer.sublayer_input(self._name, blanked(x_BLD, out_BL))
        for place, x_LI in enumerate(x_BLI):
            if self._next + place in self._fitted:
                good = slice(None) if out_BL is None else ~out_BL[place]
                self._moments.update(x_LI[good])
        self._next += len(x_BLD)

    def grams(self) -> list[Gram]:
        """It alone; none where a number in it is not finite, which needs a closer look."""
        return [self._moments.finish()[0]] if self._moments.tokens and self._moments.finite else []
