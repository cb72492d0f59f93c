"""What sub-layers may store where linears stay dense: FFNs lose channels; by a survey KV heads, attentions and layers go too.

A survey has measured each cut alone. The choice is that of the least sum of the losses which meets the ratio, where what is
removed counts more than what is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from streamlap.errors import RecipeError
from streamlap.families.stream import ModelStream
from streamlap.linalg.allocation import LEAST, TINY, Part, allocate, fit_curve
from streamlap.planning.cuts import LAYER, attention_parameters, group_counts, removable, removable_layers
from streamlap.planning.layouts import dense_parameters, share_to_cut
from streamlap.planning.survey_file import Survey
from streamlap.planning.widths import channel_parameters, step_of
from streamlap.recipe import Recipe

LEAST_WIDTH = 0.1
"""Share that all FFNs together keep at least."""

UNMENDED = 5.0
"""What is removed counts as so many times the loss that was measured. Cuts lose less together than their curves add up to,
since later fits make up for earlier ones: seven tenths of it at a ratio of 0.2, a quarter at 0.5 (SmolLM2-135M). What is
removed has no fit of its own."""

Shares = list[dict[str, int]]
"""Sub-layer -> what it may store, of every layer; 0 where it is removed."""
Choices = Iterator[tuple[float, Shares]]
"""Each with the sum of its losses."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What there is to share out: what the linears of every layer store, and how much of all stays."""

    attention: Sequence[int]
    ffn: Sequence[int]
    keep: float

    @property
    def total(self) -> int:
        """What stays."""
        return int(self.keep * sum((*self.attention, *self.ffn)))


def whole_shares(stream: ModelStream, recipe: Recipe, survey: Survey | None) -> Shares:
    """Without a survey FFNs take the cut, all the same share. Raises RecipeError where the shape cannot hold the ratio."""
    attention, ffn = ([dense_parameters(stream, i, name) for i in range(stream.depth)] for name in ("attention", "ffn"))
    sizes = Sizes(attention=attention, ffn=ffn, keep=1.0 - share_to_cut(stream, recipe.ratio))
    if survey is None:
        return unmeasured_shares(stream, recipe, sizes)
    best = min(CHOICES[recipe.shape](stream, recipe, survey, sizes), key=lambda found: found[0], default=None)
    if best is None:
        raise RecipeError(
            f"shape {recipe.shape} cannot reach ratio {recipe.ratio:g}; wanted a lower one, or shape free."
        )
    return best[1]


def unmeasured_shares(stream: ModelStream, recipe: Recipe, sizes: Sizes) -> Shares:
    """All FFNs keep the same share. Where a survey is still to be made, and they cannot hold the cut, as many attentions as it
    takes go in the shape nas, those of the last layers for want of it."""
    kept, every = sum(sizes.attention), sum(sizes.attention) + sum(sizes.ffn)
    least = max(LEAST_WIDTH, least_share(stream, recipe, sizes)) * sum(sizes.ffn)
    may_go = removable(stream) if recipe.survey is not None and recipe.shape == "nas" else []
    stays = kept - sum(sizes.attention[index] for index in may_go)
    if (share := 1.0 - sizes.keep) > 1.0 - (stays + LEAST_WIDTH * sum(sizes.ffn)) / every:
        most = (every - stays - least - 1) / every * recipe.ratio / share  # the total is rounded down
        lower = f"a ratio of at most {math.floor(1000 * most) / 1000:.3f}" if most >= 0.001 else "a smaller --multiple"
        raise RecipeError(
            f"shape {recipe.shape} at ratio {recipe.ratio:g} would leave less than {LEAST_WIDTH:.0%} of the FFNs; wanted "
            f"{lower}, or shape free."
        )
    gone: set[int] = set()
    for index in reversed(may_go):
        if sizes.total - kept >= least:
            break
        gone.add(index)
        kept -= sizes.attention[index]
    share = (sizes.total - kept) / sum(sizes.ffn)
    return rows(sizes.attention, [int(share * wide) for wide in sizes.ffn], without=gone)


def least_share(stream: ModelStream, recipe: Recipe, sizes: Sizes) -> float:
    """What all FFNs keep where none is narrower than one step, and a parameter more: shares are rounded down."""
    whole = [stream.native(index, "down").shape[1] for index in range(stream.depth)]
    step = step_of(recipe, min(whole))
    lost = [(width - step) * channel_parameters(stream, index) for index, width in enumerate(whole)]
    return max(min(1.0, 1.0 - (less - 1) / wide) for wide, less in zip(sizes.ffn, lost, strict=True))


def rows(
    attention: Sequence[int], ffn: Sequence[int], without: Set[int] = frozenset(), gone: Set[int] = frozenset()
) -> Shares:
    """Args: without, layers that have no attention; gone, layers of which nothing is left."""
    return [
        {"attention": 0 if index in without | gone else own, "ffn": 0 if index in gone else wide}
        for index, (own, wide) in enumerate(zip(attention, ffn, strict=True))
    ]


def part_of(stream: ModelStream, survey: Survey, index: int, sublayer: str) -> Part:
    """A sub-layer with the curve through its points."""
    curve = fit_curve([(point.keep, point.kl) for point in survey.layers[index][sublayer]])
    return Part(parameters=dense_parameters(stream, index, sublayer), curve=curve)


def lost_layers(stream: ModelStream, survey: Survey) -> dict[int, float]:
    """Layer that may go -> what that counts as, where it was measured."""
    layers = removable_layers(stream)
    return {index: UNMENDED * survey.layers[index][LAYER][0].kl for index in layers if LAYER in survey.layers[index]}


