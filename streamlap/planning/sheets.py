"""The figures of a machine that is not there, and what a plan takes of them: peak rates make the lower end of the range of
seconds, a share of them the upper one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamlap.errors import RecipeError
from streamlap.linalg.lowrank import SOLVER_THREADS
from streamlap.planning.machine import Machine, Rates
from streamlap.planning.schedule import Memory
from streamlap.settings import RunSettings
from streamlap.system.device import check_device_name
from streamlap.system.disk_speed import Disk
from streamlap.system.meters import ram_bytes
from streamlap.system.speed import Speed

SHARE = 0.5
"""Of the rates of a sheet, at the upper end of the range: sheets have peaks, which a run does not reach."""

EIGEN_FLOPS = 9
"""Operations of an eigen-decomposition with its vectors, as multiples of n^3."""
GPU_EIGEN = (0.2, 0.02)
"""Shares of a GPU's float32 rate at which it is taken to decompose, at both ends; not measured. Half of the operations are
bound by memory, and many steps are too small for a GPU. At the upper end it is the share of the float64 rate where that is
less."""

SYSTEM_BYTES = 1 << 30
"""RAM that the system and other programs keep."""
CUDA_RAM_BYTES = 3 << 30
"""RAM that a process takes for CUDA, cuBLAS and cuSOLVER once they are loaded: 2 to 3 GiB."""
CUDA_CONTEXT_BYTES = 1 << 29
"""VRAM that CUDA keeps for itself, beside what torch gives out: some 0.5 GiB."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Rates of a CPU or a GPU."""

    flops: Mapping[str, float]
    """Compute dtype -> FLOP/s; float32 and float64 are there in any case."""
    eigen: tuple[float, float]
    """n^3 per second of an eigen-decomposition, at both ends."""
    memory: int = 0
    """Of a GPU."""
    pcie: float = math.inf
    """Bytes/s to a GPU; what runs on the CPU goes nowhere."""

    @classmethod
    def of_cpu(cls, flops: Mapping[str, float], cores: int, share: float) -> Processor:
        """Decompositions take as many of its cores as the solvers have threads."""
        rate = flops["float64"] * min(1.0, SOLVER_THREADS / cores) / EIGEN_FLOPS
        return cls(flops=flops, eigen=(rate, share * rate))

    @classmethod
    def of_gpu(cls, flops: Mapping[str, float], memory: int, pcie: float, share: float) -> Processor:
        fast, slow = (part * flops["float32"] / EIGEN_FLOPS for part in GPU_EIGEN)
        eigen = (fast, min(slow, share * flops["float64"] / EIGEN_FLOPS))
        return cls(flops=flops, eigen=eigen, memory=memory, pcie=pcie)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The figures of a machine."""

    name: str
    source: str
    share: float
    """Of the rates, at the upper end."""
    ram: int
    disk: Disk
    cpu: Processor | None
    gpu: Processor | None

    @property
    def vram(self) -> int:
        return self.gpu.memory if self.gpu else 0

    @property
    def bfloat16(self) -> bool:
        """Whether its CPU multiplies in it by itself."""
        return self.cpu is not None and "bfloat16" in self.cpu.flops

    def settled(self, settings: RunSettings) -> RunSettings:
        """The same on its GPU, or on its CPU where that is asked for or there is no GPU. Raises RecipeError for others."""
        check_device_name(settings.device)
        there = [device for device, unit in (("cuda:0", self.gpu), ("cpu", self.cpu)) if unit]
        asked = {"auto": there[0], "cuda": "cuda:0"}.get(settings.device, settings.device)
        if asked not in there:
            raise RecipeError(
                f"device is {settings.device!r}, and machine {self.name} has figures of {' and '.join(there)}; use one of them."
            )
        return replace(settings, device=asked)

    def unit(self, device: str) -> Processor:
        """What a run on that device computes with; `settled` has looked whether it is there."""
        unit = self.cpu if device == "cpu" else self.gpu
        assert unit, "settled"
        return unit

    def memory(self, device: str) -> Memory:
        """What a run on that device finds; this process stands for that of the run."""
        ram, held = self.ram - SYSTEM_BYTES, ram_bytes()
        if device == "cpu":
            return Memory(ram=ram, ram_held=held)
        return Memory(ram=ram, ram_held=held + CUDA_RAM_BYTES, vram=self.vram - CUDA_CONTEXT_BYTES)

    def machine(self, device: str, dtype: torch.dtype) -> Machine:
        """The rates of a run on that device in that dtype. Raises RecipeError where there is none."""
        unit, name = self.unit(device), str(dtype).removeprefix("torch.")
        if name not in unit.flops:
            known = " or ".join(kind for kind in unit.flops if kind != "float64")
            raise RecipeError(
                f"machine {self.name} has no rate for {name} on {device}; give --dtype {known}, or a file with that rate."
            )
        fastest, slowest = (
            Rates(
                speed=Speed(
                    matmul=share * unit.flops[name], matmul64=share * unit.flops["float64"],
                    matmul32=share * unit.flops["float32"], eigh=eigen, upload=share * unit.pcie,
                ),
                disk=Disk(read=share * self.disk.read, write=share * self.disk.write),
            )
            for share, eigen in zip((1.0, self.share), unit.eigen, strict=True)
        )  # fmt: skip
        return Machine(name=self.name, source=self.source, device=device, fastest=fastest, slowest=slowest)

    def to_json(self) -> dict[str, Any]:
        """As its file has it, in bytes and in units a second."""
        return {
            "name": self.name, "source": self.source, "share": self.share, "ram_bytes": self.ram, "vram_bytes": self.vram,
            "disk": {"read": self.disk.read, "write": self.disk.write},
            "cpu": dict(self.cpu.flops) if self.cpu else None,
            "gpu": {"pcie": self.gpu.pcie, **self.gpu.flops} if self.gpu else None,
        }  # fmt: skip
