"""What one layer takes, from headers and settings alone: bytes, operations, the memory of its solves.

Shape suffixes: N sequences, L length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamlap.families.stream import ModelStream
from streamlap.loader.forms import Form
from streamlap.methods.anchored.costs import input_sum_bytes
from streamlap.methods.base import Cost, Layout, Natives
from streamlap.methods.trained.base import TrainingCost
from streamlap.output.depth import is_gone, places
from streamlap.planning.layouts import Candidates, largest_layout, made_anew, planned_tensors
from streamlap.planning.workload import Workload, head_bytes, layer_workload
from streamlap.recipe import Recipe
from streamlap.store.sink import shard_bytes
from streamlap.store.source import CHUNK_BYTES

ONE_PASS_READS, ONE_PASS_WRITES = 2, 1
"""How often hidden states are read and written in a layer that is edited in one pass."""
ANCHORED_READS, ANCHORED_WRITES, ANCHORED_SPILLS = 4, 2, 1
"""The same of a layer that is rebuilt beside the dense model, see `pipeline.sublayers`, but for what lies between its
sub-layers, which is written once, where memory does not keep it, and read twice. The first layer reads one more, for what its
attention reads."""

ANCHORED_STREAMS = 3
"""The compressed stream, the dense model's, and what lies between its sub-layers: hidden states kept for such a layer, whether
or not there is something between."""

HEAD_COPIES, GRADIENT_COPIES = 6, 4
"""Of the logits in float32 where predictions are compared, and where their loss is differentiated: with what a bend of the
logits leaves for that."""

PARALLEL_READS = 1
"""How many more of them a parallel layer reads, with nothing between its sub-layers: the dense stream goes through it first."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer to come. Bytes and floating-point operations."""

    index: int
    candidates: Candidates
    """What each sub-layer may become, and by whom."""
    layout: Layout
    """The largest of what may come out."""
    place: int | None
    """Its number in the result; None where the result has no place for it, see `output.depth`."""
    output_bytes: int
    """Its shard, header included; at most that where there are several candidates. 0 where it has no place."""
    copied_bytes: int
    """Of these, what is copied from the source as it stands."""
    edits_bytes: int
    source_bytes: int
    largest_bytes: int
    """The largest tensor of the source layer."""
    solve_bytes: int
    """Most that the solves hold: what the methods before have made, what this one makes, and its work."""
    widest: int
    """Widest input or output of a linear when all is done; before, where candidates leave different widths."""
    flops: int
    """Of the forwards, in the compute dtype: one through the dense layer and one through the edited one; with anchored methods
    also through what the sums are taken behind."""
    flops64: int
    """Of the solves' matrix products in float64."""
    flops32: int
    """Of those in float32, sums over tokens included."""
    decompositions: tuple[int, ...]
    """Sizes of the solves' eigen-problems."""
    capture_bytes: int = 0
    """Most that sums over tokens hold inside a solve, with the edits so far."""
    waiting_bytes: int = 0
    """What waits in RAM during a solve on another device."""
    generations_read: float = ONE_PASS_READS
    """How often hidden states are read, where they are on the disk."""
    between_read: float = 0
    """How often what lies between sub-layers is read."""
    gradients_read: int = 0
    """How often the gradient behind it is read, which is on the disk in any case."""
    generations_written: int = ONE_PASS_WRITES
    """How often they are written to the disk in any case."""
    generations_spilled: int = 0
    """How often they are written to it where memory does not keep them."""
    trained: int = 0
    """Parameters that are trained."""
    trained_bytes: int = 0
    """What training holds for them."""
    trained_state: int = 0
    """What is on the disk between two epochs."""
    trained_token: int = 0
    """What it holds for each token of a window, beside what a forward leaves for its gradients."""
    state_bytes: int = 0
    """What training writes after its epochs, all together."""
    streams: int = 1
    """Hidden states kept beside each other: the compressed stream; the dense model's; that between the sub-layers."""


