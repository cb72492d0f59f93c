"""What every layer will become and what that takes, from headers and settings alone. `plan` shows it, `compress` goes by it.

Shape suffixes: N sequences, L length.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from streamlap.errors import UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.families.table import Family
from streamlap.loader.modules import carriers, disk_name, swap_modules
from streamlap.methods import AnchoredMethod
from streamlap.methods.base import Comparable, Cost, Layout, Shapes, by_kin
from streamlap.methods.trained.refine import STATE_BYTES
from streamlap.output.inspect import site_parameters
from streamlap.planning.allocate import half_budgets
from streamlap.planning.workload import Workload, layer_workload
from streamlap.recipe import Recipe
from streamlap.store.header import TensorInfo
from streamlap.store.sink import shard_bytes
from streamlap.store.source import CHUNK_BYTES


@dataclass(frozen=True, kw_only=True)
class LayerForecast:
    """One layer to come. Bytes and floating-point operations."""

    layout: Layout
    output_bytes: int
    """Its shard, header included; at most that where several methods try for a half."""
    copied_bytes: int
    """Of these, what is copied from the source as it stands."""
    edits_bytes: int
    source_bytes: int
    largest_bytes: int
    """The largest tensor of the source layer."""
    solve_bytes: int
    """Most that the solves hold: what the methods before have made, what this one makes, and its work."""
    widest: int
    """Widest input or output of a linear when all is done; before, where methods that try leave different widths."""
    flops: int
    """Of the forwards, in the compute dtype: the two, and where halves are rebuilt half of one for each method that tries."""
    flops64: int
    """Of the solves' matrix products in float64."""
    flops32: int
    """Of those in float32, sums over tokens included."""
    decompositions: tuple[int, ...]
    """Sizes of the solves' eigen-problems."""
    capture_bytes: int = 0
    """Most that sums over tokens hold inside a solve, with the edits so far."""
    generations_read: int = 2
    """How often hidden states are read, where they are on the disk; one time less in the last layer."""
    generations_written: int = 1
    """How often they are written to the disk in any case."""
    refined: int = 0
    """Parameters that are refined."""
    state_bytes: int = 0
    """What refinement writes after its epochs, all together."""
    generations_spilled: int = 0
    """How often they are written to it where memory does not keep them."""


def plan_layers(stream: ModelStream, recipe: Recipe) -> list[Layout]:
    """What each layer will become, from shapes alone; every RecipeError that could come later comes here."""
    if stream.rows:
        raise UnsupportedModel(f"{stream.folder} is already compressed by streamlap; wanted the original checkpoint.")
    recipe.check_paths(stream.family)
    layouts = []
    for index in range(stream.depth):
        merged: Layout = {}
        if recipe.anchored:
            for candidates in plan_halves(stream, recipe, index).values():
                merged |= largest_layout(stream, index, [layout for _, layout in candidates.values()])
        for method in recipe.one_pass:
            merged |= method.layout(stream.family, dense_shapes(stream, index), recipe.ratio)
        layouts.append(merged)
    return layouts


def largest_layout(stream: ModelStream, index: int, layouts: Sequence[Layout]) -> Layout:
    """Of what several methods would make of a half, what stores most: which of them does it is known only later."""

    def stored(layout: Layout) -> int:
        copied, made = planned_tensors(stream, index, layout)
        return shard_bytes({**copied, **made})

    return layouts[0] if len(layouts) == 1 else max(layouts, key=stored)


def dense_shapes(stream: ModelStream, index: int) -> dict[str, tuple[int, int]]:
    return {path: stream.dense_shape(index, path) for path in stream.family.linears}


