"""The main job: shards in, one decoder layer at a time through, shards out. Read `compress_layers` first.

Commit order of a layer: its shard, the hidden states that feed the next layer, the journal line. Only then do the hidden states
that fed it go. A run that dies anywhere starts again at the first layer without a journal line, and gives the same bytes.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from streamlap.data.calibration import calibration_tokens
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.linalg.notes import collected
from streamlap.output.folder import finish_folder
from streamlap.output.report import LayerReport, Report
from streamlap.pipeline.job import Job, build_report, choose_schedule
from streamlap.pipeline.one_pass import edit_by_halves, edit_in_one_pass
from streamlap.pipeline.refine import Refined, refine_layer, state_path
from streamlap.pipeline.runner import Engine, open_bank, start_engine
from streamlap.pipeline.session import check_output, fingerprint, forecast_disk, hidden_folder, pick_device
from streamlap.pipeline.sublayers import HalfErrors, half_of, open_banks
from streamlap.planning.forecast import plan_layers
from streamlap.planning.schedule import Fit
from streamlap.planning.target import meet, parse_target
from streamlap.recipe import Recipe
from streamlap.store.hub import local_folder, model_name
from streamlap.store.journal import Journal, save_tokens, saved_tokens
from streamlap.store.lock import OutputLock
from streamlap.store.sink import ShardFolder, remove_file, shard_names
from streamlap.system.allocator import steady_heap
from streamlap.system.budget import parse_size
from streamlap.system.meters import (
    PhaseClock,
    bytes_moved,
    peak_ram_bytes,
    peak_vram_bytes,
    ram_bytes,
    reset_peaks,
)
from streamlap.system.signals import parse_time, stop_requests


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    work: str | Path | None = None,
    overwrite: bool = False,
    target_size: int | str | None = None,
    target_params: int | str | None = None,
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    overlap: bool = True,
    stop_after: float | str | None = None,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> Report:
    """Compress the checkpoint `model` (a folder or a hub id) into the new folder `out`, or go on where a killed run stopped.

    `overrides` replace single fields of the recipe: ratio, preset, dtype, and the calibration's files, samples, length, seed.
    In place of a ratio, `target_size` may say how many bytes all shards may take (a number, or text like 24GB), or
    `target_params` how many parameters the whole model may have (like 50B); the recipe gets the lowest ratio that will do.
    `work` is where hidden states are kept between layers; default inside `out`. `max_ram` and `max_vram` are caps, as bytes or
    as text like 8GiB; default what is free. Without `overlap` nothing runs beside the loop. None of these changes the result.
    After the time `stop_after` (seconds, or text like 3h50m) the run ends at its next commit as it does on SIGTERM.
    `trust_remote_code` lets a tokenizer that is code in the model folder run; no other code of it ever does.
    Raises a StreamlapError before the first layer for anything that can be checked from headers, and Interrupted where it was
    stopped.
    """
    deadline = time.monotonic() + parse_time(stop_after, "stop_after")
    steady_heap()
    target = parse_target(target_size, target_params, overrides.get("ratio"))
    recipe = (recipe or Recipe()).override(**overrides)
    folder, out = local_folder(str(model), trust_remote_code), Path(out)
    device = pick_device(device)
    reset_peaks()
    stream = ModelStream(folder, device, recipe.dtype)
    recipe = meet(stream, recipe, target)
    plan_layers(stream, recipe)
    tokens_NL = calibration_tokens(recipe.calibration, folder, stream.vocabulary, stream.context, trust_remote_code)
    arguments = {
        "command": "compress",
        "model": str(folder.resolve()) if Path(model).is_dir() else str(model),
        "recipe": recipe.to_dict() | {"survey": recipe.survey and str(Path(recipe.survey).resolve())},
        "device": device,
        "work": work and str(Path(work).resolve()),
        "max_ram": parse_size(max_ram, "max_ram"),
        "max_vram": parse_size(max_vram, "max_vram"),
        "overlap": overlap,
    }
    choice = choose_schedule(stream, recipe, tokens_NL, arguments)
    check_output(folder, out, overwrite)  # which may remove an earlier result, so it comes last
    return run(stream, recipe, tokens_NL, out, arguments, choice, deadline)


def resume(
    out: str | Path, *, max_ram: int | str | None = None, max_vram: int | str | None = None,
    stop_after: float | str | None = None,
) -> Report:  # fmt: skip
    """Go on with an interrupted `compress` into `out`: its folder knows everything that is needed. Other caps may be given."""
    deadline = time.monotonic() + parse_time(stop_after, "stop_after")
    steady_heap()
    out = Path(out)
    arguments = Journal.load(out).arguments
    caps = {"max_ram": parse_size(max_ram, "max_ram"), "max_vram": parse_size(max_vram, "max_vram")}
    recipe = Recipe.from_dict(arguments["recipe"])
    stream = ModelStream(local_folder(arguments["model"]), pick_device(arguments["device"]), recipe.dtype)
    tokens_NL = saved_tokens(out)
    choice = choose_schedule(stream, recipe, tokens_NL, arguments | {key: cap for key, cap in caps.items() if cap})
    return run(stream, recipe, tokens_NL, out, arguments, choice, deadline)


def run(
    stream: ModelStream, recipe: Recipe, tokens_NL: torch.Tensor, out: Path, arguments: dict[str, Any], choice: Fit,
    deadline: float,
) -> Report:  # fmt: skip
    """The checked job, from its next layer to a finished folder."""
    if not Journal.exists(out):
        model_bytes = sum(header.file_bytes for header in stream.source.headers.values())
        work_bytes = choice.work.disk_bytes
        forecast_disk(model_bytes, work_bytes, out, hidden_folder(out, arguments["work"]))
    with OutputLock(out), stop_requests(deadline, f"streamlap resume {out}") as stops:
        check_output(stream.folder, out, overwrite=False)  # again, now that nobody else can write there
        if not Journal.exists(out):
            save_tokens(out, tokens_NL)
        journal = Journal.open(out, fingerprint(stream, recipe, tokens_NL), arguments)
        arguments = journal.start["arguments"]  # those that began the folder, to whose words this run is bound
        recipe = Recipe.from_dict(arguments["recipe"])
        hidden = open_bank(stream, tokens_NL, choice.schedule, hidden_folder(out, arguments["work"]))
        banks = open_banks(stream, tokens_NL, choice.schedule, hidden.folder) if recipe.anchored else None
        job = Job(
            stream=stream, recipe=recipe, out=out, tokens_NL=tokens_NL, journal=journal, hidden=hidden, banks=banks,
            fit=choice, stops=stops,
        )  # fmt: skip
        compress_layers(job)
        report = build_report(job)
        ShardFolder(out).seal(report.shards)
        finish_folder(
            out, stream.folder, model_name(arguments["model"]), stream.family.layers, report, recipe.to_yaml()
        )
        hidden.remove()
        journal.remove()
    return report


def compress_layers(job: Job) -> None:
    """The loop over decoder layers."""
    stream, hidden, journal, first = job.stream, job.hidden, job.journal, job.journal.next_layer
    kwargs = stream.layer_kwargs(job.tokens_NL.shape[1])
    shards = shard_names(stream.depth)
    done = tuple(sum(line["seconds"].values()) for line in journal.layers)
    beside = job.banks.all if job.banks else ()
    with start_engine(stream, job.fit, hidden, "compress", first, done, beside) as engine:
        if first == 0:
            ShardFolder(job.out).write(shards[0], stream.outer_tensors())
            for bank in job.streams:
                engine.enter(bank, job.tokens_NL)
        else:
            for bank in job.streams:
                bank.drop(first - 1)  # where the run died between the commit and this
            remove_file(state_path(job.out, first - 1))
        committed: Future[None] | None = None
        try:
            for index in range(first, stream.depth):
                if job.stops.due(moved=index > first):
                    raise job.stops.stopped(f"at layer {index} of {stream.depth}")
                committed = compress_layer(job, engine, index, kwargs[index], shards[index + 1], committed)
                engine.require_baseline(index)
                engine.progress.next()
                reset_peaks()  # here, so that layer 0 also answers for what came before it
        except Exception:
            settle(committed)  # what went wrong in this layer takes nothing from the one before
            raise
        settle(committed)


def settle(committed: Future[None] | None) -> None:
    """Wait for a commit; what went wrong in it is raised here."""
    if committed is not None:
        committed.result()


def compress_layer(
    job: Job, engine: Engine, index: int, kwargs: dict[str, Any], shard: str, before: Future[None] | None
) -> Future[None]:
    """One layer through memory. Its commit, which this returns, may still be under way while the next layer is computed."""
    clock = PhaseClock(engine.progress.phase)
    engine.out_NL.zero_()
    with clock.phase("read"):
        layer = engine.layer(index, kwargs)
    with collected() as notes:
        edits, errors = edit_layer(job, engine, layer, index, clock, before)  # what runs next is what is saved
    refined = refine(job, engine, layer, index, clock)
    with clock.phase("write"):
        digest = engine.writer.submit(ShardFolder(job.out).write, shard, layer.tensors())
    with clock.phase("propagate"):
        advance(job, engine, layer, index)
    report = LayerReport(
        index=index, edits=LayerReport.describe(edits), errors=errors, refinement=refined,
        seconds=clock.seconds, ladder=engine.ladder.taken(index), numerics=tuple(notes), peak_ram_bytes=peak_ram_bytes(),
        excluded_tokens=int(engine.out_NL.sum()), peak_vram_bytes=peak_vram_bytes(), baseline_ram_bytes=ram_bytes(),
    )  # fmt: skip
    return engine.writer.submit(commit, job, report, digest)


def edit_layer(
    job: Job, engine: Engine, layer: StreamLayer, index: int, clock: PhaseClock, before: Future[None] | None
) -> tuple[list[Edit], HalfErrors]:
    """The layer's edits, applied, and what the methods that tried for its halves erred by."""

    def ready() -> None:
        with clock.phase("write"):
            settle(before)

    if job.banks is None:
        return edit_in_one_pass(job.recipe, engine, layer, index, clock, ready), {}
    return edit_by_halves(job.recipe, engine, job.banks, layer, index, clock, ready)


