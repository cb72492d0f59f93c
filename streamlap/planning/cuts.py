"""What a survey cuts, and what that takes, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.methods import AnchoredMethod
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.base import Budget, Layout
from streamlap.planning.allocate import dense_parameters
from streamlap.planning.forecast import dense_shapes, planned_tensors
from streamlap.planning.workload import Workload, evaluation_workload

LEVELS = (0.6, 0.8)
"""Shares of a half that stay; the deepest cut first, whose order of channels serves the others."""

CUTTERS: dict[str, AnchoredMethod] = {"attention": AttentionAnchored(), "ffn": FfnAnchored(share=0.25)}
"""What cuts each half. The curves are for comparing halves, so one good method does for all that a recipe may try."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One half, at one share, in a copy of the dense stream."""

    index: int
    half: str
    keep: float


def all_cuts(stream: ModelStream) -> Iterator[Cut]:
    return (
        Cut(index=index, half=half, keep=keep)
        for index in range(stream.depth)
        for half in stream.family.halves
        for keep in LEVELS
    )


def cut_layout(stream: ModelStream, index: int, half: str, keep: float) -> Layout:
    """What the half becomes when it keeps that share of its parameters."""
    budget = Budget(
        parameters=int(keep * dense_parameters(stream, index, half)), itemsize=stream.storage_itemsize(index),
        head_dim=stream.head_dim,
    )  # fmt: skip
    biased = {path: stream.has_bias(index, path) for path in stream.family.linears}
    return CUTTERS[half].layout(stream.family, dense_shapes(stream, index), biased, budget)


def disk_generations(depth: int) -> int:
    """Most that are on the disk at one time: in the last layer each stream before and after it, and one between halves."""
    per_layer = 2 * len(LEVELS)
    return 1 + per_layer * (depth - 1) + 1 + per_layer * depth + 1


def survey_workload(stream: ModelStream, sequences: int, length: int) -> Workload:
    """Sizes of `survey`. Two halves' edits are never there at once, those of all levels of one half are."""
    made, solve, capture = 0, 0, 0
    for index in range(stream.depth):
        for half, method in CUTTERS.items():
            layouts = [cut_layout(stream, index, half, keep) for keep in LEVELS]
            made = max(made, sum(edit_bytes(stream, index, layout) for layout in layouts))
            costs = [method.cost(stream.family, dense_shapes(stream, index), layout) for layout in layouts]
            solve = max(solve, *(cost.workspace_bytes for cost in costs))
            capture = max(capture, *(cost.capture_bytes for cost in costs))
    work = evaluation_workload(stream, sequences, length)
    tokens = min(HEAD_TOKENS, sequences * length)
    second = tokens * stream.vocabulary * (work.itemsize + 5 * 4)  # its logits, and what is made of both in float32
    return replace(
        work, edits=made, solve=solve + made, capture=capture + made, head=work.head + second,
        streams=2 + 2 * len(LEVELS) * stream.depth,
    )  # fmt: skip


def edit_bytes(stream: ModelStream, index: int, layout: Layout) -> int:
    """What the edits of a layout take: as stored, and in the compute dtype where they run in another."""
    made = planned_tensors(stream, index, layout)[1].values()
    return sum(
        tensor.nbytes + tensor.numel() * stream.dtype.itemsize * (tensor.dtype != stream.dtype) for tensor in made
    )