def plan_halves(stream: ModelStream, recipe: Recipe, index: int) -> dict[str, dict[str, tuple[AnchoredMethod, Layout]]]:
    """Half -> method -> what it will make of the half's linears. What the first half leaves over, the second may use."""
    shapes, family, planned, spare = dense_shapes(stream, index), stream.family, {}, 0
    biased = {path: stream.has_bias(index, path) for path in family.linears}
    for half, budget in half_budgets(stream, recipe.ratio, index, recipe.survey).items():
        budget = replace(budget, parameters=budget.parameters + spare)
        planned[half] = {
            name: (method, method.layout(family, shapes, biased, budget))
            for name, method in recipe.of_half(half).items()
        }
        stored = [
            sum(
                site_parameters(edited_shape(shapes[path], row), row, biased[path], budget.itemsize)
                for path in family.half_linears(half)
                for row in [layout.get(path, {})]
            )
            for _, layout in planned[half].values()
        ]
        spare = budget.parameters - max(stored)
    return planned


def planned_tensors(
    stream: ModelStream, index: int, layout: Layout
) -> tuple[dict[str, TensorInfo], dict[str, torch.Tensor]]:
    """What the layer's shard will hold, by name: places in the source that are copied, and tensors on meta that are made."""
    stored, prefix = stream.layer_tensors(index), stream.layer_name(index)
    module = copy.deepcopy(stream.layers[index])
    swap_modules(module, layout)
    parts = carriers(module)
    copied, made = {}, {}
    for name, tensor in module.state_dict().items():
        edited = next((path for path in layout if name.startswith(path + ".")), None)
        if edited is None:
            copied[f"{prefix}.{name}"] = stored[name]
        else:
            dtype = stored[f"{edited}.weight"].dtype
            made[f"{prefix}.{disk_name(name, parts)}"] = tensor.to(
                dtype if tensor.is_floating_point() else tensor.dtype
            )
    return copied, made


def forecast_layer(
    stream: ModelStream, recipe: Recipe, index: int, layout: Layout, shape_NL: tuple[int, int]
) -> LayerForecast:
    """Bytes and operations of one layer for `shape_NL` calibration tokens."""
    copied, made = planned_tensors(stream, index, layout)
    shapes, refine = dense_shapes(stream, index), recipe.refine
    costs = method_costs(stream, recipe, index)
    stored = stream.layer_tensors(index).values()
    dense_flops = forward_flops(stream, index, sum(info.numel for info in stored), shape_NL)
    kept = sum(info.numel for info in copied.values()) + sum(tensor.numel() for tensor in made.values())
    after_flops = forward_flops(stream, index, kept, shape_NL)
    after_flops *= (index + 1 < stream.depth) + 3 * refine  # a step takes a forward and, for gradients, twice as much
    copied_bytes, made_bytes = (sum(entry.nbytes for entry in part) for part in (copied.values(), made.values()))
    if refine:
        copied_bytes, made_bytes = 0, copied_bytes + made_bytes
    return LayerForecast(
        layout=layout, output_bytes=shard_bytes({**copied, **made}),
        copied_bytes=copied_bytes, edits_bytes=made_bytes,
        refined=kept if refine else 0, state_bytes=refine * (STATE_BYTES * kept + made_bytes),
        source_bytes=sum(info.nbytes for info in stored),
        largest_bytes=max(info.nbytes for info in stored),
        solve_bytes=solve_bytes(stream, recipe, made, costs, index),
        capture_bytes=max((cost.capture_bytes for cost in costs), default=0) * recipe.anchored,
        generations_read=(12 if recipe.anchored else 2) + 2 * refine + (refine > 0),
        generations_written=2 if recipe.anchored else 1,
        generations_spilled=2 * recipe.anchored,
        widest=widest(shapes, {} if recipe.anchored else layout),
        flops=dense_flops + after_flops + recipe.anchored * len(costs) * dense_flops // 2,
        flops64=sum(cost.flops for cost in costs),
        flops32=sum(cost.flops32 + math.prod(shape_NL) * cost.flops_per_token for cost in costs),
        decompositions=tuple(size for cost in costs for size in cost.decompositions),
    )  # fmt: skip


