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

from streamlap.errors import RecipeError
from streamlap.families import Family
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.budget import index_parameters
from streamlap.linalg.obs import removals
from streamlap.linalg.pivot import shared_pivot_rows
from streamlap.linalg.ranks import RankSite
from streamlap.linalg.subspace import Subspace, subspace
from streamlap.methods.base import Anchored, Budget, Built, Cost, HalfView, Layout, Shapes
from streamlap.methods.costs import half_cost
from streamlap.methods.fitting import (
    Aim,
    dense_edit,
    factored,
    held_error,
    input_aims,
    low_rank_edit,
    map_error,
    narrowed,
    output_aim,
    pivoted,
)
from streamlap.methods.knobs import Knobs


@dataclass(frozen=True, kw_only=True)
class FfnAnchored(Knobs):
    """Knobs of the method. `Edit.error` is the share of a linear's energy, in the metric of its inputs, that was cut."""

    share: float = 0.5
    """Part of the cut that falls to whole channels, from 0, none, to 1, all of it."""
    half: ClassVar[str] = "ffn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.share, str) or not 0 <= self.share <= 1:
            raise RecipeError(f"ffn_anchored: share is {self.share!r}; wanted a number from 0 to 1.")

    def layout(self, family: Family, shapes: Shapes, biased: Mapping[str, bool], budget: Budget) -> Layout:
        (gate, up), (down,) = family.sites["ffn_in"], family.sites["ffn_mid"]
        (hidden, width), biases = shapes[down], sum(biased[path] for path in (gate, up))
        left = budget.parameters - hidden * biased[down]
        kept = self._kept(left, width, hidden, biases)
        rows = {gate: {"out": kept}, up: {"out": kept}, down: {"in": kept}} if kept < width else {}
        if self.share < 1:
            for name, rank in self._ranks(kept, hidden, budget, left - kept * biases).items():
                for path in (gate, up) if name == "gate and up" else (down,):
                    if rank is not None:
                        rows[path] = rows.get(path, {}) | self._row(rank, path != down)
        return rows

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
        if kept is not None:
            aims = [narrowed(aim, kept) for aim in aims]
        edits, channels = self._inner_edits(view, aims, layout, kept)
        seen = view.middles(edits)
        aim = output_aim(layer, down, channels, seen, self.step)
        last, _ = low_rank_edit(layer, aim, layout.get(down, {}), shapes[down], channels if kept is not None else None)
        return Built(edits=[*edits, last], error=held_error(last, seen))

    def _kept_channels(self, view: HalfView, aims: list[Aim], layout: Layout, width: int) -> torch.Tensor | None:
        """The channels that stay, ascending; None where all do."""
        (down,) = view.layer.family.sites["ffn_mid"]
        count = layout.get(down, {}).get("in", width)
        if count == width:
            return None
        return view.once(("kept", count), lambda: next(removals(*reads_whole(view, aims), [count])).kept_K)

    @classmethod
    def compare(cls, view: HalfView, rivals: Mapping[str, tuple[Anchored, Layout]]) -> dict[str, float]:
        """Each with the channels that it would keep, ranks cut in the directions that serve all channels, and the down that was
        fitted again for the lost channels, not yet for the ranks."""
        layer = view.layer
        (gate, up), (down,) = layer.family.sites["ffn_in"], layer.family.sites["ffn_mid"]
        width = layer.shapes((down,))[down][1]
        layouts = {name: layout for name, (_, layout) in rivals.items()}
        counts = {name: layout.get(down, {}).get("in", width) for name, layout in layouts.items()}
        aims = input_aims(view, (gate, up), 0.0)
        most = max(rank_of(layout, gate) or 0 for layout in layouts.values())
        found = [subspace(aim.t_OI, aim.gram_II, most) for aim in aims] if most else []
        errors: dict[str, float] = {}
        w_DF, gram_FF = reads_whole(view, aims)
        for removal in removals(w_DF, gram_FF, sorted(set(counts.values()), reverse=True)):
            kept = removal.kept_K
            view.remember(("kept", len(kept)), kept)
            for name, layout in layouts.items():
                if counts[name] == len(kept):
                    edits = truncated(layer, aims, found, rank_of(layout, gate), kept)
                    w_DK = shortened(removal.w_OK, gram_FF, kept, rank_of(layout, down))
                    errors[name] = map_error(w_DK, view.held_middles(edits))
        return {name: errors[name] for name in rivals}

    def _inner_edits(
        self, view: HalfView, aims: list[Aim], layout: Layout, kept: torch.Tensor | None
    ) -> tuple[list[Edit], torch.Tensor | None]:
        """gate and up; and which channel stands where in their common output, None where each is in its old place."""
        layer = view.layer
        of = layer.shapes([aim.path for aim in aims])
        row = layout.get(aims[0].path, {})
        rank = rank_of(layout, aims[0].path)
        if rank is None:
            return [dense_edit(layer, aim, of[aim.path], kept) for aim in aims], kept
        found = [subspace(aim.t_OI, aim.gram_II, rank) for aim in aims]
        pairs = list(zip(aims, found, strict=True))
        if "rank" in row:
            return [factored(layer, aim, sub, of[aim.path], kept) for aim, sub in pairs], kept
        pivots_R = shared_pivot_rows([sub.basis_OR for sub in found])  # so that both give their channels in one order
        made = [pivoted(layer, aim, sub, pivots_R, 1, of[aim.path], kept) for aim, sub in pairs]
        order = made[0][1]
        assert order is not None
        return [edit for edit, _ in made], order if kept is None else kept[order]


def rank_of(layout: Layout, path: str) -> int | None:
    """None where a linear keeps its own."""
    row = layout.get(path, {})
    return row.get("rank", row.get("pivots"))


def reads_whole(view: HalfView, aims: list[Aim]) -> tuple[torch.Tensor, torch.Tensor]:
    """down, and the Gram of what it reads while gate and up are whole."""
    layer = view.layer
    (down,) = layer.family.sites["ffn_mid"]
    whole = [dense_edit(layer, aim, (aim.t_OI.shape[0], aim.t_OI.shape[1])) for aim in aims]
    return layer.linear(down).weight, view.middle_gram(whole)


def truncated(
    layer: StreamLayer, aims: list[Aim], found: list[Subspace], rank: int | None, kept: torch.Tensor
) -> list[Edit]:
    """gate and up on the channels `kept`, cut to a rank but stored in full."""
    cut = [narrowed(aim, kept) for aim in aims]
    if rank is not None:
        cut = [
            replace(aim, t_OI=sub.basis_OR[kept, :rank] @ sub.map_RI[:rank])
            for aim, sub in zip(cut, found, strict=True)
        ]
    return [dense_edit(layer, aim, (len(kept), aim.t_OI.shape[1]), kept) for aim in cut]


def shortened(w_DK: torch.Tensor, gram_FF: torch.Tensor, kept: torch.Tensor, rank: int | None) -> torch.Tensor:
    """down cut to a rank, too, where it is to have one."""
    if rank is None:
        return w_DK
    found = subspace(w_DK, gram_FF[kept][:, kept], rank)
    return found.basis_OR @ found.map_RI
