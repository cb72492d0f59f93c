"""A compressed folder as a plain dense one: factors multiplied back, removed channels as zeros. For comparison only.

It has the size and the speed of the original and the quality of the compressed model, and loads anywhere.
"""

from __future__ import annotations

from pathlib import Path

import torch

from streamlap.errors import RecipeError, UnsupportedModel
from streamlap.export.folder import copy_companions, write_json
from streamlap.families.stream import ModelStream, read_config
from streamlap.inventory import count_parameters
from streamlap.memory import require_disk
from streamlap.modules import LowRankLinear
from streamlap.preflight import check_apart
from streamlap.store.sink import ShardFolder, TensorEntry, shard_names


def export_dense(out: str | Path, destination: str | Path) -> dict[str, int]:
    """Write the dense twin of the output folder `out` into the new folder `destination`, one layer at a time.

    Returns {"shards", "bytes"}. Raises RecipeError for a destination that is not empty, UnsupportedModel for a source that is
    not compressed.
    """
    folder, destination = Path(out), Path(destination)
    stream = ModelStream(folder)
    if not stream.rows:
        raise UnsupportedModel(
            f"{folder} is not compressed by streamlap; wanted an output folder. It is dense already."
        )
    check_apart(folder, destination)
    if destination.exists() and any(destination.iterdir()):
        raise RecipeError(f"destination {destination} is not empty; wanted a new folder.")
    stored = stream.source.info(f"{stream.family.embedding}.weight").dtype
    dense_bytes = stored.itemsize * count_parameters(stream, stream.rows).total_before
    require_disk(destination, dense_bytes, "the dense checkpoint")
    destination.mkdir(parents=True, exist_ok=True)
    sink, shards = ShardFolder(destination), shard_names(stream.depth)
    sink.write(shards[0], stream.outer_tensors())
    for index in range(stream.depth):
        sink.write(shards[index + 1], dense_layer(stream, index))
    sink.seal(shards)
    copy_companions(folder, destination)
    raw = read_config(folder)
    write_json(
        destination / "config.json", {k: v for k, v in raw.items() if k not in ("quantization_config", "auto_map")}
    )
    return {"shards": len(shards), "bytes": sum((destination / shard).stat().st_size for shard in shards)}


def dense_layer(stream: ModelStream, index: int) -> dict[str, TensorEntry]:
    """Tensors of one layer in the shapes that the architecture wants. Untouched ones are copied as bytes."""
    prefix = stream.layer_name(index)
    entries: dict[str, TensorEntry] = {f"{prefix}.{n}": info for n, info in stream.layer_tensors(index).items()}
    for path in stream.family.linears:
        row, base = stream.rows.get(f"{prefix}.{path}"), f"{prefix}.{path}"
        if row is None:
            continue
        for name in [name for name in entries if name.startswith(base + ".")]:
            del entries[name]
        weight = stream.source.read(f"{base}.weight")
        if "rank" in row:
            down = stream.source.read(f"{base}.down.weight")
            weight = LowRankLinear.from_factors(weight, down, None).merged()
        entries[f"{base}.weight"] = padded(weight, stream.dense_shape(index, path))
        if stream.has_bias(index, path):
            bias = stream.source.read(f"{base}.bias")
            entries[f"{base}.bias"] = padded(bias, stream.dense_shape(index, path)[:1])
    return entries


def padded(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor` in the corner of zeros of `shape`: a channel of zeros gives zero and takes nothing."""
    whole = torch.zeros(shape, dtype=tensor.dtype)
    whole[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return whole
