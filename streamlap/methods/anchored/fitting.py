"""What the anchored methods share: from a linear and what was seen of it to the edit that is written.

Shape suffixes: O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.anchor import anchored, best_step, working
from streamlap.linalg.gram import Gram
from streamlap.linalg.moments import Sample
from streamlap.linalg.pivot import folded_order, others, output_order, pivot_rows
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.storage import as_stored, balanced
from streamlap.linalg.subspace import Subspace, refit, subspace, two_factors
from streamlap.linalg.triangles import panels
from streamlap.loader.forms import Form, Pivoted
from streamlap.loader.linears import LowRankLinear, PivotedLinear, StoredLinear
from streamlap.methods.anchored.ranks import STORAGES, RankSite
from streamlap.methods.base import Captured, StreamStatistics

LEAST_GAIN = 0.05
"""Share of the mean gain; see `without`."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What the linear of a role should be before anything is cut from it."""

    role: str
    t_OI: torch.Tensor
    """In the dtype of the layer where nothing moved it, else in that of the solve."""
    bias_O: torch.Tensor | None
    gram: Gram
    """Of its inputs."""
    rows: torch.Tensor | None = None
    """Those that are left; None is all."""
    gain_O: torch.Tensor | None = None
    """What its outputs are multiplied by before they count; see `StreamLayer.gain`."""
    counts_O: torch.Tensor | None = None
    """How much each row counts where directions are chosen for all of them; None is all alike."""


@dataclass(kw_only=True)
class Inputs:
    """The linears that read a sub-layer's input, as aims."""

    statistics: StreamStatistics
    aims: list[Aim]
    notes: tuple[str, ...] = ()
    seen_middle: list[Gram] = field(default_factory=list)

    def middle(self) -> Gram:
        """Of what the last linear reads while these are whole. It is not kept here: no more than one such is held at a time."""
        if self.seen_middle:
            return self.seen_middle.pop()
        layer = self.statistics.layer
        moved = [dense_edit(layer, aim) for aim in self.aims if not stays(layer, aim)]
        return self.statistics.middle_gram(moved)


def read_inputs(statistics: StreamStatistics, roles: Sequence[str], step: float | None, middle: bool = False) -> Inputs:
    """The linears that read a sub-layer's input, moved to give there what they gave before; `middle`, whether that will be
    asked for.

    T = W + b (W' - W), W' = W (C + lambda)(S + lambda)^-1, with b = `step`, or where that is None the one that serves held-out
    tokens best. With a step of 0 only the Gram of the inputs is needed.
    """
    linears = {role: statistics.layer.linear(role) for role in roles}
    seen_middle, notes = list[Gram](), tuple[str, ...]()
    if step == 0:
        if middle:
            gram, found = statistics.grams()
            seen_middle.append(found)
            del found
        else:
            gram = statistics.input_gram()
        targets = [linear.weight for linear in linears.values()]
    else:
        seen = statistics.inputs()
        gram = seen.gram
        into = anchored(torch.eye(len(gram)).to(seen.cross_IA), gram, seen.cross_IA)
        targets = [_moved_input(linear.weight, into.value, seen, step) for linear in linears.values()]
        notes = into.notes
    aims = [
        Aim(role=role, t_OI=t_OI, bias_O=linear.bias, gram=gram)
        for (role, linear), t_OI in zip(linears.items(), targets, strict=True)
    ]
    return Inputs(statistics=statistics, aims=aims, notes=notes, seen_middle=seen_middle)


def _moved_input(w_OI: torch.Tensor, into_II: torch.Tensor, seen: Captured, step: float | None) -> torch.Tensor:
    wide_OI, anchor_TI = w_OI.to(into_II.dtype), seen.held.anchor_TA.to(into_II)
    target_TO = product(anchor_TI, wide_OI.T)
    return _part_of_the_way(wide_OI, product(wide_OI, into_II), seen.held.x_TI.to(into_II), target_TO, step)


