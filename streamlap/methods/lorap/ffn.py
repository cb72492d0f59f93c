"""The FFN loses whole channels: LoRAP's half for gate, up, down (Li, Tang & Zhang 2024, arXiv 2404.09695)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from streamlap.errors import RecipeError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.table import Family
from streamlap.linalg.budget import Removal, lorap_removal
from streamlap.linalg.channels import channel_bytes, kept_channels, lorap_scores, removed_energy
from streamlap.linalg.statistics import Energy
from streamlap.methods.base import Cost, Layout, Shapes, Statistic


@dataclass(frozen=True, kw_only=True)
class FfnLorap:
    """Knobs of the method. `Edit.error` is the share of the FFN output's energy that went, channels taken as uncorrelated."""

    protect: float = 0.01
    """Share of the channels, the lowest-scored, that stays: LoRAP found them to matter."""

    def __post_init__(self) -> None:
        if not 0 <= self.protect < 1:
            raise RecipeError(f"ffn_lorap: protect is {self.protect}; wanted a share from 0 up to 1.")

    def paths(self, family: Family) -> tuple[str, ...]:
        return (*family.sites["ffn_in"], *family.sites["ffn_mid"])

    def layout(self, family: Family, shapes: Shapes, target: float) -> Layout:
        (gate, up), (down,) = family.sites["ffn_in"], family.sites["ffn_mid"]
        kept = self._removal(shapes[down][1], target).kept
        return {gate: {"out": kept}, up: {"out": kept}, down: {"in": kept}}

    def _removal(self, width: int, target: float) -> Removal:
        removal = lorap_removal(width, target, self.protect)
        if target + self.protect > 1 or not 1 <= removal.kept < width:
            raise RecipeError(
                f"ffn_lorap: ratio {target} with protect {self.protect} keeps {removal.kept} of {width} channels; wanted "
                f"at least 1, fewer than {width}, and ratio + protect at most 1. Choose another ratio."
            )
        return removal

    def cost(self, family: Family, shapes: Shapes, target: float) -> Cost:
        (down,) = family.sites["ffn_mid"]
        return Cost(workspace_bytes=channel_bytes(shapes[down][0]))

    def wants(self, layer: StreamLayer) -> dict[str, Statistic]:
        return {"ffn_in": Energy(), "ffn_mid": Energy()}

    def edit(self, layer: StreamLayer, stats: Mapping[str, Statistic], target: float) -> list[Edit]:
        (gate, up), (down,) = layer.family.sites["ffn_in"], layer.family.sites["ffn_mid"]
        w_gate, w_up, w_down = (layer.linear(path).weight for path in (gate, up, down))
        scale_mid_F = stats["ffn_mid"].scale()
        score_F = lorap_scores(w_gate, w_up, w_down, stats["ffn_in"].scale(), scale_mid_F)
        kept = kept_channels(score_F, self._removal(w_down.shape[1], target))
        error = removed_energy(w_down, scale_mid_F, kept)
        return [
            narrow(layer, gate, kept, 0, error),
            narrow(layer, up, kept, 0, error),
            narrow(layer, down, kept, 1, error),
        ]


def narrow(layer: StreamLayer, path: str, kept: torch.Tensor, dim: int, error: float) -> Edit:
    """The edit that keeps rows (`dim` 0) or columns (`dim` 1) `kept` of the linear at `path`; biases follow the rows."""
    dense, dtype = layer.linear(path), layer.storage_dtype(path)
    weight_OI = dense.weight.index_select(dim, kept).to(dtype)
    module = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=dense.bias is not None, device="meta")
    module.weight = nn.Parameter(weight_OI, requires_grad=False)
    if dense.bias is not None:
        bias_O = dense.bias if dim == 1 else dense.bias[kept]
        module.bias = nn.Parameter(bias_O.to(dtype), requires_grad=False)
    of = (dense.out_features, dense.in_features)
    return Edit(path=path, module=module, of=of, error=error, kept=tuple(kept.tolist()))
