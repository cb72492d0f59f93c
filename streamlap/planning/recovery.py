"""What recovery holds: the compressed model whole, adapters with their moments, what one window leaves for its gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamlap.errors import BudgetError
from streamlap.families.stream import ModelStream
from streamlap.methods.trained.recovery import Recovery
from streamlap.planning.schedule import RUNTIME_BYTES, least_cap
from streamlap.planning.workload import GRAPH_HEADS, GRAPH_INNER, GRAPH_SCORES, GRAPH_WIDTHS, whole_scores
from streamlap.settings import Caps
from streamlap.system.budget import free_ram, show_size, vram_state
from streamlap.system.meters import ram_bytes

ADAPTER_BYTES = 20
"""Of a number in an adapter, in float32: itself, its gradient, two moments of AdamW, and the best so far."""
LOGIT_COPIES = 3
"""Of the logits, in float32, beside themselves."""
KEPT_BYTES = 6
"""Of a token that is kept of the dense model's predictions."""


@dataclass(frozen=True, kw_only=True)
class RecoveryNeeds:
    """Bytes, by purpose."""

    model: int
    adapters: int
    graph: int
    """What a window leaves for its gradients, of all layers."""
    thrifty_graph: int
    """The same where each layer runs again on the way back, and leaves its input alone till then."""
    logits: int
    teacher: int
    """In RAM, whatever the device."""

    @property
    def on_disk(self) -> int:
        """Beside the shards: predictions, what the next step needs, twice while it is replaced, and the adapters."""
        return self.teacher + 2 * self.adapters

    def on_device(self, thrifty: bool) -> int:
        return self.model + self.adapters + self.logits + (self.thrifty_graph if thrifty else self.graph)


def recovery_needs(stream: ModelStream, knobs: Recovery, windows: int, length: int, distilled: bool) -> RecoveryNeeds:
    """From headers alone."""
    infos = [stream.source.info(name) for name in stream.source.names()]
    shapes = [info.shape for index in range(stream.depth) for info in stream.layer_tensors(index).values()]
    added = sum(knobs.rank * (shape[0] + shape[1]) for shape in shapes if len(shape) == 2)
    inner = max(max(shape) for shape in shapes if len(shape) == 2)
    heads = max(map(stream.heads_width, range(stream.depth)))
    scores = GRAPH_SCORES * whole_scores(stream, length)
    layer = 4 * length * (GRAPH_WIDTHS * stream.width + GRAPH_HEADS * heads + GRAPH_INNER * inner + scores)
    return RecoveryNeeds(
        model=sum(math.prod(info.shape) * stream.dtype.itemsize for info in infos),
        adapters=added * ADAPTER_BYTES,
        graph=stream.depth * layer,
        thrifty_graph=layer + stream.depth * length * stream.width * 4,
        logits=length * stream.vocabulary * 4 * (1 + LOGIT_COPIES),
        teacher=windows * (length - 1) * min(knobs.top, stream.vocabulary) * KEPT_BYTES * distilled,
    )


def is_thrifty(needs: RecoveryNeeds, stream: ModelStream, caps: Caps) -> bool:
    """Whether layers have to run again on the way back, for want of memory. Raises BudgetError, with the smallest cap that
    would do, where that is too much too."""
    away, (given, left) = stream.accelerator.away, vram_state(stream.device)
    held = ram_bytes()
    ram = (caps.ram - held) if caps.ram is not None else free_ram()
    room = (min(left, caps.vram - given) if caps.vram is not None else left) if away else ram - needs.teacher
    if away and needs.teacher > ram:
        raise BudgetError(
            f"the dense model's predictions take {show_size(needs.teacher)} of RAM, {show_size(max(0, ram))} are left, and the "
            f"process holds {show_size(held)}. {way_out('--max-ram', caps.ram, held + needs.teacher)}, or use fewer --samples."
        )
    for thrifty in (False, True):
        if needs.on_device(thrifty) <= room:
            return thrifty
    window, whole = needs.thrifty_graph + needs.logits, needs.on_device(True)
    here = (("the dense model's predictions", needs.teacher * (not away)), ("the process", given if away else held))
    others = "".join(f", {what} {show_size(count)}" for what, count in here if count)
    flag, cap = ("--max-vram", caps.vram) if away else ("--max-ram", caps.ram)
    wanted = whole + sum(count for _, count in here)
    raise BudgetError(
        f"recover takes {show_size(wanted)} on {stream.device} (the compressed model {show_size(needs.model)}, adapters "
        f"{show_size(needs.adapters)}, a window {show_size(window)}{others}), and {show_size(max(0, room))} are left for the "
        f"first three. {way_out(flag, cap, wanted)}, or use a shorter --length, a smaller --rank or --dtype bfloat16."
    )


def way_out(flag: str, cap: int | None, wanted: int) -> str:
    """What would do for so many bytes of the process: a higher cap where one was set."""
    # As much more as `fit` counts for what libraries take meanwhile, so that what is named does on the next try too.
    return "Free some memory" if cap is None else f"Give {flag} {least_cap(wanted + RUNTIME_BYTES)}"