def forecast_layers(
    stream: ModelStream, recipe: Recipe, candidates: Iterable[Candidates], shape_NL: tuple[int, int], held: int
) -> tuple[LayerPlan, ...]:
    """Every layer for so many calibration tokens, of whose windows so many are held out. Layers of equal shapes and budgets are
    computed once."""
    known: dict[str, LayerPlan] = {}
    result = []
    those = [(found, largest_layout(stream, index, found)) for index, found in enumerate(candidates)]
    gone = (is_gone({**stream.natives(index), **layout}) for index, (_, layout) in enumerate(those))
    for index, ((found, layout), place) in enumerate(zip(those, places(gone, recipe.format), strict=True)):
        key = f"{shape_key(stream, index, layout)} {len(str(place))} {index == 0} {index + 1 == stream.depth}"
        if key not in known:
            known[key] = forecast_layer(stream, recipe, index, found, layout, place, shape_NL, held)
        result.append(replace(known[key], index=index, candidates=found, layout=layout, place=place))
    return tuple(result)


def shape_key(stream: ModelStream, index: int, layout: Layout) -> str:
    """Equal for layers whose shards differ in numbers only; the digits of the layer's own name count, being in the header."""
    stored = {name: (info.dtype, info.shape) for name, info in stream.layer_tensors(index).items()}
    return f"{len(str(index))} {stored} {layout}"


def forecast_layer(
    stream: ModelStream, recipe: Recipe, index: int, candidates: Candidates, layout: Layout, place: int | None,
    shape_NL: tuple[int, int], held: int,
) -> LayerPlan:  # fmt: skip
    absent = place is None
    anew = {
        role: form
        for name, rivals in candidates.items()
        for found in rivals
        for role, form in made_anew(stream, index, name, found).items()
    }
    copied, made = ({}, {}) if absent else planned_tensors(stream, index, {**anew, **layout}, recipe.format, place)
    natives, stored = stream.natives(index), stream.layer_tensors(index).values()
    costs = [found.cost for rivals in candidates.values() for found in rivals]
    dense_flops = forward_flops(natives, sum(info.numel for info in stored), shape_NL)
    kept = sum(info.numel for info in copied.values()) + sum(tensor.numel() for tensor in made.values())
    copied_bytes, made_bytes = (sum(entry.nbytes for entry in part) for part in (copied.values(), made.values()))
    if recipe.trained:
        copied_bytes, made_bytes = 0, copied_bytes + made_bytes
    epochs, training = layer_training(stream, recipe, index, layout, kept, made_bytes)
    anchored, last = recipe.anchored, index + 1 == stream.depth and not recipe.final
    onward = index + 1 < stream.depth and not anchored
    steps = forward_flops(natives, kept, shape_NL) if recipe.trained else dense_flops
    read, between = (
        anchored_reads(index, candidates, held / shape_NL[0], last) if anchored else (ONE_PASS_READS - last, 0)
    )
    if anchored and stream.parallel(index):
        read, between = read + between + PARALLEL_READS, 0
    normed = anchored and bool(stream.family.normed)  # what norms divide by takes a pass of its own
    streams_read = 2 + any(method.reads_dense for method in recipe.distilled)
    return LayerPlan(
        index=index, candidates=candidates, layout=layout, place=place,
        output_bytes=0 if absent else shard_bytes({**copied, **made}),
        copied_bytes=copied_bytes, edits_bytes=made_bytes,
        trained=training.parameters, trained_bytes=training.held_bytes, trained_state=training.state_bytes,
        trained_token=training.token_bytes, state_bytes=epochs * training.state_bytes,
        source_bytes=sum(info.nbytes for info in stored), largest_bytes=max(info.nbytes for info in stored),
        solve_bytes=solve_bytes(stream, recipe, index, candidates, made),
        capture_bytes=max((cost.capture_bytes for cost in costs), default=0) * recipe.beside_dense,
        waiting_bytes=max((cost.waiting_bytes for cost in costs), default=0) * (stream.device.type != "cpu"),
        generations_read=read + normed + streams_read * epochs + (epochs > 0), between_read=between,
        gradients_read=epochs * recipe.reads_gradient,
        generations_written=ANCHORED_WRITES if recipe.beside_dense else ONE_PASS_WRITES,
        generations_spilled=ANCHORED_SPILLS * (anchored and not stream.parallel(index)),
        streams=1 + recipe.beside_dense + anchored,
        widest=widest(natives, {} if recipe.beside_dense else layout),
        flops=(1 + normed) * dense_flops + forward_flops(natives, kept, shape_NL) * onward + training.forwards * epochs * steps
        + anchored * anchored_flops(stream, recipe, index, candidates, layout, shape_NL),
        **solve_flops(costs, math.prod(shape_NL)),
    )  # fmt: skip


