"""The FFN loses whole channels: LoRAP's way with gate, up, down (Li, Tang & Zhang 2024, arXiv 2404.09695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from streamlap.errors import RecipeError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.budget import Removal, lorap_removal, removal_keeping
from streamlap.linalg.channels import channel_bytes, kept_channels, lorap_scores, removed_energy
from streamlap.loader.forms import Dense
from streamlap.methods.base import Cost, DenseStatistics, Layouts, Natives, ParameterBudget, Solved, ffn_reads


@dataclass(frozen=True, kw_only=True)
class FfnLorap:
    """Knobs of the method. `Edit.error` is the share of the FFN output's energy that went, channels taken as uncorrelated."""

    sublayer: ClassVar[str] = "ffn"
    needs: ClassVar[tuple[str, ...]] = ("up", "down")
    moves_inputs: ClassVar[bool] = False

    protect: float = 0.01
    """Share of the channels, the lowest-scored, that stays: LoRAP found them to matter."""

    def __post_init__(self) -> None:
        if not 0 <= self.protect < 1:
            raise RecipeError(f"ffn_lorap: protect is {self.protect}; wanted a share from 0 up to 1.")

    def layouts(self, natives: Natives, budget: ParameterBudget) -> Layouts:
        return {"": fewer_channels(natives, self._removal(natives["down"].shape[1], budget.ratio).kept)}

    def _removal(self, width: int, ratio: float) -> Removal:
        removal = lorap_removal(width, ratio, self.protect)
        if ratio + self.protect > 1 or not 1 <= removal.kept < width:
            raise RecipeError(
                f"ffn_lorap: ratio {ratio} with protect {self.protect} keeps {removal.kept} of {width} channels; wanted "
                f"at least 1, fewer than {width}, and ratio + protect at most 1. Choose another ratio."
            )
        return removal

    def cost(self, natives: Natives, layouts: Layouts, budget: ParameterBudget) -> Cost:
        return Cost(workspace_bytes=channel_bytes(natives["down"].shape[0]))

    def solve(self, statistics: DenseStatistics, layouts: Layouts) -> Solved:
        layer, scale_mid_F = statistics.layer, statistics.scale("down")
        reads, w_down = layer.family.sublayers["ffn"].reads, layer.linear("down").weight
        rows = [layer.linear(role).weight for role in reads]
        score_F = lorap_scores(rows, w_down, statistics.scale("up"), scale_mid_F)
        removal = removal_keeping(w_down.shape[1], layouts[""]["down"].shape[1], self.protect)
        kept = kept_channels(score_F, removal)
        return Solved(edits=narrowed_ffn(layer, kept, removed_energy(w_down, scale_mid_F, kept)))


def fewer_channels(natives: Natives, kept: int) -> dict[str, Dense]:
    """The layout of an FFN that keeps so many channels."""
    hidden = natives["down"].shape[0]
    inner = {role: Dense((kept, natives[role].shape[1]), natives[role].bias) for role in ffn_reads(natives)}
    return inner | {"down": Dense((hidden, kept), natives["down"].bias)}


def narrowed_ffn(layer: StreamLayer, kept: torch.Tensor, error: float) -> list[Edit]:
    """The edits that keep the channels `kept` of an FFN: rows of gate and up, columns of down."""
    return [narrow(layer, role, kept, int(role == "down"), error) for role in layer.family.sublayers["ffn"].roles]


def narrow(layer: StreamLayer, role: str, kept: torch.Tensor, dim: int, error: float) -> Edit:
    """The edit that keeps rows (`dim` 0) or columns (`dim` 1) `kept` of the linear of a role; biases follow the rows."""
    dense, dtype = layer.linear(role), layer.storage_dtype(role)
    weight_OI = dense.weight.index_select(dim, kept).to(dtype)
    module = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=dense.bias is not None, device="meta")
    module.weight = nn.Parameter(weight_OI, requires_grad=False)
    if dense.bias is not None:
        bias_O = dense.bias if dim == 1 else dense.bias[kept]
        module.bias = nn.Parameter(bias_O.to(dtype), requires_grad=False)
    return Edit(role=role, module=module, native=layer.native(role), error=error, kept=tuple(kept.tolist()))
