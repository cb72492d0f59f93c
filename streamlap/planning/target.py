"""The ratio at which a result is as large as was asked for: in bytes of its shards, or in parameters. From headers alone.

What a recipe makes of a model is counted tensor by tensor, as the shards will hold it, and the ratio is found by bisection.
Only the ratio goes into the recipe, so a run that is resumed, or repeated from its recipe, knows nothing of the target.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from streamlap.errors import RecipeError, one_line, shown
from streamlap.families.cache import cache_bytes, window_of
from streamlap.families.stream import ModelStream
from streamlap.loader.forms import index_parameters
from streamlap.methods.base import Layout
from streamlap.output.depth import places
from streamlap.planning.allocate import layer_parameters
from streamlap.planning.forecast import shape_key
from streamlap.planning.layouts import layer_candidates, layer_entries, possible_layouts
from streamlap.planning.survey_file import Survey
from streamlap.recipe import Recipe
from streamlap.store.header import TensorInfo
from streamlap.store.sink import shard_bytes
from streamlap.system.amounts import parse_amount
from streamlap.system.budget import parse_size

STEPS = 1_000_000
"""A ratio that is tried is a multiple of one over this."""

STARTS = tuple(STEPS * odd // size for size in (2, 4, 8, 16, 32) for odd in range(1, size, 2))
"""Where a ratio that the methods can reach is looked for."""

COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

Tensors = Mapping[str, TensorInfo | torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Target:
    """How large the result may be."""

    name: str
    """What it is called where it was given: target_size or target_params."""
    text: str
    most: int
    unit: str
    count: Callable[[Tensors], int]
    """What the tensors of one shard count as."""
    context: int = 0
    """Tokens a sequence whose keys and values count too."""
    batch: int = 1
    """Sequences at a time."""


def parse_target(
    target_size: int | str | None, target_params: int | str | None, ratio: float | None = None,
    context: int | None = None, batch: int | None = None,
) -> Target | None:  # fmt: skip
    """The target, None where there is none. Raises RecipeError for more than one wish and for what is no size or count."""
    wishes = {"ratio": ratio, "target_size": target_size, "target_params": target_params}
    given = {name: value for name, value in wishes.items() if value is not None}
    if len(given) > 1:
        words = " and ".join(
            f"{name} {one_line(value, 100) if isinstance(value, str) else shown(value)}"
            for name, value in given.items()
        )
        raise RecipeError(f"{words} are given together; wanted one of {', '.join(wishes)}.")
    for name, count in (("context", context), ("batch", batch)):
        if count is not None and (type(count) is not int or not 1 <= count < 2**40):
            raise RecipeError(f"{name} is {shown(count)}; wanted a whole number of at least 1.")
        if count is not None and target_size is None:
            raise RecipeError(
                f"{name} is {count}, and target_size is not given; wanted both: the cache counts as size."
            )
    if batch is not None and context is None:
        raise RecipeError(f"batch is {batch}, and context is not given; wanted how many tokens each sequence has.")
    if size := parse_size(target_size, "target_size"):
        text = f"{target_size} with the cache of {batch or 1} x {context:,} tokens" if context else str(target_size)
        return Target(
            name="target_size",
            text=text,
            most=size,
            unit="bytes",
            count=shard_bytes,
            context=context or 0,
            batch=batch or 1,
        )
    if count := parse_count(target_params, "target_params"):
        return Target(name="target_params", text=str(target_params), most=count, unit="parameters", count=parameters)
    return None


def parse_count(text: str | int | None, what: str) -> int | None:
    """`50B`, `7.5M`, `150k` or a number -> parameters; None stays None. Raises RecipeError that names `what`."""
    if text is None:
        return None
    if count := parse_amount(text, COUNT_UNITS):
        return count
    raise RecipeError(
        f"{what} is {shown(text)}; wanted a number of parameters like 50B (billions), 7.5M, 150k or 1000000."
    )


def parameters(tensors: Tensors) -> int:
    """As `inspect` counts them: an index counts as the weights that would take its bytes."""
    total = 0
    for name, tensor in tensors.items():
        numel = tensor.shape.numel() if isinstance(tensor, torch.Tensor) else tensor.numel
        if not tensor.dtype.is_floating_point:
            numel = index_parameters(numel, tensors[name.rpartition(".")[0] + ".weight"].dtype.itemsize)
        total += numel
    return total


def meet(stream: ModelStream, recipe: Recipe, survey: Survey | None, target: Target | None) -> Recipe:
    """The recipe with the lowest ratio whose result is within the target.

    Raises RecipeError where no ratio that the methods can reach is, and where the model itself is smaller than the target.
    """
    if target is None:
        return recipe
    count = meter(stream, recipe, survey, target)

    def reached(step: int) -> bool:
        with contextlib.suppress(RecipeError):
            return count(step) > 0
        return False

    start = next(filter(reached, STARTS), STARTS[0])
    count(start)  # where nothing is reached, this says why
    lowest, highest = last_good(start, 0, reached), last_good(start, STEPS, reached)
    smallest, largest, dense = map(count, (highest, lowest, 0))
    if not smallest <= target.most <= max(largest, dense):  # a header may outgrow what a single rank removes
        raise RecipeError(
            f"{target.name} is {target.text}, which is {target.most:,} {target.unit}; the model has {dense:,}, and wanted is "
            f"what these methods can make of it: from {smallest:,} to {largest:,}."
        )
    if largest > target.most:
        lowest = last_good(highest, lowest, lambda step: reached(step) and count(step) <= target.most)
    return replace(recipe, ratio=lowest / STEPS)


def last_good(good: int, bad: int, is_good: Callable[[int], bool]) -> int:
    """The last good step on the way from a good one to a bad one, on whichever side that is."""
    while abs(bad - good) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if is_good(middle) else (good, middle)
    return good


def meter(stream: ModelStream, recipe: Recipe, survey: Survey | None, target: Target) -> Callable[[int], int]:
    """Step -> what the result counts as at that ratio; RecipeError where the methods cannot reach it. 0 is the model itself.

    Of several candidates for a sub-layer, the one that stores most counts: which one it will be is known only later.
    """
    keys = [f"{shape_key(stream, index, {})} {window_of(stream, index)}" for index in range(stream.depth)]
    outer = target.count(stream.outer_tensors())

    def layer(index: int, at: Recipe, parameters: Mapping[str, int], place: int | None) -> int:
        layouts = possible_layouts(layer_candidates(stream, at, index, parameters))
        return 0 if place is None else max(counted(index, layout, place) for layout in layouts)

    def counted(index: int, layout: Layout, place: int) -> int:
        cache = cache_bytes(stream, index, layout, target.context, target.batch) if target.context else 0
        return (
            target.count(layer_entries(stream, index, layout, recipe.format if layout else "factored", place)) + cache
        )

    @functools.cache
    def total(step: int) -> int:
        if step == 0:
            return outer + sum(counted(index, {}, index) for index in range(stream.depth))
        at = replace(recipe, ratio=step / STEPS)
        parameters = layer_parameters(stream, at, survey)
        placed = places((not any(own.values()) for own in parameters), recipe.format)
        alike: dict[str, list[int]] = {}
        for index, own in enumerate(parameters):
            alike.setdefault(f"{keys[index]} {len(str(placed[index]))} {sorted(own.items())}", []).append(index)
        firsts = ((those[0], len(those)) for those in alike.values())
        return outer + sum(count * layer(index, at, parameters[index], placed[index]) for index, count in firsts)

    return total
