"""The one place where a budget becomes ranks and widths: parameters of sub-layers -> what their linears may become.

How many parameters each sub-layer gets of the ratio is decided in `allocate`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from streamlap.errors import RecipeError
from streamlap.families.stream import ModelStream
from streamlap.loader.forms import Form
from streamlap.loader.modules import carriers, disk_name
from streamlap.methods.base import Cost, Layout, Layouts, Method, Natives, ParameterBudget
from streamlap.methods.removed import Removal
from streamlap.methods.rows import method_name
from streamlap.methods.trained.base import Distilled
from streamlap.output.formats import packed
from streamlap.recipe import Recipe
from streamlap.store.header import TensorInfo
from streamlap.store.sink import shard_bytes


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method that may compress a sub-layer, with what it may make of it."""

    name: str
    layouts: Layouts
    cost: Cost
    solver: Method | None = None
    """None where the layer is trained as a whole."""

    @property
    def method(self) -> Method:
        assert self.solver is not None, "sub-layers are not solved where the layer is trained as a whole"
        return self.solver


Candidates = Mapping[str, Sequence[Candidate]]
"""Sub-layer -> those that may compress it; none where it stays as it is."""

REMOVED = "removed"


def share_to_cut(stream: ModelStream, ratio: float) -> float:
    """What the linears that have a role lose, so that all linears of the decoder together lose `ratio`: the others count, and
    stay. Raises RecipeError where that is more than there is."""
    stays = sum(map(stream.kept_parameters, range(stream.depth)))
    if not stays:
        return ratio
    given = sum(
        dense_parameters(stream, index, name)
        for index in range(stream.depth)
        for name in stream.family_of(index).compressible
    )
    share = ratio * (given + stays) / given
    if share >= 1:
        kept = ", ".join(stream.family.kept.values())
        raise RecipeError(
            f"ratio is {ratio:g}, and {stays / (given + stays):.1%} of the linears of this {stream.family.model_type} stay as "
            f"they are ({kept}); wanted a ratio below {given / (given + stays):.3f}."
        )
    return share


def uniform_parameters(stream: ModelStream, index: int, ratio: float) -> dict[str, int]:
    """Sub-layer -> what it may store where all give the same share; those alone that have roles."""
    names = stream.family_of(index).compressible
    return {name: int((1.0 - ratio) * dense_parameters(stream, index, name)) for name in names}


def dense_parameters(stream: ModelStream, index: int, sublayer: str) -> int:
    """Parameters of the linears of a sub-layer that have a role before any edit, biases included."""
    natives, itemsize = stream.natives(index), stream.storage_itemsize(index)
    return sum(natives[role].parameters(itemsize) for role in stream.family_of(index).sublayers[sublayer].roles)


def budget_of(stream: ModelStream, index: int, ratio: float, parameters: int) -> ParameterBudget:
    """What a sub-layer of a layer may store, with what is to be known of the layer."""
    return ParameterBudget(
        ratio=ratio, parameters=parameters, itemsize=stream.storage_itemsize(index), head_dim=stream.head_dim,
        heads_stay=stream.family.heads_stay, gained=stream.family.gained, converts=converts(stream, index),
    )  # fmt: skip


def converts(stream: ModelStream, index: int) -> bool:
    """Whether some linear of a layer is stored in another dtype than it is computed in."""
    names = (f"{stream.linear_name(index, role)}.weight" for role in stream.family_of(index).roles)
    return any(stream.source.info(name).dtype != stream.dtype for name in names)


def layer_candidates(stream: ModelStream, recipe: Recipe, index: int, parameters: Mapping[str, int]) -> Candidates:
    """What each sub-layer of a layer may become within its parameters; what attention leaves over, the FFN may use. One that
    may store nothing is removed; one without roles has no candidates.

    Raises RecipeError where a method cannot reach its budget.
    """
    natives, spare, share = stream.natives(index), 0, share_to_cut(stream, recipe.ratio)
    planned: dict[str, list[Candidate]] = {name: [] for name in stream.family_of(index).sublayers}
    for name in stream.family_of(index).compressible:
        budget = budget_of(stream, index, share, parameters[name] + spare)
        methods = recipe.of_sublayer(name)
        if recipe.shape != "free" and not parameters[name]:
            methods = {REMOVED: Removal(sublayer=name, roles=stream.family.sublayers[name].roles)}
        planned[name] = [candidate(key, method, natives, budget) for key, method in methods.items()]
        planned[name] += [distilled(method_name(method), method, name, natives, budget) for method in recipe.distilled]
        stored = [
            sum(
                layout.get(role, natives[role]).parameters(budget.itemsize)
                for role in stream.family.sublayers[name].roles
            )
            for found in planned[name]
            for layout in found.layouts.values()
        ]
        spare = budget.parameters - max(stored) if stored and REMOVED not in methods else 0
    return planned


