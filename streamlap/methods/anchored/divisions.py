"""How the cut of an FFN is best divided between channels and ranks, told without building it in every way.

Shape suffixes: D out of down, F channels, K channels kept, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.anchor import root
from streamlap.linalg.gram import Gram
from streamlap.linalg.obs import removals
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.subspace import Subspace, subspace
from streamlap.methods.anchored.fitting import Aim, dense_edit, map_error, narrowed, truncated_edit
from streamlap.methods.base import Layout, Layouts, StreamStatistics


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
    """Width -> the channels that it would keep."""
    subspaces: Solution[list[Subspace]] | None
    """Of gate and up; none where no layout cuts a rank."""

    def division(self, layout: Layout) -> Division:
        down = layout.get("down")
        kept = None if down is None else self.kept.get(down.shape[1])
        return Division(kept=kept, subspaces=self.subspaces)


def compare(statistics: StreamStatistics, aims: Sequence[Aim], layouts: Layouts) -> Solution[Divisions]:
    """Each with the channels that it would keep, gate and up cut in the directions that serve the channels of the middle one,
    and the down that was fitted again for the lost channels, not yet for the ranks."""
    w_DF, gram = reads_whole(statistics, aims)
    counts = {name: _width(layout, len(gram)) for name, layout in layouts.items()}
    ranks = {name: rank for name, layout in layouts.items() if (rank := _rank(layout, "gate"))}
    found = list(removals(w_DF, gram, sorted(set(counts.values()), reverse=True)))
    left = {len(pruned.value.kept_K): pruned.value for pruned in found}
    whole: Solution[list[Subspace]] | None = None
    if ranks:
        middle = sorted(counts[name] for name in ranks)[len(ranks) // 2]
        whole = subspaces(aims, left[middle].kept_K, max(ranks.values()))
    errors, notes = {}, [*(pruned.notes for pruned in found), whole.notes if whole else ()]
    for name, layout in layouts.items():
        kept_K = left[counts[name]].kept_K
        edits = truncated(statistics.layer, aims, whole, ranks.get(name), kept_K)
        shortened = shorten(left[counts[name]].w_OK, gram, kept_K, _rank(layout, "down"))
        errors[name] = map_error(shortened.value, statistics.held_middles(edits))
        notes += [shortened.notes, *(edit.notes for edit in edits)]
    kept = {width: pruned.kept_K for width, pruned in left.items()}
    return Solution(Divisions(errors=errors, kept=kept, subspaces=whole), notes=joined(*notes))


def channels_to_keep(statistics: StreamStatistics, aims: Sequence[Aim], count: int) -> Solution[torch.Tensor]:
    """The channels that stay where so many do, ascending."""
    pruned = next(removals(*reads_whole(statistics, aims), [count]))
    return Solution(pruned.value.kept_K, notes=pruned.notes)


def _width(layout: Layout, width: int) -> int:
    return layout["down"].shape[1] if "down" in layout else width


def _rank(layout: Layout, role: str) -> int | None:
    """None where a linear keeps its own."""
    return layout[role].rank or None if role in layout else None


def reads_whole(statistics: StreamStatistics, aims: Sequence[Aim]) -> tuple[torch.Tensor, Gram]:
    """down, and the Gram of what it reads while gate and up are whole."""
    whole = [dense_edit(statistics.layer, aim) for aim in aims]
    return statistics.layer.linear("down").weight, statistics.middle_gram(whole)


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


def shorten(w_DK: torch.Tensor, gram: Gram, kept: torch.Tensor, rank: int | None) -> Solution[torch.Tensor]:
    """down cut to a rank, too, where it is to have one."""
    if rank is None:
        return Solution(w_DK)
    w_DF = w_DK.new_zeros(len(w_DK), len(gram))
    w_DF[:, kept] = w_DK
    found = subspace(w_DF, gram, rank)
    return Solution(product(found.value.basis_OR, found.value.map_RI[:, kept]), notes=found.notes)
