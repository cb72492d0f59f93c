"""Runs a layer, or a part of one, on hidden states: in batches that fit, inside the budget, with threads beside it.

With overlap the next layer is read, the last one written and hidden states fetched while this layer is computed; without it
each happens in turn. The order of every sum is the same either way.

Every pass gives back which tokens [N, L] were out: NaN or infinite somewhere, see `linalg.rows`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from streamlap.accelerator.devices import Accelerator
from streamlap.accelerator.slab import open_slab
from streamlap.errors import BudgetError, StreamlapError, first_line
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.linalg.rows import MOST_OUT, require_few, rows_out
from streamlap.pipeline.streams import HiddenStates, LayerPart
from streamlap.planning.schedule import INNER, Fit, buffers, slab_sizes
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


@dataclass(frozen=True, kw_only=True)
class LayerRunner:
    """One run's moving parts. Made by `start_runner`."""

    stream: ModelStream
    fit: Fit
    staging: Staging
    fetcher: Worker
    writer: Worker
    ladder: Ladder
    progress: Progress
    heap: KeptHeap
    most_out: float = MOST_OUT
    """Share of the tokens that may be out; see `linalg.rows`."""

    def layer(self, index: int, kwargs: Mapping[str, Any], back: bool = False) -> StreamLayer:
        """The layer, read ahead where that overlaps. It must be dropped before the next is asked for, which on the way `back`
        is the one before it."""
        return self.stream.layer(index, kwargs, self.staging, back)

    def require_few(self, where: str, out_NL: torch.Tensor, most: float | None = None) -> torch.Tensor:
        """The same, where they are few enough: at most this share, or the runner's own. Raises NumericalError."""
        require_few(out_NL, self.most_out if most is None else most, where)
        return out_NL

    def enter(self, bank: HiddenBank, tokens_NL: torch.Tensor) -> torch.Tensor:
        """Embed the tokens: generation 0."""
        states = HiddenStates(bank=bank, generation=0)
        return self.take(states, self.stream.embed(tokens_NL), self.stream.family.embedding)

    def take(
        self, states: HiddenStates, batches: Iterator[torch.Tensor], where: str, most: float | None = None
    ) -> torch.Tensor:
        """Write a generation, of which no more than `most` of the tokens may be out."""
        outs: list[torch.Tensor] = []

        def noted(x_BLD: torch.Tensor) -> torch.Tensor:
            outs.append(rows_out(x_BLD))
            return x_BLD

        states.bank.write(states.generation, map(noted, batches), self.writer)
        return self.require_few(where, torch.cat(outs).cpu(), most)

    def together(
        self, states: Sequence[HiddenStates], phase: str, numbers: Sequence[int] | None = None
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Batches of several streams side by side on the device, the next under way while one is in use; of the sequences of
        these numbers alone, where they are given."""
        bank = states[0].bank
        total = -(-(bank.shape_NLD[0] if numbers is None else len(numbers)) // bank.batch)
        rows = zip(*(self._there(state.read(numbers)) for state in states), strict=True)
        for place, row in enumerate(rows):
            self.progress.phase(phase, place, total)
            yield row

    def _there(self, batches: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """What is read of a stream, on the device."""
        tier = self.fit.schedule.tier
        fetched = ahead(batches, self.fetcher) if tier == "disk" else batches
        return fetched if tier == "vram" else upload_ahead(fetched, self.stream.accelerator)

    def observe(self, layer: StreamLayer, states: HiddenStates) -> torch.Tensor:
        """Hidden states through the layer, for those who look at its inputs; the outputs are dropped."""
        outs = [
            rows_out(layer(part))
            for (x_BLD,) in self.together([states], "capture")
            for part in torch.split(x_BLD, self.ladder.micro)
        ]
        return self.require_few(layer.prefix, torch.cat(outs).cpu())

    def carry(
        self, part: LayerPart, index: int, states: HiddenStates, into: HiddenStates,
        watch: Callable[[torch.Tensor], None] | None = None, numbers: Sequence[int] | None = None,
        most: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states through a part of layer `index` into another place, a batch at a time. What comes out is shown to
        `watch`, as many sequences at a time as are in one forward.

        Args: numbers, of the only sequences to carry; most, the share of tokens that may be out, if not the runner's own.
        """

        def step(x_BLD: torch.Tensor) -> torch.Tensor:
            y_BLD = self.ladder.climb("propagate", index, lambda: self.forward(part, x_BLD))
            if watch is not None:
                for some_BLD in torch.split(y_BLD, self.ladder.micro):
                    watch(some_BLD)
            return y_BLD

        with self.claim("propagate"):
            batches = self.together([states], "propagate", numbers)
            return self.take(into, (step(x_BLD) for (x_BLD,) in batches), self.stream.layer_name(index), most)

    def forward(self, part: LayerPart, x_BLD: torch.Tensor) -> torch.Tensor:
        """The output of a part, computed on as many sequences at a time as fit."""
        if len(x_BLD) <= self.ladder.micro:
            return part(x_BLD)
        y_BLD = torch.empty_like(x_BLD, device=self.stream.device)
        for piece, room in zip(*(torch.split(tensor, self.ladder.micro) for tensor in (x_BLD, y_BLD)), strict=True):
            room.copy_(part(piece))
        return y_BLD

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
                   (self.fit.vram, self.fit.schedule.vram, self.stream.accelerator.memory()[0]))  # fmt: skip
        for budget, phases, held in budgets:
            assert set(budget.held) <= set(phases.get("layers", {})), (
                f"claims that outlive layer {index}: {budget.held}"
            )
            coming = max((sum(phases.get(phase, {}).values()) for phase in INNER), default=0)
            # Edits of this layer may be on their way to the disk, and what was summed for the next one waits for it: they are
            # gone before the next solve, or part of it.
            passing = phases.get("capture", {}).get("edits", 0) + phases.get("propagate", {}).get("inputs", 0)
            crept = held - budget.used - passing
            if crept > CREEP_BYTES:
                log.warning("%s: %s more than its claims after layer %d", budget.name, show_size(crept), index)
            if crept > 0 and budget.used + crept + coming > budget.cap:
                raise BudgetError(
                    f"after layer {index} this process holds {show_size(held)} of {budget.name}, {show_size(crept)} more than "
                    f"it claims, and the next layer would break the cap of {show_size(budget.cap)}. Run again to resume."
                )


