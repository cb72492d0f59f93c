"""What `compress` and `eval` share while layers stream by: threads beside the loop, staging, the hidden states, the budgets.

With overlap the next layer is read, the last one written and hidden states fetched while this layer is computed; without it
each happens in turn. The order of every sum is the same either way.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from streamlap.errors import BudgetError, StreamlapError, first_line
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream, batch_of
from streamlap.linalg.rows import MOST_OUT, require_few, rows_out
from streamlap.planning.schedule import INNER, Fit, Schedule, buffers
from streamlap.store.hidden import HiddenBank
from streamlap.store.staging import Staging
from streamlap.store.transfer import upload_ahead
from streamlap.store.worker import Worker, ahead
from streamlap.system.allocator import KeptHeap
from streamlap.system.budget import Ladder, is_device_fault, is_out_of_memory, show_size
from streamlap.system.meters import peak_ram_bytes, ram_bytes
from streamlap.system.progress import Progress

log = logging.getLogger(__name__)
T = TypeVar("T")

CREEP_BYTES = 128 << 20
"""Memory beyond what is claimed that libraries may come to hold between two layers."""


@dataclass(kw_only=True)
class Engine:
    """One run's moving parts. Made by `start_engine`."""

    stream: ModelStream
    fit: Fit
    hidden: HiddenBank
    staging: Staging
    fetcher: Worker
    writer: Worker
    ladder: Ladder
    progress: Progress
    heap: KeptHeap
    most_out: float = MOST_OUT
    """Share of the tokens that may be out; see `linalg.rows`."""

    def __post_init__(self) -> None:
        self.out_NL = torch.zeros(self.hidden.shape_NLD[:2], dtype=torch.bool)
        """Tokens that were left out of something in the layer in hand."""

    def layer(self, index: int, kwargs: Mapping[str, Any]) -> StreamLayer:
        """The layer, read ahead where that overlaps. It must be dropped before the next is asked for."""
        return self.stream.layer(index, kwargs, self.staging)

    def leave_out(self, where: str, out_NL: torch.Tensor) -> None:
        """Take down which tokens are left out there. Raises NumericalError where they are too many."""
        self.out_NL |= out_NL
        require_few(out_NL, self.most_out, where)

    def enter(self, bank: HiddenBank, tokens_NL: torch.Tensor) -> None:
        """Embed the tokens: generation 0."""
        self._take(bank, 0, self.stream.embed(tokens_NL), self.stream.family.embedding)

    def _take(self, bank: HiddenBank, generation: int, batches: Iterator[torch.Tensor], where: str) -> None:
        """Write a generation, and take down which of its tokens are out."""
        outs: list[torch.Tensor] = []

        def noted(x_BLD: torch.Tensor) -> torch.Tensor:
            outs.append(rows_out(x_BLD))
            return x_BLD

        bank.write(generation, map(noted, batches), self.writer)
        self.leave_out(where, torch.cat(outs).cpu())

    def batches(self, generation: int, phase: str) -> Iterator[torch.Tensor]:
        """Hidden states on the device, the next batch under way while one is in use."""
        return (x_BLD for (x_BLD,) in self.together(self.hidden.read(generation), phase=phase))

    def together(self, *streams: Iterator[torch.Tensor], phase: str) -> Iterator[tuple[torch.Tensor, ...]]:
        """Batches of several streams of hidden states, side by side."""
        on_disk, total = self.fit.schedule.tier == "disk", -(-self.hidden.shape_NLD[0] // self.hidden.batch)
        fetched = (ahead(batches, self.fetcher) if on_disk else batches for batches in streams)
        rows = zip(*(upload_ahead(batches, self.stream.device) for batches in fetched), strict=True)
        for place, row in enumerate(rows):
            self.progress.phase(phase, place, total)
            yield row

    def forward(self, layer: Callable[[torch.Tensor], torch.Tensor], x_BLD: torch.Tensor) -> torch.Tensor:
        """The output of a layer, or of a half, computed on as many sequences at a time as fit."""
        if len(x_BLD) <= self.ladder.micro:
            return layer(x_BLD)
        y_BLD = torch.empty_like(x_BLD, device=self.stream.device)
        for part, room in zip(*(torch.split(tensor, self.ladder.micro) for tensor in (x_BLD, y_BLD)), strict=True):
            room.copy_(layer(part))
        return y_BLD

    def observe(self, layer: StreamLayer, index: int) -> None:
        """Generation `index` through the layer, for those who look at its inputs; the outputs are dropped."""
        batches = self.batches(index, "capture")
        parts = (part for x_BLD in batches for part in torch.split(x_BLD, self.ladder.micro))
        self.leave_out(layer.prefix, torch.cat([rows_out(layer(part)) for part in parts]).cpu())

    def advance(self, layer: StreamLayer, index: int) -> None:
        """Generation `index` through the layer into generation `index + 1`, a batch at a time."""
        with self.claim("propagate"):
            self.carry(layer, index, self.hidden.read(index), self.hidden, index + 1)

    def carry(
        self, part: Callable[[torch.Tensor], torch.Tensor], index: int, source: Iterator[torch.Tensor],
        target: HiddenBank, generation: int,
    ) -> None:  # fmt: skip
        """Every batch of `source` through a part of layer `index` into a generation of `target`."""

        def step(x_BLD: torch.Tensor) -> torch.Tensor:
            return self.ladder.climb("propagate", index, lambda: self.forward(part, x_BLD))

        batches = self.together(source, phase="propagate")
        self._take(target, generation, (step(x_BLD) for (x_BLD,) in batches), self.stream.layer_name(index))

    def run(self, phase: str, index: int, attempt: Callable[[], T]) -> T:
        """`attempt` inside its claim, again where memory ran out and something could give way."""
        with self.claim(phase):
            return self.ladder.climb(phase, index, attempt)

    @contextlib.contextmanager
    def claim(self, phase: str) -> Iterator[None]:
        schedule = self.fit.schedule
        self.heap.trim()
        with self.fit.ram.claim(schedule.ram.get(phase, {})), self.fit.vram.claim(schedule.vram.get(phase, {})):
            yield

    def require_baseline(self, index: int) -> None:
        """Raise BudgetError where memory crept up between layers so far that the next one would break a cap."""
        self.heap.trim()
        if (most := peak_ram_bytes()) > self.fit.ram.cap:
            log.warning("layer %d took %s of RAM, more than the cap", index, show_size(most))
        # Of what is kept though it was freed only so much is there, whatever is claimed for it.
        kept = self.heap.limit and self.heap.limit - self.heap.freed
        budgets = ((self.fit.ram, self.fit.schedule.ram, ram_bytes() + kept),
                   (self.fit.vram, self.fit.schedule.vram, self._allocated()))  # fmt: skip
        for budget, phases, held in budgets:
            assert set(budget.held) <= set(phases.get("layers", {})), (
                f"claims that outlive layer {index}: {budget.held}"
            )
            coming = max((sum(phases.get(phase, {}).values()) for phase in INNER), default=0)
            # Edits of this layer may be on their way to the disk; they are gone before the next solve.
            crept = held - budget.used - phases.get("capture", {}).get("edits", 0)
            if crept > CREEP_BYTES:
                log.warning("%s: %s more than its claims after layer %d", budget.name, show_size(crept), index)
            if crept > 0 and budget.used + crept + coming > budget.cap:
                raise BudgetError(
                    f"after layer {index} this process holds {show_size(held)} of {budget.name}, {show_size(crept)} more than "
                    f"it claims, and the next layer would break the cap of {show_size(budget.cap)}. Run again to resume."
                )

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.stream.device) if self.stream.device.type == "cuda" else 0