def candidate(name: str, method: Method, natives: Natives, budget: ParameterBudget) -> Candidate:
    layouts = method.layouts(natives, budget)
    return Candidate(name=name, solver=method, layouts=layouts, cost=method.cost(natives, layouts, budget))


def distilled(name: str, method: Distilled, sublayer: str, natives: Natives, budget: ParameterBudget) -> Candidate:
    layout = method.layout(sublayer, natives, budget)
    return Candidate(name=name, layouts={"": layout}, cost=method.cost(sublayer, natives, layout, budget))


def made_anew(stream: ModelStream, index: int, sublayer: str, found: Candidate) -> Layout:
    """Linears that a candidate makes anew though they keep their form: beside the dense model the last one of a sub-layer is
    fitted, and those that read its input may be moved."""
    method = found.solver
    if method is None or method.needs or isinstance(method, Removal):
        return {}
    part, natives = stream.family_of(index).sublayers[sublayer], stream.natives(index)
    return {role: natives[role] for role in (part.roles if method.moves_inputs else (part.writes,))}


def possible_layouts(candidates: Candidates) -> Iterator[Layout]:
    """What the layer may become: one thing, or as many as there are ways to choose among candidates and their variants."""
    tries = [
        [layout for found in rivals for layout in found.layouts.values()] for rivals in candidates.values() if rivals
    ]
    for choice in itertools.product(*tries):
        yield {role: form for layout in choice for role, form in layout.items()}


def largest_layout(stream: ModelStream, index: int, candidates: Candidates) -> Layout:
    """Of what may be made of each sub-layer, what stores most: which of them it will be is known only later."""

    def stored(layout: Layout) -> int:
        return shard_bytes(layer_entries(stream, index, layout))

    merged: dict[str, Form] = {}
    for rivals in candidates.values():
        layouts = [layout for found in rivals for layout in found.layouts.values()]
        if layouts:
            largest = layouts[0] if len(layouts) == 1 else max(layouts, key=stored)
            merged |= largest
    return merged


def layer_entries(
    stream: ModelStream, index: int, layout: Layout, to: str = "factored", place: int | None = None
) -> dict[str, TensorInfo | torch.Tensor]:
    """Every tensor of the layer's shard by name; see `planned_tensors`."""
    copied, made = planned_tensors(stream, index, layout, to, place)
    return {**copied, **made}


def planned_tensors(
    stream: ModelStream, index: int, layout: Layout, to: str = "factored", place: int | None = None
) -> tuple[dict[str, TensorInfo], dict[str, torch.Tensor]]:
    """What the layer's shard will hold in the format `to`, by name: places in the source that are copied, and tensors on meta
    that are made.

    Args: place, the layer's number in the result; None is that which it has.
    """
    stored, prefix = stream.layer_tensors(index), stream.layer_name(index)
    module = copy.deepcopy(stream.layers[index])
    edited = {stream.family.path(role): form for role, form in layout.items()}
    for path, form in edited.items():
        module.set_submodule(path, form.build("meta"))
    parts = carriers(module)
    copied: dict[str, TensorInfo] = {}
    made: dict[str, torch.Tensor] = {}
    for name, tensor in module.state_dict().items():
        within = next((path for path in edited if name.startswith(path + ".")), None)
        if within is None:
            copied[f"{prefix}.{name}"] = stored[name]
        else:
            dtype = stored[f"{within}.weight"].dtype if tensor.is_floating_point() else tensor.dtype
            made[f"{prefix}.{disk_name(name, parts)}"] = tensor.to(dtype)
    forms, place = {**stream.natives(index), **layout}, index if place is None else place
    kept = packed(to, stream, index, place, forms, {**copied, **made})
    infos = {name: entry for name, entry in kept.items() if isinstance(entry, TensorInfo)}
    others = {name: entry for name, entry in kept.items() if not isinstance(entry, TensorInfo)}
    return infos, {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in others.items()}