def method_costs(stream: ModelStream, recipe: Recipe, index: int) -> list[Cost]:
    """Of every one-pass method, or of every anchored one in each half that it tries for; those of one kin together."""
    shapes, family = dense_shapes(stream, index), stream.family
    if not recipe.anchored:
        return [method.cost(family, shapes, recipe.ratio) for method in recipe.one_pass]
    halves = plan_halves(stream, recipe, index).values()
    return [kin_cost(family, shapes, rivals) for candidates in halves for rivals in by_kin(candidates)]


def kin_cost(family: Family, shapes: Shapes, rivals: Mapping[str, tuple[AnchoredMethod, Layout]]) -> Cost:
    method, layout = next(iter(rivals.values()))
    if len(rivals) == 1 or not isinstance(method, Comparable):
        return method.cost(family, shapes, layout)
    return method.comparing(family, shapes, {name: layout for name, (_, layout) in rivals.items()})


def widest(shapes: Mapping[str, tuple[int, int]], layout: Layout) -> int:
    return max(width for path, shape in shapes.items() for width in edited_shape(shape, layout.get(path, {})))


def edited_shape(shape: tuple[int, int], row: Mapping[str, int]) -> tuple[int, int]:
    """(out, in) after the edit that `row` describes; of two factors that of their product."""
    return row.get("out", shape[0]), row.get("in", shape[1])


def solve_bytes(
    stream: ModelStream, recipe: Recipe, made: Mapping[str, torch.Tensor], costs: list[Cost], index: int
) -> int:
    """The most held in the solves of a layer; methods come one after another, and what they made stays."""
    held, most, prefix = 0, 0, stream.layer_name(index)
    if recipe.anchored:
        return sum(tensor.nbytes for tensor in made.values()) + max(cost.workspace_bytes for cost in costs)
    for method, cost in zip(recipe.one_pass, costs, strict=True):
        paths = tuple(f"{prefix}.{path}." for path in method.paths(stream.family))
        held += sum(tensor.nbytes for name, tensor in made.items() if name.startswith(paths))
        most = max(most, held + cost.workspace_bytes)
    return most


def forward_flops(stream: ModelStream, index: int, parameters: int, shape_NL: tuple[int, int]) -> int:
    """Two operations a weight and token, and causal attention: scores and mix, each over half of the window on average."""
    sequences, length = shape_NL
    heads = stream.dense_shape(index, stream.family.sites["attn_in"][0])[0]
    return sequences * length * (2 * parameters + 2 * length * heads)


def compression_workload(stream: ModelStream, layers: list[LayerForecast], shape_NL: tuple[int, int]) -> Workload:
    """Sizes of `compress`."""
    return Workload(
        **layer_workload(stream, *shape_NL),
        edits=max(layer.edits_bytes for layer in layers), solve=max(layer.solve_bytes for layer in layers),
        inner_after=max(layer.widest for layer in layers),
        streams=4 if layers[0].capture_bytes else 1, capture=max(layer.capture_bytes for layer in layers),
        refined=max(layer.refined for layer in layers),
        copied=min(CHUNK_BYTES, max(layer.largest_bytes for layer in layers)),
    )  # fmt: skip


def forecast(stream: ModelStream, recipe: Recipe, shape_NL: tuple[int, int]) -> list[LayerForecast]:
    """Every layer to come. Raises what `plan_layers` raises. Layers of equal shapes are computed once."""
    known: dict[str, LayerForecast] = {}
    result = []
    for index, layout in enumerate(plan_layers(stream, recipe)):
        key = shape_key(stream, index, layout) + ("" if index + 1 < stream.depth else " last")
        if key not in known:
            known[key] = forecast_layer(stream, recipe, index, layout, shape_NL)
        result.append(known[key])
    return result


def shape_key(stream: ModelStream, index: int, layout: Mapping[str, Mapping[str, int]]) -> str:
    """Equal for layers whose shards differ in numbers only; the digits of the layer's own name count, being in the header."""
    stored = {name: (info.dtype, info.shape) for name, info in stream.layer_tensors(index).items()}
    return f"{len(str(index))} {stored} {layout}"
