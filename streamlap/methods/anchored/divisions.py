"""How the cut of an FFN is best divided between channels and ranks, estimated without building each variant in full.

Shape suffixes: D out of down, F channels, K channels kept, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.anchor import root
from streamlap.linalg.gram import Gram
from streamlap.linalg.obs import Pruned, removals
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.subspace import Subspace, best_basis, energies_of, subspace
from streamlap.linalg.triangles import panels
from streamlap.methods.anchored.fitting import Aim, Inputs, dense_edit, map_error, narrowed, truncated_edit
from streamlap.methods.base import Layout, Layouts

LEAST_COUNT, MOST_COUNT = 0.01, 100.0
"""Bounds on how much a row of gate or up counts, as multiples of the median; see `weighed`."""

PIECE = 4096
"""Columns that go to RAM at a time."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """What is known of one layout before it is built."""

    kept: torch.Tensor | None
    """The channels that stay, ascending; None where all do."""
    last_DK: torch.Tensor | None = None
    """down of these channels as it acts on the hidden states, fitted again to give what it gave with all. It waits in RAM."""
    subspaces: list[Subspace] = field(default_factory=list)
    """Of gate and up, with rows for all channels, where they are known. Whoever builds takes them away."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Divisions:
    """What comparing several layouts has found."""

    errors: Mapping[str, float]
    """Of each, as `Solved.error`."""
    kept: Mapping[str, torch.Tensor]
    """The channels that each would keep, where these are not all."""
    lasts: Mapping[str, Last]
    subspaces: list[Subspace]
    """Of gate and up; none where no layout cuts a rank."""

    def division(self, name: str) -> Division:
        """Of the layout of this name; what is known of the others goes with `self`."""
        kept = self.kept.get(name)
        last_DK = None if kept is None else self.lasts[name].w_DK
        return Division(kept=kept, last_DK=last_DK, subspaces=self.subspaces)


@dataclass(kw_only=True)
class Last:
    """down of a layout as it acts on the hidden states, as far as it is known; it waits in RAM, as it would be stored."""

    w_DK: torch.Tensor
    metric_DD: torch.Tensor | None = None
    """W S W', where it is to be cut to a rank."""

    def cut(self, rank: int | None, device: torch.device) -> torch.Tensor:
        """Where it has a rank, the best map of that rank."""
        w_DK = self.w_DK.to(device)
        if rank is None or self.metric_DD is None:
            return w_DK
        basis_DR = best_basis(self.metric_DD.to(device), rank)
        w_DK = w_DK.to(basis_DR.dtype)
        return product(basis_DR, product(basis_DR.T, w_DK))


