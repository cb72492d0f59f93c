"""A layer edited by methods that look once: energies from one dense pass on the compressed stream, then all edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamlap.errors import NumericalError, located
from streamlap.linalg.solution import joined
from streamlap.linalg.statistics import Energy
from streamlap.methods.base import DenseStatistics
from streamlap.pipeline.layer_in_hand import LayerEdits, LayerInHand, refuse_overflow
from streamlap.planning.layouts import Candidate


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the pass has found."""

    energies: dict[str, Energy]
    """Role -> that of its inputs."""
    out_NL: torch.Tensor
    notes: tuple[str, ...]


def observe_layer(hand: LayerInHand) -> Seen:
    """The pass over the dense layer, for all that its methods need."""
    methods = [found.method for found in one_pass_candidates(hand)]
    roles = list(dict.fromkeys(role for method in methods for role in method.needs))
    layer = hand.layer

    def capture() -> Seen:
        for careful in (False, True):  # rows that go bad inside are searched for only where there are some
            energies = {role: Energy() for role in roles}  # anew on every attempt
            with layer.observed(energies.items(), careful):
                out_NL = hand.runner.observe(layer, hand.compressed)
            if all(energy.finite for energy in energies.values()):
                break
        else:
            raise NumericalError(
                f"{layer.prefix}: squares of activations overflow; wanted finite ones. Scale the model."
            )
        notes = [layer.family.dead_inputs(role, energy.dead) for role, energy in energies.items() if energy.dead]
        return Seen(energies=energies, out_NL=out_NL, notes=tuple(notes))

    with hand.clock.phase("capture"):
        return hand.runner.run("capture", hand.index, capture)


def solve_layer(hand: LayerInHand, seen: Seen) -> LayerEdits:
    """The edits of all methods, applied."""
    layer, statistics = hand.layer, DenseStatistics(layer=hand.layer, energies=seen.energies)

    def solve() -> LayerEdits:
        with layer.on(hand.runner.ladder.solve_device), located(layer.prefix):
            solved = [found.method.solve(statistics, found.layouts) for found in one_pass_candidates(hand)]
        edits = [edit for found in solved for edit in found.edits]
        notes = joined(seen.notes, *(found.notes for found in solved), *(edit.notes for edit in edits))
        return LayerEdits(edits=edits, notes=notes, out_NL=seen.out_NL)

    with hand.clock.phase("solve"):
        made = hand.runner.run("solve", hand.index, solve)
        refuse_overflow(layer, made.edits)
        layer.apply(made.edits)
    return made


def one_pass_candidates(hand: LayerInHand) -> Sequence[Candidate]:
    """In the order of the sub-layers."""
    return [found for rivals in hand.plan.candidates.values() for found in rivals]
