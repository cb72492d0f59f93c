"""A compressed folder as a plain dense one, a layer at a time. A run that dies goes on after the last shard in its journal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamlap.errors import RecipeError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.output.folder import companions, copy_companions, write_json
from streamlap.output.formats import dense_config, dense_layer
from streamlap.output.inspect import count_parameters
from streamlap.pipeline.place import check_apart, contents
from streamlap.pipeline.session import Run, Session, session, source_marks
from streamlap.planning.disk import DiskNeeds
from streamlap.settings import RunSettings
from streamlap.store.journal import STATE_FOLDER, Journal
from streamlap.store.sink import ShardFolder, shard_names

Exported = dict[str, int]
"""{"shards", "bytes"} of what was written."""


def export_dense(out: str | Path, destination: str | Path, *, stop_after: float | str | None = None) -> Exported:
    """Write the dense twin of the output folder `out` into the new folder `destination`, one layer at a time, or go on where a
    killed run stopped: every matrix multiplied back, removed channels as zeros. For comparison only: it has the size and the
    speed of the original and the quality of the compressed model, and loads anywhere. After the time `stop_after` (seconds, or
    text like 3h50m) it ends at its next shard.

    Returns {"shards", "bytes"}. Raises Interrupted where it was stopped, RecipeError for a destination that is not empty,
    UnsupportedModel for a source that is not compressed or has a bias that the architecture does not know.
    """
    settings, folder, destination = RunSettings(stop_after=stop_after), Path(out), Path(destination)
    run = Run(
        command="export", out=destination, folder=destination, model=str(folder.resolve()), settings=settings, own={}
    )
    return resume_export(run, settings)


def resume_export(run: Run, settings: RunSettings) -> Exported:
    """The export, from its next shard."""
    deadline, folder, destination = settings.deadline(), Path(run.model), run.out
    stream = ModelStream(folder)
    if not stream.rows:
        raise UnsupportedModel(
            f"{folder} is not compressed by streamlap; wanted an output folder. It is dense already."
        )
    check_apart(folder, destination)
    companions(folder)
    check_destination(destination)
    config = dense_config(stream)
    itemsize = stream.source.info(f"{stream.family.embedding}.weight").dtype.itemsize
    dense_bytes = itemsize * count_parameters(stream, stream.rows).total_before
    needs = DiskNeeds(output_bytes=dense_bytes, what="the dense checkpoint")
    marks = {"command": "export", **source_marks(stream)}
    with session(run, marks, needs, deadline, lambda: check_destination(destination)) as running:
        write_shards(stream, destination, config, running)
        copy_companions(folder, destination)
        write_json(destination / "config.json", config)
    shards = shard_names(stream.depth)
    return {"shards": len(shards), "bytes": sum((destination / shard).stat().st_size for shard in shards)}


def check_destination(destination: Path) -> None:
    """Refuse a folder that holds anything but an unfinished run."""
    entries = contents(destination)
    if entries and not Journal.exists(destination) and entries != {STATE_FOLDER}:
        raise RecipeError(f"destination {destination} is not empty ({min(entries)}, ...); wanted a new folder.")


def write_shards(stream: ModelStream, destination: Path, config: Mapping[str, Any], running: Session) -> None:
    """Every shard that the journal does not have, each with its line there once it is on the disk; then the index."""
    sink, shards, journal = ShardFolder(destination), shard_names(stream.depth), running.journal
    first = journal.next_layer
    for place in range(first, len(shards)):
        if running.stops.due(moved=place > first):
            raise running.stops.stopped(f"at shard {place} of {len(shards)}")
        entries = dense_layer(stream, place - 1, config) if place else stream.outer_tensors()
        journal.append({"index": place, "sha256": sink.write(shards[place], entries)})
    sink.seal(shards)
