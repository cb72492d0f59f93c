"""The machine that a plan counts seconds for: rates of its processor, of its links and of its disk, measured or read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamlap.planning.figures import Traffic
from streamlap.planning.forecast import LayerPlan
from streamlap.planning.survey import SurveyCost
from streamlap.settings import RunSettings
from streamlap.system.disk_speed import Disk, known_disk
from streamlap.system.speed import Speed, known_speed

FASTEST, SLOWEST = Disk(read=5e9, write=5e9), Disk(read=1e8, write=1e8)
"""What a disk that was not measured lies between: a good NVMe drive; a hard disk, or a busy network mount."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What bytes and operations are divided by."""

    speed: Speed
    disk: Disk

    def compute_seconds(self, work: LayerPlan | SurveyCost) -> float:
        speed = self.speed
        products = work.flops / speed.matmul + work.flops64 / speed.matmul64 + work.flops32 / speed.matmul32
        return products + sum(size**3 for size in work.decompositions) / speed.eigh

    def layer_seconds(self, layer: LayerPlan, traffic: Traffic, overlap: bool) -> float:
        """The least that a layer takes. What overlaps takes as long as the longest of it."""
        speed, compute = self.speed, self.compute_seconds(layer)
        beside = (self.disk_seconds(traffic), traffic.states_up / speed.upload, traffic.down / speed.upload)
        return traffic.weights_up / speed.upload + (max(compute, *beside) if overlap else compute + sum(beside))

    def disk_seconds(self, traffic: Traffic) -> float:
        return traffic.read / self.disk.read + traffic.written / self.disk.write

    def to_json(self) -> dict[str, float]:
        """FLOP/s by what is computed, n^3 per second of an eigen-problem, bytes/s by link."""
        speed, disk = self.speed, self.disk
        return {
            "compute": speed.matmul, "float32": speed.matmul32, "float64": speed.matmul64, "eigen": speed.eigh,
            "pcie": speed.upload, "disk_read": disk.read, "disk_write": disk.write,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine with the rates at both ends of the range of seconds."""

    name: str
    source: str
    """Where the rates are from."""
    device: str
    fastest: Rates
    slowest: Rates
    disk_measured: bool = True
    """Whether the rates of the disk are known."""

    def to_json(self) -> dict[str, Any]:
        rates = {"fastest": self.fastest.to_json(), "slowest": self.slowest.to_json()}
        if torch.device(self.device).type == "cpu":
            for table in rates.values():
                del table["pcie"]
        return {"name": self.name, "source": self.source, "device": self.device, **rates}


def this_machine(settings: RunSettings, dtype: torch.dtype) -> Machine:
    """Measured, or as it was within the last month. Needs no place to write."""
    disk = known_disk(Path(settings.work) if settings.work else None)
    speed = known_speed(settings.device, dtype)
    return Machine(
        name="this machine", source="measured", device=settings.device, disk_measured=disk is not None,
        fastest=Rates(speed=speed, disk=disk or FASTEST), slowest=Rates(speed=speed, disk=disk or SLOWEST),
    )  # fmt: skip
