"""How much every sub-layer may store: the same share of its parameters everywhere, or what a survey advises.

A curve through the points of a survey tells what each sub-layer loses at any share, and the shares are chosen so that the sum
is least. Where linears stay dense, `whole` chooses.
"""

from __future__ import annotations

from streamlap.families.stream import ModelStream
from streamlap.linalg.allocation import Part, allocate_kinds
from streamlap.planning.layouts import share_to_cut, uniform_parameters
from streamlap.planning.survey_file import Survey
from streamlap.planning.whole import part_of, whole_shares
from streamlap.planning.widths import in_steps
from streamlap.recipe import Recipe


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
