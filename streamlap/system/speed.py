"""How fast this machine computes: what a forecast of seconds divides FLOP by. A second or two to measure, kept for a month.

Each rate is the best of a few tries, for whatever comes between makes a try slower and never faster. The random numbers have
a generator of their own, so that measuring moves no other.
"""

from __future__ import annotations

import contextlib
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamlap.accelerator.devices import accelerator_of
from streamlap.accelerator.slab import SlabSizes, open_slab
from streamlap.linalg.lowrank import eigh
from streamlap.linalg.products import product
from streamlap.system.rate_cache import kept

TRIES = 4
PATIENCE = 0.5
"""Seconds after which a computation is not tried again, however slow."""

CPU_MATMUL = {"tokens": 512, "columns": 2048, "rows": 2048}
"""Enough for the full rate of a CPU, in milliseconds. A GPU needs the larger default."""
UPLOAD_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Rates of a machine."""

    matmul: float
    """FLOP/s of a forward's product in the compute dtype on the device; a multiply-add is two."""
    matmul64: float
    """FLOP/s of a solver's product in float64."""
    matmul32: float
    """FLOP/s of the same in float32."""
    eigh: float
    """n^3 per second of an eigen-decomposition of n x n numbers in float64 on the device, with the solver's threads."""
    upload: float
    """Bytes/s from pinned memory to the device; on a CPU from memory to memory."""


def known_speed(device: str, dtype: torch.dtype) -> Speed:
    """`measure`, or what it gave within the last month for this device, dtype, number of threads and torch."""
    return kept(_key(device, dtype), Speed, lambda: measure(device, dtype))


def measure(device: str, dtype: torch.dtype) -> Speed:
    """All rates but the disk's. Takes a second."""
    sizes: dict[str, Any] = CPU_MATMUL if torch.device(device).type == "cpu" else {}
    return Speed(
        matmul=matmul_rate(device, dtype, **sizes),
        matmul64=matmul_rate(device, torch.float64, multiply=product, **sizes),
        matmul32=matmul_rate(device, torch.float32, multiply=product, **sizes),
        eigh=eigh_rate(device),
        upload=upload_rate(device),
    )


def matmul_rate(
    device: str, dtype: torch.dtype, tokens: int = 2048, columns: int = 4096, rows: int = 4096,
    multiply: Callable[..., torch.Tensor] = torch.matmul,
) -> float:  # fmt: skip
    """FLOP/s of a linear of shape [rows, columns] on that many tokens."""
    x, w = (_random(device, count, columns).to(dtype) for count in (tokens, rows))
    return 2 * tokens * columns * rows / _seconds(lambda: multiply(x, w.T), device)


def eigh_rate(device: str, size: int = 2048, dtype: torch.dtype = torch.float64) -> float:
    """size^3 per second of an eigen-decomposition as the solvers do it."""
    x = _random(device, size, size).to(dtype)
    gram = x @ x.T
    return size**3 / _seconds(lambda: eigh(gram), device)


def upload_rate(device: str) -> float:
    """Bytes/s into the device's memory; from pinned memory, unless the device is the CPU itself."""
    accelerator = accelerator_of(device)
    with open_slab(accelerator, SlabSizes(buffer=UPLOAD_BYTES)) as slab:
        source = slab.buffer.fill_(1)  # so that the pages are there
        target = torch.empty_like(source, device=accelerator.device)
        return UPLOAD_BYTES / _seconds(lambda: target.copy_(source, non_blocking=accelerator.away), device)


def _seconds(work: Callable[[], object], device: str) -> float:
    """The shortest time of one call, of up to `TRIES`."""
    if torch.device(device).type != "cpu":
        work()  # starts the device's libraries and clocks, which may take longer than `PATIENCE`
    _synchronise(device)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < TRIES and (not times or time.perf_counter() - begun < PATIENCE):
        start = time.perf_counter()
        work()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronise(device: str) -> None:
    if torch.device(device).type != "cpu":
        accelerator_of(device).synchronize()


def _random(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)


def _key(device: str, dtype: torch.dtype) -> str:
    parts = [_cpu_model(), f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", str(dtype)]
    return ", ".join(filter(None, [*parts, accelerator_of(device).model()]))


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return platform.processor() or platform.machine()
