"""The loop over decoder layers of a compression. Read `compress_layers` first, then `compress_layer`, which is one turn of it.

Commit order of a layer: its shard, the hidden states that feed the next layer, the journal line. Only then do the hidden states
that fed it go. A run that dies anywhere starts again at the first layer without a journal line, and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from streamlap.families.stream import ModelStream
from streamlap.linalg.gram import Gram
from streamlap.output.depth import is_gone
from streamlap.output.formats import packed
from streamlap.output.report import LayerReport
from streamlap.pipeline import one_pass, sublayers
from streamlap.pipeline.distil import distil_layer
from streamlap.pipeline.layer_in_hand import LayerEdits, LayerInHand
from streamlap.pipeline.next_inputs import next_inputs
from streamlap.pipeline.runner import LayerRunner, start_runner
from streamlap.pipeline.session import Session
from streamlap.pipeline.streams import Streams
from streamlap.pipeline.train import Trace, state_path, train_layer
from streamlap.planning.plan import Plan
from streamlap.store.sink import ShardFolder, remove_file, shard_names
from streamlap.system.meters import PhaseClock, bytes_moved, peak_ram_bytes, peak_vram_bytes, ram_bytes, reset_peaks
from streamlap.system.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one compression needs, checked."""

    stream: ModelStream
    plan: Plan
    out: Path
    streams: Streams
    session: Session


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What the commit of a layer leaves to the next."""

    moved: tuple[int, int]
    """Bytes that the process had read and written by then."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """What one turn of the loop hands to the next."""

    commit: Future[Committed]
    """That of the layer that is done; it may still be under way in the writer's thread."""
    inputs: list[Gram] = field(default_factory=list)
    """The Gram of what the next layer's first sub-layer will read, where it was summed."""


def compress_layers(job: Job) -> None:
    """Every layer, from the first without a journal line. Raises Interrupted between two layers where a stop is due."""
    stream, journal = job.stream, job.session.journal
    first = journal.next_layer
    kwargs = stream.layer_kwargs(job.streams.windows.shape_NL[1])
    done = tuple(sum(line["seconds"].values()) for line in journal.layers)
    progress = Progress("compress", stream.depth, first, done)
    with start_runner(stream, job.plan.fit, job.streams.banks, progress) as runner:
        left = Left(commit=done_already())
        begin(job, runner, first)
        try:
            for index in range(first, stream.depth):
                if job.session.stops.due(moved=index > first):
                    raise job.session.stops.stopped(f"at layer {index} of {stream.depth}")
                left = compress_layer(job, runner, index, kwargs[index : index + 2], left)
                runner.require_baseline(index)
                progress.next()
                reset_peaks()  # here, so that layer 0 also answers for what came before it
        except Exception:
            left.commit.result()  # what went wrong in this layer takes nothing from the one before
            raise
        left.commit.result()


def begin(job: Job, runner: LayerRunner, first: int) -> None:
    """What comes before layer `first`: the embeddings, or what a run left that died after its commit."""
    if first == 0:
        for bank in job.streams.lasting:
            runner.enter(bank, job.streams.windows.tokens_NL)
    else:
        job.streams.drop(first - 1)
        remove_file(state_path(job.session.state, first - 1))


def done_already() -> Future[Committed]:
    """The commit before the first layer."""
    future: Future[Committed] = Future()
    future.set_result(Committed(moved=bytes_moved()))
    return future


def compress_layer(job: Job, runner: LayerRunner, index: int, kwargs: Sequence[dict[str, Any]], before: Left) -> Left:
    """One layer through memory. `kwargs` are its own and the next one's."""
    clock = PhaseClock(runner.progress.phase)
    with clock.phase("read"):
        layer = runner.layer(index, kwargs[0])
    hand = LayerInHand(
        runner=runner, streams=job.streams, plan=job.plan.layers[index], layer=layer, clock=clock, inputs=before.inputs
    )
    made = edit_layer(hand, before.commit, job)  # what runs next is what is saved
    trace = train(job, hand, made) or made.trace
    with clock.phase("write"):
        digest = write_shard(job, hand, made)
    with clock.phase("propagate"):
        out_NL, inputs = propagate(hand, kwargs[1:], bool(job.plan.recipe.final), trained=trace is not None)
        out_NL |= made.out_NL
    report = LayerReport(
        index=index, edits=LayerReport.describe(made.edits, layer.family), errors=made.errors, refinement=trace,
        seconds=clock.seconds, ladder=runner.ladder.taken(index), numerics=made.notes, peak_ram_bytes=peak_ram_bytes(),
        excluded_tokens=int(out_NL.sum()), peak_vram_bytes=peak_vram_bytes(), baseline_ram_bytes=ram_bytes(),
        place=hand.plan.place,
    )  # fmt: skip
    return Left(commit=runner.writer.submit(commit_layer, job, report, digest, before.commit), inputs=inputs)


