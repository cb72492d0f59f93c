"""How the cut of an FFN is best divided between channels and ranks, told without building it in every way.

Shape suffixes: D out of down, F channels, K channels kept, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.anchor import root
from streamlap.linalg.gram import Gram
from streamlap.linalg.obs import removals
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.subspace import Subspace, subspace
from streamlap.methods.anchored.fitting import Aim, Inputs, dense_edit, map_error, narrowed, truncated_edit
from streamlap.methods.base import Layout, Layouts


@dataclass(frozen=True, kw_only=True)
class Division:
    """What is known of one layout before it is built; nothing unless there was a comparison."""

    kept: torch.Tensor | None = None
    """The channels that stay, ascending."""
    subspaces: Solution[list[Subspace]] | None = None
    """Of gate and up, with rows for all channels."""


@dataclass(frozen=True, kw_only=True)
class Divisions:
    """What comparing several layouts has found."""

    errors: Mapping[str, float]
    """Of each, as `Solved.error`."""
    kept: Mapping[int, torch.Tensor]
    """Width -> the channels that it would keep, where these are not all."""
    subspaces: Solution[list[Subspace]] | None
    """Of gate and up; none where no layout cuts a rank."""

    def division(self, layout: Layout) -> Division:
        down = layout.get("down")
        kept = None if down is None else self.kept.get(down.shape[1])
        return Division(kept=kept, subspaces=self.subspaces)


def compare(inputs: Inputs, layouts: Layouts) -> Solution[Divisions]:
    """Each with the channels that it would keep, gate and up cut in the directions that serve the channels of the middle one,
    and the down that was fitted again for the lost channels, not yet for the ranks."""
    statistics, aims = inputs.statistics, inputs.aims
    counts = {name: width_of(layout, statistics.layer) for name, layout in layouts.items()}
    ranks = {name: rank for name, layout in layouts.items() if (rank := _rank(layout, "gate"))}
    kept, lasts, notes = shortened(inputs, layouts, counts)
    whole: Solution[list[Subspace]] | None = None
    if ranks:
        middle = sorted(counts[name] for name in ranks)[len(ranks) // 2]
        whole = subspaces(aims, kept[middle], max(ranks.values()))
        notes = joined(notes, whole.notes)
    errors = {}
    for name in layouts:
        edits = truncated(statistics.layer, aims, whole, ranks.get(name), kept[counts[name]])
        held = statistics.held_middles(edits)
        errors[name] = map_error(lasts.pop(name).to(aims[0].t_OI.device), held)
        notes = joined(notes, *(edit.notes for edit in edits))
    fewer = {width: kept_K for width, kept_K in kept.items() if width < statistics.layer.native("down").shape[1]}
    return Solution(Divisions(errors=errors, kept=fewer, subspaces=whole), notes=notes)


def shortened(
    inputs: Inputs, layouts: Layouts, counts: Mapping[str, int]
) -> tuple[dict[int, torch.Tensor], dict[str, torch.Tensor], tuple[str, ...]]:
    """Width -> the channels that it would keep; layout -> its down; and notes. The downs wait in RAM, as they would be stored:
    all are held at a time."""
    layer, gram = inputs.statistics.layer, inputs.middle()
    w_DF, dtype = layer.linear("down").weight, layer.storage_dtype("down")
    kept, lasts, notes = dict[int, torch.Tensor](), dict[str, torch.Tensor](), tuple[str, ...]()
    for pruned in removals(w_DF, gram, sorted(set(counts.values()), reverse=True)):
        kept_K, notes = pruned.value.kept_K, joined(notes, pruned.notes)
        kept[len(kept_K)] = kept_K
        for name in (name for name, count in counts.items() if count == len(kept_K)):
            last = shorten(pruned.value.w_OF, gram, _rank(layouts[name], "down"))
            lasts[name], notes = last.value.to("cpu", dtype)[:, kept_K.cpu()], joined(notes, last.notes)
    return kept, lasts, notes


def channels_to_keep(inputs: Inputs, counts: Iterable[int]) -> Solution[dict[int, torch.Tensor]]:
    """Of each number of channels those that stay, ascending."""
    w_DF, notes = inputs.statistics.layer.linear("down").weight, tuple[str, ...]()
    kept = {}
    for pruned in removals(w_DF, inputs.middle(), sorted(set(counts), reverse=True)):
        kept[len(pruned.value.kept_K)], notes = pruned.value.kept_K, joined(notes, pruned.notes)
    return Solution(kept, notes=notes)


def width_of(layout: Layout, layer: StreamLayer) -> int:
    """Channels that a layout keeps."""
    return (layout["down"] if "down" in layout else layer.native("down")).shape[1]


def _rank(layout: Layout, role: str) -> int | None:
    """None where a linear keeps its own."""
    return layout[role].rank or None if role in layout else None


def subspaces(aims: Sequence[Aim], serves: torch.Tensor | None, rank: int) -> Solution[list[Subspace]]:
    """Of linears that read the same: the best for the channels in `serves`, with the rows of all."""
    gram = aims[0].gram
    root_II = root(gram)
    found = [subspace(aim.t_OI, gram, rank, root_II.value, serves) for aim in aims]
    return Solution([sub.value for sub in found], notes=joined(root_II.notes, *(sub.notes for sub in found)))


def on_rows(found: Subspace, kept: torch.Tensor | None, rank: int) -> Subspace:
    """The same of fewer rows, and of a smaller rank."""
    basis_OR = found.basis_OR if kept is None else found.basis_OR[kept]
    return Subspace(basis_OR[:, :rank], found.map_RI[:rank], found.energies)


def truncated(
    layer: StreamLayer, aims: Sequence[Aim], whole: Solution[list[Subspace]] | None, rank: int | None,
    kept: torch.Tensor,
) -> list[Edit]:  # fmt: skip
    """gate and up on the channels `kept`, cut to a rank; where that is None, whole."""
    left = [narrowed(aim, kept) for aim in aims]
    if rank is None or whole is None:
        return [dense_edit(layer, aim, kept) for aim in left]
    pairs = zip(left, whole.value, strict=True)
    return [truncated_edit(layer, aim, on_rows(found, kept, rank)) for aim, found in pairs]


def shorten(w_DF: torch.Tensor, gram: Gram, rank: int | None) -> Solution[torch.Tensor]:
    """down cut to a rank, too, where it is to have one."""
    if rank is None:
        return Solution(w_DF)
    found = subspace(w_DF, gram, rank)
    return Solution(product(found.value.basis_OR, found.value.map_RI), notes=found.notes)
