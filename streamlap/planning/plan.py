"""What a compression would take: sizes, peaks, bytes, operations, time. From headers alone, before any weight is read.

The sizes are those that `compress` claims and writes; the seconds come from rates measured on this machine once a month.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamlap.data.calibration import calibration_tokens
from streamlap.families.stream import ModelStream
from streamlap.pipeline.session import COMPANION_BYTES, pick_device
from streamlap.planning.forecast import LayerForecast, compression_workload, forecast
from streamlap.planning.schedule import Caps, Fit, advice, fit
from streamlap.planning.target import meet, parse_target
from streamlap.recipe import Recipe
from streamlap.store.hub import header_source
from streamlap.store.sink import shard_bytes
from streamlap.system.allocator import steady_heap
from streamlap.system.budget import existing_ancestor, parse_size
from streamlap.system.speed import Machine, calibrated

SLACK = 1.8
"""Upper end of the range of seconds over its lower end: what lies between products and decompositions, and other programs."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer."""

    index: int
    output_bytes: int
    read_bytes: int
    write_bytes: int
    flops: int
    seconds_low: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compression, foretold."""

    fits: bool
    ratio: float
    """As asked for, or the one that keeps to the target."""
    output_bytes: int
    """Of all shards."""
    peak_ram_bytes: int
    peak_vram_bytes: int
    disk_bytes: int
    """Most that is on the disk at one time beside the source: shards, two generations of hidden states, small files."""
    read_bytes: int
    write_bytes: int
    flops: int
    seconds_low: float
    """With every product and decomposition at its measured rate and nothing else; the upper end is a fixed multiple."""
    seconds_high: float
    advice: tuple[str, ...]
    """Which knob to turn where it does not fit."""
    calibration_tokens: tuple[int, int]
    overlap: bool
    hidden_states: str
    """Where they stay between layers: vram, ram or disk."""
    forward_tokens: int
    """Tokens in one forward."""
    layers: tuple[LayerPlan, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    work: str | Path | None = None,
    target_size: int | str | None = None,
    target_params: int | str | None = None,
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    overlap: bool = True,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> Plan:
    """What `compress` with the same arguments would take. Of a hub id only config, tokenizer and shard headers are fetched.

    Raises the StreamlapError that `compress` would raise before its first layer, but for one: where the memory does not do,
    the plan says so in `fits` and `advice`.
    """
    target = parse_target(target_size, target_params, overrides.get("ratio"))
    recipe, device = (recipe or Recipe()).override(**overrides), pick_device(device)
    steady_heap()
    folder, source = header_source(str(model), trust_remote_code)
    stream = ModelStream(folder, device, recipe.dtype, source)
    recipe = meet(stream, recipe, target)
    sequences, length = calibration_tokens(
        recipe.calibration, folder, stream.vocabulary, stream.context, trust_remote_code
    ).shape
    layers = forecast(stream, recipe, (sequences, length))
    caps = Caps(ram=parse_size(max_ram, "max_ram"), vram=parse_size(max_vram, "max_vram"))
    choice = fit(compression_workload(stream, layers, (sequences, length)), caps, overlap)
    machine = calibrated(device, stream.dtype, existing_ancestor(Path(work or ".")))
    rows = [plan_layer(choice, machine, layer, index, stream.depth) for index, layer in enumerate(layers)]
    outer = stream.outer_tensors()
    outer_bytes = shard_bytes(outer)
    first_write = outer_bytes + choice.work.generation * layers[0].generations_written
    first_read = sum(info.nbytes for info in outer.values()) + embedding_bytes(stream, choice)
    seconds = sum(row.seconds_low for row in rows) + first_read / machine.read + first_write / machine.write
    output = outer_bytes + sum(layer.output_bytes for layer in layers)
    return Plan(
        fits=choice.fits, ratio=recipe.ratio, output_bytes=output,
        peak_ram_bytes=choice.peak_ram, peak_vram_bytes=choice.peak_vram,
        disk_bytes=output + choice.work.disk_bytes + COMPANION_BYTES,
        read_bytes=first_read + sum(row.read_bytes for row in rows),
        write_bytes=first_write + sum(row.write_bytes for row in rows),
        flops=sum(row.flops for row in rows), seconds_low=seconds, seconds_high=SLACK * seconds,
        advice=tuple(advice(choice, caps)), calibration_tokens=(sequences, length),
        overlap=choice.schedule.overlap, hidden_states=choice.schedule.tier,
        forward_tokens=min(choice.schedule.micro, sequences) * length, layers=tuple(rows),
    )  # fmt: skip


def plan_layer(choice: Fit, machine: Machine, layer: LayerForecast, index: int, depth: int) -> LayerPlan:
    """Bytes, operations and the least seconds of one layer. What overlaps takes as long as the longer of the two."""
    generation, last = choice.work.generation, index + 1 == depth
    on_disk = choice.schedule.tier == "disk"
    read = layer.source_bytes + layer.copied_bytes + (layer.generations_read - last) * generation * on_disk
    written = layer.generations_written - last + layer.generations_spilled * on_disk
    write = layer.output_bytes + layer.state_bytes + written * generation
    compute = layer.flops / machine.matmul + layer.flops64 / machine.matmul64 + layer.flops32 / machine.matmul32
    compute += sum(size**3 for size in layer.decompositions) / machine.eigh
    disk = read / machine.read + write / machine.write
    upload = layer.source_bytes / machine.upload if choice.work.device.type == "cuda" else 0.0
    seconds = upload + (max(compute, disk) if choice.schedule.overlap else compute + disk)
    return LayerPlan(
        index=index, output_bytes=layer.output_bytes, read_bytes=read, write_bytes=write,
        flops=layer.flops + layer.flops64 + layer.flops32, seconds_low=seconds,
    )  # fmt: skip


def embedding_bytes(stream: ModelStream, choice: Fit) -> int:
    """At most this is read of the embedding table for generation 0: a row a token."""
    stored = stream.source.info(f"{stream.family.embedding}.weight")
    return min(stored.nbytes, choice.work.sequences * choice.work.length * stored.nbytes // stored.shape[0])
