"""A compressed folder as a plain checkpoint, a layer at a time. A run that dies goes on after the last shard in its journal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamlap.data.tokenizer import class_elsewhere
from streamlap.errors import RecipeError, ResumeMismatch, UnsupportedModel, shown
from streamlap.families.stream import ModelStream
from streamlap.loader.shim import write_nas
from streamlap.output.card import CARD_NAME, base_of, licence_of, model_card
from streamlap.output.depth import is_gone, places
from streamlap.output.folder import companions, copy_companions, loader_of, write_json
from streamlap.output.formats import CONFIGS, Forms, exported_layer, packed
from streamlap.output.gguf import architecture, check_type, library, write_gguf
from streamlap.output.inspect import count_cache, count_parameters, count_written
from streamlap.pipeline.place import check_apart, check_place, contents
from streamlap.pipeline.session import Run, Session, session, source_marks
from streamlap.planning.disk import DiskNeeds
from streamlap.settings import RunSettings
from streamlap.store.journal import STATE_FOLDER, Journal
from streamlap.store.sink import ShardFolder, TensorEntry, make_folder, shard_names, write_durably
from streamlap.system.budget import require_disk
from streamlap.untrusted.paths import path_of

log = logging.getLogger(__name__)

GGUF = "gguf"
Exported = dict[str, int]
"""{"shards", "bytes"} of what was written."""


def export(
    out: str | Path, destination: str | Path, *, to: str = "dense", type: str | None = None,
    stop_after: float | str | None = None,
) -> Exported:  # fmt: skip
    """Write the output folder `out` as another format into the new folder `destination`, one layer at a time, or go on where a
    killed run stopped. After the time `stop_after` (seconds, or text like 3h50m) it ends at its next shard.

    Args: to, dense: every matrix multiplied back, removed channels as zeros, for comparison only: it has the size and the speed
    of the original and the quality of the compressed model; stock: a plain checkpoint that is as small, where nothing is lost
    by that: all linears dense, of the same widths in every layer; nas: the same with widths that differ and layers without
    attention, packaged as engines know them; gguf: one new file for llama.cpp, of any folder whose linears are dense,
    begun anew where it was stopped. type, of that file: f32, f16, bf16 or q8_0, default the dtype of the checkpoint.

    Returns {"shards", "bytes"}. Raises Interrupted where it was stopped, RecipeError for a destination that is not empty or a
    format that is not known, UnsupportedModel for a source that is not compressed and for what the format cannot express.
    """
    settings, folder, destination = (
        RunSettings(stop_after=stop_after),
        path_of(out, "out"),
        path_of(destination, "destination"),
    )
    if isinstance(to, str) and to == GGUF:
        if stop_after is not None:
            raise RecipeError(
                "stop_after is set and the format gguf, one file that is begun anew; wanted no stop_after."
            )
        return export_gguf(folder, destination, type)
    if type is not None:
        raise RecipeError(f"type is {shown(type)} and the format {shown(to)}; wanted a type with gguf alone.")
    run = Run(
        command="export", out=destination, folder=destination, model=str(folder.resolve()), settings=settings,
        own={"to": check_format(to)},
    )  # fmt: skip
    return resume_export(run, settings)


def export_dense(out: str | Path, destination: str | Path, *, stop_after: float | str | None = None) -> Exported:
    """`export` to the dense twin."""
    return export(out, destination, to="dense", stop_after=stop_after)


def check_format(to: str) -> str:
    if not isinstance(to, str) or to not in CONFIGS:
        raise RecipeError(f"export to {shown(to)} is not known; wanted one of {', '.join((*CONFIGS, GGUF))}.")
    return to


def export_gguf(folder: Path, destination: Path, type: str | None) -> Exported:
    """One file, begun anew where it was stopped."""
    if destination.suffix != f".{GGUF}" or destination.exists():
        state = "is there already" if destination.exists() else f"does not end in .{GGUF}"
        raise RecipeError(f"destination {destination} {state}; wanted a new file like model.{GGUF}.")
    library()
    check_place(destination.absolute().parent)
    stream = ModelStream(folder)
    kind, layers = check_type(type, stream), layers_of(stream)
    architecture(stream, layers)
    if not stream.has_head:
        log.warning(
            "%s has no language-model head, and llama.cpp takes the embedding for one: the file serves for embeddings alone",
            folder,
        )
    most = count_parameters(stream, stream.rows).total_after * (4 if kind == "f32" else 2)
    require_disk(destination, most, "the GGUF file")
    make_folder(destination.absolute().parent)
    return {"shards": 1, "bytes": write_gguf(stream, layers, destination, kind, base_of(folder))}


def layers_of(stream: ModelStream) -> list[Forms]:
    """What the linears of every layer are in this checkpoint."""
    return [{role: stream.form(index, role) for role in stream.natives(index)} for index in range(stream.depth)]


def resume_export(run: Run, settings: RunSettings) -> Exported:
    """The export, from its next shard."""
    deadline, folder, destination = settings.deadline(), Path(run.model), run.out
    to = exported_format(run)
    stream = ModelStream(folder)
    if not stream.compressed:
        raise UnsupportedModel(
            f"{folder} is a plain checkpoint, with nothing to undo; wanted a folder of the format factored or nas."
        )
    check_apart(folder, destination)
    companions(folder)
    check_destination(destination)
    layers = layers_of(stream)
    config, parameters = CONFIGS[to](stream, layers), count_parameters(stream, stream.rows)
    wanted: list[Forms] = [stream.natives(index) for index in range(stream.depth)] if to == "dense" else [*layers]
    placed = [index for index, place in enumerate(places(map(is_gone, wanted), to)) if place is not None]
    itemsize = stream.source.info(f"{stream.family.embedding}.weight").dtype.itemsize
    numbers = parameters.total_before if to == "dense" else parameters.total_after
    needs = DiskNeeds(output_bytes=itemsize * numbers, what=f"the {to} checkpoint")
    marks = {"command": "export", "to": to, **source_marks(stream)}
    with session(run, marks, needs, deadline, lambda: check_destination(destination)) as running:
        write_shards(stream, running, to, wanted, placed, config)
        copy_companions(folder, destination, class_elsewhere(folder, config["model_type"]))
        write_durably(destination / CARD_NAME, card_of(stream, to, destination, shard_names(len(placed))).encode())
        if to == "nas":
            write_nas(destination, write_durably)
        write_json(destination / "config.json", config)
    shards = shard_names(len(placed))
    return {"shards": len(shards), "bytes": sum((destination / shard).stat().st_size for shard in shards)}


def exported_format(run: Run) -> str:
    """The format that an export was begun with. Raises ResumeMismatch where its journal has none."""
    to = run.own.get("to")
    if to not in list(CONFIGS):
        raise ResumeMismatch(
            f"{run.folder} was begun as an export to {shown(to)}; wanted one of {', '.join(CONFIGS)}. Delete it and give the "
            "first command again."
        )
    return str(to)


def card_of(stream: ModelStream, to: str, destination: Path, shards: Sequence[str]) -> str:
    """With what is known of the compressed folder and of the shards that are written. A dense export has the sizes of the
    original."""
    rows = {} if to == "dense" else stream.rows
    return model_card(
        base=base_of(stream.folder), licence=licence_of(stream.folder), to=to, loader=loader_of(stream.raw_config),
        parameters=count_written(stream, rows, to, destination, shards), cache=count_cache(stream, rows),
        made=f"Exported as {to} from a result of streamlap.",
    )  # fmt: skip


def check_destination(destination: Path) -> None:
    """Refuse a folder that holds anything but an unfinished run."""
    entries = contents(destination)
    if entries and not Journal.exists(destination) and entries != {STATE_FOLDER}:
        raise RecipeError(f"destination {destination} is not empty ({min(entries)}, ...); wanted a new folder.")


def write_shards(
    stream: ModelStream, running: Session, to: str, wanted: Sequence[Forms], placed: Sequence[int],
    config: Mapping[str, Any],
) -> None:  # fmt: skip
    """Every shard that the journal does not have, each with its line there once it is on the disk; then the index.

    Args: placed, the layers that the result has, in order.
    """
    sink, shards, journal = ShardFolder(running.run.out), shard_names(len(placed)), running.journal
    first = journal.next_layer
    sink.require(shards[:first])
    for place in range(first, len(shards)):
        if running.stops.due(moved=place > first):
            raise running.stops.stopped(f"at shard {place} of {len(shards)}")
        entries: Mapping[str, TensorEntry] = stream.outer_tensors()
        if place:
            index = placed[place - 1]
            tensors = exported_layer(stream, index, wanted[index], config)
            entries = packed(to, stream, index, place - 1, wanted[index], tensors)
        journal.append({"index": place, "sha256": sink.write(shards[place], entries)})
    sink.seal(shards)
