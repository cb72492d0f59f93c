"""The machine that a plan counts seconds for: rates of its processor and of its disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from streamlap.planning.forecast import LayerPlan
from streamlap.settings import RunSettings
from streamlap.system.disk_speed import Disk, known_disk
from streamlap.system.speed import Speed, known_speed

FASTEST, SLOWEST = Disk(read=5e9, write=5e9), Disk(read=1e8, write=1e8)
"""What a disk that was not measured lies between: a good NVMe drive; a hard disk, or a busy network mount."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of a machine, measured."""

    speed: Speed
    disk: Disk | None
    """None where it could not be measured."""
    uploads: bool
    """Whether a layer goes to a device of its own."""

    @property
    def fastest_disk(self) -> Disk:
        return self.disk or FASTEST

    @property
    def slowest_disk(self) -> Disk:
        return self.disk or SLOWEST

    def layer_seconds(self, layer: LayerPlan, moved: tuple[int, int], disk: Disk, overlap: bool) -> float:
        """The least that a layer takes which reads and writes so many bytes, with such a disk. What overlaps takes as long as
        the longer of the two."""
        speed, (read, write) = self.speed, moved
        compute = layer.flops / speed.matmul + layer.flops64 / speed.matmul64 + layer.flops32 / speed.matmul32
        compute += sum(size**3 for size in layer.decompositions) / speed.eigh
        waiting = read / disk.read + write / disk.write
        upload = layer.source_bytes / speed.upload if self.uploads else 0.0
        return upload + (max(compute, waiting) if overlap else compute + waiting)


def this_machine(settings: RunSettings, dtype: torch.dtype) -> Machine:
    """Measured, or as it was within the last month. Needs no place to write."""
    disk = known_disk(Path(settings.work) if settings.work else None)
    uploads = torch.device(settings.device).type != "cpu"
    return Machine(speed=known_speed(settings.device, dtype), disk=disk, uploads=uploads)
