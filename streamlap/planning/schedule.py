"""How much memory a run takes, phase by phase, and the schedule that fits it under the caps. From headers alone.

`plan` prints these numbers and `compress` and `eval` claim them from their budgets while they run; no size is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from streamlap.accelerator.slab import SlabSizes, paged
from streamlap.errors import BudgetError
from streamlap.families.stream import batch_of
from streamlap.planning.workload import Workload
from streamlap.settings import Caps
from streamlap.store.hidden import IN_FLIGHT
from streamlap.store.source import CHUNK_BYTES
from streamlap.system.allocator import CAN_KEEP
from streamlap.system.budget import MemoryBudget, free_ram, show_size, vram_state, warm_up
from streamlap.system.meters import ram_bytes

RUNTIME_BYTES = 96 << 20
"""What torch and its libraries take when they first compute (thread stacks, kernels, small blocks: some 64 MiB), and room for
what they may come to hold later on: else the least cap that a message names could be too little by a MiB."""

KEEPS, KEPT_BYTES = (1.25, 0.5), 256 << 20
"""Freed memory that may stay, as shares of what a solve holds, and the least that it is worth while for."""

Parts = Mapping[str, int]
"""Purpose -> bytes."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a run goes about its work. It decides time and memory; the result is the same, bit by bit, but for forwards so short
    that a processor rounds them otherwise, see `schedules`."""

    overlap: bool
    """Read the next layer, write the last one and move hidden states beside the computation."""
    tier: str
    """Where the newest hidden states stay: vram, ram or disk."""
    micro: int
    """Sequences in one forward."""
    ram: Mapping[str, Parts]
    """Phase -> purpose -> bytes. "layers" holds beside each of `INNER`, every other phase stands alone."""
    vram: Mapping[str, Parts]
    between: str = ""
    """Where those between the sub-layers of a layer stay, if that is not `tier`."""
    kept: int = 0
    """Freed memory that stays with the process while layers stream by, at most."""


INNER = ("capture", "solve", "refine", "propagate")
"""Phases inside the loop over layers."""


def peak(phases: Mapping[str, Parts]) -> int:
    """The most that is held at one time."""
    sums = {phase: sum(parts.values()) for phase, parts in phases.items()}
    inner = max((sums.get(phase, 0) for phase in INNER), default=0)
    outer = [count for phase, count in sums.items() if phase not in (*INNER, "layers")]
    return max([sums.get("layers", 0) + inner, *outer])


def buffers(work: Workload, overlap: bool) -> int:
    """Staging buffers: two where a layer lives in one while the next is read into the other."""
    return 2 if overlap and not work.converts and work.device.type == "cpu" else 1


def make_schedule(
    work: Workload, overlap: bool, tier: str, micro: int, keeps: float = 0.0, between: str = ""
) -> Schedule:
    """The schedule with these choices, and what it holds. On a CPU freed memory may stay: as much as `keeps` solves hold."""
    streams = work.between if between == "ram" else work.streams * (tier != "disk")
    places = -(-work.sequences // batch_of(work.length)) * streams
    make = _cpu_schedule if work.device.type == "cpu" else _gpu_schedule
    made = make(work, overlap, tier, micro, places)
    kept = max(KEPT_BYTES, int(keeps * work.solve)) if keeps else 0
    ram = {**made.ram, "layers": {**made.ram["layers"], **_optional({"freed memory": kept})}}
    return replace(made, ram=ram, between=between, kept=kept)


def _cpu_schedule(work: Workload, overlap: bool, tier: str, micro: int, places: int) -> Schedule:
    bank, batches = _hidden(work, overlap, tier, work.batch(batch_of(work.length)), places)
    if bank:
        bank["hidden states"] += work.partial_bytes
    after = {"edits": work.edits, "activations": work.activations(micro, work.inner_after)}
    ram = {
        "layers": {
            "staging": work.staged * buffers(work, overlap), "layer": work.computed * work.converts, **bank, **batches,
        },
        "capture": {"activations": work.activations(micro, work.inner), "edits": work.edits * overlap},
        "solve": {"solve": _solve(work, micro)},
        "refine": work.refinement,
        "propagate": {**after, "writer": work.copied, **_optional({"inputs": work.inputs})},
        "head": {"head": work.head, **bank, **batches} if work.head else {},
    }  # fmt: skip
    return Schedule(overlap=overlap, tier=tier, micro=micro, ram=ram, vram={})


def _gpu_schedule(work: Workload, overlap: bool, tier: str, micro: int, places: int) -> Schedule:
    full = work.batch(batch_of(work.length))
    slab = {"staging": paged(work.staged)}  # of exact size, see `accelerator.slab`; every part begins at a page
    if tier != "vram" and places:
        rooms = work.partial * -(-work.partial_sequences // batch_of(work.length))  # all of one size
        slab["hidden states"] = (places + rooms) * paged(full)
    slab["hidden batches"] = _on_their_way(work, overlap, tier) * paged(full)
    ram = {
        "layers": slab,
        "solve": _optional({"waiting": work.waiting}),
        "propagate": {"writer": CHUNK_BYTES},
        "head": {"head": work.head_stored, **slab},  # as long as something of a slab is in use all of it is there
    }
    resident = {"hidden states": places * full + work.partial_bytes} if tier == "vram" else {}
    vram = {
        "layers": {
            "layer": work.computed,
            "upload": work.staged * work.converts,
            "hidden batches": (4 + 2 * (work.streams > 1)) * full,
            **resident,
        },
        "capture": {"activations": work.activations(micro, work.inner), "edits": work.edits * overlap},
        "solve": {"solve": _solve(work, micro)},
        "refine": work.refinement,
        "propagate": {
            "edits": work.edits,
            "activations": work.activations(micro, work.inner_after),
            **_optional({"inputs": work.inputs}),
        },
        "head": {"head": work.head, **resident, **_optional({"hidden batches": 3 * full * (work.gradients > 0)})},
    }
    return Schedule(overlap=overlap, tier=tier, micro=micro, ram=ram, vram=vram)


def _optional(parts: Parts) -> Parts:
    """Those of which there is something."""
    return {purpose: count for purpose, count in parts.items() if count}


def _solve(work: Workload, micro: int) -> int:
    """What a solve holds; one beside the dense model goes back to the streams between its steps."""
    return max(work.solve, work.capture + work.activations(micro, work.inner) if work.capture else 0)


def _hidden(work: Workload, overlap: bool, tier: str, batch: int, places: int) -> tuple[dict[str, int], dict[str, int]]:
    """The generations that memory keeps, in so many places for a batch, and the batches on their way: read (in use, and the
    next), computed, written. Of two streams both are read, and one is between its sub-layers."""
    two = work.streams > 1
    on_their_way = 3 + 3 * two + IN_FLIGHT * overlap if tier == "disk" else two
    return dict(_optional({"hidden states": places * batch})), {"hidden batches": batch * on_their_way}


def _on_their_way(work: Workload, overlap: bool, tier: str) -> int:
    """Batches between the host and a device: one on its way back and those that wait for the disk, and from the disk one for
    each stream that is read, two where the next is read ahead. In RAM they wait where they stay, and what is picked of two
    streams, while nothing comes back, takes one each."""
    streams = min(work.streams, 2)
    if tier == "ram":
        return streams
    return (1 + overlap) * streams * (tier == "disk") + 1 + IN_FLIGHT * overlap


def slab_sizes(work: Workload, schedule: Schedule) -> SlabSizes:
    """The host memory of a run on a device: what `schedule` claims for it, to the byte."""
    room, kept = paged(work.batch(batch_of(work.length))), schedule.ram["layers"].get("hidden states", 0)
    rooms = _on_their_way(work, schedule.overlap, schedule.tier) + kept // room
    return SlabSizes(buffer=paged(work.staged), room=room, rooms=rooms)


def schedules(work: Workload, overlap: bool) -> Iterator[Schedule]:
    """From the fastest to the leanest. Shorter forwards come last: they alone may move last bits, on some devices."""
    full = min(batch_of(work.length), work.sequences)
    if work.device.type == "cpu" and work.capture and CAN_KEEP:
        for keeps in KEEPS:
            yield make_schedule(work, overlap, "ram", full, keeps)
    kinds = [("vram", "")] * (work.device.type == "cuda") + [("ram", "")]
    disk = [("disk", "ram")] * bool(work.between) + [("disk", "")]
    kinds += disk * work.disk
    least = disk if work.disk else kinds[-1:]
    for tier, between in kinds:
        yield make_schedule(work, overlap, tier, full, between=between)
    micro = full
    while True:
        if micro < full or overlap:
            for tier, between in least:
                yield make_schedule(work, False, tier, micro, between=between)
        if micro == 1:
            return
        micro = -(-micro // 2)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A schedule with the budgets that hold it."""

    work: Workload
    schedule: Schedule
    ram: MemoryBudget
    vram: MemoryBudget

    @property
    def peak_ram(self) -> int:
        return self.ram.base + peak(self.schedule.ram)

    @property
    def peak_vram(self) -> int:
        return self.vram.base + peak(self.schedule.vram) if self.schedule.vram else 0

    @property
    def fits(self) -> bool:
        return self.peak_ram <= self.ram.cap and self.peak_vram <= self.vram.cap


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a run may take, and what its process holds of that when it begins. Bytes."""

    ram: int
    ram_held: int
    vram: int = 0
    vram_held: int = 0


def memory_here(device: torch.device) -> Memory:
    """Of this process on this machine, now."""
    warm_up(device)
    held = ram_bytes()
    allocated, free = vram_state(device)
    return Memory(ram=held + free_ram(), ram_held=held, vram=allocated + free, vram_held=allocated)


def fit(work: Workload, caps: Caps, overlap: bool = True, memory: Memory | None = None) -> Fit:
    """The fastest schedule inside the caps, or the leanest where none is. See `require_fit`.

    Args: memory, that of the machine; None is what is here.
    """
    there = memory or memory_here(work.device)
    libraries = RUNTIME_BYTES if work.device.type == "cuda" else 0
    ram = MemoryBudget(_least(caps.ram, there.ram), there.ram_held + RUNTIME_BYTES, "RAM")
    vram = MemoryBudget(_least(caps.vram, there.vram), there.vram_held + libraries, "VRAM")
    for schedule in schedules(work, overlap):
        choice = Fit(work=work, schedule=schedule, ram=ram, vram=vram)
        if choice.fits:
            break
    return choice


def _least(cap: int | None, there: int) -> int:
    return there if cap is None else min(cap, there)


def require_fit(choice: Fit, caps: Caps) -> None:
    """Raise BudgetError with the smallest caps that would do where even the leanest schedule does not fit."""
    if choice.fits:
        return
    raise BudgetError(" ".join(advice(choice, caps)))


def advice(choice: Fit, caps: Caps) -> Iterator[str]:
    """What does not fit, what takes the room, and which knob to turn."""
    rows = [
        ("RAM", "--max-ram", choice.ram, caps.ram, choice.peak_ram, choice.schedule.ram),
        ("VRAM", "--max-vram", choice.vram, caps.vram, choice.peak_vram, choice.schedule.vram),
    ]
    for name, flag, budget, cap, wanted, phases in rows:
        if wanted > budget.cap:
            asked = cap is not None and cap <= budget.cap
            seen = f"{flag} is {show_size(cap)}" if asked and cap else f"{show_size(budget.cap)} of {name} are there"
            parts = ", ".join(f"{what} {show_size(count)}" for what, count in largest(phases, budget.base))
            way = f"give {flag} {least_cap(wanted)}" if asked else "free some, or take a larger machine"
            yield f"{seen}; the leanest way through this model takes {show_size(wanted)} ({parts}): {way}."
    if not choice.work.disk and (needed := least_ram_with_disk(choice)) < choice.peak_ram:
        yield f"With --work FOLDER hidden states go to the disk there, and {least_cap(needed)} of RAM will do."
    if not choice.fits:
        yield "A shorter --length takes less too."


def least_ram_with_disk(choice: Fit) -> int:
    """What the leanest schedule would take if hidden states could lie on the disk."""
    return choice.ram.base + min(peak(row.ram) for row in schedules(replace(choice.work, disk=True), False))


def least_cap(wanted: int) -> str:
    """The smallest size, in hundredths of a GiB, that holds `wanted` bytes: what --max-ram must be at least."""
    return f"{math.ceil(wanted / 2**30 * 100) / 100:.2f}GiB"


def largest(phases: Mapping[str, Parts], base: int) -> list[tuple[str, int]]:
    """Purposes and bytes of the moment at which most is held, largest first."""
    moments = [
        {"process": base, **phases.get("layers", {}), **phases[phase]}
        if phase in INNER
        else {"process": base, **phases[phase]}
        for phase in phases
    ]
    moment = max(moments, key=lambda parts: sum(parts.values()))
    return sorted(((what, count) for what, count in moment.items() if count), key=lambda row: -row[1])
