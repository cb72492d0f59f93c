"""The loop over decoder layers of a compression. Read `compress_layers` first.

Commit order of a layer: its shard, the hidden states that feed the next layer, the journal line. Only then do the hidden states
that fed it go. A run that dies anywhere starts again at the first layer without a journal line, and gives the same bytes.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamlap.families.stream import ModelStream
from streamlap.output.report import LayerReport
from streamlap.pipeline import one_pass, sublayers
from streamlap.pipeline.hand import LayerEdits, LayerInHand
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


def compress_layers(job: Job) -> None:
    """The loop."""
    stream, journal = job.stream, job.session.journal
    first = journal.next_layer
    kwargs = stream.layer_kwargs(job.streams.tokens_NL.shape[1])
    done = tuple(sum(line["seconds"].values()) for line in journal.layers)
    progress = Progress("compress", stream.depth, first, done)
    with start_runner(stream, job.plan.fit, job.streams.banks, progress) as runner:
        committed = done_already()
        begin(job, runner, first)
        try:
            for index in range(first, stream.depth):
                if job.session.stops.due(moved=index > first):
                    raise job.session.stops.stopped(f"at layer {index} of {stream.depth}")
                committed = compress_layer(job, runner, index, kwargs[index], committed)
                runner.require_baseline(index)
                progress.next()
                reset_peaks()  # here, so that layer 0 also answers for what came before it
        except Exception:
            committed.result()  # what went wrong in this layer takes nothing from the one before
            raise
        committed.result()


def begin(job: Job, runner: LayerRunner, first: int) -> None:
    """What comes before layer `first`: what lies outside the layers, or what a run left that died after its commit."""
    if first == 0:
        ShardFolder(job.out).write(shard_names(job.stream.depth)[0], job.stream.outer_tensors())
        for bank in job.streams.lasting:
            runner.enter(bank, job.streams.tokens_NL)
    else:
        job.streams.drop(first - 1)
        remove_file(state_path(job.session.state, first - 1))


def done_already() -> Future[Committed]:
    """The commit before the first layer."""
    future: Future[Committed] = Future()
    future.set_result(Committed(moved=bytes_moved()))
    return future


def compress_layer(
    job: Job, runner: LayerRunner, index: int, kwargs: dict[str, Any], before: Future[Committed]
) -> Future[Committed]:
    """One layer through memory. Its commit, which this returns, may still be under way while the next layer is computed."""
    clock = PhaseClock(runner.progress.phase)
    with clock.phase("read"):
        layer = runner.layer(index, kwargs)
    hand = LayerInHand(runner=runner, streams=job.streams, plan=job.plan.layers[index], layer=layer, clock=clock)
    made = edit_layer(hand, before)  # what runs next is what is saved
    trace = train(job, hand)
    with clock.phase("write"):
        shard = shard_names(job.stream.depth)[index + 1]
        digest = runner.writer.submit(ShardFolder(job.out).write, shard, layer.tensors())
    with clock.phase("propagate"):
        out_NL = made.out_NL | propagate(hand, trained=trace is not None)
    report = LayerReport(
        index=index, edits=LayerReport.describe(made.edits, layer.family), errors=made.errors, refinement=trace,
        seconds=clock.seconds, ladder=runner.ladder.taken(index), numerics=made.notes, peak_ram_bytes=peak_ram_bytes(),
        excluded_tokens=int(out_NL.sum()), peak_vram_bytes=peak_vram_bytes(), baseline_ram_bytes=ram_bytes(),
    )  # fmt: skip
    return runner.writer.submit(commit_layer, job, report, digest, before)


def edit_layer(hand: LayerInHand, before: Future[Committed]) -> LayerEdits:
    """The layer's edits, applied. Before the first solve the layer before is on the disk, and out of memory."""
    if hand.streams.dense is None:
        seen = one_pass.observe_layer(hand)
        wait(hand, before)
        return one_pass.solve_layer(hand, seen)
    out_NL = sublayers.run_dense(hand, sublayers.ATTENTION)
    wait(hand, before)
    return sublayers.rebuild_layer(hand, out_NL)


def wait(hand: LayerInHand, before: Future[Committed]) -> None:
    with hand.clock.phase("write"):
        before.result()


def train(job: Job, hand: LayerInHand) -> Trace | None:
    """The layer trained further, where the recipe says so."""
    methods = job.plan.recipe.trained
    return train_layer(hand, methods[0], job.session) if methods else None


def propagate(hand: LayerInHand, trained: bool) -> torch.Tensor:
    """The compressed stream through the edited layer, or through its second sub-layer where the first is done; not at the
    end. Gives the tokens that were out."""
    last = hand.index + 1 == hand.runner.stream.depth
    out_NL = torch.zeros(hand.streams.tokens_NL.shape, dtype=torch.bool)
    if not last:
        if hand.streams.dense is None or trained:
            bank = hand.streams.compressed
            out_NL = hand.runner.carry(hand.layer, hand.index, hand.compressed, bank, hand.index + 1)
        else:
            out_NL = sublayers.finish_layer(hand)
    hand.streams.drop_middles(hand.index)
    return out_NL


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
