"""The FFN rebuilt: some channels go, gate and up become low-rank, down is fitted again, anchored to the dense model.

`share` says how the cut is divided: a half that keeps `a` of its parameters keeps a ** share of its channels, the rest of
the cut falls to the ranks. 0 removes no channel, 1 cuts no rank. Channels go in the order of the optimal brain surgeon; down
is fitted on what the new gate and up hand it, so that the half brings the stream back to where the dense model is. It is best
left dense, since what it can mend it mends with all its numbers, until gate and up would have too little left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from streamlap.errors import RecipeError, shown
from streamlap.families.layer import Edit
from streamlap.families.table import Family
from streamlap.linalg.budget import index_parameters
from streamlap.linalg.obs import removals
from streamlap.linalg.pivot import shared_pivot_rows
from streamlap.methods.anchored.costs import compared_cost, half_cost
from streamlap.methods.anchored.divisions import compare_layouts, on_rows, rank_of, reads_whole, subspaces
from streamlap.methods.anchored.fitting import (
    Aim,
    dense_edit,
    factored,
    held_error,
    input_aims,
    low_rank_edit,
    narrowed,
    output_aim,
    pivoted,
    with_bias,
)
from streamlap.methods.anchored.knobs import Knobs
from streamlap.methods.anchored.ranks import RankSite
from streamlap.methods.base import Budget, Built, Cost, HalfView, Layout, Shapes


@dataclass(frozen=True, kw_only=True)
class FfnAnchored(Knobs):
    """Knobs of the method. `Edit.error` is the share of a linear's energy, in the metric of its inputs, that was cut."""

    share: float = 0.5
    """Part of the cut that falls to whole channels, from 0, none, to 1, all of it."""
    half: ClassVar[str] = "ffn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.share, str) or not 0 <= self.share <= 1:
            raise RecipeError(f"ffn_anchored: share is {shown(self.share)}; wanted a number from 0 to 1.")

    def layout(self, family: Family, shapes: Shapes, biased: Mapping[str, bool], budget: Budget) -> Layout:
        (gate, up), (down,) = family.sites["ffn_in"], family.sites["ffn_mid"]
        (hidden, width), biases = shapes[down], sum(biased[path] for path in (gate, up))
        added = self.bias_row(biased[down])
        left = budget.parameters - hidden * (biased[down] or bool(added))
        kept = self._kept(left, width, hidden, biases)
        rows = {gate: {"out": kept}, up: {"out": kept}, down: {"in": kept}} if kept < width else {}
        if self.share < 1:
            for name, rank in self._ranks(kept, hidden, budget, left - kept * biases).items():
                for path in (gate, up) if name == "gate and up" else (down,):
                    if rank is not None:
                        rows[path] = rows.get(path, {}) | self._row(rank, path != down)
        return rows | ({down: rows.get(down, {}) | added} if added else {})

    def _ranks(self, kept: int, hidden: int, budget: Budget, left: int) -> dict[str, int | None]:
        """Of the sites that do not stay dense whatever is left."""
        index = index_parameters(hidden, budget.itemsize) if self.storage == "pivoted" else 0
        inner = RankSite(name="gate and up", rows=kept, columns=hidden, storage=self.storage, copies=2)
        last = RankSite(name="down", rows=hidden, columns=kept, storage=self.storage, index=index)
        return self.ranks([inner], last, left)

    def _kept(self, parameters: int, width: int, hidden: int, biases: int) -> int:
        """Channels that stay."""
        most = parameters // (3 * hidden + biases)
        kept = most if self.share == 1 else min(width, round(width * (parameters / (3 * hidden * width)) ** self.share))
        if not most >= 1:
            raise RecipeError(
                f"ffn_anchored: {parameters} parameters hold no channel of {3 * hidden}; lower the ratio."
            )
        return min(kept, width)

    def _row(self, rank: int, folds: bool) -> dict[str, int]:
        if self.storage == "factors":
            return {"rank": rank}
        return {"pivots": rank} | ({"groups": 1} if folds else {})

    def cost(self, family: Family, shapes: Shapes, layout: Layout) -> Cost:
        return half_cost(family, "ffn", shapes, layout)

    def build(self, view: HalfView, layout: Layout) -> Built:
        layer = view.layer
        (gate, up), (down,) = layer.family.sites["ffn_in"], layer.family.sites["ffn_mid"]
        shapes = layer.shapes((gate, up, down))
        aims = input_aims(view, (gate, up), self.input_step)
        kept = self._kept_channels(view, aims, layout, shapes[down][1])
        edits, channels = self._inner_edits(view, aims, layout, kept)
        seen = view.middles(edits, self.bias)
        aim = output_aim(layer, down, channels, seen, self.step)
        last, _ = low_rank_edit(layer, aim, layout.get(down, {}), shapes[down], channels if kept is not None else None)
        last = with_bias(layer, last, seen)
        return Built(edits=[*edits, last], error=held_error(last, seen))

    def _kept_channels(self, view: HalfView, aims: list[Aim], layout: Layout, width: int) -> torch.Tensor | None:
        """The channels that stay, ascending; None where all do."""
        (down,) = view.layer.family.sites["ffn_mid"]
        count = layout.get(down, {}).get("in", width)
        if count == width:
            return None
        return view.once((self.kin, count), lambda: next(removals(*reads_whole(view, aims, self.bias), [count])).kept_K)

    def _inner_edits(
        self, view: HalfView, aims: list[Aim], layout: Layout, kept: torch.Tensor | None
    ) -> tuple[list[Edit], torch.Tensor | None]:
        """gate and up; and which channel stands where in their common output, None where each is in its old place."""
        layer = view.layer
        of = layer.shapes([aim.path for aim in aims])
        row = layout.get(aims[0].path, {})
        rank = rank_of(layout, aims[0].path)
        left = aims if kept is None else [narrowed(aim, kept) for aim in aims]
        if rank is None:
            return [dense_edit(layer, aim, of[aim.path], kept) for aim in left], kept
        whole = view.once((self.kin, "subspaces"), lambda: subspaces(aims, kept, rank))
        pairs = [(aim, on_rows(found, kept, rank)) for aim, found in zip(left, whole, strict=True)]
        if "rank" in row:
            return [factored(layer, aim, sub, of[aim.path], kept) for aim, sub in pairs], kept
        # Shared, so that both give their channels in one order.
        pivots_R = shared_pivot_rows([sub.basis_OR for _, sub in pairs])
        made = [pivoted(layer, aim, sub, pivots_R, 1, of[aim.path], kept) for aim, sub in pairs]
        order = made[0][1]
        assert order is not None
        return [edit for edit, _ in made], order if kept is None else kept[order]

    @property
    def kin(self) -> FfnAnchored:
        return replace(self, share=0.0)

    def compare(self, view: HalfView, layouts: Mapping[str, Layout]) -> dict[str, float]:
        """Channels and subspaces that it has found serve the one that is built."""
        aims = input_aims(view, view.layer.family.sites["ffn_in"], self.input_step)
        compared = compare_layouts(view, aims, layouts, self.bias)
        view.remember((self.kin, "subspaces"), compared.subspaces)
        for kept_K in compared.kept:
            view.remember((self.kin, len(kept_K)), kept_K)
        return compared.errors

    def comparing(self, family: Family, shapes: Shapes, layouts: Mapping[str, Layout]) -> Cost:
        return compared_cost(family, "ffn", shapes, layouts.values())