def refine(job: Job, engine: Engine, layer: StreamLayer, index: int, clock: PhaseClock) -> Refined | None:
    """The layer trained further, where the recipe says so; what lies between its halves is stale then."""
    knobs = job.recipe.refinement
    if knobs is None or job.banks is None:
        return None
    job.banks.drop_middles(index)
    with clock.phase("refine"), engine.claim("refine"):
        return refine_layer(engine, job.banks, layer, index, knobs, job.out, job.stops)


def advance(job: Job, engine: Engine, layer: StreamLayer, index: int) -> None:
    """The compressed stream through the edited layer, or through its second half where the first is done; not at the end."""
    last = index + 1 == job.stream.depth
    if job.banks is None or job.recipe.refine:
        if not last:
            engine.advance(layer, index)
        return
    if not last:
        with engine.claim("propagate"):
            engine.carry(half_of(layer, "ffn"), index, job.banks.middle.read(index), job.hidden, index + 1)
    job.banks.drop_middles(index)


def commit(job: Job, report: LayerReport, digest: Future[str]) -> None:
    """The commit point of a layer: its shard and the next hidden states are on the disk, and now the journal says so."""
    sha256 = digest.result()
    for bank in job.streams:
        bank.settle()
    now = bytes_moved()
    read, written = (after - before for after, before in zip(now, job.moved, strict=True))
    job.moved = now
    job.journal.append(replace(report, sha256=sha256, bytes_read=read, bytes_written=written).to_json())
    remove_file(state_path(job.out, report.index))
    for bank in job.streams:
        bank.drop(report.index)
