"""The FFN rebuilt: some channels go, gate and up become low-rank, down is fitted again, anchored to the dense model.

A share says how the cut is divided: a sub-layer that keeps `a` of its parameters keeps a ** share of its channels, the rest of
the cut falls to the ranks. 0 removes no channel, 1 cuts no rank. Of several shares the method builds the one that serves
held-out tokens best. Channels go in the order of the optimal brain surgeon; down is fitted on what the new gate and up hand it,
so that the sub-layer brings the stream back to where the dense model is. It is best left dense, since what it can mend it mends
with all its numbers, until gate and up would have too little left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from streamlap.errors import RecipeError, shown
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.pivot import shared_pivot_rows
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.subspace import Subspace
from streamlap.loader.forms import Pivoted
from streamlap.methods.anchored.costs import anchored_cost
from streamlap.methods.anchored.divisions import (
    Division,
    Divisions,
    compare,
    on_rows,
    only_division,
    own_rows,
    subspaces,
    width_of,
)
from streamlap.methods.anchored.fitting import (
    Aim,
    Inputs,
    dense_edit,
    factored,
    held_error,
    low_rank_edit,
    narrowed,
    output_aim,
    pivoted,
    read_inputs,
    stays,
)
from streamlap.methods.anchored.knobs import Knobs
from streamlap.methods.anchored.ranks import RankSite
from streamlap.methods.base import (
    Cost,
    Layout,
    Layouts,
    Natives,
    ParameterBudget,
    Solved,
    StreamStatistics,
    ffn_reads,
    finite_error,
)

MOST_SHARES = 16


@dataclass(frozen=True, kw_only=True)
class FfnAnchored(Knobs):
    """Knobs of the method. `Edit.error` is the share of a linear's energy, in the metric of its inputs, that was cut.

    Where channels go, each row of gate and up has its energy times the square of what it counts (`divisions.weighed`), and
    where several layouts are compared it is that of the channels of the layout of middle width, not of the one that is built.
    """

    sublayer: ClassVar[str] = "ffn"
    needs: ClassVar[tuple[str, ...]] = ()

    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Parts of the cut that may fall to whole channels, each from 0, none, to 1, all of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = all(type(share) in (int, float) and 0 <= share <= 1 for share in self.shares)
        if not (numbers and 1 <= len(set(self.shares)) == len(self.shares) <= MOST_SHARES):
            raise RecipeError(
                f"ffn_anchored: shares is {shown(self.shares)}; wanted 1 to {MOST_SHARES} different numbers from 0 to 1."
            )

    def layouts(self, natives: Natives, budget: ParameterBudget) -> Layouts:
        return {f"share {share:g}": self._layout(natives, budget, share) for share in self.shares}

    def _layout(self, natives: Natives, budget: ParameterBudget, share: float) -> Layout:
        hidden, width = natives["down"].shape
        reads = ffn_reads(natives)
        biases = sum(natives[role].bias for role in reads)
        left = budget.parameters - hidden * natives["down"].bias
        kept = _channels(left, width, (len(reads) + 1) * hidden, biases, share)
        ranks: dict[str, int | None] = {}
        inner, last = self._sites(reads, kept, hidden, budget)
        if share < 1:
            ranks = self.ranks([inner], last, left - kept * biases)
        layout = {}
        for role, site in (*((role, inner) for role in reads), ("down", last)):
            rank = ranks.get(site.name)
            if rank is not None or kept < width:
                layout[role] = replace(site.at(rank), bias=natives[role].bias)
        return layout

    def _sites(
        self, reads: Sequence[str], kept: int, hidden: int, budget: ParameterBudget
    ) -> tuple[RankSite, RankSite]:
        """gate and up, whose order is folded into down; and down."""
        item, storage = budget.itemsize, self.storage
        inner = RankSite(
            name=" and ".join(reads), shape=(kept, hidden), itemsize=item, storage=storage, groups=1, copies=len(reads)
        )  # fmt: skip
        return inner, RankSite(name="down", shape=(hidden, kept), itemsize=item, storage=storage)

    def cost(self, natives: Natives, layouts: Layouts, budget: ParameterBudget) -> Cost:
        return anchored_cost(ffn_reads(natives), "down", natives, layouts, budget, self.moves_inputs, together=True)

    def solve(self, statistics: StreamStatistics, layouts: Layouts) -> Solved:
        inputs = self._inputs(statistics, layouts)
        if len(layouts) == 1:
            ((name, layout),) = layouts.items()
            division = only_division(inputs, layout)
            built = self._build(inputs, layout, division)
            return replace(built, errors={name: built.error}, notes=joined(inputs.notes, division.notes, built.notes))
        compared = compare(inputs, layouts)
        name, notes = best_variant(compared.value), joined(inputs.notes, compared.notes)
        errors = {variant: error for variant, error in compared.value.errors.items() if math.isfinite(error)}
        division = compared.value.division(name)
        del compared  # what is known of the others
        built = self._build(inputs, layouts[name], division)
        return replace(built, errors=errors | {name: built.error}, notes=joined(notes, built.notes))

    def _inputs(self, statistics: StreamStatistics, layouts: Layouts) -> Inputs:
        width, layer = statistics.layer.native("down").shape[1], statistics.layer
        prunes = any(width_of(layout, layer) < width for layout in layouts.values())
        return read_inputs(statistics, layer.family.sublayers["ffn"].reads, self.input_step, prunes)

    def _build(self, inputs: Inputs, layout: Layout, division: Division) -> Solved:
        """One layout in full; subspaces that are known already serve it."""
        statistics, layer, kept = inputs.statistics, inputs.statistics.layer, division.kept
        edits, channels = inner_edits(layer, inputs.aims, layout, division)
        inputs.aims.clear()
        statistics.forget_inputs()  # room for the Gram of down's
        seen = statistics.middles(edits)
        output = output_aim(layer, "down", channels, seen, self.step, in_order(division, channels))
        last, _ = low_rank_edit(layer, output.value, layout.get("down"), channels if kept is not None else None)
        notes, held = joined(output.notes, *(edit.notes for edit in (*edits, last))), seen.held
        del seen, output  # the largest arrays of the layer, before the error takes some
        return Solved(edits=[*edits, last], error=held_error(layer, last, held), notes=notes)


def in_order(division: Division, channels: torch.Tensor | None) -> torch.Tensor | None:
    """`Division.last_DK` with its columns as the channels now come."""
    if division.kept is None or division.last_DK is None or channels is None:
        return None
    return division.last_DK[:, torch.searchsorted(division.kept, channels).cpu()]


def _channels(parameters: int, width: int, each: int, biases: int, share: float) -> int:
    """Channels that stay, of `each` so many weights."""
    most = parameters // (each + biases)
    if most < 1:
        raise RecipeError(f"ffn_anchored: {parameters} parameters hold no channel of {each}; lower the ratio.")
    kept = most if share == 1 else round(width * (parameters / (each * width)) ** share)
    return min(kept, width)


def best_variant(compared: Divisions) -> str:
    """The variant of least error. Raises NumericalError where that is no number."""
    finite = {name: error for name, error in compared.errors.items() if math.isfinite(error)}
    best = min(compared.errors, key=lambda name: finite.get(name, math.inf))
    finite_error(compared.errors[best])
    return best


def inner_edits(
    layer: StreamLayer, aims: Sequence[Aim], layout: Layout, division: Division
) -> tuple[list[Edit], torch.Tensor | None]:
    """gate and up; and which channel stands where in their common output, None where each is in its old place."""
    form, kept = layout.get("up"), division.kept
    left = list(aims) if kept is None else [narrowed(aim, kept) for aim in aims]
    if form is None or not form.rank:
        return [dense_edit(layer, aim, kept) for aim in left if not stays(layer, aim)], kept
    found = Solution(division.subspaces)
    if not found.value:
        found = subspaces(aims, kept, form.rank)
    device, notes = aims[0].t_OI.device, found.notes

    def taken(rows: torch.Tensor | None) -> Solution[Subspace]:
        """The next linear's, of these rows; it waits no longer."""
        return Solution(on_rows(found.value.pop(0), rows, form.rank, device), notes=notes)

    if not isinstance(form, Pivoted):
        return [factored(layer, aim, taken(kept), kept) for aim in left], kept
    # Shared, so that both give their channels in one order.
    pivots = shared_pivot_rows([own_rows(space, kept, form.rank, device) for space in found.value])
    stored = pivots.value if kept is None else kept[pivots.value]
    made = [pivoted(layer, aim, taken(stored), pivots, 1, kept) for aim in left]
    order = made[0][1]
    assert order is not None
    return [edit for edit, _ in made], order if kept is None else kept[order]
