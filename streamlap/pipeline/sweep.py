"""The loop of a survey: the dense stream through every layer, and of every layer passed, copies in which a half of it is cut.

A layer is committed as in `pipeline`: the streams that feed the next one are on the disk, then comes the journal line, then
those that fed it go.

Shape suffixes: N windows, L length, B batch, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from streamlap.errors import located
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.pipeline.divergence import mean_divergence
from streamlap.pipeline.observe import Place, View
from streamlap.pipeline.runner import Engine, start_engine
from streamlap.pipeline.sublayers import finite_error, half_of
from streamlap.planning.allocate import Point
from streamlap.planning.cuts import CUTTERS, LEVELS, Cut, cut_layout
from streamlap.planning.schedule import Fit
from streamlap.store.hidden import HiddenBank
from streamlap.store.journal import Journal
from streamlap.store.sink import write_durably
from streamlap.system.allocator import trim_heap
from streamlap.system.meters import PhaseClock
from streamlap.system.signals import Stops
from streamlap.untrusted.json import parse_json

HEAD_NAME = "head.json"


@dataclass(kw_only=True)
class Sweep:
    """Everything one survey needs, checked."""

    stream: ModelStream
    tokens_NL: torch.Tensor
    file: Path
    journal: Journal
    fit: Fit
    dense: HiddenBank
    dense_middle: HiddenBank
    copies: dict[Cut, HiddenBank]
    stops: Stops

    def begun(self, layers: int) -> list[HiddenBank]:
        """The streams that have something in them once so many layers are done."""
        return [self.dense, *(bank for cut, bank in self.copies.items() if cut.index < layers)]


def sweep_layers(sweep: Sweep) -> None:
    """The loop over decoder layers."""
    stream, first = sweep.stream, sweep.journal.next_layer
    kwargs = stream.layer_kwargs(sweep.tokens_NL.shape[1])
    beside = (sweep.dense_middle, *sweep.copies.values())
    with start_engine(stream, sweep.fit, sweep.dense, "survey", first, (), beside) as engine:
        if first == 0:
            engine.enter(sweep.dense, sweep.tokens_NL)
        else:
            for bank in sweep.begun(first):
                bank.drop(first - 1)  # where the run died between the commit and this
        for index in range(first, stream.depth):
            if sweep.stops.due(moved=index > first):
                raise sweep.stops.stopped(f"at layer {index} of {stream.depth}")
            layer = engine.layer(index, kwargs[index])
            errors = carry_through(sweep, engine, layer, index)
            del layer
            commit(sweep, index, errors)
            engine.require_baseline(index)
            engine.progress.next()


def commit(sweep: Sweep, index: int, errors: dict[str, list[float]]) -> None:
    """All streams are before the next layer, on the disk, and now the journal says so."""
    banks = sweep.begun(index + 1)
    for bank in banks:
        bank.settle()
    sweep.journal.append({"index": index, "errors": errors})
    for bank in (*banks, sweep.dense_middle):
        bank.drop(index)


def carry_through(sweep: Sweep, engine: Engine, layer: StreamLayer, index: int) -> dict[str, list[float]]:
    """Every stream through a layer, and new copies in which a half of it is cut. Gives half -> its own error at each level."""
    attention, ffn = half_of(layer, "attention"), half_of(layer, "ffn")

    def whole(x_BLD: torch.Tensor) -> torch.Tensor:
        return ffn(attention(x_BLD))

    with engine.claim("propagate"):
        for cut, bank in sweep.copies.items():
            if cut.index < index:
                engine.carry(whole, index, bank.read(index), bank, index + 1)
        engine.carry(attention, index, sweep.dense.read(index), sweep.dense_middle, index)
    before, between, after = (
        Place(bank=sweep.dense, generation=index), Place(bank=sweep.dense_middle, generation=index),
        Place(bank=sweep.dense, generation=index + 1),
    )  # fmt: skip
    errors = {"attention": cut_half(sweep, engine, layer, index, "attention", (before, between), whole)}
    with engine.claim("propagate"):
        engine.carry(ffn, index, between.read(), sweep.dense, index + 1)
    return errors | {"ffn": cut_half(sweep, engine, layer, index, "ffn", (between, after), ffn)}


def cut_half(
    sweep: Sweep, engine: Engine, layer: StreamLayer, index: int, half: str, ends: tuple[Place, Place],
    rest: Callable[[torch.Tensor], torch.Tensor],
) -> list[float]:  # fmt: skip
    """New copies of the dense stream, through a half that is cut and the `rest` of the layer. Gives the half's own errors.

    Args: ends, the dense stream before and after the half.
    """
    with engine.claim("solve"), located(f"{layer.prefix} {half}"):
        view = View(
            engine=engine, clock=PhaseClock(engine.progress.phase), layer=layer, index=index, half=half,
            dense=ends[0], goal=ends[1], stream=ends[0],
        )  # fmt: skip
        made = {keep: CUTTERS[half].build(view, cut_layout(sweep.stream, index, half, keep)) for keep in LEVELS}
        del view  # and the sums that it holds
        errors = [finite_error(built.error) for built in made.values()]
    for keep, built in made.items():
        copy = sweep.copies[Cut(index=index, half=half, keep=keep)]
        with engine.claim("propagate"), layer.tried(built.edits):
            engine.carry(rest, index, ends[0].read(), copy, index + 1)
    return errors


def head_divergences(sweep: Sweep) -> dict[Cut, float]:
    """Of every copy; each is on the disk once it is found, since the head of a large model takes hours in all."""
    path = sweep.journal.state / HEAD_NAME
    table = parse_json(path.read_bytes()) if path.is_file() else {}
    found = {cut: table[name] for cut in sweep.copies if (name := f"{cut.index} {cut.half} {cut.keep}") in table}
    head, begun = sweep.stream.head(), len(found)
    for cut, copy in sweep.copies.items():
        if cut not in found:
            if sweep.stops.due(moved=len(found) > begun):
                raise sweep.stops.stopped(f"at the head, with {len(found)} of {len(sweep.copies)} cuts measured")
            found[cut] = mean_divergence(sweep.stream, head, sweep.dense, copy, cut)
            named = {f"{cut.index} {cut.half} {cut.keep}": value for cut, value in found.items()}
            write_durably(path, json.dumps(named, allow_nan=False).encode())
    return found


def points(sweep: Sweep) -> tuple[dict[str, tuple[Point, ...]], ...]:
    """What was measured, with the divergences at the head."""
    schedule = sweep.fit.schedule
    trim_heap()  # of what the layers have left
    with sweep.fit.ram.claim(schedule.ram["head"]), sweep.fit.vram.claim(schedule.vram.get("head", {})):
        kl = head_divergences(sweep)
    rows = []
    for index, line in enumerate(sweep.journal.layers):
        errors = {half: dict(zip(LEVELS, values, strict=True)) for half, values in line["errors"].items()}
        rows.append(
            {
                half: tuple(
                    Point(keep=keep, kl=kl[Cut(index=index, half=half, keep=keep)], error=errors[half][keep])
                    for keep in LEVELS
                )
                for half in errors
            }
        )
    return tuple(rows)