@contextlib.contextmanager
def start_runner(
    stream: ModelStream, choice: Fit, banks: Sequence[HiddenBank], progress: Progress, most_out: float = MOST_OUT
) -> Iterator[LayerRunner]:
    """The runner for a run over these banks. At the end all is written.

    Args: most_out, the share of the tokens that may go bad.
    """
    schedule, accelerator = choice.schedule, stream.accelerator
    accelerator.limit(choice.vram.cap)
    with contextlib.ExitStack() as stack:
        stack.enter_context(choice.ram.claim(schedule.ram["layers"]))
        stack.enter_context(choice.vram.claim(schedule.vram.get("layers", {})))
        heap = stack.enter_context(KeptHeap(schedule.kept))
        memory = stack.enter_context(host_memory(choice, accelerator, banks))
        for bank in banks:
            stack.callback(bank.close)
        stack.enter_context(progress)
        reader, fetcher, writer = (
            stack.enter_context(Worker(schedule.overlap, thread)) for thread in ("reader", "fetcher", "writer")
        )
        with clear_machine_faults():
            yield LayerRunner(
                stream=stream, fit=choice, fetcher=fetcher, writer=writer, progress=progress,
                staging=Staging(memory, accelerator, reader), ladder=Ladder(schedule.micro, accelerator),
                heap=heap, most_out=most_out,
            )  # fmt: skip


@contextlib.contextmanager
def host_memory(choice: Fit, accelerator: Accelerator, banks: Sequence[HiddenBank]) -> Iterator[list[torch.Tensor]]:
    """The buffers that layers are read into; where a device copies from them and back, in one slab with the batches of the
    banks."""
    work, schedule = choice.work, choice.schedule
    if not accelerator.away:
        yield [torch.empty(work.staged, dtype=torch.uint8) for _ in range(buffers(work, schedule.overlap))]
        return
    with open_slab(accelerator, slab_sizes(work, schedule)) as slab:
        for bank in banks:
            bank.use(slab.room)
        yield [slab.buffer]


def check_sublayers(stream: ModelStream, choice: Fit, tokens_NL: torch.Tensor, writes: bool) -> None:
    """Raise UnsupportedModel where the sub-layers of the first layer of a kind are not that layer; inside the loop's budget.

    See `ModelStream.check_sublayers`.
    """
    stream.accelerator.limit(choice.vram.cap)
    schedule = choice.schedule
    with (
        clear_machine_faults(),
        choice.ram.claim(schedule.ram["layers"]),
        choice.vram.claim(schedule.vram.get("layers", {})),
    ):
        stream.check_sublayers(tokens_NL, writes)


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
