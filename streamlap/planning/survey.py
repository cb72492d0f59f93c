"""What a survey cuts, and what that takes, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.base import Layout, ParameterBudget
from streamlap.planning.layouts import Candidate, candidate, converts, dense_parameters, planned_tensors
from streamlap.planning.schedule import Fit, fit, require_fit
from streamlap.planning.workload import Workload, evaluation_workload
from streamlap.settings import RunSettings

LEVELS = {"attention": 0.6, "ffn": 0.8}
"""Share of a sub-layer that stays. A shallower cut of attention moves the predictions by no more than rounding does."""

PERTURBERS: dict[str, AttentionAnchored | FfnAnchored] = {
    "attention": AttentionAnchored(),
    "ffn": FfnAnchored(shares=(0.25,)),
}
"""What cuts each sub-layer. Only how sub-layers compare is wanted, so one good method does for all that a recipe may try."""


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """One sub-layer, cut, in a copy of the dense stream."""

    index: int
    sublayer: str

    @property
    def keep(self) -> float:
        """Share of it that stays."""
        return LEVELS[self.sublayer]

    def __str__(self) -> str:
        return f"{self.index} {self.sublayer}"


@dataclass(frozen=True, kw_only=True)
class SurveyPlan:
    """A survey to come: what each perturbation becomes, and the schedule."""

    perturbations: Mapping[Perturbation, Candidate]
    fit: Fit


def plan_survey(stream: ModelStream, shape_NL: tuple[int, int], settings: RunSettings) -> SurveyPlan:
    """Raises BudgetError, with the smallest caps that would do, where nothing fits."""
    perturbations = {perturbed: perturbed_candidate(stream, perturbed) for perturbed in all_perturbations(stream)}
    choice = fit(survey_workload(stream, perturbations, *shape_NL), settings.caps, settings.overlap)
    require_fit(choice, settings.caps)
    return SurveyPlan(perturbations=perturbations, fit=choice)


def all_perturbations(stream: ModelStream) -> Iterator[Perturbation]:
    return (
        Perturbation(index=index, sublayer=name) for index in range(stream.depth) for name in stream.family.sublayers
    )


def perturbed_candidate(stream: ModelStream, perturbed: Perturbation) -> Candidate:
    """What the sub-layer becomes when it keeps that share of its parameters."""
    budget = ParameterBudget(
        ratio=1.0 - perturbed.keep,
        parameters=int(perturbed.keep * dense_parameters(stream, perturbed.index, perturbed.sublayer)),
        itemsize=stream.storage_itemsize(perturbed.index), head_dim=stream.head_dim,
        converts=converts(stream, perturbed.index),
    )  # fmt: skip
    return candidate(perturbed.sublayer, PERTURBERS[perturbed.sublayer], stream.natives(perturbed.index), budget)


def disk_generations(depth: int) -> int:
    """Most that are on the disk at one time: in the last layer each stream before and after it, and one between sub-layers."""
    per_layer = len(LEVELS)
    return 1 + per_layer * (depth - 1) + 1 + per_layer * depth + 1


def survey_workload(
    stream: ModelStream, perturbations: Mapping[Perturbation, Candidate], sequences: int, length: int
) -> Workload:
    """Sizes of `survey`. Edits of two sub-layers are never there at once."""
    most = max(
        edit_bytes(stream, perturbed.index, layout)
        for perturbed, found in perturbations.items()
        for layout in found.layouts.values()
    )
    work = evaluation_workload(stream, sequences, length)
    tokens = min(HEAD_TOKENS, sequences * length)
    second = tokens * stream.vocabulary * (work.itemsize + 5 * 4)  # its logits, and what is made of both in float32
    return replace(
        work, edits=most, solve=max(found.cost.both_bytes for found in perturbations.values()) + most,
        capture=max(found.cost.capture_bytes for found in perturbations.values()) + most, head=work.head + second,
        streams=2 + len(perturbations),
    )  # fmt: skip


def edit_bytes(stream: ModelStream, index: int, layout: Layout) -> int:
    """What the edits of a layout take: as stored, and in the compute dtype where they run in another."""
    made = planned_tensors(stream, index, layout)[1].values()
    return sum(
        tensor.nbytes + tensor.numel() * stream.dtype.itemsize * (tensor.dtype != stream.dtype) for tensor in made
    )
