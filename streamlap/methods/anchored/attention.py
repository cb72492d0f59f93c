"""Attention rebuilt as low-rank maps with the full covariance, anchored to the dense model.

q, k and v first, on the inputs that the compressed stream has; then o, on what attention with the new q, k, v hands it, so that
the half brings the stream back to where the dense model is. Full-covariance low rank as in SVD-LLM (Wang et al. 2024,
arXiv 2403.07378), identity-block storage as in PIFA (Zhao et al. 2025, arXiv 2501.19090).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from streamlap.families.table import Family
from streamlap.linalg.budget import index_parameters
from streamlap.methods.anchored.costs import half_cost
from streamlap.methods.anchored.fitting import held_error, input_aims, low_rank_edit, output_aim, with_bias
from streamlap.methods.anchored.knobs import Knobs
from streamlap.methods.anchored.ranks import RankSite
from streamlap.methods.base import Budget, Built, Cost, HalfView, Layout, Shapes

LEAST_SHARE = 0.25
"""Share of their parameters that q and o must keep where grouped k and v stay dense."""


@dataclass(frozen=True, kw_only=True)
class AttentionAnchored(Knobs):
    """Knobs of the method. `Edit.error` is the share of a linear's energy, in the metric of its inputs, that was cut."""

    half: ClassVar[str] = "attention"

    def layout(self, family: Family, shapes: Shapes, biased: Mapping[str, bool], budget: Budget) -> Layout:
        (q, k, v), (o,) = family.sites["attn_in"], family.sites["attn_out"]
        added = {o: row} if (row := self.bias_row(biased[o])) else {}
        left = budget.parameters - sum(shapes[path][0] for path in (q, k, v, o) if biased[path] or path in added)
        sites = {path: self._site(path, shapes[path], budget, v) for path in (q, k, v, o)}
        others = [sites[q]]
        after = left - sites[k].stored(None) - sites[v].stored(None)
        if shapes[k][0] > shapes[q][0] // 2 or after < LEAST_SHARE * (sites[q].stored(None) + sites[o].stored(None)):
            others, after = [sites[path] for path in (q, k, v)], left
        ranks = self.ranks(others, sites[o], after)
        rows = {path: self._row(sites[path], rank) for path, rank in ranks.items() if rank is not None}
        return rows | {path: rows.get(path, {}) | row for path, row in added.items()}

    def _site(self, path: str, shape: tuple[int, int], budget: Budget, v: str) -> RankSite:
        heads = shape[0] // budget.head_dim
        if self.storage == "factors":
            return RankSite(name=path, rows=shape[0], columns=shape[1], storage="factors")
        if path == v and heads * 8 <= min(shape):
            return RankSite(name=path, rows=shape[0], columns=shape[1], step=heads)
        return RankSite(name=path, rows=shape[0], columns=shape[1], index=index_parameters(shape[0], budget.itemsize))

    def _row(self, site: RankSite, rank: int) -> dict[str, int]:
        if site.storage == "factors":
            return {"rank": rank}
        return {"pivots": rank} | ({} if site.index else {"groups": site.step})

    def cost(self, family: Family, shapes: Shapes, layout: Layout) -> Cost:
        return half_cost(family, "attention", shapes, layout)

    def build(self, view: HalfView, layout: Layout) -> Built:
        layer = view.layer
        (q, k, v), (o,) = layer.family.sites["attn_in"], layer.family.sites["attn_out"]
        shapes, edits, columns = layer.shapes((q, k, v, o)), [], None
        for aim in input_aims(view, (q, k, v), self.input_step):
            edit, order = low_rank_edit(layer, aim, layout.get(aim.path, {}), shapes[aim.path])
            edits.append(edit)
            if order is not None:
                columns = mixed_columns(order, layout[v]["groups"], shapes[o][1])
        seen = view.middles(edits, self.bias)
        aim = output_aim(layer, o, columns, seen, self.step)
        edits.append(with_bias(layer, low_rank_edit(layer, aim, layout.get(o, {}), shapes[o])[0], seen))
        return Built(edits=edits, error=held_error(edits[-1], seen))


def mixed_columns(order_V: torch.Tensor, groups: int, width: int) -> torch.Tensor:
    """Columns of o in the order in which its input comes once v gives its rows in `order_V`."""
    head = len(order_V) // groups
    inside = order_V.view(groups, head) - torch.arange(groups, device=order_V.device)[:, None] * head
    queries = width // head
    of_query = inside.repeat_interleave(queries // groups, dim=0)
    return (of_query + torch.arange(queries, device=order_V.device)[:, None] * head).flatten()