def _part_of_the_way(
    w_OI: torch.Tensor, t_OI: torch.Tensor, x_TI: torch.Tensor, target_TO: torch.Tensor, step: float | None
) -> torch.Tensor:
    """From W towards T, in whose place it comes: `step` of it, or what serves held-out tokens best."""
    if step is None:
        step = best_step(w_OI, t_OI, x_TI, target_TO)
    return t_OI.mul_(step).add_(w_OI, alpha=1 - step)


def output_aim(
    layer: StreamLayer, role: str, columns: torch.Tensor | None, seen: Captured, step: float | None,
    refitted_OI: torch.Tensor | None = None,
) -> Solution[Aim]:  # fmt: skip
    """The last linear of a sub-layer, moved to add to the compressed stream what brings it to the dense one.

    `refitted_OI` makes up for what inputs that went had given. What earlier layers have lost is mostly noise to a fit, and
    held-out tokens let in about half of it. So where they choose the step, each of the two has its own.

    Args: columns, which of its inputs are left, in the order in which they now come; None where nothing changed; refitted_OI,
    the linear of these as it acts on the hidden states, fitted again to give what it gave with all; it may be in RAM.
    """
    dense, gain_O = layer.linear(role), layer.gain(role)
    w_OI = dense.weight if columns is None else dense.weight[:, columns]
    t_OI, notes = w_OI, tuple[str, ...]()
    if step != 0:
        begin_OI = w_OI if gain_O is None else w_OI * gain_O[:, None]
        x_TI, target_TO = seen.held.x_TI, seen.held.anchor_TA.to(seen.cross_IA)
        if step is None and refitted_OI is not None:
            assert columns is not None, "what lost nothing is not fitted again"  # so that W is a copy
            part = best_step(begin_OI, refitted_OI, x_TI, target_TO)
            if part:  # what is not finite is no better, and 0 times it is NaN
                for at in panels(begin_OI.shape[1]):
                    begin_OI[:, at] += part * (refitted_OI[:, at].to(target_TO) - begin_OI[:, at])
        found = anchored(begin_OI, seen.gram, seen.cross_IA)
        t_OI, notes = _part_of_the_way(begin_OI, found.value, x_TI, target_TO, step), found.notes
        if gain_O is not None:
            del begin_OI
            t_OI.sub_(w_OI * gain_O[:, None]).mul_(without(gain_O)[:, None]).add_(w_OI)
    if gain_O is not None and not bool(gain_O.any()):
        gain_O = None  # nothing of it is heard, so that no row counts for more than another
    return Solution(Aim(role=role, t_OI=t_OI, bias_O=dense.bias, gram=seen.gram, gain_O=gain_O), notes=notes)


def without(gain_O: torch.Tensor) -> torch.Tensor:
    """1 / gain. A row of hardly any gain brings nothing to the hidden states, but a norm divides each row by the size of all.
    So below `LEAST_GAIN` of the mean a row is moved the less the smaller its gain is, and without any it stays."""
    least = float((LEAST_GAIN * gain_O.abs().mean()).square())
    return gain_O / gain_O.square().clamp_min(max(least, torch.finfo(gain_O.dtype).tiny))


def stays(layer: StreamLayer, aim: Aim) -> bool:
    """Whether nothing has moved the linear or taken rows from it, so that dense it needs no edit."""
    return aim.rows is None and aim.t_OI is layer.linear(aim.role).weight


def narrowed(aim: Aim, kept: torch.Tensor) -> Aim:
    """An aim of which only the rows `kept` are left."""
    return replace(aim, bias_O=None if aim.bias_O is None else aim.bias_O[kept], rows=kept)


