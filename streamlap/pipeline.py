"""The main job: shards in, one decoder layer at a time through, shards out. Read `compress_layers` first.

Commit order of a layer: its shard, the hidden states that feed the next layer, the journal line. Only then do the hidden states
that fed it go. A run that dies anywhere starts again at the first layer without a journal line, and gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from streamlap.calibration import calibration_tokens
from streamlap.errors import Interrupted, NumericalError, ResumeMismatch, first_line
from streamlap.export.folder import KEPT_NAME, finish_folder, module_rows
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.inventory import count_parameters
from streamlap.memory import PhaseClock, peak_ram_bytes, peak_vram_bytes, reset_peak_ram, steady_heap
from streamlap.preflight import check_output, fingerprint, forecast_disk, open_bank, pick_device, plan_layers
from streamlap.recipe import Recipe
from streamlap.report import LayerReport, Report
from streamlap.stopping import stop_requests
from streamlap.store.hidden import DiskBank
from streamlap.store.hub import local_folder, model_name
from streamlap.store.journal import STATE_FOLDER, Journal, OutputLock
from streamlap.store.sink import ShardFolder, file_hash, shard_names, write_durably

TOKENS_NAME = "tokens.npy"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one run needs, checked."""

    stream: ModelStream
    recipe: Recipe
    out: Path
    tokens_NL: torch.Tensor
    journal: Journal
    hidden: DiskBank


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    work: str | Path | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> Report:
    """Compress the checkpoint `model` (a folder or a hub id) into the new folder `out`, or go on where a killed run stopped.

    `overrides` replace single fields of the recipe: ratio, preset, dtype, and the calibration's files, samples, length, seed.
    `work` is where hidden states are kept between layers; default inside `out`.
    Raises a StreamlapError before the first layer for anything that can be checked from headers.
    """
    recipe = (recipe or Recipe()).override(**overrides)
    folder, out = local_folder(str(model)), Path(out)
    device = pick_device(device)
    stream = ModelStream(folder, device, recipe.dtype)
    plan_layers(stream, recipe)
    tokens_NL = calibration_tokens(recipe.calibration, folder, stream.vocabulary, stream.context)
    check_output(folder, out, overwrite)
    source = str(folder.resolve()) if Path(model).is_dir() else str(model)
    arguments = {
        "model": source,
        "recipe": recipe.to_dict(),
        "device": device,
        "work": work and str(Path(work).resolve()),
    }
    return run(stream, recipe, tokens_NL, out, arguments)


def resume(out: str | Path) -> Report:
    """Go on with an interrupted `compress` into `out`: its folder knows everything that is needed."""
    out = Path(out)
    arguments = Journal.load(out).start["arguments"]
    recipe = Recipe.from_dict(arguments["recipe"])
    stream = ModelStream(local_folder(arguments["model"]), pick_device(arguments["device"]), recipe.dtype)
    return run(stream, recipe, saved_tokens(out), out, arguments)


def saved_tokens(out: Path) -> torch.Tensor:
    path = out / STATE_FOLDER / TOKENS_NAME
    try:
        with path.open("rb") as file:
            return torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False))
    except Exception as error:  # numpy raises a different one for every way to damage a header
        raise ResumeMismatch(
            f"{path} cannot be read ({first_line(error)}); wanted this run's tokens. Give the compress command again."
        ) from error


def run(stream: ModelStream, recipe: Recipe, tokens_NL: torch.Tensor, out: Path, arguments: dict[str, Any]) -> Report:
    """The checked job, from its next layer to a finished folder."""
    if not Journal.exists(out):
        forecast_disk(stream, out, open_bank(stream, out, arguments["work"], tokens_NL))
    with OutputLock(out), stop_requests() as stopped:
        check_output(stream.folder, out, overwrite=False)  # again, now that nobody else can write there
        if not Journal.exists(out):
            np_bytes = io.BytesIO()
            np.save(np_bytes, tokens_NL.numpy())
            write_durably(out / STATE_FOLDER / TOKENS_NAME, np_bytes.getvalue())
        journal = Journal.open(out, fingerprint(stream, recipe, tokens_NL), arguments)
        arguments = journal.start["arguments"]  # those that began the folder, to whose words this run is bound
        recipe = Recipe.from_dict(arguments["recipe"])
        hidden = open_bank(stream, out, arguments["work"], tokens_NL)
        job = Job(stream=stream, recipe=recipe, out=out, tokens_NL=tokens_NL, journal=journal, hidden=hidden)
        compress_layers(job, stopped)
        report = build_report(job)
        ShardFolder(out).seal(report.shards)
        finish_folder(
            out, stream.folder, model_name(arguments["model"]), stream.family.layers, report, recipe.to_yaml()
        )
        hidden.remove()
        journal.remove()
    return report


