"""A layer rebuilt half by half, beside the dense model: what `pipeline` does for the anchored methods of a recipe.

Two streams go through a layer: x, where the dense model is, and x^, where the compressed one is. A half is rebuilt to add to x^
what brings it to where x will be. Between the halves both streams are kept in banks of their own, which need not outlive the
process: a run that dies begins its layer anew.

Shape suffixes: B batch, L length, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from streamlap.errors import NumericalError, located
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.linalg.notes import note, under
from streamlap.methods.base import Built, Candidates, Comparable, by_kin
from streamlap.pipeline.observe import Place, View
from streamlap.pipeline.runner import Engine, open_bank
from streamlap.planning.schedule import Schedule
from streamlap.store.hidden import HiddenBank
from streamlap.system.meters import PhaseClock


@dataclass(frozen=True, kw_only=True)
class Banks:
    """The streams beside the compressed one, which `Engine.hidden` holds."""

    dense: HiddenBank
    """The dense stream between layers; as durable as the compressed one."""
    dense_middle: HiddenBank
    middle: HiddenBank
    """Both streams between the halves of the layer in hand."""

    @property
    def all(self) -> tuple[HiddenBank, ...]:
        return self.dense, self.dense_middle, self.middle

    def drop_middles(self, index: int) -> None:
        """What lies between the halves of a layer that is done."""
        self.dense_middle.drop(index)
        self.middle.drop(index)


def open_banks(stream: ModelStream, tokens_NL: torch.Tensor, schedule: Schedule, folder: Path | None) -> Banks:
    """The banks in the memory that the schedule gives them. What lies between halves is in `folder` only where no memory is."""
    between = folder if schedule.tier == "disk" else None
    return Banks(
        dense=open_bank(stream, tokens_NL, schedule, folder, "dense"),
        dense_middle=open_bank(stream, tokens_NL, schedule, between, "dense-middle"),
        middle=open_bank(stream, tokens_NL, schedule, between, "middle"),
    )


HalfErrors = dict[str, dict[str, float]]
"""Half -> method -> how far its output is from the target on held-out tokens, see `held_error`."""


def rebuild_layer(
    engine: Engine, banks: Banks, layer: StreamLayer, index: int, candidates: Mapping[str, Candidates],
    clock: PhaseClock, ready: Callable[[], None],
) -> tuple[list[Edit], HalfErrors]:  # fmt: skip
    """Both halves of a layer, rebuilt and applied; the compressed stream is then at `banks.middle`, before the second half.

    `ready` is called before the first solve. Gives the edits, and the errors of all methods by half.
    """
    before, between, after = (
        Place(bank=banks.dense, generation=index), Place(bank=banks.dense_middle, generation=index),
        Place(bank=banks.dense, generation=index + 1),
    )  # fmt: skip
    with clock.phase("dense"), engine.claim("propagate"):
        engine.carry(half_of(layer, "attention"), index, before.read(), banks.dense_middle, index)
    ready()
    edits: list[Edit] = []
    errors: HalfErrors = {}
    for half, dense, goal, bank in (
        ("attention", before, between, engine.hidden),
        ("ffn", between, after, banks.middle),
    ):
        if half == "ffn":
            with clock.phase("dense"), engine.claim("propagate"):
                engine.carry(half_of(layer, "ffn"), index, between.read(), banks.dense, index + 1)
        view = View(
            engine=engine, clock=clock, layer=layer, index=index, half=half, dense=dense, goal=goal,
            stream=Place(bank=bank, generation=index),
        )  # fmt: skip
        with clock.phase("solve"), engine.claim("solve"), under(half), located(f"{layer.prefix} {half}"):
            built, errors[half] = rebuild(view, candidates[half])
        layer.apply(built.edits)
        edits += built.edits
        if half == "attention":
            with clock.phase("propagate"), engine.claim("propagate"):
                engine.carry(half_of(layer, half), index, engine.hidden.read(index), banks.middle, index)
    return edits, errors


def half_of(layer: StreamLayer, half: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x_BLD: layer.run_half(half, x_BLD)


def rebuild(view: View, candidates: Candidates) -> tuple[Built, dict[str, float]]:
    """The best of the methods for a half, by its error on held-out tokens; and the errors of all, by name.

    A method that fails on its numbers is passed over, with a note, as long as another does not. Raises NumericalError where
    all fail.
    """
    best: Built | None = None
    errors: dict[str, float] = {}
    failed: NumericalError | None = None
    for rivals in by_kin(candidates):
        try:
            for name, (method, layout) in foremost(view, rivals, errors).items():
                built = method.build(view, layout)
                errors[name] = finite_error(built.error)
                if best is None or built.error < best.error:
                    best = built
        except NumericalError as error:
            failed = error
            note(f"{', '.join(rivals)} failed: {str(error).split(';')[0]}")
    if best is None:
        assert failed is not None, "no method for a half"
        raise failed
    return best, errors


def finite_error(error: float) -> float:
    """The error itself. Raises NumericalError where it is none to choose by: NaN would win or lose by its place in a list."""
    if not math.isfinite(error):
        raise NumericalError(f"its error on held-out tokens is {error}; wanted a number. Try dtype float32.")
    return error


def foremost(view: View, rivals: Candidates, errors: dict[str, float]) -> Candidates:
    """Of several methods of one kin the one that looks best; `errors` learns how they look."""
    method, _ = next(iter(rivals.values()))
    if len(rivals) == 1 or not isinstance(method, Comparable):
        return rivals
    found = method.compare(view, {name: layout for name, (_, layout) in rivals.items()})
    errors.update({name: error for name, error in found.items() if math.isfinite(error)})
    best = min(found, key=lambda name: errors.get(name, math.inf))
    finite_error(found[best])
    return {best: rivals[best]}
