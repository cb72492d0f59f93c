"""How much every sub-layer may store: the same share of its parameters everywhere, or what a survey advises.

A curve through the points of a survey tells what each sub-layer loses at any share, and the shares are chosen so that the sum
is least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamlap.errors import RecipeError
from streamlap.families.stream import ModelStream
from streamlap.linalg.allocation import Part, allocate, allocate_kinds, fit_curve
from streamlap.planning.layouts import dense_parameters, share_to_cut, uniform_parameters
from streamlap.planning.survey_file import Survey
from streamlap.planning.widths import in_steps
from streamlap.recipe import Recipe

LEAST_WIDTH = 0.1
"""Share that all FFNs together keep at least where attention keeps its form."""


def layer_parameters(stream: ModelStream, recipe: Recipe, survey: Survey | None) -> list[dict[str, int]]:
    """What the sub-layers of every layer may store: all the same share, or so that a survey's losses are least. One that may
    store nothing is removed. Raises RecipeError where the shape cannot hold the ratio."""
    if recipe.shape != "free":
        return in_steps(stream, recipe, whole_shares(stream, recipe, survey))
    share = share_to_cut(stream, recipe.ratio)
    if survey is None:
        return [uniform_parameters(stream, index, share) for index in range(stream.depth)]
    keep, names = 1.0 - share, [stream.family_of(index).compressible for index in range(stream.depth)]
    kinds: dict[str, list[Part]] = {}
    floors: dict[str, float] = {}
    for index, own in enumerate(names):
        for name in own:
            kinds.setdefault(name, []).append(part_of(stream, survey, index, name))
            measured = (point.keep for point in survey.layers[index][name])
            floors[name] = min(floors.get(name, keep), *measured)
    total = int(keep * sum(part.parameters for parts in kinds.values() for part in parts))
    counts = {name: iter(own) for name, own in allocate_kinds(kinds, total, floors).items()}
    return [{name: next(counts[name]) for name in own} for own in names]


def part_of(stream: ModelStream, survey: Survey, index: int, sublayer: str) -> Part:
    points = survey.layers[index][sublayer]
    curve = fit_curve([(point.keep, point.kl) for point in points])
    return Part(parameters=dense_parameters(stream, index, sublayer), curve=curve)


def whole_shares(stream: ModelStream, recipe: Recipe, survey: Survey | None) -> list[dict[str, int]]:
    """The same where attention is whole or removed, and the FFNs take the rest of the cut.

    By a survey the cheapest attention goes, in so many layers that the sum of all losses is least; what an FFN loses follows
    from that.
    """
    attention, ffn = ([dense_parameters(stream, i, name) for i in range(stream.depth)] for name in ("attention", "ffn"))
    share = share_to_cut(stream, recipe.ratio)
    total, least = int((1.0 - share) * sum(attention + ffn)), LEAST_WIDTH * sum(ffn)
    may_go = removable(stream) if recipe.survey is not None and recipe.shape == "nas" else []
    most = 1.0 - (sum(attention) - sum(attention[index] for index in may_go) + least) / sum(attention + ffn)
    if share > most:
        raise RecipeError(
            f"shape {recipe.shape} at ratio {recipe.ratio:g} would leave less than {LEAST_WIDTH:.0%} of the FFNs; wanted a "
            f"ratio of at most {math.floor(1000 * most * recipe.ratio / share) / 1000:.3f}, or shape free."
        )
    if survey is None:
        return unmeasured_shares(attention, ffn, total, may_go)
    parts = [part_of(stream, survey, index, "ffn") for index in range(stream.depth)]
    lost = {index: survey.layers[index]["attention"][0].kl for index in may_go}
    cheapest = sorted(lost, key=lambda index: lost[index] / attention[index])
    best: tuple[float, list[dict[str, int]]] | None = None
    for count in range(len(cheapest) + 1):
        gone = set(cheapest[:count])
        rest = total - sum(attention[index] for index in range(stream.depth) if index not in gone)
        if not least <= rest <= sum(ffn):
            continue
        widths = allocate(parts, rest)
        loss = sum(lost[index] for index in gone)
        loss += sum(part.curve.loss(width / part.parameters) for part, width in zip(parts, widths, strict=True))
        if best is None or loss < best[0]:
            rows = [{"attention": 0 if i in gone else attention[i], "ffn": widths[i]} for i in range(stream.depth)]
            best = loss, rows
    if best is None:
        raise RecipeError(
            f"shape {recipe.shape} cannot reach ratio {recipe.ratio:g}; wanted a lower one, or shape free."
        )
    return best[1]


def unmeasured_shares(
    attention: Sequence[int], ffn: Sequence[int], total: int, may_go: Sequence[int]
) -> list[dict[str, int]]:
    """All FFNs keep the same share. Where they cannot hold the cut, as many attentions as it takes go, those of the last
    layers, for want of a survey that is still to be made."""
    gone: set[int] = set()
    kept = sum(attention)
    for index in reversed(may_go):
        if total - kept >= LEAST_WIDTH * sum(ffn):
            break
        gone.add(index)
        kept -= attention[index]
    share = (total - kept) / sum(ffn)
    return [
        {"attention": 0 if index in gone else own, "ffn": int(share * wide)}
        for index, (own, wide) in enumerate(zip(attention, ffn, strict=True))
    ]


def removable(stream: ModelStream) -> list[int]:
    """Layers whose attention may go: engines, and the masks of transformers, look at the first of each kind."""
    kinds = list(getattr(stream.config, "layer_types", None) or ["full_attention"] * stream.depth)
    there = [index for index in range(stream.depth) if "attention" in stream.family_of(index).compressible]
    return [index for index in there if index > kinds.index(kinds[index])]