def compress_layers(job: Job, stopped: Callable[[], bool]) -> None:
    """The loop over decoder layers."""
    stream, hidden, journal = job.stream, job.hidden, job.journal
    steady_heap()
    kwargs = stream.layer_kwargs(job.tokens_NL.shape[1])
    shards = shard_names(stream.depth)
    if journal.next_layer == 0:
        outer = stream.outer_tensors()
        for name in outer:
            stream.source.read(name)  # refuses NaN, which a copy as bytes would carry over
        ShardFolder(job.out).write(shards[0], outer)
        hidden.write(0, stream.embed(job.tokens_NL))
    else:
        hidden.drop(journal.next_layer - 1)  # where the run died between the commit and this
    for index in progress(journal.next_layer, stream.depth):
        if stopped():
            raise Interrupted(f"stopped at layer {index} of {stream.depth}; go on with: streamlap resume {job.out}")
        report = compress_layer(job, index, kwargs[index], shards[index + 1])
        journal.append(report.to_json())  # the commit point
        hidden.drop(index)
        reset_peak_ram()  # here, so that layer 0 also answers for what came before it


def compress_layer(job: Job, index: int, kwargs: dict[str, Any], shard: str) -> LayerReport:
    """One layer through memory: its shard and the next hidden states are on the disk when this returns."""
    hidden, clock = job.hidden, PhaseClock()
    with clock.phase("read"):
        layer = job.stream.layer(index, kwargs)
    edits = edit_layer(job, layer, index, clock)  # what runs next is what is saved
    with clock.phase("write"):
        digest = ShardFolder(job.out).write(shard, layer.tensors())
    with clock.phase("propagate"):
        if index + 1 < job.stream.depth:
            hidden.write(index + 1, (layer(x_BLD) for x_BLD in hidden.read(index)))
    return LayerReport(
        index=index, edits=LayerReport.describe(edits), seconds=clock.seconds,
        peak_ram_bytes=peak_ram_bytes(), peak_vram_bytes=peak_vram_bytes(), sha256=digest,
    )  # fmt: skip


def edit_layer(job: Job, layer: StreamLayer, index: int, clock: PhaseClock) -> list[Edit]:
    """Statistics from one dense pass on inputs from the compressed prefix, then every method's edits, applied."""
    methods, ratio = job.recipe.methods, job.recipe.ratio
    stats = [method.wants(layer) for method in methods]
    with clock.phase("capture"):
        pairs = [pair for wanted in stats for pair in wanted.items()]
        if pairs:
            layer.observe(pairs, job.hidden.read(index))
    with clock.phase("solve"):
        edits = [edit for method, seen in zip(methods, stats, strict=True) for edit in method.edit(layer, seen, ratio)]
        for edit in edits:
            refuse_overflow(layer, edit)
        layer.apply(edits)
    return edits


def refuse_overflow(layer: StreamLayer, edit: Edit) -> None:
    """Raise NumericalError where an edit has no finite form in the storage dtype; nothing of it is written then."""
    for name, tensor in edit.module.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(
                f"{layer.prefix}.{edit.path}: {name} is not finite in {tensor.dtype}; wanted numbers that {tensor.dtype} "
                "can hold. Convert the checkpoint to bfloat16 or float32 and compress that."
            )


def progress(first: int, depth: int) -> Iterator[int]:
    """Layer numbers from `first`, behind a bar on stderr that honours TQDM_DISABLE."""
    return iter(tqdm(range(first, depth), initial=first, total=depth, desc="compress", unit="layer"))


def build_report(job: Job) -> Report:
    layers = tuple(LayerReport.from_json(line) for line in job.journal.layers)
    rows = module_rows(layers, job.stream.family.layers)
    names = shard_names(job.stream.depth)
    hashes = {names[0]: file_hash(job.out / names[0])} | {names[layer.index + 1]: layer.sha256 for layer in layers}
    sequences, length = job.tokens_NL.shape
    return Report(
        out=str(job.out), recipe=job.recipe.to_dict(), parameters=count_parameters(job.stream, rows), layers=layers,
        shards=hashes, calibration_tokens=(sequences, length), kept_channels=KEPT_NAME,
        seconds=sum(sum(layer.seconds.values()) for layer in layers),
    )  # fmt: skip