# --- equal widths ------------------------------------------------------------------------------------------------------


def equal_choices(stream: ModelStream, recipe: Recipe, survey: Survey, sizes: Sizes) -> Choices:
    """Every number of KV heads with every number of layers that go: the FFN's width follows, and with it which layers cost the
    least. All layers that may go have the same sizes."""
    lost, depth = lost_layers(stream, survey), stream.depth
    curves = [part_of(stream, survey, index, "ffn").curve for index in range(depth)]
    wide, each = stream.native(0, "down").shape[1], channel_parameters(stream, 0)
    fixed, step = sizes.ffn[0] - each * wide, step_of(recipe, wide)
    for attention, costs in fewer_heads(stream, survey, sizes):
        for number in range(len(lost) + 1):
            rest = sizes.total - sum(attention) + number * attention[0]
            width = int((rest / (depth - number) - fixed) / each)
            width = wide if width >= wide else width // step * step
            if width < max(1.0, LEAST_WIDTH * wide):
                continue
            ffn = fixed + each * width
            here = [cost + curve.loss(ffn / sizes.ffn[0]) for cost, curve in zip(costs, curves, strict=True)]
            gone = set(sorted(lost, key=lambda index: lost[index] - here[index])[:number])
            loss = sum(lost[index] if index in gone else cost for index, cost in enumerate(here))
            yield loss, rows(attention, [ffn] * depth, gone=gone)
            if width == wide:
                break


def fewer_heads(stream: ModelStream, survey: Survey, sizes: Sizes) -> Iterator[tuple[Sequence[int], Sequence[float]]]:
    """What attentions store, and what each of them loses: whole, and with each number of KV heads that is no lower than what
    was measured, or than the uniform share where that is less."""
    yield sizes.attention, [0.0] * stream.depth
    if not all("attention" in layer for layer in survey.layers):
        return
    parts = [part_of(stream, survey, index, "attention") for index in range(stream.depth)]
    least = min(sizes.keep, *(point.keep for layer in survey.layers for point in layer["attention"]))
    for count in group_counts(stream)[1:]:
        stored = [attention_parameters(stream, index, count) for index in range(stream.depth)]
        if stored[0] >= int(least * sizes.attention[0]):
            yield stored, [part.curve.loss(own / part.parameters) for own, part in zip(stored, parts, strict=True)]


# --- widths that differ ------------------------------------------------------------------------------------------------


def free_choices(stream: ModelStream, recipe: Recipe, survey: Survey, sizes: Sizes) -> Choices:
    """Attentions and layers that go, the cheapest first, and for each set of them the best widths."""
    parts = [part_of(stream, survey, index, "ffn") for index in range(stream.depth)]
    alone = {index: UNMENDED * survey.layers[index]["attention"][0].kl for index in removable(stream)}
    lost = lost_layers(stream, survey)
    for without, gone in removals(sizes, parts, alone, lost):
        kept = [index for index in range(stream.depth) if index not in gone]
        rest = sizes.total - sum(sizes.attention[index] for index in kept if index not in without)
        wide = sum(sizes.ffn[index] for index in kept)
        if not LEAST_WIDTH * wide <= rest <= wide:
            continue
        widths = dict(zip(kept, allocate([parts[index] for index in kept], rest), strict=True))
        loss = sum(alone[index] for index in without - gone) + sum(lost[index] for index in gone)
        loss += sum(parts[index].curve.loss(width / sizes.ffn[index]) for index, width in widths.items())
        yield loss, rows(sizes.attention, [widths.get(i, 0) for i in range(stream.depth)], without, gone)


def removals(
    sizes: Sizes, parts: Sequence[Part], alone: Mapping[int, float], lost: Mapping[int, float]
) -> Iterator[tuple[Set[int], Set[int]]]:
    """Layers without attention, and layers that are gone, as a parameter gets dearer: at each price those whose loss is less
    than what their parameters cost.

    Args: alone, what the attention of a layer loses; lost, what all of it loses.
    """
    events = [(loss / sizes.attention[index], index, False) for index, loss in alone.items()]
    events += [(price_of(sizes, parts, alone, index, loss), index, True) for index, loss in lost.items()]
    without, gone = frozenset[int](), frozenset[int]()
    yield without, gone
    for _, index, whole in sorted(events):
        without, gone = (without, gone | {index}) if whole else (without | {index}, gone)
        yield without, gone


def price_of(sizes: Sizes, parts: Sequence[Part], alone: Mapping[int, float], index: int, loss: float) -> float:
    """The loss for each parameter at which all of a layer goes: what is best of it then loses, with the price of what that
    stores, as much as the layer does. By bisection."""
    part, least = parts[index], LEAST * sizes.keep

    def stays(price: float) -> float:
        keep = min(1.0, max(least, part.curve.keep_at(price * part.parameters)))
        attention = min(alone.get(index, math.inf), price * sizes.attention[index])
        return attention + part.curve.loss(keep) + price * keep * part.parameters

    loss = max(loss, TINY)
    low, high = loss / (sizes.attention[index] + part.parameters), loss / (least * part.parameters)
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if stays(middle) < loss else (low, middle)
    return high


CHOICES: dict[str, Callable[[ModelStream, Recipe, Survey, Sizes], Choices]] = {
    "nas": free_choices,
    "stock": equal_choices,
}
"""Shape -> what a survey chooses from."""