def layer_training(
    stream: ModelStream, recipe: Recipe, index: int, layout: Layout, kept: int, made_bytes: int
) -> tuple[int, TrainingCost]:
    """Epochs, and what they take: of a layer as it was edited, whose best state is kept as it will be stored, or of one that is
    trained from where it is dense."""
    for method in recipe.trained:
        state = method.state_bytes * kept + made_bytes
        return method.epochs, TrainingCost(parameters=kept, held_bytes=method.held_bytes * kept, state_bytes=state)
    for whole in recipe.distilled:
        return whole.epochs, whole.training_cost(stream.natives(index), layout, stream.dtype.itemsize)
    return 0, TrainingCost(parameters=0, held_bytes=0, state_bytes=0)


def anchored_reads(index: int, candidates: Candidates, held: float, last: bool) -> tuple[float, float]:
    """Generations that the passes of a layer read, and those of what lies between its sub-layers. Layouts that are compared are
    tried on what is held out of two streams, this share of them, and rivals look at all of both."""
    tried = [
        held * sum(len(found.layouts) for found in rivals if len(found.layouts) > 1) + len(rivals) - 1
        for rivals in candidates.values()
    ]
    attention, ffn = tried
    if not candidates["attention"]:  # the dense stream goes on, and nothing is looked at on its way
        return ANCHORED_READS - 1 + ffn, 2 - last + ffn
    return ANCHORED_READS + (index == 0) + 2 * attention + ffn, 2 - last + ffn


def anchored_flops(
    stream: ModelStream, recipe: Recipe, index: int, candidates: Candidates, layout: Layout, shape_NL: tuple[int, int]
) -> int:
    """Of the forwards on the compressed stream, see `pipeline.sublayers`: the first linears of both sub-layers once for what
    the last one reads, the FFN's also as they were; then the new sub-layers, the second not in the last layer unless
    something comes after it. A layer that is trained begins anew."""
    natives, itemsize = stream.natives(index), stream.storage_itemsize(index)

    def numbers(roles: Iterable[str], forms: Mapping[str, Form]) -> int:
        return sum(forms.get(role, natives[role]).parameters(itemsize) for role in roles)

    parts, stays = stream.family_of(index).sublayers, stream.kept_parameters(index)
    attention, ffn = parts.values()
    through = [
        (numbers(attention.reads, layout), True), (numbers(attention.roles, layout), True), (numbers(ffn.reads, {}), False),
        (numbers(ffn.reads, layout), False),
    ]  # fmt: skip
    if index + 1 < stream.depth or recipe.final:
        through += [
            (numbers(ffn.roles, layout), False),
            *[(numbers(attention.roles, layout), True)] * bool(recipe.trained),
        ]
    again = sum((len(candidates[name]) - 1) * numbers(part.reads, layout) for name, part in parts.items())
    sequences, length = shape_NL
    scores = mixed_flops(natives, length)
    return (
        sequences * length * (2 * stays + 2 * again + sum(2 * weights + mixes * scores for weights, mixes in through))
    )


