"""What layers move over the links of a machine under a schedule, and what they compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from streamlap.families.stream import ModelStream
from streamlap.planning.forecast import LayerPlan, forward_flops
from streamlap.planning.schedule import Fit, Schedule
from streamlap.planning.survey import SurveyCost
from streamlap.planning.workload import Workload
from streamlap.store.sink import shard_bytes


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes over each link."""

    read: int
    """From the disk."""
    written: int
    """To the disk."""
    weights_up: int = 0
    """Of the layer to a device of its own; none where that is the CPU."""
    states_up: int = 0
    """Of hidden states to it."""
    down: int = 0
    """Of hidden states and of what is edited from it."""

    @property
    def up(self) -> int:
        return self.weights_up + self.states_up

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            **{entry.name: getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(Traffic)}
        )


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """What a layer takes under the plan's schedule."""

    index: int
    output_bytes: int
    read_bytes: int
    write_bytes: int
    upload_bytes: int
    download_bytes: int
    flops: int
    seconds_low: float


def generations_moved(layer: LayerPlan, schedule: Schedule) -> tuple[float, int]:
    """How often the hidden states of a stream are (read, written) on the disk."""
    on_disk = schedule.tier == "disk"
    spilled = on_disk and not schedule.between
    read = layer.generations_read * on_disk + layer.between_read * spilled
    return read + layer.gradients_read, layer.generations_written + layer.generations_spilled * spilled


def layer_traffic(layer: LayerPlan, work: Workload, schedule: Schedule, last: bool) -> Traffic:
    """Of one layer; after the last one nothing is kept for a next."""
    read, written = generations_moved(layer, schedule)
    away, outside = work.device.type != "cpu", schedule.tier != "vram"
    down = layer.generations_written + layer.generations_spilled * outside - last
    return Traffic(
        read=layer.source_bytes + layer.copied_bytes + round(read * work.generation),
        written=layer.output_bytes + layer.state_bytes + (written - last) * work.generation,
        weights_up=layer.source_bytes * away,
        states_up=round(
            ((layer.generations_read + layer.between_read) * outside + layer.gradients_read) * work.generation
        )
        * away,
        down=(layer.edits_bytes + layer.state_bytes + down * work.generation) * away,
    )


def first_traffic(stream: ModelStream, choice: Fit, layer: LayerPlan, redrawn: int, compared: int) -> Traffic:
    """Around the layers: what lies outside them is copied, and generation 0 is made. Of the embedding table at most a row a
    token is read for each stream. So many redrawn windows take a forward through all layers, and the head. So many windows are
    `compared` at the end: the head once more, for the predictions of both streams."""
    outer, stored = stream.outer_tensors(), stream.source.info(f"{stream.family.embedding}.weight")
    shape_NL, streams = (choice.work.sequences, choice.work.length), layer.generations_written
    rows = streams * min(stored.nbytes, math.prod(shape_NL) * stored.nbytes // stored.shape[0])
    held = streams * choice.work.batch(compared)
    states, away = choice.work.generation * streams, choice.work.device.type != "cpu"
    on_disk = choice.schedule.tier == "disk"
    weights = (redraw_bytes(stream) if redrawn else 0) + choice.work.head_stored * (compared > 0)
    passing = stream.depth * choice.work.batch(redrawn)
    return Traffic(
        read=sum(info.nbytes for info in outer.values()) + rows + weights + (passing + held) * on_disk,
        written=shard_bytes(outer) + states + passing, weights_up=weights * away,
        states_up=(rows + passing * (choice.schedule.tier != "vram")) * away, down=(states + passing) * away,
    )  # fmt: skip


def gradient_traffic(stream: ModelStream, choice: Fit) -> Traffic:
    """Of the sweeps of `pipeline.gradients`: forward through all layers and the head, and back through all but the first. What
    a layer read is on the disk by then, and so is what each sweep begins with."""
    states, away, back = choice.work.generation, choice.work.device.type != "cpu", stream.depth - 1
    layers = (info.nbytes for index in range(1, stream.depth) for info in stream.layer_tensors(index).values())
    # The first gradient on the way back is among those that are read from the disk in any case.
    weights, passed, again = redraw_bytes(stream) + sum(layers), stream.depth + max(0, back - 1), back + 1 + (back > 0)
    on_disk, outside = choice.schedule.tier == "disk", choice.schedule.tier != "vram"
    return Traffic(
        read=weights + (again + passed * on_disk) * states, written=(2 * stream.depth + 1) * states,
        weights_up=weights * away, states_up=(again + passed * outside) * states * away,
        down=(2 * stream.depth + 1) * states * away,
    )  # fmt: skip


def gradient_flops(stream: ModelStream, shape_NL: tuple[int, int]) -> int:
    """Of the same: on the way back each layer runs again, and its gradient takes as much once more; so does the head's."""
    head = stream.source.info(stream.head_name).numel
    layers = (
        forward_flops(stream.natives(index), sum(info.numel for info in stream.layer_tensors(index).values()), shape_NL)
        for index in range(1, stream.depth)
    )
    return redraw_flops(stream, *shape_NL) + 2 * sum(layers) + 2 * math.prod(shape_NL) * head


def redraw_bytes(stream: ModelStream) -> int:
    """Of all layers, and the head."""
    layers = (info.nbytes for index in range(stream.depth) for info in stream.layer_tensors(index).values())
    return sum(layers) + stream.source.info(stream.head_name).nbytes


def redraw_flops(stream: ModelStream, windows: int, length: int) -> int:
    """Of a forward through all layers, and the head, for so many windows."""
    if not windows:
        return 0
    layers = (
        forward_flops(
            stream.natives(index), sum(info.numel for info in stream.layer_tensors(index).values()), (windows, length)
        )
        for index in range(stream.depth)
    )
    return sum(layers) + 2 * windows * length * stream.source.info(stream.head_name).numel


def flops_by_dtype(layers: Sequence[LayerPlan | SurveyCost], dtype: str) -> dict[str, int]:
    """Operations by what they are done in; `dtype` is that of the forwards."""
    found = {dtype: 0, "float32": 0, "float64": 0}
    for layer in layers:
        found[dtype] += layer.flops
        found["float32"] += layer.flops32
        found["float64"] += layer.flops64
    return found