def dense_edit(layer: StreamLayer, aim: Aim, kept: torch.Tensor | None = None) -> Edit:
    """A plain linear, of fewer channels where `kept` says so."""
    t_OI = aim.t_OI if aim.rows is None else aim.t_OI[aim.rows]
    module = nn.Linear(t_OI.shape[1], t_OI.shape[0], bias=aim.bias_O is not None, device="meta")
    path = layer.family.path(aim.role)
    for name, tensor, where in (("weight", t_OI, path), ("bias", aim.bias_O, f"{path}.bias")):
        if tensor is not None:
            # In one piece, as it will be read, so that it runs with the same bits; and not in the layer's own memory, which is
            # read into again while an edit may still be on its way to the disk.
            stored = as_stored(tensor, layer.storage_dtype(aim.role), where).contiguous()
            own = stored.clone() if stored.data_ptr() == tensor.data_ptr() else stored
            setattr(module, name, nn.Parameter(own, requires_grad=False))
    return Edit(role=aim.role, module=module, native=layer.native(aim.role), error=0.0, kept=as_kept(kept))


def as_kept(kept: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if kept is None else tuple(kept.tolist())


def low_rank_edit(
    layer: StreamLayer, aim: Aim, form: Form | None, kept: torch.Tensor | None = None
) -> tuple[Edit, torch.Tensor | None]:
    """The edit that gives a linear its form; and, where that folds its order away, the natural row at each place of its
    output."""
    if form is None or not form.rank:
        return dense_edit(layer, aim, kept), None
    if aim.gain_O is None:
        found = subspace(aim.t_OI, aim.gram, form.rank)
    else:
        found = subspace(aim.t_OI * aim.gain_O[:, None], aim.gram, form.rank)
        found.value.basis_OR.mul_(without(aim.gain_O)[:, None])
    pivots = pivot_rows(found.value.basis_OR, form.groups or 1) if isinstance(form, Pivoted) else None
    if pivots is not None and pivots.error:
        path, asked = layer.family.path(aim.role), form.rank
        form = ungrouped(form, layer.storage_dtype(aim.role).itemsize)
        note = f"{path}: a head has too few independent rows, so that rank {form.rank} is stored without groups, not {asked}"
        found = replace(
            found, value=shortened_to(found.value, form.rank), notes=joined(found.notes, pivots.notes, (note,))
        )
        pivots = pivot_rows(found.value.basis_OR) if isinstance(form, Pivoted) else None
    if pivots is None:
        return factored(layer, aim, found, kept), None
    assert isinstance(form, Pivoted)
    found = replace(found, value=replace(found.value, basis_OR=found.value.basis_OR[pivots.value]))
    return pivoted(layer, aim, found, pivots, form.groups, kept)


def ungrouped(form: Form, itemsize: int) -> Form:
    """What stores no more than a form with groups, and has none: pivots from all rows and an order, or two factors where the
    order, in weights of `itemsize` bytes, leaves them the larger rank."""
    sites = [RankSite(name="", shape=form.shape, itemsize=itemsize, storage=storage) for storage in STORAGES]
    rank, site = max(((site.rank_within(form.weights) or 0, site) for site in sites), key=lambda found: found[0])
    return replace(site.at(rank), bias=form.bias)


def shortened_to(found: Subspace, rank: int) -> Subspace:
    """The same at a smaller rank."""
    return replace(found, basis_OR=found.basis_OR[:, :rank], map_RI=found.map_RI[:rank])


def truncated_edit(layer: StreamLayer, aim: Aim, found: Subspace, kept: torch.Tensor) -> Edit:
    """The factors of a subspace, which has the rows of the channels `kept`, as they are: to be looked at, not to be stored.
    Its basis is scaled in place."""
    dtype, bias_O = layer.storage_dtype(aim.role), None if aim.bias_O is None else aim.bias_O[kept]
    scale_R = found.map_RI.norm(dim=1).clamp_min(torch.finfo(found.map_RI.dtype).tiny)
    path = layer.family.path(aim.role)
    factors = balanced(found.basis_OR.mul_(scale_R), found.map_RI / scale_R[:, None], dtype, path)
    module = LowRankLinear.from_factors(*factors.value, None if bias_O is None else bias_O.to(dtype))
    return _edit(layer, aim, module, found.error(len(found.map_RI)), factors.notes)


def factored(layer: StreamLayer, aim: Aim, found: Solution[Subspace], kept: torch.Tensor | None = None) -> Edit:
    """Two factors."""
    dtype = layer.storage_dtype(aim.role)
    factors = two_factors(found.value, aim.gram, aim.t_OI, dtype, layer.family.path(aim.role), aim.rows)
    up_OR, down_RI = factors.value
    bias = None if aim.bias_O is None else aim.bias_O.to(dtype)
    module = LowRankLinear.from_factors(up_OR.contiguous(), down_RI.contiguous(), bias)
    notes = joined(found.notes, factors.notes)
    return _edit(layer, aim, module, found.value.error(len(down_RI)), notes, kept)


def pivoted(
    layer: StreamLayer, aim: Aim, found: Solution[Subspace], pivots: Solution[torch.Tensor], groups: int | None,
    kept: torch.Tensor | None = None,
) -> tuple[Edit, torch.Tensor | None]:  # fmt: skip
    """Pivot rows as they are, rounded, and the other rows fitted again to what the rounding made of them.

    Args: found, the subspace, of whose basis only the pivot rows are needed.
    """
    dtype, pivots_R, path = layer.storage_dtype(aim.role), pivots.value, layer.family.path(aim.role)
    rows = len(aim.t_OI if aim.rows is None else aim.rows)
    base_RI = as_stored(product(found.value.basis_OR, found.value.map_RI), dtype, path)
    order_O = None if groups is None else folded_order(pivots_R, rows, groups)
    rest_N = others(pivots_R, rows)
    fitted = refit(aim.t_OI, base_RI, aim.gram, rest_N if aim.rows is None else aim.rows[rest_N])
    rest_NR = as_stored(fitted.value, dtype, f"{path}.rest")
    bias_O = aim.bias_O if aim.bias_O is None or order_O is None else aim.bias_O[order_O]
    module = PivotedLinear.from_parts(
        base_RI.contiguous(), rest_NR.contiguous(), None if bias_O is None else bias_O.to(dtype),
        output_order(pivots_R, rows) if groups is None else None, groups or 1,
    )  # fmt: skip
    if kept is not None and order_O is not None:
        kept = kept[order_O]
    notes = joined(found.notes, pivots.notes, fitted.notes)
    return _edit(layer, aim, module, found.value.error(len(pivots_R)), notes, kept), order_O


def _edit(
    layer: StreamLayer, aim: Aim, module: StoredLinear, error: float, notes: tuple[str, ...],
    kept: torch.Tensor | None = None,
) -> Edit:  # fmt: skip
    native = layer.native(aim.role)
    return Edit(role=aim.role, module=module, native=native, error=error, kept=as_kept(kept), notes=notes)


def held_error(layer: StreamLayer, edit: Edit, held: Sample) -> float:
    """How far a sub-layer that ends in this edit is from its target on held-out tokens: root mean square over tokens of each
    token's squared error, over the mean of the target's. Tokens that are hit hard count for more than their share: a mean
    alone prefers to lose what few tokens need."""
    module = edit.module
    assert isinstance(module, nn.Linear | StoredLinear)
    w_OI, gain_O = (
        module.weight if isinstance(module, nn.Linear) else module.merged(torch.float32),
        layer.gain(edit.role),
    )
    return map_error(w_OI if gain_O is None else w_OI * gain_O[:, None], held)


def map_error(w_OI: torch.Tensor, held: Sample) -> float:
    """The same of a sub-layer whose last linear acts as the map W on the hidden states."""
    x_TI, w_OI, target_TO = working(held.x_TI.to(w_OI.device), w_OI, held.anchor_TA.to(w_OI.device))
    y_TO = product(x_TI, w_OI.T)
    missed = float((target_TO - y_TO).square().sum(dim=1).square().mean().sqrt())
    return 0.0 if held.power == 0 else missed / held.power
