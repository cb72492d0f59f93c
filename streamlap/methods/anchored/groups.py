"""Attention with fewer heads: whole KV heads go with their query heads, the others keep their form, o is fitted again.

What is left is plain attention of fewer heads, which loads wherever the layer's widths are read from the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from streamlap.errors import RecipeError
from streamlap.linalg.heads import kept_heads
from streamlap.linalg.solution import joined
from streamlap.loader.forms import Dense
from streamlap.methods.anchored.costs import anchored_cost
from streamlap.methods.anchored.fitting import dense_edit, held_error, narrowed, output_aim, read_inputs, stays
from streamlap.methods.anchored.knobs import Steps
from streamlap.methods.base import Cost, Layout, Layouts, Natives, ParameterBudget, Solved, StreamStatistics


def group_parameters(natives: Natives, head_dim: int) -> tuple[int, int]:
    """KV heads, and what the linears store of each with its query heads."""
    heads, o = natives["v"].shape[0] // head_dim, natives["o"]
    inputs = [natives[role] for role in ("q", "k", "v")]
    each = sum(linear.shape[0] // heads * (linear.shape[1] + linear.bias) for linear in inputs)
    return heads, each + o.shape[0] * (o.shape[1] // heads)


def groups_layout(natives: Natives, head_dim: int, kept: int) -> Layout:
    """Attention with so many KV heads."""
    heads, o = natives["v"].shape[0] // head_dim, natives["o"]
    out = {role: natives[role].shape[0] // heads * kept for role in ("q", "k", "v")}
    layout = {role: Dense((count, natives[role].shape[1]), natives[role].bias) for role, count in out.items()}
    return layout | {"o": Dense((o.shape[0], o.shape[1] // heads * kept), o.bias)}


@dataclass(frozen=True, kw_only=True)
class AttentionGroups(Steps):
    """Knobs of the method. Only whole KV heads go, so that a sub-layer may stay well below its budget; where none can,
    the FFN takes the whole cut."""

    sublayer: ClassVar[str] = "attention"
    needs: ClassVar[tuple[str, ...]] = ()

    def layouts(self, natives: Natives, budget: ParameterBudget) -> Layouts:
        (heads, each), o = group_parameters(natives, budget.head_dim), natives["o"]
        kept = min(heads, (budget.parameters - o.shape[0] * o.bias) // each)
        if kept < 1:
            raise RecipeError(
                f"attention_groups: {budget.parameters} parameters hold no KV head of {each}; lower the ratio."
            )
        if kept == heads or budget.heads_stay:
            return {"": {}}
        return {"": groups_layout(natives, budget.head_dim, kept)}

    def cost(self, natives: Natives, layouts: Layouts, budget: ParameterBudget) -> Cost:
        return anchored_cost(("q", "k", "v"), "o", natives, layouts, budget, self.moves_inputs)

    def solve(self, statistics: StreamStatistics, layouts: Layouts) -> Solved:
        (layout,), layer = layouts.values(), statistics.layer
        read = read_inputs(statistics, ("q", "k", "v"), self.input_step, bool(layout))
        aims, notes = read.aims, read.notes
        rows = dict[str, torch.Tensor]()
        if layout:
            size = layer.head_dim
            rows = {aim.role: torch.arange(len(aim.t_OI), device=aim.t_OI.device) for aim in aims}
            heads, queries = len(rows["v"]) // size, layer.native("o").shape[1] // size
            stay = kept_heads(layer.acting("o"), read.middle(), heads, queries, layout["v"].shape[0] // size)
            rows = {role: index.view(heads, -1)[stay.value].flatten() for role, index in rows.items()}
            notes = joined(notes, stay.notes)
            aims = [narrowed(aim, rows[aim.role]) for aim in aims]
        edits = [dense_edit(layer, aim, rows.get(aim.role)) for aim in aims if not stays(layer, aim)]
        seen = statistics.middles(edits)
        output = output_aim(layer, "o", rows.get("q"), seen, self.step)
        edits.append(dense_edit(layer, output.value, rows.get("q")))
        return Solved(edits=edits, error=held_error(layer, edits[-1], seen.held), notes=joined(notes, output.notes))
