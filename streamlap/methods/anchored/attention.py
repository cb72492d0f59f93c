"""Attention rebuilt as low-rank maps with the full covariance, anchored to the dense model.

q, k and v first, on the inputs that the compressed stream has; then o, on what attention with the new q, k, v hands it, so that
the sub-layer brings the stream back to where the dense model is. Full-covariance low rank as in SVD-LLM (Wang et al. 2024,
arXiv 2403.07378), identity-block storage as in PIFA (Zhao et al. 2025, arXiv 2501.19090).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from streamlap.linalg.solution import joined
from streamlap.loader.forms import Pivoted
from streamlap.methods.anchored.costs import anchored_cost
from streamlap.methods.anchored.fitting import held_error, low_rank_edit, output_aim, read_inputs, stays
from streamlap.methods.anchored.knobs import Knobs
from streamlap.methods.anchored.ranks import RankSite
from streamlap.methods.base import Cost, Layouts, Natives, ParameterBudget, Solved, StreamStatistics

LEAST_SHARE = 0.25
"""Share of their parameters that q and o must keep where grouped k and v stay dense."""


@dataclass(frozen=True, kw_only=True)
class AttentionAnchored(Knobs):
    """Knobs of the method. `Edit.error` is the share of a linear's energy, in the metric of its inputs, that was cut."""

    sublayer: ClassVar[str] = "attention"
    needs: ClassVar[tuple[str, ...]] = ()

    def layouts(self, natives: Natives, budget: ParameterBudget) -> Layouts:
        q, k, v, o = (self._site(role, natives, budget) for role in ("q", "k", "v", "o"))
        left = budget.parameters - sum(natives[site.name].shape[0] * natives[site.name].bias for site in (q, k, v, o))
        others: Sequence[RankSite] = [q]
        after = left - k.stored(None) - v.stored(None)
        if k.shape[0] > q.shape[0] // 2 or after < LEAST_SHARE * (q.stored(None) + o.stored(None)):
            others, after = [q, k, v], left
        ranks = self.ranks(others, o, after)
        return {
            "": {
                site.name: replace(site.at(rank), bias=natives[site.name].bias)
                for site in (q, k, v, o)
                if (rank := ranks.get(site.name)) is not None
            }
        }

    def _site(self, role: str, natives: Natives, budget: ParameterBudget) -> RankSite:
        """The order of v is folded into o, head by head, where its heads are large enough for that, and nothing but o reads
        what they give: gates, which q writes too, have an order of their own."""
        shape = natives[role].shape
        heads, gated = shape[0] // budget.head_dim, natives["q"].shape[0] != natives["o"].shape[1]
        groups = heads if role == "v" and heads * 8 <= min(shape) and not gated else None
        return RankSite(name=role, shape=shape, itemsize=budget.itemsize, storage=self.storage, groups=groups)

    def cost(self, natives: Natives, layouts: Layouts, budget: ParameterBudget) -> Cost:
        return anchored_cost(("q", "k", "v"), "o", natives, layouts, budget, self.moves_inputs)

    def solve(self, statistics: StreamStatistics, layouts: Layouts) -> Solved:
        (layout,) = layouts.values()
        inputs = read_inputs(statistics, ("q", "k", "v"), self.input_step)
        layer, edits, columns = statistics.layer, [], None
        for aim in inputs.aims:
            if aim.role not in layout and stays(layer, aim):
                continue
            edit, order = low_rank_edit(layer, aim, layout.get(aim.role))
            edits.append(edit)
            if order is not None:
                form = layout["v"]
                assert isinstance(form, Pivoted)
                columns = mixed_columns(order, form.groups or 1, layer.native("o").shape[1])
        seen = statistics.middles(edits)
        output = output_aim(layer, "o", columns, seen, self.step)
        edits.append(low_rank_edit(layer, output.value, layout.get("o"))[0])
        return Solved(
            edits=edits, error=held_error(layer, edits[-1], seen.held),
            notes=joined(inputs.notes, output.notes, *(edit.notes for edit in edits)),
        )  # fmt: skip


def mixed_columns(order_V: torch.Tensor, groups: int, width: int) -> torch.Tensor:
    """Columns of o in the order in which its input comes once v gives its rows in `order_V`."""
    head = len(order_V) // groups
    inside = order_V.view(groups, head) - torch.arange(groups, device=order_V.device)[:, None] * head
    queries = width // head
    of_query = inside.repeat_interleave(queries // groups, dim=0)
    return (of_query + torch.arange(queries, device=order_V.device)[:, None] * head).flatten()
