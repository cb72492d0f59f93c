"""Recovery: a compressed model trained by LoRA, and written again with the adapters in its weights. Read `run_recovery` first.

The dense model, where it is given, goes layer by layer over the windows once, and what it predicts is kept. So it need not fit
into memory; the compressed model has to.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from streamlap.data.calibration import calibration_tokens, file_names, find_files
from streamlap.data.text import is_ids
from streamlap.data.windows import open_ids
from streamlap.errors import RecipeError, ResumeMismatch, UnsupportedModel, first_line
from streamlap.families.opening import parse_dtype, read_config
from streamlap.families.stream import ModelStream
from streamlap.loader.configuration_nas import NAS
from streamlap.methods.trained.recovery import Recovery, merged
from streamlap.output.folder import companions
from streamlap.output.nas import FAMILIES as NAS_FAMILIES
from streamlap.output.recovered import finish_recovered
from streamlap.pipeline.adapt import BEST_NAME, Recovered, RecoveryJob, require_peft, train_adapters
from streamlap.pipeline.export import check_destination
from streamlap.pipeline.place import check_apart, check_places
from streamlap.pipeline.session import Run, Session, session, source_marks, stream_marks, whole_name
from streamlap.pipeline.teacher import ask_teacher
from streamlap.planning.disk import COMPANION_BYTES, DiskNeeds
from streamlap.planning.recovery import is_thrifty, recovery_needs
from streamlap.planning.schedule import fit, require_fit
from streamlap.planning.workload import evaluation_workload
from streamlap.recipe import Calibration
from streamlap.settings import RunSettings, refuse_options, split_options
from streamlap.store.hub import local_folder, model_name
from streamlap.store.journal import saved_tokens
from streamlap.store.sink import ShardFolder, TensorEntry, shard_names, write_durably
from streamlap.store.source import read_tensors
from streamlap.system.allocator import steady_heap, trim_heap
from streamlap.untrusted.json import parse_json
from streamlap.untrusted.paths import path_of

LENGTH, SAMPLES = 512, 1024
"""Of the windows, where nothing else is asked for."""
OUTCOME_NAME = "outcome.json"


def recover(
    out: str | Path,
    destination: str | Path,
    text: str | Path | list[str] | tuple[str, ...],
    *,
    dense: str | Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    text_column: str | None = None,
    dtype: str = "auto",
    **options: Any,
) -> Recovered:
    """Train the compressed model `out` by LoRA on every linear that it stores, and write it, with the adapters merged into what
    is stored, into the new folder `destination`; or go on where a killed run stopped. Ranks and widths stay. It is written only
    where the loss on held-out windows falls.

    Args: text, files as for calibration; dense, the model that `out` was made of, towards whose predictions it is trained
    beside the text; samples (1024) windows of `length` (512, or the rows of an .npy) tokens; dtype, compute dtype, auto as for
    `compress`; options, single fields of RunSettings, and of Recovery (epochs, rank, learning_rate, warm_up, batch,
    distil, top, seed).

    Raises a StreamlapError before the first step for anything that can be checked from headers, and Interrupted where it was
    stopped.
    """
    settings, others = split_options(options)
    refuse_options(recover, others, (entry.name for entry in fields(Recovery)))
    knobs, deadline, destination = Recovery(**others), settings.deadline(), path_of(destination, "destination")
    names = file_names(text)
    require_peft()
    check_places(destination, settings.work)
    settings = settings.settled()
    folder = local_folder(out, settings.trust_remote_code)
    own: dict[str, Any] = {"knobs": asdict(knobs), "dtype": parse_dtype(dtype), "dense": None}
    if dense is not None:
        dense_folder = local_folder(dense, settings.trust_remote_code)
        own["dense"] = whole_name(dense, dense_folder)
    model = whole_name(out, folder)
    run = Run(command="recover", out=destination, folder=destination, model=model, settings=settings, own=own)
    stream = ModelStream(folder, settings.device, own["dtype"])
    rows = has_rows(names)
    if samples is None and not (rows and len(names) == 1):
        samples = SAMPLES
    if length is None and not rows:
        length = min(LENGTH, stream.context)
    calibration = Calibration(files=names, samples=samples, length=length, seed=knobs.seed, text_column=text_column)
    tokens_NL = calibration_tokens(
        calibration, folder, stream.vocabulary, stream.context, settings.trust_remote_code, settings.caps.ram
    )
    return run_recovery(run, checked_job(run, settings, stream, tokens_NL), deadline)


def has_rows(files: tuple[str, ...]) -> bool:
    """Whether some file is token ids in rows, which are windows already."""
    return any(len(open_ids(path).shape) == 2 for path in find_files(files) if is_ids(path))


def resume_recovery(run: Run, settings: RunSettings) -> Recovered:
    """Go on with an interrupted run; `settings` are its own, with other caps where they were given."""
    deadline, settings = settings.deadline(), settings.settled()
    try:
        dtype, knobs = str(run.own["dtype"]), run.own["knobs"]
        stream = ModelStream(local_folder(run.model), settings.device, dtype)
        Recovery(**knobs)
    except (KeyError, TypeError, RecipeError) as error:
        raise ResumeMismatch(
            f"{run.folder} has no knobs that can be used ({first_line(error)}). Delete it and give the first command again."
        ) from error
    return run_recovery(run, checked_job(run, settings, stream, saved_tokens(run.folder)), deadline)


def checked_job(run: Run, settings: RunSettings, stream: ModelStream, tokens_NL: torch.Tensor) -> RecoveryJob:
    """Raises before anything is read or written."""
    steady_heap()
    stream.require_head()
    check_apart(stream.folder, run.out)
    companions(stream.folder)
    check_destination(run.out)
    found = read_config(stream.folder).get("model_type")
    if found not in (stream.family.model_type, NAS):
        raise UnsupportedModel(
            f"{stream.folder} is a {found}, which is read as a {stream.family.model_type}; wanted a compressed model. Compress "
            "it first."
        )
    if stream.joined and not stream.apart:
        raise UnsupportedModel(
            f"{stream.folder} is a {stream.family.model_type} with linears that share a matrix, {next(iter(stream.joined))}; "
            "wanted them apart, as in the format factored. Recover the factored folder, then export it."
        )
    knobs, dense, teacher_fit = Recovery(**run.own["knobs"]), None, None
    (windows, length), name = tokens_NL.shape, run.own.get("dense")
    if windows < 2:
        raise RecipeError(
            f"the text has one window of {length} tokens; wanted two, to train on one and judge by the other. Give more text, "
            "or a shorter --length."
        )
    if name is not None and knobs.distil:
        dense = ModelStream(local_folder(name), settings.device, run.own["dtype"])
        check_teacher(dense, stream)
        teacher_fit = fit(evaluation_workload(dense, windows, length), settings.caps, settings.overlap)
        require_fit(teacher_fit, settings.caps)
    needs = recovery_needs(stream, knobs, windows, length, dense is not None)
    return RecoveryJob(
        stream=stream, dense=dense, teacher_fit=teacher_fit, knobs=knobs, tokens_NL=tokens_NL, needs=needs,
        thrifty=is_thrifty(needs, stream, settings.caps),
    )  # fmt: skip


def check_teacher(dense: ModelStream, stream: ModelStream) -> None:
    """Raise RecipeError for a dense model whose predictions are not about the same vocabulary, or of another kind. A folder of
    the format nas is read as a llama, whatever it was made of."""
    dense.require_head()
    seen, wanted = (dense.vocabulary, dense.family.model_type), (stream.vocabulary, stream.family.model_type)
    kinds = NAS_FAMILIES if not stream.marked else (wanted[1],)
    if seen[0] != wanted[0] or seen[1] not in kinds:
        raise RecipeError(
            f"--dense {dense.folder} is a {seen[1]} with a vocabulary of {seen[0]}, and {stream.folder} a {' or '.join(kinds)} "
            f"with {wanted[0]}; wanted the model that it was made of."
        )


def run_recovery(run: Run, job: RecoveryJob, deadline: float) -> Recovered:
    """The checked job: the dense model's predictions, the training, the shards."""
    stream = job.stream
    model_bytes = sum(header.file_bytes for header in stream.source.headers.values())
    hidden = job.teacher_fit.work.disk_bytes if job.teacher_fit else 0
    needs = DiskNeeds(output_bytes=model_bytes + COMPANION_BYTES + job.needs.on_disk, hidden_bytes=hidden)
    marks = fingerprint(job)
    with session(run, marks, needs, deadline, lambda: check_destination(run.out), job.tokens_NL) as running:
        outcome = running.state / OUTCOME_NAME
        if not outcome.is_file():
            teacher = None
            if job.dense is not None and job.teacher_fit is not None:
                teacher = ask_teacher(job.dense, job.tokens_NL, job.knobs.top, job.teacher_fit, running)
            found = train_adapters(job, teacher, running)
            write_durably(outcome, json.dumps(found.to_json(), allow_nan=False).encode())
            trim_heap()
        result = Recovered(**parse_json(outcome.read_bytes()))
        if result.kept:
            shards = write_shards(job, running)
            finish_recovered(run.out, stream, model_name(run.model), result.to_json(), shards)
    if not result.kept:
        with contextlib.suppress(OSError):  # it may hold what is left alone
            run.out.rmdir()
    return result