def solve_flops(costs: Sequence[Cost], tokens: int) -> dict[str, Any]:
    """Operations of the solves, as keywords of LayerPlan."""
    return {
        "flops64": sum(cost.flops for cost in costs),
        "flops32": sum(cost.flops32 + tokens * cost.flops_per_token for cost in costs),
        "decompositions": tuple(size for cost in costs for size in cost.decompositions),
    }


def widest(natives: Natives, layout: Layout) -> int:
    return max(width for role, native in natives.items() for width in layout.get(role, native).shape)


def solve_bytes(
    stream: ModelStream, recipe: Recipe, index: int, candidates: Candidates, made: Mapping[str, torch.Tensor]
) -> int:
    """The most held in the solves of a layer; sub-layers come one after another, and what was made of them stays."""
    held, most, on_cpu = 0, 0, stream.device.type == "cpu"
    for name, rivals in candidates.items():
        roles = stream.family_of(index).sublayers[name].roles
        names = tuple(f"{stream.linear_name(index, role)}." for role in roles)
        own = sum(tensor.nbytes for key, tensor in made.items() if key.startswith(names))
        # A workspace has room for what an anchored method makes, but not for what a rival before it has made.
        first = held if recipe.anchored else held + own
        for place, found in enumerate(rivals):
            work = found.cost.both_bytes if on_cpu and recipe.anchored else found.cost.workspace_bytes
            most = max(most, first + own * place + work)
        held += own
    return most


def forward_flops(natives: Natives, parameters: int, shape_NL: tuple[int, int]) -> int:
    """Two operations a weight and token, and causal attention: scores and mix, each over half of the window on average."""
    sequences, length = shape_NL
    return sequences * length * (2 * parameters + mixed_flops(natives, length))


def mixed_flops(natives: Natives, length: int) -> int:
    """Of scores and mix, for a token; none in a layer that has something else in place of attention."""
    return 2 * length * natives["o"].shape[1] if "o" in natives else 0


def next_input_bytes(stream: ModelStream, layers: Sequence[LayerPlan]) -> int:
    """What summing the inputs of a layer takes while its stream is made, where it is rebuilt beside the dense model."""
    first = {layer.index: next(iter(stream.family_of(layer.index).sublayers.values())).reads[:1] for layer in layers}
    rebuilt = [layer.index for layer in layers if layer.streams == ANCHORED_STREAMS]
    widths = [stream.native(index, role).shape[1] for index in rebuilt for role in first[index]]
    return max(map(input_sum_bytes, widths), default=0)


def compression_workload(
    stream: ModelStream, layers: Sequence[LayerPlan], shape_NL: tuple[int, int], head: bool = False, gradient: bool = False,
) -> Workload:  # fmt: skip
    """Sizes of `compress`; `head`, whether predictions are asked for; `gradient`, whether that of their loss is."""
    copies = max(HEAD_COPIES * head, GRADIENT_COPIES * gradient)
    asked = head_bytes(stream, math.prod(shape_NL), copies) if copies else {}
    return Workload(
        **layer_workload(stream, *shape_NL), **asked, gradients=stream.depth * gradient,
        edits=max(layer.edits_bytes for layer in layers), solve=max(layer.solve_bytes for layer in layers),
        inner_after=max(layer.widest for layer in layers),
        streams=layers[0].streams, between=layers[0].generations_spilled,
        capture=max(layer.capture_bytes for layer in layers),
        waiting=max(layer.waiting_bytes for layer in layers), inputs=next_input_bytes(stream, layers),
        trained=max(layer.trained for layer in layers),
        trained_bytes=max(layer.trained_bytes for layer in layers),
        trained_state=max(layer.trained_state for layer in layers),
        trained_token=max(layer.trained_token for layer in layers),
        copied=min(CHUNK_BYTES, max(layer.largest_bytes for layer in layers)),
    )  # fmt: skip
