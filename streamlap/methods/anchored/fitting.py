"""What the anchored methods share: from a linear and what was seen of it to the edit that is written.

Shape suffixes: O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.anchor import anchored, best_step, working
from streamlap.linalg.moments import Sample
from streamlap.linalg.pivot import folded_order, others, output_order, pivot_rows
from streamlap.linalg.products import product
from streamlap.linalg.storage import as_stored, balanced
from streamlap.linalg.subspace import Subspace, refit, subspace, two_factors
from streamlap.loader.linears import LowRankLinear, PivotedLinear, StoredLinear
from streamlap.methods.base import HalfView, Seen


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What a linear should be before anything is cut from it, and where it belongs."""

    path: str
    t_OI: torch.Tensor
    bias_O: torch.Tensor | None
    gram_II: torch.Tensor


def input_aims(view: HalfView, paths: Sequence[str], step: float | None) -> list[Aim]:
    """The linears at `paths`, which read a half's input, moved to give there what they gave before.

    T = W + b (W' - W), W' = W (C + lambda)(S + lambda)^-1, with b = `step`, or where that is None the one that serves held-out
    tokens best. Made once for all methods of a half.
    """
    make = _unmoved_aims if step == 0 else _moved_aims
    return view.once(("aims", *paths, step), lambda: make(view, paths, step))


def _unmoved_aims(view: HalfView, paths: Sequence[str], step: float | None) -> list[Aim]:
    gram_II = view.input_gram()
    linears = {path: view.layer.linear(path) for path in paths}
    return [
        Aim(path=path, t_OI=dense.weight.to(gram_II.dtype), bias_O=dense.bias, gram_II=gram_II)
        for path, dense in linears.items()
    ]


def _moved_aims(view: HalfView, paths: Sequence[str], step: float | None) -> list[Aim]:
    seen, aims = view.inputs(), []
    gram_II = seen.gram_II
    into_II = anchored(torch.eye(len(gram_II)).to(gram_II), gram_II, seen.cross_AI)
    for path in paths:
        dense = view.layer.linear(path)
        w_OI = dense.weight.to(gram_II.dtype)
        target_TO = product(seen.held.anchor_TA.to(w_OI.dtype), w_OI.T)
        t_OI = _moved(w_OI, product(w_OI, into_II), seen.held.x_TI, target_TO, step)
        aims.append(Aim(path=path, t_OI=t_OI, bias_O=dense.bias, gram_II=gram_II))
    return aims


def _moved(
    w_OI: torch.Tensor, t_OI: torch.Tensor, x_TI: torch.Tensor, target_TO: torch.Tensor, step: float | None
) -> torch.Tensor:
    """A part of the way from W to T: `step`, or what serves held-out tokens best."""
    if step is None:
        step = best_step(w_OI, t_OI - w_OI, x_TI, target_TO)
    return torch.lerp(w_OI, t_OI, step)


def output_aim(layer: StreamLayer, path: str, columns: torch.Tensor | None, seen: Seen, step: float | None) -> Aim:
    """The linear at the end of a half, moved to add to the compressed stream what brings it to the dense one.

    `columns`: which of its inputs are left, in the order in which they now come; None where nothing changed.
    """
    dense = layer.linear(path)
    return moved(path, dense.weight if columns is None else dense.weight[:, columns], dense.bias, seen, step)


def moved(
    path: str, w_OI: torch.Tensor, bias_O: torch.Tensor | None, seen: Seen, step: float | None,
    columns: torch.Tensor | None = None,
) -> Aim:  # fmt: skip
    """The same for a linear at the end of a half that has become `w_OI`; it reads only `columns` of what was seen, if given."""
    gram_II, cross_AI, x_TI = seen.gram_II, seen.cross_AI, seen.held.x_TI
    if columns is not None:
        gram_II, cross_AI, x_TI = gram_II[columns][:, columns], cross_AI[:, columns], x_TI[:, columns]
    t_OI = w_OI.to(gram_II.dtype)
    if step != 0:
        t_OI = _moved(t_OI, anchored(t_OI, gram_II, cross_AI), x_TI, seen.held.anchor_TA, step)
    if seen.means is not None:  # a place for what `with_bias` will find
        bias_O = t_OI.new_zeros(len(t_OI)) if bias_O is None else bias_O.clone()
    return Aim(path=path, t_OI=t_OI, bias_O=bias_O, gram_II=gram_II)


def narrowed(aim: Aim, kept: torch.Tensor) -> Aim:
    """An aim of which only the rows `kept` are left."""
    bias_O = None if aim.bias_O is None else aim.bias_O[kept]
    return replace(aim, t_OI=aim.t_OI[kept], bias_O=bias_O)


def dense_edit(layer: StreamLayer, aim: Aim, of: tuple[int, int], kept: torch.Tensor | None = None) -> Edit:
    """A plain linear, of fewer channels where `kept` says so."""
    dtype = layer.storage_dtype(aim.path)
    module = nn.Linear(aim.t_OI.shape[1], aim.t_OI.shape[0], bias=aim.bias_O is not None, device="meta")
    module.weight = nn.Parameter(as_stored(aim.t_OI, dtype, aim.path), requires_grad=False)
    if aim.bias_O is not None:
        module.bias = nn.Parameter(as_stored(aim.bias_O, dtype, f"{aim.path}.bias"), requires_grad=False)
    return Edit(path=aim.path, module=module, of=of, error=0.0, kept=as_kept(kept))


