"""Attention with smaller value heads: v gives, and o reads, fewer numbers a head; q and k are low-rank.

Per KV head the numbers that stay are the leading directions of what the head hands to o, measured where o has read it (MoDeGPT,
Lin et al. 2024, arXiv 2408.09632, for one head at a time); then o is fitted again across all heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from streamlap.errors import RecipeError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.table import Family
from streamlap.linalg.budget import index_parameters
from streamlap.linalg.heads import HeadCut, head_cut
from streamlap.loader.linears import PaddedLinear, SlicedLinear
from streamlap.methods.anchored.costs import half_cost
from streamlap.methods.anchored.fitting import Aim, dense_edit, held_error, input_aims, low_rank_edit, moved
from streamlap.methods.anchored.knobs import Steps
from streamlap.methods.anchored.ranks import RankSite, share_ranks
from streamlap.methods.base import Budget, Built, Cost, HalfView, Layout, Seen, Shapes


@dataclass(frozen=True, kw_only=True)
class AttentionHeads(Steps):
    """Knobs of the method. `Edit.error` of v and o is the share of the heads' energy that was cut."""

    half: ClassVar[str] = "attention"

    def layout(self, family: Family, shapes: Shapes, biased: Mapping[str, bool], budget: Budget) -> Layout:
        (q, k, v), (o,) = family.sites["attn_in"], family.sites["attn_out"]
        dense = {path: shapes[path][0] * (shapes[path][1] + biased[path]) for path in (q, k, v, o)}
        size, keep = budget.head_dim, budget.parameters / sum(dense.values())
        heads, readers = shapes[v][0] // size, shapes[o][1] // size
        each = heads * (shapes[v][1] + biased[v]) + readers * shapes[o][0]
        kept = min(size - 1, int(size * keep))
        if kept < 1:
            raise RecipeError(
                f"attention_heads: {keep:.1%} of heads of {size} numbers leave none; choose a lower ratio."
            )
        sites = [
            RankSite(
                name=path, rows=shapes[path][0], columns=shapes[path][1],
                index=index_parameters(shapes[path][0], budget.itemsize),
            )
            for path in (q, k)
        ]  # fmt: skip
        biases = sum(shapes[path][0] for path in (q, k, o) if biased[path])
        ranks = share_ranks(sites, budget.parameters - each * kept - biases)
        rows = {path: {"pivots": rank} for path, rank in ranks.items() if rank is not None}
        return rows | {v: {"out_heads": heads, "head_dim": kept}, o: {"in_heads": readers, "head_dim": kept}}

    def cost(self, family: Family, shapes: Shapes, layout: Layout) -> Cost:
        return half_cost(family, "attention", shapes, layout)

    def build(self, view: HalfView, layout: Layout) -> Built:
        layer = view.layer
        (q, k, v), (o,) = layer.family.sites["attn_in"], layer.family.sites["attn_out"]
        shapes, aims = layer.shapes((q, k, v, o)), input_aims(view, (q, k, v), self.input_step)
        edits = [low_rank_edit(layer, aim, layout.get(aim.path, {}), shapes[aim.path])[0] for aim in aims[:2]]
        mixed = view.middle_gram([*edits, dense_edit(layer, aims[2], shapes[v])])
        heads, readers, kept = layout[v]["out_heads"], layout[o]["in_heads"], layout[v]["head_dim"]
        cut = head_cut(aims[2].t_OI, layer.linear(o).weight, mixed, heads, readers, kept, aims[2].bias_O)
        edits.append(padded_edit(layer, aims[2], cut, heads, kept, shapes[v]))
        seen = view.middles(edits)
        last = sliced_edit(layer, o, cut, seen, self.step, readers, kept)
        return Built(edits=[*edits, last], error=held_error(last, seen))


def padded_edit(layer: StreamLayer, aim: Aim, cut: HeadCut, heads: int, kept: int, of: tuple[int, int]) -> Edit:
    """v with the numbers that stay."""
    inner = dense_edit(layer, replace(aim, t_OI=cut.w_v_VI, bias_O=cut.bias_V), of).module
    assert isinstance(inner, nn.Linear)
    module = PaddedLinear(inner, heads, of[0] // heads)
    return Edit(path=aim.path, module=module, of=of, error=cut.error(kept))


def sliced_edit(
    layer: StreamLayer, path: str, cut: HeadCut, seen: Seen, step: float | None, readers: int, kept: int
) -> Edit:
    """o on the numbers that stay, fitted again across all heads."""
    dense = layer.linear(path)
    size = dense.in_features // readers
    columns = torch.arange(dense.in_features, device=dense.weight.device).view(readers, size)[:, :kept].flatten()
    aim = moved(path, cut.w_o_DO, dense.bias, seen, step, columns)
    of = (dense.out_features, dense.in_features)
    inner = dense_edit(layer, aim, of).module
    assert isinstance(inner, nn.Linear)
    return Edit(path=path, module=SlicedLinear(inner, readers, size), of=of, error=cut.error(kept))
