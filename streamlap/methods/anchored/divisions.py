"""How the cut of an FFN is best divided between channels and ranks, told without building it in every way.

Shape suffixes: D out of down, F channels, K channels kept, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.anchor import root
from streamlap.linalg.obs import removals
from streamlap.linalg.products import product
from streamlap.linalg.subspace import Subspace, subspace
from streamlap.methods.anchored.fitting import Aim, dense_edit, map_error, narrowed, truncated_edit
from streamlap.methods.base import HalfView, Layout


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What comparing several layouts has found."""

    errors: dict[str, float]
    """Of each, as `Built.error`."""
    kept: list[torch.Tensor]
    """The channels that each width would keep."""
    subspaces: list[Subspace]
    """Of gate and up, with rows for all channels; none where no layout cuts a rank."""


def compare_layouts(view: HalfView, aims: list[Aim], layouts: Mapping[str, Layout], bias: bool) -> Compared:
    """Each with the channels that it would keep, gate and up cut in the directions that serve the channels of the middle one,
    and the down that was fitted again for the lost channels, not yet for the ranks."""
    (gate, _), (down,) = view.layer.family.sites["ffn_in"], view.layer.family.sites["ffn_mid"]
    w_DF, gram_FF = reads_whole(view, aims, bias)
    counts = {name: layout.get(down, {}).get("in", len(gram_FF)) for name, layout in layouts.items()}
    ranks = {name: rank for name, layout in layouts.items() if (rank := rank_of(layout, gate)) is not None}
    left = {len(found.kept_K): found for found in removals(w_DF, gram_FF, sorted(set(counts.values()), reverse=True))}
    whole: list[Subspace] = []
    if ranks:
        middle = sorted(counts[name] for name in ranks)[len(ranks) // 2]
        whole = subspaces(aims, left[middle].kept_K, max(ranks.values()))
    errors = {}
    for name, layout in layouts.items():
        kept_K = left[counts[name]].kept_K
        edits = truncated(view.layer, aims, whole, ranks.get(name), kept_K)
        w_DK = shortened(left[counts[name]].w_OK, gram_FF, kept_K, rank_of(layout, down))
        errors[name] = map_error(w_DK, view.held_middles(edits, bias))
    return Compared(errors=errors, kept=[found.kept_K for found in left.values()], subspaces=whole)


def rank_of(layout: Layout, path: str) -> int | None:
    """None where a linear keeps its own."""
    row = layout.get(path, {})
    return row.get("rank", row.get("pivots"))


def reads_whole(view: HalfView, aims: Sequence[Aim], bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """down, and the Gram of what it reads while gate and up are whole, its mean apart where a bias will make up for that."""
    layer = view.layer
    (down,) = layer.family.sites["ffn_mid"]
    whole = [dense_edit(layer, aim, (aim.t_OI.shape[0], aim.t_OI.shape[1])) for aim in aims]
    return layer.linear(down).weight, view.middle_gram(whole, bias)


def subspaces(aims: Sequence[Aim], serves: torch.Tensor | None, rank: int) -> list[Subspace]:
    """Of linears that read the same: the best for the channels in `serves`, with the rows of all."""
    gram_II = aims[0].gram_II
    root_II = root(gram_II)
    return [subspace(aim.t_OI, gram_II, rank, root_II, serves) for aim in aims]


def on_rows(found: Subspace, kept: torch.Tensor | None, rank: int) -> Subspace:
    """The same of fewer rows, and of a smaller rank."""
    basis_OR = found.basis_OR if kept is None else found.basis_OR[kept]
    return Subspace(basis_OR[:, :rank], found.map_RI[:rank], found.energies)


def truncated(
    layer: StreamLayer, aims: Sequence[Aim], whole: Sequence[Subspace], rank: int | None, kept: torch.Tensor
) -> list[Edit]:
    """gate and up on the channels `kept`, cut to a rank; where that is None, whole."""
    left = [narrowed(aim, kept) for aim in aims]
    if rank is None:
        return [dense_edit(layer, aim, (len(kept), aim.t_OI.shape[1]), kept) for aim in left]
    return [truncated_edit(layer, aim, on_rows(found, kept, rank)) for aim, found in zip(left, whole, strict=True)]


def shortened(w_DK: torch.Tensor, gram_FF: torch.Tensor, kept: torch.Tensor, rank: int | None) -> torch.Tensor:
    """down cut to a rank, too, where it is to have one."""
    if rank is None:
        return w_DK
    found = subspace(w_DK, gram_FF[kept][:, kept], rank)
    return product(found.basis_OR, found.map_RI)