def as_kept(kept: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if kept is None else tuple(kept.tolist())


def low_rank_edit(
    layer: StreamLayer, aim: Aim, row: Mapping[str, int], of: tuple[int, int], kept: torch.Tensor | None = None
) -> tuple[Edit, torch.Tensor | None]:
    """The edit that `row` describes; and, where it folds its order away, the natural row at each place of its output."""
    if "rank" not in row and "pivots" not in row:
        return dense_edit(layer, aim, of, kept), None
    found = subspace(aim.t_OI, aim.gram_II, row.get("rank", row.get("pivots", 0)))
    if "rank" in row:
        return factored(layer, aim, found, of, kept), None
    pivots_R = pivot_rows(found.basis_OR, row.get("groups", 1))
    return pivoted(layer, aim, found, pivots_R, row.get("groups"), of, kept)


def truncated_edit(layer: StreamLayer, aim: Aim, found: Subspace) -> Edit:
    """The factors of a subspace as they are: to be looked at, not to be stored."""
    dtype, bias_O = layer.storage_dtype(aim.path), aim.bias_O
    scale_R = found.map_RI.norm(dim=1).clamp_min(torch.finfo(found.map_RI.dtype).tiny)
    up_OR, down_RI = balanced(found.basis_OR * scale_R, found.map_RI / scale_R[:, None], dtype, aim.path)
    module = LowRankLinear.from_factors(up_OR, down_RI, None if bias_O is None else bias_O.to(dtype))
    return Edit(
        path=aim.path, module=module, of=(aim.t_OI.shape[0], aim.t_OI.shape[1]), error=found.error(len(down_RI))
    )


def factored(
    layer: StreamLayer, aim: Aim, found: Subspace, of: tuple[int, int], kept: torch.Tensor | None = None
) -> Edit:
    """Two factors."""
    dtype = layer.storage_dtype(aim.path)
    up_OR, down_RI = two_factors(found, aim.gram_II, aim.t_OI, dtype, aim.path)
    bias = None if aim.bias_O is None else aim.bias_O.to(dtype)
    module = LowRankLinear.from_factors(up_OR.contiguous(), down_RI.contiguous(), bias)
    return Edit(path=aim.path, module=module, of=of, error=found.error(down_RI.shape[0]), kept=as_kept(kept))


def pivoted(
    layer: StreamLayer, aim: Aim, found: Subspace, pivots_R: torch.Tensor, groups: int | None, of: tuple[int, int],
    kept: torch.Tensor | None = None,
) -> tuple[Edit, torch.Tensor | None]:  # fmt: skip
    """Pivot rows as they are, rounded, and the other rows fitted again to what the rounding made of them."""
    dtype, rows = layer.storage_dtype(aim.path), aim.t_OI.shape[0]
    base_RI = as_stored(product(found.basis_OR[pivots_R], found.map_RI), dtype, aim.path)
    order_O = None if groups is None else folded_order(pivots_R, rows, groups)
    rest_N = others(pivots_R, rows)
    rest_NR = as_stored(refit(aim.t_OI[rest_N], base_RI, aim.gram_II), dtype, f"{aim.path}.rest")
    bias_O = aim.bias_O if aim.bias_O is None or order_O is None else aim.bias_O[order_O]
    module = PivotedLinear.from_parts(
        base_RI.contiguous(), rest_NR.contiguous(), None if bias_O is None else bias_O.to(dtype),
        output_order(pivots_R, rows) if groups is None else None, groups or 1,
    )  # fmt: skip
    if kept is not None and order_O is not None:
        kept = kept[order_O]
    error = found.error(len(pivots_R))
    return Edit(path=aim.path, module=module, of=of, error=error, kept=as_kept(kept)), order_O


def with_bias(layer: StreamLayer, edit: Edit, seen: Seen) -> Edit:
    """The edit, with the bias that makes up for what it does to the means, where these were taken off what it is fitted to.

    The weights that are best on centred tokens are best with it. FLAP's compensation (An et al. 2024, arXiv 2312.11983) is
    the bias without the fit.
    """
    if seen.means is None:
        return edit
    mean_I, mean_O = seen.means
    module, own = edit.module, layer.linear(edit.path).bias
    assert isinstance(module, nn.Linear | StoredLinear)
    w_OI = module.weight if isinstance(module, nn.Linear) else module.merged(torch.float32)
    bias_O = mean_O - w_OI.to(mean_I.dtype) @ mean_I
    stored_O = module.bias if isinstance(module, nn.Linear) else module.merged_bias()
    assert isinstance(stored_O, nn.Parameter), "`moved` has made one"
    stored_O.copy_(bias_O if own is None else bias_O + own)
    return replace(edit, added_bias=own is None)


def held_error(edit: Edit, seen: Seen) -> float:
    """How far a half that ends in this edit is from its target on held-out tokens: root mean square over tokens of each
    token's squared error, over the mean of the target's. Tokens that are hit hard count for more than their share: a mean
    alone prefers to lose what few tokens need."""
    module = edit.module
    assert isinstance(module, nn.Linear | StoredLinear)
    return map_error(module.weight if isinstance(module, nn.Linear) else module.merged(torch.float32), seen.held)


def map_error(w_OI: torch.Tensor, held: Sample) -> float:
    """The same of a half that ends in the map W."""
    x_TI, w_OI, target_TO = working(held.x_TI, w_OI, held.anchor_TA)
    y_TO = product(x_TI, w_OI.T)
    missed = float((target_TO - y_TO).square().sum(dim=1).square().mean().sqrt())
    return 0.0 if held.power == 0 else missed / held.power
