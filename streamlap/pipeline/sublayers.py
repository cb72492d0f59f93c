"""A layer rebuilt sub-layer by sub-layer, beside the dense model: what anchored methods ask for.

Two streams go through a layer: x, where the dense model is, and x^, where the compressed one is. A sub-layer is rebuilt to add
to x^ what brings it to where x will be. The passes over the streams, and what each of them leaves behind:

    x              where norms follow the sub-layers, by what these divide each token
    x, x^          the dense layer on x, which leaves the next x; what o reads on x^ with the new q, k and v
    x^             the new attention on x^, which leaves x^ between the sub-layers; what gate and up read there, and down
    x^ between, next x     what down reads with the new gate and up
    x^ between     the new FFN, which leaves the next x^; what q, k and v of the next layer read there
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from streamlap.errors import NumericalError, located
from streamlap.linalg.solution import joined
from streamlap.methods.base import Solved, finite_error
from streamlap.pipeline.layer_in_hand import LayerEdits, LayerInHand, refuse_overflow
from streamlap.pipeline.observe import SublayerStatistics, weights
from streamlap.pipeline.sizes import dense_sizes
from streamlap.pipeline.streams import Source
from streamlap.planning.layouts import Candidate

ATTENTION, FFN = "attention", "ffn"


def rebuild_layer(hand: LayerInHand) -> LayerEdits:
    """Both sub-layers, rebuilt and applied."""
    attention, ffn = rebuild_parallel(hand) if hand.layer.parallel else rebuild_in_sequence(hand)
    return LayerEdits(
        edits=[*attention.edits, *ffn.edits], errors={**attention.errors, **ffn.errors},
        notes=joined(attention.notes, ffn.notes), out_NL=attention.out_NL | ffn.out_NL,
    )  # fmt: skip


def rebuild_in_sequence(hand: LayerInHand) -> tuple[LayerEdits, LayerEdits]:
    """Both sub-layers, rebuilt and applied. The dense stream is then behind the layer, the compressed one between them."""
    layer, dense, after = hand.layer, hand.dense, hand.next_dense
    run, run_dense = (functools.partial(functools.partial, call) for call in (layer.run_sublayer, layer.run_dense))
    weight_NL = torch.ones(hand.streams.windows.shape_NL)
    size_NL = dense_sizes(hand.runner, hand.clock, layer, hand.index, dense)
    target = Source(states=dense, part=run_dense(ATTENTION), onward=run_dense(FFN), keep=after, weight_NL=weight_NL)
    attention = rebuild(hand, SublayerStatistics(
        runner=hand.runner, windows=hand.streams.windows, clock=hand.clock, layer=layer, index=hand.index, sublayer=ATTENTION,
        dense=Source(states=dense), target=target, compressed=Source(states=hand.compressed), summed=hand.inputs,
        size_NL=size_NL.get(ATTENTION),
    ))  # fmt: skip
    hand.inputs.clear()
    compressed = Source(states=hand.compressed, part=run(ATTENTION), keep=hand.between)
    ffn = rebuild(hand, SublayerStatistics(
        runner=hand.runner, windows=hand.streams.windows, clock=hand.clock, layer=layer, index=hand.index, sublayer=FFN,
        dense=Source(states=dense, part=run_dense(ATTENTION)), target=Source(states=after), compressed=compressed,
        weight_NL=weight_NL, size_NL=size_NL.get(FFN),
    ))  # fmt: skip
    assert target.keep is compressed.keep is None, "methods look at all tokens"
    return attention, ffn


def rebuild_parallel(hand: LayerInHand) -> tuple[LayerEdits, LayerEdits]:
    """The same where both read the input of the layer. First the dense stream goes through the whole layer, since what lies
    between the sub-layers does not lead on. The FFN then adds to what the new attention has made of the compressed stream."""
    layer, dense, after = hand.layer, hand.dense, hand.next_dense
    found: list[torch.Tensor] = []
    hand.runner.carry(layer, hand.index, dense, after, lambda x_BLD: found.append(weights(x_BLD)))
    target = Source(states=dense, part=functools.partial(layer.run_dense, ATTENTION))
    attention = rebuild(hand, SublayerStatistics(
        runner=hand.runner, windows=hand.streams.windows, clock=hand.clock, layer=layer, index=hand.index, sublayer=ATTENTION,
        dense=Source(states=dense), target=target, compressed=Source(states=hand.compressed), summed=hand.inputs,
    ))  # fmt: skip
    hand.inputs.clear()
    ffn = rebuild(hand, SublayerStatistics(
        runner=hand.runner, windows=hand.streams.windows, clock=hand.clock, layer=layer, index=hand.index, sublayer=FFN,
        dense=Source(states=dense), target=Source(states=after), compressed=Source(states=hand.compressed),
        weight_NL=torch.cat(found),
    ))  # fmt: skip
    return attention, ffn


def finish_layer(hand: LayerInHand, watch: Callable[[torch.Tensor], None] | None) -> torch.Tensor:
    """The compressed stream from between the sub-layers through the rebuilt FFN, or from before a parallel layer through all of
    it, into what the next layer begins with."""
    if hand.layer.parallel:
        return hand.runner.carry(hand.layer, hand.index, hand.compressed, hand.next_compressed, watch)
    part = functools.partial(hand.layer.run_sublayer, FFN)
    return hand.runner.carry(part, hand.index, hand.between, hand.next_compressed, watch)


def rebuild(hand: LayerInHand, statistics: SublayerStatistics) -> LayerEdits:
    """The best that the candidates of a sub-layer make of it, applied. One without candidates stays as it is."""
    name = statistics.sublayer
    with hand.clock.phase("solve"), hand.runner.claim("solve"), located(f"{hand.layer.prefix} {name}"):
        solved = best_candidate(statistics, hand.plan.candidates[name])
    refuse_overflow(hand.layer, solved.edits)
    # What moves the inputs of the FFN looks at those of the dense model, which come out of its attention.
    keep_dense = name == ATTENTION and any(found.method.moves_inputs for found in hand.plan.candidates[FFN])
    hand.layer.apply(solved.edits, keep_dense)
    notes = tuple(f"{name}: {note}" for note in joined(statistics.notes, solved.notes))
    errors = {name: solved.errors} if solved.errors else {}
    return LayerEdits(edits=solved.edits, errors=errors, notes=notes, out_NL=statistics.out_NL)


def best_candidate(statistics: SublayerStatistics, candidates: Sequence[Candidate]) -> Solved:
    """What the candidate of least error on held-out tokens makes; its `errors` and `notes` are those of all.

    A method that fails on its numbers is passed over, with a note, as long as another does not. Raises NumericalError where
    all fail.
    """
    if not candidates:
        statistics.pass_on()
        return Solved(edits=[])
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