def write_shard(job: Job, hand: LayerInHand, made: LayerEdits) -> Future[str]:
    """The layer's shard on its way to the disk; gives its hash, nothing for a layer that has no place in the result."""
    layer, place = hand.layer, hand.plan.place
    if place is None:
        return hand.runner.writer.submit(str)
    forms = layer.natives(layer.family.roles) | {edit.role: edit.form for edit in made.edits}
    entries = packed(job.plan.recipe.format, job.stream, hand.index, place, forms, layer.tensors())
    return hand.runner.writer.submit(ShardFolder(job.out).write, shard_names(job.plan.depth)[place + 1], entries)


def edit_layer(hand: LayerInHand, before: Future[Committed], job: Job) -> LayerEdits:
    """The layer's edits, applied, by the kind of the recipe's methods: distilled, one-pass or anchored. Before the first solve
    it waits for the commit `before`: that layer is then on the disk, and out of memory."""
    for method in job.plan.recipe.distilled:
        wait(hand, before)
        return distil_layer(hand, method, job.session)
    if hand.streams.dense is None:
        seen = one_pass.observe_layer(hand)
        wait(hand, before)
        return one_pass.solve_layer(hand, seen)
    wait(hand, before)
    return sublayers.rebuild_layer(hand)


def wait(hand: LayerInHand, before: Future[Committed]) -> None:
    with hand.clock.phase("write"):
        before.result()


def train(job: Job, hand: LayerInHand, made: LayerEdits) -> Trace | None:
    """The layer trained further, where the recipe says so and something is left of it."""
    methods, gone = job.plan.recipe.trained, is_gone({edit.role: edit.form for edit in made.edits})
    return train_layer(hand, methods[0], job.session) if methods and not gone else None


def propagate(
    hand: LayerInHand, following: Sequence[dict[str, Any]], final: bool, trained: bool
) -> tuple[torch.Tensor, list[Gram]]:
    """Carry the compressed stream through the edited layer. Where sub-layers were rebuilt one by one, it has been through the
    first already, and only the second is left. Behind the last layer nobody reads it, unless a `final` method does.

    Gives the tokens that are out, and the Gram of what the next layer reads, where that could be summed on the way.

    Args: following, the arguments of the next layer, none for the last; trained, whether the layer was trained after it was
    edited, so that what lies between its sub-layers is stale.
    """
    out_NL, seen = torch.zeros(hand.streams.windows.shape_NL, dtype=torch.bool), None
    if following or final:
        if following and hand.streams.between is not None:
            seen = next_inputs(hand, following[0])
        watch = None if seen is None else seen.see
        if hand.streams.dense is None or trained:
            out_NL = hand.runner.carry(hand.layer, hand.index, hand.compressed, hand.next_compressed, watch)
        else:
            out_NL = sublayers.finish_layer(hand, watch)
    hand.streams.drop_between(hand.index)
    return out_NL, seen.grams() if seen else []


def commit_layer(job: Job, report: LayerReport, digest: Future[str], before: Future[Committed]) -> Committed:
    """The commit point of a layer: its shard and the next hidden states are on the disk, and now the journal says so."""
    sha256 = digest.result()
    job.streams.settle()
    now = bytes_moved()
    read, written = (after - earlier for after, earlier in zip(now, before.result().moved, strict=True))
    job.session.journal.append(replace(report, sha256=sha256, bytes_read=read, bytes_written=written).to_json())
    remove_file(state_path(job.session.state, report.index))
    job.streams.drop(report.index)
    return Committed(moved=now)
