"""Memory as a budget: how much there is, who holds how much of it, and what gives way where it is not enough."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from streamlap.accelerator import vram
from streamlap.accelerator.devices import Accelerator, accelerator_of
from streamlap.errors import BudgetError, RecipeError, first_line, shown
from streamlap.system.allocator import trim_heap
from streamlap.system.amounts import parse_amount
from streamlap.system.cgroups import memory_room

log = logging.getLogger(__name__)
T = TypeVar("T")

UNITS = {"": 1, "B": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for ending, base in (("", 1024), ("I", 1024), ("IB", 1024), ("B", 1000))
}
"""As GNU tools read them: G and GiB are 2^30 bytes, GB is 10^9."""

OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
"""What libraries say in errors of other kinds."""


def parse_size(text: str | int | None, what: str) -> int | None:
    """`8GiB`, `8G`, `500MB` or a number of bytes -> bytes; None stays None. Raises RecipeError that names `what`."""
    if text is None:
        return None
    if size := parse_amount(text, UNITS):
        return size
    raise RecipeError(f"{what} is {shown(text)}; wanted a size like 8GiB or 8G (2^30 bytes each), or 8GB (10^9 bytes).")


def show_size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def free_ram() -> int:
    """Bytes that this process may still take: what the system has, or what its control group leaves, if that is less."""
    return max(0, min([psutil.virtual_memory().available, *memory_room()]))


def vram_state(device: torch.device) -> tuple[int, int]:
    """(bytes that torch has given out, bytes that it still can) of a device's own memory; zeros on a CPU."""
    return accelerator_of(device).memory()


def warm_up(device: torch.device) -> None:
    """Have a device's libraries loaded, which takes RAM by the hundred MiB, before what is held is measured."""
    accelerator_of(device).warm_up()


class MemoryBudget:
    """The one purse of a run. Whatever lives longer than a moment is claimed here, under its purpose, before it is made.

    Args: cap, bytes in all; base, what the process held before (Python, torch, the meta model).
    """

    def __init__(self, cap: int, base: int = 0, name: str = "RAM") -> None:
        self.cap, self.base, self.name = cap, base, name
        self.held: dict[str, int] = {}

    @property
    def used(self) -> int:
        return self.base + sum(self.held.values())

    @contextlib.contextmanager
    def claim(self, parts: Mapping[str, int]) -> Iterator[None]:
        """Hold `parts` (purpose -> bytes) for the block. Raises BudgetError where they do not fit, before they are held."""
        if self.used + sum(parts.values()) > self.cap:
            raise BudgetError(
                f"{', '.join(parts)} take {show_size(sum(parts.values()))} of {self.name}, and {show_size(self.used)} of the "
                f"{show_size(self.cap)} allowed are held ({self._table()}). Raise the cap."
            )
        self._add(parts, 1)
        try:
            yield
        finally:
            self._add(parts, -1)

    def _add(self, parts: Mapping[str, int], sign: int) -> None:
        for purpose, count in parts.items():
            self.held[purpose] = self.held.get(purpose, 0) + sign * count
        self.held = {purpose: count for purpose, count in self.held.items() if count}

    def _table(self) -> str:
        return ", ".join(
            f"{purpose} {show_size(count)}" for purpose, count in {"process": self.base, **self.held}.items()
        )


class Ladder:
    """What gives way where memory runs out all the same: fewer sequences a forward, cached blocks, the device of the solve.

    A step, once taken, holds for the rest of the run. Statistics and solves go in blocks of rows in any case.
    """

    def __init__(self, micro: int, accelerator: Accelerator) -> None:
        self.micro, self.solve_device, self._away = micro, accelerator.device, accelerator.away
        self.steps: list[tuple[int, str]] = []

    def taken(self, layer: int) -> tuple[str, ...]:
        """The steps taken in this layer."""
        return tuple(step for index, step in self.steps if index == layer)

    def climb(self, phase: str, layer: int, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, which is called again after each step. Raises BudgetError when there is none left."""
        tried: set[str] = set()
        while True:
            try:
                return attempt()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Not inside the handler: the error's traceback holds the tensors of the attempt.
            step = self._give_way(phase, tried, reason)
            tried.add(step)
            self.steps.append((layer, f"layer {layer}, {phase}: {step}"))
            log.warning("out of memory in layer %d, %s: %s", layer, phase, step)
            free_caches()

    def _give_way(self, phase: str, tried: set[str], reason: str) -> str:
        if phase != "solve" and self.micro > 1:
            self.micro = -(-self.micro // 2)
            return f"{self.micro} sequences a forward"
        if "caches freed" not in tried:
            return "caches freed"
        if phase == "solve" and self._away:
            self.solve_device, self._away = torch.device("cpu"), False
            return "solve on the CPU"
        raise BudgetError(
            f"out of memory in {phase} after every fallback ({reason}). What is committed is kept: run again with a shorter "
            "--length in a new folder, with less beside it on the machine, or on a larger one."
        )


def free_caches() -> None:
    gc.collect()
    trim_heap()
    vram.release_cached()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get memory, on whatever device."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(word in str(error) for word in OUT_OF_MEMORY))


def is_device_fault(error: BaseException) -> bool:
    """Whether a GPU, or its driver, stopped working. Memory that ran out is none."""
    kinds = (
        getattr(torch, "AcceleratorError", RuntimeError),
        RuntimeError,
    )  # the first is younger than the oldest torch
    return isinstance(error, kinds) and "CUDA" in str(error) and not is_out_of_memory(error)


def existing_ancestor(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def require_disk(path: Path, wanted: int, purpose: str) -> None:
    """Raise BudgetError unless the file system under `path` has `wanted` bytes free."""
    free = shutil.disk_usage(existing_ancestor(path)).free
    if free < wanted:
        raise BudgetError(
            f"{purpose} takes {wanted:,} bytes under {path}, and {free:,} are free. Free some space, choose another "
            "folder or --work, or use fewer --samples."
        )
