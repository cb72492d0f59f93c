"""A compressed folder as a plain dense one: every matrix multiplied back, removed channels as zeros. For comparison only.

It has the size and the speed of the original and the quality of the compressed model, and loads anywhere. A run that dies
goes on after the last shard that its journal has.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from streamlap.errors import RecipeError, UnsupportedModel
from streamlap.families.shell import check_orders, read_config
from streamlap.families.stream import ModelStream
from streamlap.loader.modules import dense_linear
from streamlap.output.folder import companions, copy_companions, write_json
from streamlap.output.inspect import count_parameters
from streamlap.pipeline.session import check_apart, source_marks
from streamlap.store.journal import STATE_FOLDER, Journal
from streamlap.store.lock import OutputLock
from streamlap.store.sink import ShardFolder, TensorEntry, shard_names
from streamlap.system.budget import require_disk
from streamlap.system.signals import Stops, parse_time, stop_requests


def export_dense(out: str | Path, destination: str | Path, *, stop_after: float | str | None = None) -> dict[str, int]:
    """Write the dense twin of the output folder `out` into the new folder `destination`, one layer at a time, or go on where a
    killed run stopped. After the time `stop_after` (seconds, or text like 3h50m) it ends at its next shard.

    Returns {"shards", "bytes"}. Raises Interrupted where it was stopped, RecipeError for a destination that is not empty,
    UnsupportedModel for a source that is not compressed or has a bias that the architecture does not know.
    """
    deadline = time.monotonic() + parse_time(stop_after, "stop_after")
    folder, destination = Path(out), Path(destination)
    stream = ModelStream(folder)
    if not stream.rows:
        raise UnsupportedModel(
            f"{folder} is not compressed by streamlap; wanted an output folder. It is dense already."
        )
    check_apart(folder, destination)
    companions(folder)
    check_destination(destination)
    config = dense_config(stream)
    if not Journal.exists(destination):
        stored = stream.source.info(f"{stream.family.embedding}.weight").dtype
        dense_bytes = stored.itemsize * count_parameters(stream, stream.rows).total_before
        require_disk(destination, dense_bytes, "the dense checkpoint")
    with OutputLock(destination), stop_requests(deadline, f"streamlap resume {destination}") as stops:
        check_destination(destination)  # again, now that nobody else can write there
        arguments = {"command": "export", "model": str(folder.resolve())}
        journal = Journal.open(destination, {"command": "export", **source_marks(stream)}, arguments)
        write_shards(stream, destination, config, journal, stops)
        copy_companions(folder, destination)
        write_json(destination / "config.json", config)
        journal.remove()
    shards = shard_names(stream.depth)
    return {"shards": len(shards), "bytes": sum((destination / shard).stat().st_size for shard in shards)}


def check_destination(destination: Path) -> None:
    """Refuse a folder that holds anything but an unfinished run."""
    entries = {path.name for path in destination.iterdir()} if destination.exists() else set()
    if entries and not Journal.exists(destination) and entries != {STATE_FOLDER}:
        raise RecipeError(f"destination {destination} is not empty ({min(entries)}, ...); wanted a new folder.")


def write_shards(
    stream: ModelStream, destination: Path, config: Mapping[str, Any], journal: Journal, stops: Stops
) -> None:
    """Every shard that the journal does not have, each with its line there once it is on the disk; then the index."""
    sink, shards = ShardFolder(destination), shard_names(stream.depth)
    first = journal.next_layer
    for place in range(first, len(shards)):
        if stops.due(moved=place > first):
            raise stops.stopped(f"at shard {place} of {len(shards)}")
        entries = dense_layer(stream, place - 1, config) if place else stream.outer_tensors()
        journal.append({"index": place, "sha256": sink.write(shards[place], entries)})
    sink.seal(shards)


def dense_config(stream: ModelStream) -> dict[str, Any]:
    """config.json without a word of streamlap, and with the flags of the biases that were added.

    Raises UnsupportedModel where the architecture has no such flag.
    """
    raw = {k: v for k, v in read_config(stream.folder).items() if k not in ("quantization_config", "auto_map")}
    for index in range(stream.depth):
        for path in stream.family.linears:
            if "bias" in stream.rows.get(f"{stream.layer_name(index)}.{path}", {}):
                raw[bias_flag(stream, index, path)] = True
    return raw


def bias_flag(stream: ModelStream, index: int, path: str) -> str:
    for prefix, flag in stream.family.bias_flags.items():
        if path.startswith(prefix):
            return flag
    raise UnsupportedModel(
        f"{stream.layer_name(index)}.{path} has a bias, and {stream.family.model_type} has no place for one there; "
        "wanted a folder without added biases. Load it with streamlap instead: nothing else can hold it."
    )


def dense_layer(stream: ModelStream, index: int, config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Tensors of one layer in the shapes that `config` wants. Untouched ones are copied as bytes."""
    prefix, tensors = stream.layer_name(index), stream.layer_tensors(index)
    entries: dict[str, TensorEntry] = {f"{prefix}.{n}": info for n, info in tensors.items()}
    for path in stream.family.linears:
        base, shape = f"{prefix}.{path}", stream.dense_shape(index, path)
        if base in stream.rows:
            stored = {name.removeprefix(path + "."): name for name in tensors if name.startswith(path + ".")}
            for name in stored.values():
                del entries[f"{prefix}.{name}"]
            module = copy.deepcopy(stream.layers[index].get_submodule(path))
            module.load_state_dict(
                {n: stream.source.read(tensors[name].name) for n, name in stored.items()}, assign=True
            )
            check_orders(module, base)
            entries |= {f"{base}.{n}": t for n, t in dense_linear(module, shape).state_dict().items()}
        flags = [flag for start, flag in stream.family.bias_flags.items() if path.startswith(start)]
        if f"{base}.bias" not in entries and any(config.get(flag) for flag in flags):
            dtype = stream.source.info(f"{base}.weight").dtype
            entries[f"{base}.bias"] = torch.zeros(shape[0], dtype=dtype)
    return entries
