"""A layer rebuilt sub-layer by sub-layer, beside the dense model: what anchored methods ask for.

Two streams go through a layer: x, where the dense model is, and x^, where the compressed one is. A sub-layer is rebuilt to add
to x^ what brings it to where x will be. Between the sub-layers both streams are kept in banks of their own.

Shape suffixes: N windows, L length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from streamlap.errors import NumericalError, located
from streamlap.linalg.solution import joined
from streamlap.methods.base import Solved, finite_error
from streamlap.pipeline.hand import LayerEdits, LayerInHand, refuse_overflow
from streamlap.pipeline.observe import SublayerStatistics
from streamlap.pipeline.runner import LayerPart
from streamlap.pipeline.streams import DenseBanks, HiddenStates
from streamlap.planning.layouts import Candidate

ATTENTION, FFN = "attention", "ffn"


def run_dense(hand: LayerInHand, sublayer: str) -> torch.Tensor:
    """The dense stream through a sub-layer that is not edited yet."""
    banks, index = dense_banks(hand), hand.index
    before, bank, generation = (
        (banks.stream, banks.middle, index) if sublayer == ATTENTION else (banks.middle, banks.stream, index + 1)
    )
    with hand.clock.phase("dense"):
        states = HiddenStates(bank=before, generation=index)
        return hand.runner.carry(part_of(hand, sublayer), index, states, bank, generation)


def rebuild_layer(hand: LayerInHand, out_NL: torch.Tensor) -> LayerEdits:
    """Both sub-layers, rebuilt and applied; `run_dense` has been through attention, and `out_NL` are the tokens it lost.

    The compressed stream is then between the sub-layers, before the second.
    """
    banks, index = dense_banks(hand), hand.index
    before, between, after = (
        HiddenStates(bank=bank, generation=generation)
        for bank, generation in ((banks.stream, index), (banks.middle, index), (banks.stream, index + 1))
    )
    middle = HiddenStates(bank=banks.compressed_middle, generation=index)

    statistics = statistics_of(hand, ATTENTION, before, between, hand.compressed)
    attention = rebuild(hand, statistics)
    with hand.clock.phase("propagate"):
        carried = hand.runner.carry(part_of(hand, ATTENTION), index, hand.compressed, middle.bank, index)
    dense = run_dense(hand, FFN)
    ffn = rebuild(hand, statistics_of(hand, FFN, between, after, middle))

    outs = (out_NL, attention.out_NL, carried, dense, ffn.out_NL)
    return LayerEdits(
        edits=[*attention.edits, *ffn.edits], errors={**attention.errors, **ffn.errors},
        notes=joined(attention.notes, ffn.notes), out_NL=functools.reduce(torch.logical_or, outs),
    )  # fmt: skip


def finish_layer(hand: LayerInHand) -> torch.Tensor:
    """The compressed stream from between the sub-layers through the rebuilt FFN, into what the next layer begins with."""
    middle = HiddenStates(bank=dense_banks(hand).compressed_middle, generation=hand.index)
    bank = hand.streams.compressed
    return hand.runner.carry(part_of(hand, FFN), hand.index, middle, bank, hand.index + 1)


def dense_banks(hand: LayerInHand) -> DenseBanks:
    assert hand.streams.dense is not None, "a run beside the dense model keeps its stream"
    return hand.streams.dense


def part_of(hand: LayerInHand, sublayer: str) -> LayerPart:
    return functools.partial(hand.layer.run_sublayer, sublayer)


def statistics_of(
    hand: LayerInHand, sublayer: str, dense: HiddenStates, target: HiddenStates, compressed: HiddenStates
) -> SublayerStatistics:
    return SublayerStatistics(
        runner=hand.runner, clock=hand.clock, layer=hand.layer, index=hand.index, sublayer=sublayer, dense=dense, target=target,
        compressed=compressed,
    )  # fmt: skip


def rebuild(hand: LayerInHand, statistics: SublayerStatistics) -> LayerEdits:
    """The best that the candidates of a sub-layer make of it, applied."""
    name = statistics.sublayer
    with hand.clock.phase("solve"), hand.runner.claim("solve"), located(f"{hand.layer.prefix} {name}"):
        solved = best_candidate(statistics, hand.plan.candidates[name])
    refuse_overflow(hand.layer, solved.edits)
    hand.layer.apply(solved.edits)
    notes = tuple(f"{name}: {note}" for note in joined(statistics.notes, solved.notes))
    return LayerEdits(edits=solved.edits, errors={name: solved.errors}, notes=notes, out_NL=statistics.out_NL)


def best_candidate(statistics: SublayerStatistics, candidates: Sequence[Candidate]) -> Solved:
    """What the candidate of least error on held-out tokens makes; its `errors` and `notes` are those of all.

    A method that fails on its numbers is passed over, with a note, as long as another does not. Raises NumericalError where
    all fail.
    """
    best: Solved | None = None
    errors: dict[str, float] = {}
    notes: list[tuple[str, ...]] = []
    failed: NumericalError | None = None
    for found in candidates:
        try:
            solved = found.method.solve(statistics, found.layouts)
            notes.append(solved.notes)
            variants = (solved.errors or {"": solved.error}).items()
            errors |= {f"{found.name} {name}".strip(): error for name, error in variants if math.isfinite(error)}
            finite_error(solved.error)
        except NumericalError as error:
            failed = error.with_traceback(None)  # which would hold the layer and its sums
            notes.append((f"{found.name} failed: {str(error).split(';')[0]}",))
            continue
        if best is None or solved.error < best.error:
            best = solved
    if best is None:
        assert failed is not None, "no method for a sub-layer"
        raise failed
    return Solved(edits=best.edits, error=best.error, errors=errors, notes=joined(*notes))
