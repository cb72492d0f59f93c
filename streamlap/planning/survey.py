"""What a survey cuts, and what that takes, from shapes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from streamlap.errors import RecipeError, StreamlapError, first_line, shown
from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.linalg.moments import held_sequences
from streamlap.loader.forms import Removed
from streamlap.methods.base import Cost
from streamlap.methods.removed import Removal
from streamlap.planning.cuts import CUTS, LAYER, Cut, cuts_of
from streamlap.planning.forecast import forward_flops, solve_flops
from streamlap.planning.layouts import REMOVED, Candidate, budget_of, candidate, made_anew, planned_tensors
from streamlap.planning.sample import fitted_inputs
from streamlap.planning.schedule import Fit, Memory, fit, require_fit
from streamlap.planning.workload import Workload, evaluation_workload
from streamlap.recipe import AUTO, Recipe
from streamlap.settings import RunSettings

DEFAULT_SAMPLES = 32
"""Few, and not for the time alone. Shares are wanted for text of another kind. With few tokens to fit to, what cuts lose on
held-out windows is nearer to that: most of all the first layers lose more."""

DEFAULT_LENGTH = 256

DENSE_PASSES = 5
"""Forwards of the dense stream through a layer: onward, and for the sums that its two sub-layers are fitted to."""

MOST_INPUTS_ALONE = 4
"""Inputs for each token beyond which no compression makes a survey for itself: the fits of wide layers to few tokens take far
longer, and say little."""


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """One sub-layer, cut, in a copy of the dense stream; or a whole layer that is gone."""

    index: int
    sublayer: str
    keep: float
    """Share of it that stays."""

    def __str__(self) -> str:
        return f"{self.index} {self.sublayer}"


@dataclass(frozen=True, kw_only=True)
class SurveyPlan:
    """A survey to come: what each perturbation becomes, and the schedule."""

    perturbations: Mapping[Perturbation, Candidate]
    fit: Fit
    shape: str
    """That of the results which it serves."""

    @property
    def per_layer(self) -> int:
        """Most perturbations of a layer."""
        return max(Counter(perturbed.index for perturbed in self.perturbations).values())


def plan_survey(
    stream: ModelStream, shape_NL: tuple[int, int], settings: RunSettings, shape: str, memory: Memory | None = None
) -> SurveyPlan:
    """Raises BudgetError, with the smallest caps that would do, where nothing fits."""
    perturbations = {
        Perturbation(index=index, sublayer=name, keep=cut.keep): perturbed_candidate(stream, index, name, cut)
        for index, cuts in enumerate(cuts_of(stream, shape))
        for name, cut in cuts.items()
    }
    choice = fit(survey_workload(stream, perturbations, *shape_NL), settings.caps, settings.overlap, memory)
    require_fit(choice, settings.caps)
    return SurveyPlan(perturbations=perturbations, fit=choice, shape=shape)


@dataclass(frozen=True, kw_only=True)
class SurveyCost:
    """What a survey takes that a compression makes for itself. Floating-point operations as in `forecast.LayerPlan`."""

    peak_ram: int
    peak_vram: int
    read_bytes: int
    """Of weights; the streams stay in memory where they can."""
    write_bytes: int
    """Of streams: each is on the disk before the next layer, so that a run that dies goes on."""
    disk_bytes: int
    """Of these, the most at one time."""
    flops: int
    flops64: int
    flops32: int
    decompositions: tuple[int, ...]


def pieces_of(shape_NL: tuple[int, int]) -> tuple[int, int]:
    """Number and length of the pieces of calibration windows that it is measured on: few and short ones."""
    length = min(DEFAULT_LENGTH, shape_NL[1])
    return min(shape_NL[0] * (shape_NL[1] // length), max(1, DEFAULT_SAMPLES * DEFAULT_LENGTH // length)), length


def plan_own_survey(
    stream: ModelStream, pieces_NL: tuple[int, int], settings: RunSettings, shape: str, memory: Memory | None = None
) -> SurveyPlan:
    """Of the survey that a compression makes for itself, on so many pieces.

    Raises UnsupportedModel, RecipeError or BudgetError where it makes none: without a head, for layers so wide that the tokens
    say little, or for want of memory.
    """
    stream.require_head()
    tokens, inputs = math.prod(pieces_NL), fitted_inputs(stream, stream.family.sublayers)
    if tokens * MOST_INPUTS_ALONE < inputs:
        raise RecipeError(
            f"it would have {tokens:,} tokens for layers of {inputs:,} inputs; wanted at least "
            f"{-(-inputs // MOST_INPUTS_ALONE):,}. Make one of more windows with streamlap survey and give it by --survey."
        )
    return plan_survey(stream, pieces_NL, settings, shape, memory)


def forecast_survey(
    stream: ModelStream, recipe: Recipe, shape_NL: tuple[int, int], settings: RunSettings, memory: Memory | None
) -> tuple[SurveyCost | None, str]:
    """What the survey takes that a compression with these settings makes for itself, and why it makes none where it would.

    Args: shape_NL, calibration windows and tokens in each; memory, that of another machine.
    """
    if recipe.survey != AUTO:
        return None, ""
    pieces_NL = pieces_of(shape_NL)
    try:
        plan = plan_own_survey(stream, pieces_NL, settings, recipe.shape, memory)
    except StreamlapError as error:
        return None, first_line(error)
    return survey_cost(stream, plan, pieces_NL), ""


def survey_cost(stream: ModelStream, plan: SurveyPlan, pieces_NL: tuple[int, int]) -> SurveyCost:
    """From shapes alone."""
    stored = [stream.layer_tensors(index).values() for index in range(stream.depth)]
    head = stream.source.info(stream.head_name)
    held_NL = len(held_sequences(*pieces_NL)), pieces_NL[1]
    copies = [sum(cut.index <= index for cut in plan.perturbations) for index in range(stream.depth)]
    layers = (
        part * forward_flops(stream.natives(index), sum(info.numel for info in tensors), windows_NL)
        for index, (count, tensors) in enumerate(zip(copies, stored, strict=True))
        for part, windows_NL in ((DENSE_PASSES, pieces_NL), (count, held_NL))
    )
    work = plan.fit.work
    written = (stream.depth + 1) * work.generation + sum(copies) * work.batch(work.partial_sequences)
    scored = 2 * len(plan.perturbations) * math.prod(held_NL)
    solves = solve_flops([found.cost for found in plan.perturbations.values()], math.prod(pieces_NL))
    return SurveyCost(
        peak_ram=plan.fit.peak_ram, peak_vram=plan.fit.peak_vram, flops=sum(layers) + 2 * scored * head.numel,
        read_bytes=sum(info.nbytes for tensors in stored for info in tensors) + head.nbytes, write_bytes=written,
        disk_bytes=hidden_bytes(work, stream.depth, plan.per_layer), **solves,
    )  # fmt: skip


def check_served(shape: str) -> None:
    """Raise RecipeError for a shape without surveys."""
    if not isinstance(shape, str) or shape not in CUTS:
        raise RecipeError(f"shape is {shown(shape)}; wanted one of {', '.join(CUTS)}: those that a survey serves.")


def perturbed_candidate(stream: ModelStream, index: int, sublayer: str, cut: Cut) -> Candidate:
    """What the sub-layer, or the layer, becomes when it keeps that share of its parameters."""
    if sublayer == LAYER:
        gone = {role: Removed(native.shape) for role, native in stream.natives(index).items()}
        return Candidate(name=REMOVED, layouts={"": gone}, cost=Cost())
    budget = budget_of(stream, index, 1.0 - cut.keep, cut.parameters)
    method = cut.method or Removal(sublayer=sublayer, roles=stream.family.sublayers[sublayer].roles)
    return candidate(sublayer, method, stream.natives(index), budget)


def hidden_bytes(work: Workload, depth: int, per_layer: int) -> int:
    """Most that is on the disk at one time: in the last layer each stream before and after it, and one between sub-layers."""
    return 3 * work.generation + per_layer * (2 * depth - 1) * work.batch(work.partial_sequences)


def survey_workload(
    stream: ModelStream, perturbations: Mapping[Perturbation, Candidate], sequences: int, length: int
) -> Workload:
    """Sizes of `survey`. Edits of two sub-layers are never there at once."""
    costs = [found.cost for found in perturbations.values()]
    work = evaluation_workload(stream, sequences, length)
    tokens = min(HEAD_TOKENS, sequences * length)
    second = tokens * stream.vocabulary * (work.itemsize + 5 * 4)  # its logits, and what is made of both in float32
    apart = stream.device.type != "cpu"  # so that what waits is in other memory than the work
    return replace(
        work, edits=max(edit_bytes(stream, perturbed, found) for perturbed, found in perturbations.items()),
        solve=max(cost.workspace_bytes if apart else cost.both_bytes for cost in costs),
        waiting=max(cost.waiting_bytes for cost in costs) * apart,
        capture=max(cost.capture_bytes for cost in costs), head=work.head + second,
        streams=2, partial=len(perturbations), partial_sequences=len(held_sequences(sequences, length)),
    )  # fmt: skip


def edit_bytes(stream: ModelStream, perturbed: Perturbation, found: Candidate) -> int:
    """What the edits of a cut take: as stored, and in the compute dtype where they run in another."""
    anew = made_anew(stream, perturbed.index, perturbed.sublayer, found)
    tables = [planned_tensors(stream, perturbed.index, {**anew, **layout})[1] for layout in found.layouts.values()]
    return max(
        sum(
            made.nbytes + made.numel() * stream.dtype.itemsize * (made.dtype != stream.dtype) for made in table.values()
        )
        for table in tables
    )
