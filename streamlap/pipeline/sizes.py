"""By what norms behind sub-layers divide the tokens of the dense stream, in a pass of its own.

Shape suffixes: N windows, B batch, L length, D hidden.
"""

from __future__ import annotations

import torch

from streamlap.families.layer import StreamLayer
from streamlap.families.watch import norm_sizes
from streamlap.pipeline.runner import LayerRunner
from streamlap.pipeline.streams import HiddenStates
from streamlap.system.meters import PhaseClock


def dense_sizes(
    runner: LayerRunner, clock: PhaseClock, layer: StreamLayer, index: int, dense: HiddenStates
) -> dict[str, torch.Tensor]:
    """Sub-layer -> by what the norm behind it divides each token [N, L] of the dense stream, for those that have one. The layer
    is as it was read."""
    if not layer.family.normed:
        return {}

    def measure() -> dict[str, torch.Tensor]:
        parts = [
            norm_sizes(layer, part)
            for (x_BLD,) in runner.together([dense], "capture")
            for part in torch.split(x_BLD, runner.ladder.micro)
        ]
        return {
            name: torch.cat([sizes[name] for sizes in parts]).nan_to_num(nan=1.0).cpu() for name in layer.family.normed
        }

    with clock.phase("dense"):
        return runner.run("capture", index, measure)