@contextlib.contextmanager
def start_engine(
    stream: ModelStream, choice: Fit, hidden: HiddenBank, name: str, first: int = 0, seconds: tuple[float, ...] = (),
    beside: tuple[HiddenBank, ...] = (), most_out: float = MOST_OUT,
) -> Iterator[Engine]:  # fmt: skip
    """The engine for a run from layer `first`; `seconds` are those of the layers done before, `beside` the banks that go
    with `hidden`, `most_out` the share of the tokens that may go bad. At the end all is written."""
    schedule, device = choice.schedule, stream.device
    limit_vram(choice, device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(choice.ram.claim(schedule.ram["layers"]))
        stack.enter_context(choice.vram.claim(schedule.vram.get("layers", {})))
        heap = stack.enter_context(KeptHeap(schedule.kept))
        for bank in (hidden, *beside):
            stack.callback(bank.close)
        progress = stack.enter_context(Progress(name, stream.depth, first, seconds))
        reader, fetcher, writer = (
            stack.enter_context(Worker(schedule.overlap, thread)) for thread in ("reader", "fetcher", "writer")
        )
        with clear_machine_faults():
            yield Engine(
            stream=stream, fit=choice, hidden=hidden, fetcher=fetcher, writer=writer, progress=progress,
            staging=Staging(choice.work.staged, buffers(choice.work, schedule.overlap), device, reader),
            ladder=Ladder(schedule.micro, device), heap=heap, most_out=most_out,
        )  # fmt: skip


@contextlib.contextmanager
def clear_machine_faults() -> Iterator[None]:
    """Memory that ran out where nothing can give way is a BudgetError like any other; a GPU that fails is a StreamlapError."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise BudgetError(
                f"out of memory ({first_line(error)}). What is committed is kept: run again with less beside it on the "
                "machine, or with a lower --max-ram or --max-vram, so that less is held at a time."
            ) from error
        if is_device_fault(error):
            raise StreamlapError(
                f"the GPU failed ({first_line(error)}). What is committed is kept: run again to resume once the driver lists "
                "the device again (nvidia-smi); this process cannot use it any more."
            ) from error
        raise


def limit_vram(choice: Fit, device: torch.device) -> None:
    """Have torch itself keep the cap: an allocation beyond it fails as if the device were full."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, choice.vram.cap / total), device)


def open_bank(
    stream: ModelStream, tokens_NL: torch.Tensor, schedule: Schedule, folder: Path | None, name: str = "hidden"
) -> HiddenBank:
    """Hidden states in `folder`, if there is one, and in the memory that the schedule gives them."""
    sequences, length = tokens_NL.shape
    cache = {"vram": stream.device, "ram": torch.device("cpu"), "disk": None}[schedule.tier]
    return HiddenBank(
        (sequences, length, stream.width), stream.dtype, batch_of(length),
        folder=folder, cache=cache, pinned=stream.device.type == "cuda", name=name,
    )  # fmt: skip
