"""Attention with fewer heads: whole KV heads go with their query heads, the others keep their form, o is fitted again.

What is left is plain attention of fewer heads, which loads wherever the layer's widths are read from the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from streamlap.errors import RecipeError
from streamlap.families.table import Family
from streamlap.linalg.heads import group_order
from streamlap.methods.anchored.costs import half_cost
from streamlap.methods.anchored.fitting import dense_edit, held_error, input_aims, moved, narrowed
from streamlap.methods.anchored.knobs import Steps
from streamlap.methods.base import Budget, Built, Cost, HalfView, Layout, Shapes


@dataclass(frozen=True, kw_only=True)
class AttentionGroups(Steps):
    """Knobs of the method. Only whole KV heads go, so that a half may stay well below its budget."""

    half: ClassVar[str] = "attention"

    def layout(self, family: Family, shapes: Shapes, biased: Mapping[str, bool], budget: Budget) -> Layout:
        (q, k, v), (o,) = family.sites["attn_in"], family.sites["attn_out"]
        heads, queries = shapes[v][0] // budget.head_dim, shapes[q][0] // budget.head_dim
        each = sum(shapes[path][0] // heads * (shapes[path][1] + biased[path]) for path in (q, k, v))
        each += shapes[o][0] * (shapes[o][1] // heads)
        kept = min(heads, (budget.parameters - shapes[o][0] * biased[o]) // each)
        if kept < 1:
            raise RecipeError(
                f"attention_groups: {budget.parameters} parameters hold no KV head of {each}; lower the ratio."
            )
        if kept == heads:
            return {}
        narrow, wide = kept * budget.head_dim, kept * (queries // heads) * budget.head_dim
        return {q: {"out": wide}, k: {"out": narrow}, v: {"out": narrow}, o: {"in": wide}}

    def cost(self, family: Family, shapes: Shapes, layout: Layout) -> Cost:
        return half_cost(family, "attention", shapes, layout)

    def build(self, view: HalfView, layout: Layout) -> Built:
        layer = view.layer
        (q, k, v), (o,) = layer.family.sites["attn_in"], layer.family.sites["attn_out"]
        shapes, aims = layer.shapes((q, k, v, o)), input_aims(view, (q, k, v), self.input_step)
        whole = [dense_edit(layer, aim, shapes[aim.path]) for aim in aims]
        rows = {path: torch.arange(shapes[path][0], device=layer.linear(path).weight.device) for path in (q, k, v)}
        if layout:
            mixed, size = view.middle_gram(whole), layer.head_dim
            heads = shapes[v][0] // size
            order_G, _ = group_order(layer.linear(o).weight, mixed, heads, shapes[o][1] // size)
            kept_G = order_G[heads - layout[v]["out"] // size :].sort().values
            rows = {path: index.view(heads, -1)[kept_G].flatten() for path, index in rows.items()}
        edits = [dense_edit(layer, narrowed(aim, rows[aim.path]), shapes[aim.path], rows[aim.path]) for aim in aims]
        seen = view.middles(edits if layout else whole)
        dense = layer.linear(o)
        aim = moved(o, dense.weight.double()[:, rows[q]], dense.bias, seen, self.step)
        edits.append(dense_edit(layer, aim, shapes[o], rows[q] if layout else None))
        return Built(edits=edits, error=held_error(edits[-1], seen))
