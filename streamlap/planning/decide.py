"""What every layer may become by a recipe, and at which ratio: decided from headers alone, before a weight is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamlap.errors import RecipeError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.output.formats import CONFIGS
from streamlap.planning.allocate import layer_parameters
from streamlap.planning.forecast import shape_key
from streamlap.planning.layouts import Candidates, dense_parameters, largest_layout, layer_candidates
from streamlap.planning.survey_file import Survey, read_survey
from streamlap.planning.target import Target, meet
from streamlap.recipe import AUTO, Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What every layer may become, before it is known on how many tokens."""

    recipe: Recipe
    """With the ratio that it comes to."""
    candidates: Sequence[Candidates]
    """A table for each layer."""


def decide(stream: ModelStream, recipe: Recipe, target: Target | None = None) -> Decided:
    """What every layer may become by the recipe, at its ratio or at the one that meets the target. From headers alone.

    Raises RecipeError and UnsupportedModel for all in recipe and target that could stop a run later on.
    """
    if stream.compressed:
        raise UnsupportedModel(f"{stream.folder} is already compressed by streamlap; wanted the original checkpoint.")
    recipe.check_methods(stream.family)
    if recipe.reads_gradient and not stream.has_head:
        raise RecipeError(
            f"loraprune: importance is model, and {stream.folder} has no language-model head, so no such loss; wanted "
            "importance block."
        )
    if not stream.has_head or stream.caps_logits:
        recipe = recipe.without_final()
    # A survey that is still to be made moves shares between layers, and hardly the total.
    survey = None if recipe.survey in (None, AUTO) else read_survey(stream, Path(str(recipe.survey)), recipe.shape)
    try:
        recipe = meet(stream, recipe, survey, target)
        candidates = all_candidates(stream, recipe, survey)
    except RecipeError as error:
        if survey is None or recipe.shape != "free":
            raise
        raise RecipeError(
            f"{error} By the survey some sub-layers keep less than others; --no-survey gives all the same share."
        ) from error
    check_format(stream, recipe, candidates)
    warn_of_the_rest(stream, recipe, targeted=target is not None)
    return Decided(recipe=recipe, candidates=candidates)


def warn_of_the_rest(stream: ModelStream, recipe: Recipe, targeted: bool) -> None:
    """Warn where a sub-layer has no method, so that less than the ratio goes. A target counts what there is, and is met."""
    edited = recipe.edited(stream.family)
    sizes = Counter[str]()
    for index in range(stream.depth):
        sizes.update({name: dense_parameters(stream, index, name) for name in stream.family_of(index).compressible})
    if targeted or not (whole := [name for name in sizes if name not in edited]):
        return
    part = sum(sizes[name] for name in edited) / sizes.total()
    if not part:
        log.warning("no method compresses anything, so that nothing goes. Add methods, or give a preset.")
        return
    more = f", or give a ratio of {recipe.ratio / part:.1%}" if recipe.ratio < part else ""
    log.warning(
        "no method compresses %s, so that the ratio holds for %s alone: about %s of the decoder's linears go, and not %s. Add "
        "a method%s.",
        " and ".join(whole), " and ".join(sorted(edited)), f"{recipe.ratio * part:.1%}", f"{recipe.ratio:.1%}", more,
    )  # fmt: skip


def check_format(stream: ModelStream, recipe: Recipe, candidates: Sequence[Candidates]) -> None:
    """Raise UnsupportedModel where the format cannot hold what is planned."""
    if recipe.format in CONFIGS:
        layouts = (largest_layout(stream, index, found) for index, found in enumerate(candidates))
        CONFIGS[recipe.format](stream, [{**stream.natives(index), **layout} for index, layout in enumerate(layouts)])


def all_candidates(stream: ModelStream, recipe: Recipe, survey: Survey | None) -> list[Candidates]:
    """Of every layer; those of equal shapes and budgets share them."""
    known: dict[str, Candidates] = {}
    result = []
    for index, parameters in enumerate(layer_parameters(stream, recipe, survey)):
        key = f"{shape_key(stream, index, {})} {parameters}"
        if key not in known:
            known[key] = layer_candidates(stream, recipe, index, parameters)
        result.append(known[key])
    return result