def fingerprint(job: RecoveryJob) -> dict[str, Any]:
    """All that the bytes of the output depend on."""
    marks = {f"recover {key}": value for key, value in asdict(job.knobs).items()}
    dense = {f"dense {key}": value for key, value in source_marks(job.dense).items()} if job.dense else {"dense": None}
    return {**marks, **stream_marks(job.stream, job.tokens_NL), **dense, "peft": require_peft().__version__}


def write_shards(job: RecoveryJob, running: Session) -> dict[str, str]:
    """Every shard that the journal does not have, each with its line there once it is on the disk; then the index. Gives their
    hashes."""
    stream, sink, journal = job.stream, ShardFolder(running.run.out), running.journal
    names, adapters = shard_names(stream.depth), read_tensors(running.state / BEST_NAME)
    first = journal.next_layer
    sink.require(names[:first])
    for place in range(first, len(names)):
        if running.stops.due(moved=place > first):
            raise running.stops.stopped(f"at shard {place} of {len(names)}")
        entries: Mapping[str, TensorEntry]
        entries = trained_layer(stream, place - 1, adapters) if place else stream.outer_tensors()
        journal.append({"index": place, "sha256": sink.write(names[place], entries)})
    hashes = {names[line["index"]]: line["sha256"] for line in journal.layers}
    sink.seal(hashes)
    return hashes


def trained_layer(stream: ModelStream, index: int, adapters: Mapping[str, torch.Tensor]) -> dict[str, TensorEntry]:
    """Tensors of one layer by their names on disk, with the adapters in those that have some; others are copied as bytes.

    Args: adapters, `up NAME` and `down NAME` by the name on disk of the weight that they are added to.
    """
    entries: dict[str, TensorEntry] = {}
    tensors = stream.layer_tensors(index)
    for name, stored in stream.layer_names(index).items():
        entries[stored] = tensors[name]
        if f"up {stored}" in adapters:
            sides = adapters[f"up {stored}"], adapters[f"down {stored}"]
            entries[stored] = merged(stream.source.read(stored), *sides)
    return entries
