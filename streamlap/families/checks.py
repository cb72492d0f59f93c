"""Whether the sub-layers of a layer are what its family's row says: measured on one batch, since names cannot tell.

Shape suffixes: B batch, L length, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from streamlap.errors import UnsupportedModel, whole
from streamlap.families.table import Family
from streamlap.linalg.rows import any_out, blanked, marked
from streamlap.system.budget import is_device_fault, is_out_of_memory

ROUNDINGS = 4
"""So many roundings of the compute dtype may lie between two ways to compute one number."""

WANTED = "wanted sub-layers that, one after another, are the whole layer. Take a model of another family."


class Layer(Protocol):
    """What is asked of a layer here."""

    module: torch.nn.Module
    prefix: str
    family: Family

    def __call__(self, x_BLD: torch.Tensor) -> torch.Tensor: ...

    def in_sequence(self, x_BLD: torch.Tensor) -> torch.Tensor: ...

    def run_sublayer(self, name: str, x_BLD: torch.Tensor) -> torch.Tensor: ...

    def sublayer_middle(self, name: str, x_BLD: torch.Tensor) -> torch.Tensor: ...

    def added(self, name: str, output_BLD: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two results that should be equal and are not."""

    largest: float
    """Largest distance between two of their numbers."""
    reach: float
    """Largest of the numbers themselves."""

    def __str__(self) -> str:
        return f"differ by up to {self.largest:.3g}, where numbers reach {self.reach:.3g}"


def check_layer(layer: Layer, x_BLD: torch.Tensor, writes: bool) -> None:
    """See `StreamLayer.check_sublayers`."""
    x_BLD, model = blanked(x_BLD, any_out(x_BLD)), layer.family.model_type
    try:
        sequence = sequence_difference(layer, x_BLD)
        sums = {name: sum_difference(layer, name, x_BLD) for name in layer.family.compressible if writes}
    except Exception as error:  # whatever a layer makes of a stand-in that returns something else than it expects
        if is_out_of_memory(error) or is_device_fault(error):
            raise
        raise UnsupportedModel(
            f"{layer.prefix}: the layer of {model} does not run while one of its sub-layers returns zeros ({whole(error)}); "
            f"{WANTED}"
        ) from error
    if sequence:
        names = " and ".join(layer.family.sublayers)
        raise UnsupportedModel(
            f"{layer.prefix}: in {model}, {names} one after another and the whole layer {sequence}; {WANTED}"
        )
    for name, found in sums.items():
        if found:
            path = layer.family.path(layer.family.sublayers[name].writes)
            raise UnsupportedModel(
                f"{layer.prefix}: in {model}, what {name} adds to the hidden states and what {path} gives {found}; wanted both "
                "equal, as the methods fit this linear to the hidden states. Name the norm or multiplier behind it in the row "
                "of the family, or take methods that do not: preset lorap."
            )


def sequence_difference(layer: Layer, x_BLD: torch.Tensor) -> Difference | None:
    """Between the sub-layers one after another and the layer."""
    return difference(layer.in_sequence(x_BLD), layer(x_BLD), x_BLD)


def sum_difference(layer: Layer, name: str, x_BLD: torch.Tensor) -> Difference | None:
    """Between a sub-layer and x + what its last linear makes of its middle, behind what the row says stands there."""
    last = layer.module.get_submodule(layer.family.path(layer.family.sublayers[name].writes))
    sum_BLD = marked(x_BLD + layer.added(name, last(layer.sublayer_middle(name, x_BLD))))
    return difference(layer.run_sublayer(name, x_BLD), sum_BLD, x_BLD)


def difference(found_BLD: torch.Tensor, wanted_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Difference | None:
    """None where two results of the hidden states x differ by rounding alone. Rows that are out of both are equal.

    A number may be off by some roundings of itself, as it was in x or as it is now, and of the mean. The largest of all numbers
    is no measure: many models have a few huge ones, beside which no other would count.
    """
    eps = torch.finfo(x_BLD.dtype).eps
    found_BLD, wanted_BLD, x_BLD = found_BLD.float(), wanted_BLD.float(), x_BLD.float()
    out_of_both_BLD = found_BLD.isnan() & wanted_BLD.isnan()
    apart_BLD = (found_BLD - wanted_BLD).abs().masked_fill(out_of_both_BLD, 0.0).nan_to_num(nan=torch.inf)
    size_BLD = torch.maximum(wanted_BLD.abs(), x_BLD.abs()).nan_to_num()
    if not bool((apart_BLD > ROUNDINGS * eps * (size_BLD + size_BLD.mean())).any()):
        return None
    return Difference(largest=float(apart_BLD.max()), reach=float(size_BLD.max()))