def compare(inputs: Inputs, layouts: Layouts) -> Solution[Divisions]:
    """The error of each layout on held-out tokens, and what building the best one can use again.

    It is estimated: each layout keeps its own channels, and its down is fitted again for the lost channels, but not for
    the ranks. The subspaces of gate and up are computed once, for the channels of the layout of middle width, for all."""
    statistics = inputs.statistics
    counts = {name: width_of(layout, statistics.layer) for name, layout in layouts.items()}
    ranks = {name: rank for name, layout in layouts.items() if (rank := _rank(layout, "up"))}
    kept, lasts, notes = shortened(inputs, layouts, counts)
    aims = inputs.aims
    whole: list[Subspace] = []
    if ranks:
        middle = sorted(counts[name] for name in ranks)[len(ranks) // 2]
        found = subspaces(aims, kept[middle], max(ranks.values()))
        whole, notes = found.value, joined(notes, found.notes)
    errors, device = {}, aims[0].t_OI.device
    for name, layout in layouts.items():
        edits = truncated(statistics.layer, aims, whole, ranks.get(name), kept[counts[name]])
        held = statistics.held_middles(edits)
        errors[name] = map_error(lasts[name].cut(_rank(layout, "down"), device), held)
        lasts[name].metric_DD = None
        notes = joined(notes, *(edit.notes for edit in edits))
    width = statistics.layer.native("down").shape[1]
    fewer = {name: kept[count] for name, count in counts.items() if count < width}
    return Solution(Divisions(errors=errors, kept=fewer, lasts=lasts, subspaces=whole), notes=notes)


def shortened(
    inputs: Inputs, layouts: Layouts, counts: Mapping[str, int]
) -> tuple[dict[int, torch.Tensor], dict[str, Last], tuple[str, ...]]:
    """Width -> the channels that it would keep; layout -> its down; and notes."""
    layer, gram = inputs.statistics.layer, inputs.middle()
    w_DF, dtype = layer.acting("down"), layer.storage_dtype("down")
    if any(_rank(layout, "up") for layout in layouts.values()):
        inputs.aims = weighed(inputs.aims, gram, w_DF)
    kept, lasts, notes = dict[int, torch.Tensor](), dict[str, Last](), tuple[str, ...]()
    for pruned in removals(w_DF, gram, sorted(set(counts.values()), reverse=True)):
        kept_K, notes = pruned.value.kept_K, joined(notes, pruned.notes)
        kept[len(kept_K)] = kept_K
        for name in (name for name, count in counts.items() if count == len(kept_K)):
            lasts[name] = Last(w_DK=columns_of(pruned.value, dtype))
            if _rank(layouts[name], "down") is not None:
                lasts[name].metric_DD = gram.metric(pruned.value.w_OF).cpu()
    return kept, lasts, notes


def columns_of(pruned: Pruned, dtype: torch.dtype) -> torch.Tensor:
    """The inputs that are left of a linear, fitted again, [O, K], in RAM."""
    parts = torch.split(pruned.kept_K, PIECE)
    return torch.cat([pruned.w_OF[:, some].to("cpu", dtype) for some in parts], dim=1)


def weighed(aims: Sequence[Aim], middle: Gram, w_DF: torch.Tensor) -> list[Aim]:
    """gate and up, each row of which counts as much as its channel moves the hidden states.

    A channel gives down act(g) u. An error of u is multiplied by act(g) on its way, of mean square E(act(g) u)^2 / E u^2 as far
    as the two are independent, and by the length of a column of down; an error of g likewise.

    Args: middle, the Gram of what down reads; w_DF, down as it acts on the hidden states.
    """
    length_F = torch.cat([w_DF[:, at].to(middle.dtype).norm(dim=0) for at in panels(len(middle))])
    moves_F, found = middle.diagonal_I.clamp_min(0).sqrt() * length_F, []
    for aim in aims:
        own_F = energies_of(aim.t_OI, aim.gram).clamp_min(0).sqrt()
        counts_F = moves_F.to(own_F.dtype) / own_F
        median = float(counts_F[counts_F.isfinite()].nanmedian())
        if 0 < median < math.inf:
            counts_F = (counts_F / median).nan_to_num(LEAST_COUNT).clamp(LEAST_COUNT, MOST_COUNT)
            aim = replace(aim, counts_O=counts_F)
        found.append(aim)
    return found


def only_division(inputs: Inputs, layout: Layout) -> Division:
    """That of a single layout."""
    layer = inputs.statistics.layer
    count = width_of(layout, layer)
    if count == layer.native("down").shape[1]:
        return Division(kept=None)
    w_DF, middle = layer.acting("down"), inputs.middle()
    if _rank(layout, "up"):
        inputs.aims = weighed(inputs.aims, middle, w_DF)
    (pruned,) = removals(w_DF, middle, [count])
    last_DK = columns_of(pruned.value, layer.storage_dtype("down"))
    return Division(kept=pruned.value.kept_K, last_DK=last_DK, notes=pruned.notes)


def width_of(layout: Layout, layer: StreamLayer) -> int:
    """Channels that a layout keeps."""
    return (layout["down"] if "down" in layout else layer.native("down")).shape[1]


def _rank(layout: Layout, role: str) -> int | None:
    """None where a linear keeps its own."""
    return layout[role].rank or None if role in layout else None


def subspaces(aims: Sequence[Aim], serves: torch.Tensor | None, rank: int) -> Solution[list[Subspace]]:
    """Of linears that read the same: the best for the channels in `serves`, with the rows of all. They wait in RAM."""
    gram, found = aims[0].gram, []
    root_II = root(gram)
    notes = root_II.notes
    for aim in aims:
        sub = subspace(aim.t_OI, gram, rank, root_II.value, serves, aim.counts_O)
        found.append(Subspace(sub.value.basis_OR.cpu(), sub.value.map_RI.cpu(), sub.value.energies.cpu()))
        notes = joined(notes, sub.notes)
    return Solution(found, notes=notes)


def on_rows(found: Subspace, kept: torch.Tensor | None, rank: int, device: torch.device) -> Subspace:
    """The same of fewer rows, and of a smaller rank, on the device."""
    return Subspace(own_rows(found, kept, rank, device), found.map_RI[:rank].to(device), found.energies)


def own_rows(found: Subspace, kept: torch.Tensor | None, rank: int, device: torch.device) -> torch.Tensor:
    """A copy of these rows of the basis, at a smaller rank, on the device."""
    basis_OR = found.basis_OR[:, :rank]
    return basis_OR.to(device, copy=True) if kept is None else basis_OR[kept.to(basis_OR.device)].to(device)


def truncated(
    layer: StreamLayer, aims: Sequence[Aim], whole: Sequence[Subspace], rank: int | None, kept: torch.Tensor
) -> list[Edit]:
    """gate and up on the channels `kept`, cut to a rank; where that is None, whole."""
    if rank is None:
        return [dense_edit(layer, narrowed(aim, kept), kept) for aim in aims]
    return [
        truncated_edit(layer, aim, on_rows(found, kept, rank, kept.device), kept)
        for aim, found in zip(aims, whole, strict=True)
    ]
