"""The loop of a survey: the dense stream through every layer, and of every layer passed, copies in which a sub-layer is cut.

Sub-layers are fitted to most windows of the dense stream. The copies have the others: what was fitted to says little of what a
cut loses, least in the first layer, which knows each token by itself.

A layer is committed as in `layers`: the streams that feed the next one are on the disk, then comes the journal line, then those
that fed it go.

Shape suffixes: N windows, L length, B batch, D hidden.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import torch

from streamlap.errors import located
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.methods.base import finite_error
from streamlap.pipeline.divergence import mean_divergence
from streamlap.pipeline.observe import SublayerStatistics
from streamlap.pipeline.runner import LayerRunner, start_runner
from streamlap.pipeline.session import Session
from streamlap.pipeline.sizes import dense_sizes
from streamlap.pipeline.streams import HiddenStates, LayerPart, Source, Windows, open_bank
from streamlap.planning.cuts import LAYER
from streamlap.planning.survey import Perturbation, SurveyPlan
from streamlap.planning.survey_file import Point
from streamlap.store.hidden import HiddenBank
from streamlap.store.sink import write_durably
from streamlap.system.allocator import trim_heap
from streamlap.system.meters import PhaseClock
from streamlap.system.progress import Progress
from streamlap.untrusted.json import parse_json

HEAD_NAME = "head.json"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything one survey needs, checked."""

    stream: ModelStream
    plan: SurveyPlan
    tokens_NL: torch.Tensor
    session: Session
    dense: HiddenBank
    dense_middle: HiddenBank
    """The dense stream between the sub-layers; of a parallel layer then also that behind it, until its FFN is cut."""
    copies: dict[Perturbation, HiddenBank]
    """Of the windows that are held out alone. All tokens of these may be out on the dense stream; `mean_divergence` says where
    a copy has lost more."""

    @property
    def windows(self) -> Windows:
        return Windows(tokens_NL=self.tokens_NL)

    def begun(self, layers: int) -> list[HiddenBank]:
        """The streams that have something in them once so many layers are done."""
        return [self.dense, *(bank for perturbed, bank in self.copies.items() if perturbed.index < layers)]


def open_sweep(stream: ModelStream, plan: SurveyPlan, tokens_NL: torch.Tensor, session: Session) -> Sweep:
    folder, schedule = session.run.hidden, plan.fit.schedule
    between = folder if schedule.tier == "disk" else None
    held_NL = tokens_NL[Windows(tokens_NL=tokens_NL).held]
    copies = {
        perturbed: open_bank(stream, held_NL, schedule, folder, f"{perturbed.sublayer}-{perturbed.index:05d}")
        for perturbed in plan.perturbations
    }
    return Sweep(
        stream=stream, plan=plan, tokens_NL=tokens_NL, session=session, copies=copies,
        dense=open_bank(stream, tokens_NL, schedule, folder, "dense"),
        dense_middle=open_bank(stream, tokens_NL, schedule, between, "dense-middle"),
    )  # fmt: skip


def sweep_layers(sweep: Sweep) -> None:
    """The loop over decoder layers."""
    stream, stops, first = sweep.stream, sweep.session.stops, sweep.session.journal.next_layer
    kwargs = stream.layer_kwargs(sweep.tokens_NL.shape[1])
    banks = (sweep.dense, sweep.dense_middle, *sweep.copies.values())
    progress = Progress("survey", stream.depth, first)
    with start_runner(stream, sweep.plan.fit, banks, progress) as runner:
        if first == 0:
            runner.enter(sweep.dense, sweep.tokens_NL)
        else:
            for bank in sweep.begun(first):
                bank.drop(first - 1)  # where the run died between the commit and this
        for index in range(first, stream.depth):
            if stops.due(moved=index > first):
                raise stops.stopped(f"at layer {index} of {stream.depth}")
            layer = runner.layer(index, kwargs[index])
            errors = carry_through(sweep, runner, layer, index)
            del layer
            commit_streams(sweep, index, errors)
            runner.require_baseline(index)
            progress.next()


def commit_streams(sweep: Sweep, index: int, errors: dict[str, float]) -> None:
    """All streams are before the next layer, on the disk, and now the journal says so."""
    banks = sweep.begun(index + 1)
    for bank in banks:
        bank.settle()
    sweep.session.journal.append({"index": index, "errors": errors})
    for bank in (*banks, sweep.dense_middle):
        bank.drop(index)


def carry_through(sweep: Sweep, runner: LayerRunner, layer: StreamLayer, index: int) -> dict[str, float]:
    """Every stream through a layer, and new copies in which a sub-layer of it is cut, or which pass it by. Gives sub-layer ->
    its own error."""
    attention, ffn = (functools.partial(layer.run_sublayer, name) for name in ("attention", "ffn"))

    def whole(x_BLD: torch.Tensor) -> torch.Tensor:
        return layer(x_BLD) if layer.parallel else ffn(attention(x_BLD))

    for perturbed, bank in sweep.copies.items():
        if perturbed.index < index:
            before, after = (HiddenStates(bank=bank, generation=generation) for generation in (index, index + 1))
            runner.carry(whole, index, before, after, most=1.0)
    before, between, after = (
        HiddenStates(bank=bank, generation=generation)
        for bank, generation in ((sweep.dense, index), (sweep.dense_middle, index), (sweep.dense, index + 1))
    )
    sizes = dense_sizes(runner, PhaseClock(runner.progress.phase), layer, index, before)

    def statistics(sublayer: str, given: HiddenStates, target: HiddenStates) -> SublayerStatistics:
        """A sub-layer on the dense stream, which stands for the compressed one too."""
        return SublayerStatistics(
            runner=runner, windows=sweep.windows, clock=PhaseClock(runner.progress.phase), layer=layer,
            index=index, sublayer=sublayer,
            dense=Source(states=given), target=Source(states=target), compressed=Source(states=given),
            size_NL=sizes.get(sublayer),
        )  # fmt: skip

    cut = {perturbed.sublayer: bank for perturbed, bank in sweep.copies.items() if perturbed.index == index}
    errors = dict[str, float]()
    if LAYER in cut:
        passed = HiddenStates(bank=cut[LAYER], generation=index + 1)
        runner.carry(torch.clone, index, before, passed, numbers=sweep.windows.held, most=1.0)
        errors[LAYER] = 1.0
    runner.carry(attention, index, before, between)
    if "attention" in cut:
        errors["attention"] = perturb_sublayer(sweep, statistics("attention", before, between), whole)
    if not layer.parallel:
        runner.carry(ffn, index, between, after)
        return errors | {"ffn": perturb_sublayer(sweep, statistics("ffn", between, after), ffn)}
    # What lies before the layer and behind it is read side by side, so it cannot be in one bank yet.
    runner.carry(layer, index, before, between)
    errors["ffn"] = perturb_sublayer(sweep, statistics("ffn", before, between), layer)
    runner.carry(torch.clone, index, between, after)
    return errors


def perturb_sublayer(sweep: Sweep, statistics: SublayerStatistics, rest: LayerPart) -> float:
    """A new copy of the dense stream, through a sub-layer that is cut and the `rest` of the layer, which begins with it. Gives
    the sub-layer's own error."""
    runner, layer, index, name = statistics.runner, statistics.layer, statistics.index, statistics.sublayer
    perturbed = next(cut for cut in sweep.copies if (cut.index, cut.sublayer) == (index, name))
    found = sweep.plan.perturbations[perturbed]
    with runner.claim("solve"), located(f"{layer.prefix} {name}"):
        made = found.method.solve(statistics, found.layouts)
        error = finite_error(made.error)
    with layer.tried(made.edits):
        after = HiddenStates(bank=sweep.copies[perturbed], generation=index + 1)
        runner.carry(rest, index, statistics.dense.states, after, numbers=sweep.windows.held, most=1.0)
    return error


def head_divergences(sweep: Sweep) -> dict[Perturbation, float]:
    """Of every copy; each is on the disk once it is found, since the head of a large model takes hours in all."""
    path, stops = sweep.session.state / HEAD_NAME, sweep.session.stops
    table = parse_json(path.read_bytes()) if path.is_file() else {}
    found = {perturbed: table[name] for perturbed in sweep.copies if (name := str(perturbed)) in table}
    head, begun = sweep.stream.head(), len(found)
    for perturbed, copy in sweep.copies.items():
        if perturbed not in found:
            if stops.due(moved=len(found) > begun):
                raise stops.stopped(f"at the head, with {len(found)} of {len(sweep.copies)} perturbations measured")
            found[perturbed] = mean_divergence(sweep.stream, head, sweep.dense, copy, perturbed, sweep.windows.held)
            named = {str(perturbed): value for perturbed, value in found.items()}
            write_durably(path, json.dumps(named, allow_nan=False).encode())
    return found


def points(sweep: Sweep) -> tuple[dict[str, tuple[Point, ...]], ...]:
    """What was measured, with the divergences at the head."""
    fit = sweep.plan.fit
    trim_heap()  # of what the layers have left
    with fit.ram.claim(fit.schedule.ram["head"]), fit.vram.claim(fit.schedule.vram.get("head", {})):
        kl = head_divergences(sweep)
    return tuple(
        {
            perturbed.sublayer: (
                Point(keep=perturbed.keep, kl=kl[perturbed], error=line["errors"][perturbed.sublayer]),
            )
            for perturbed in sweep.copies
            if perturbed.index == index
        }
        for index, line in enumerate(sweep.session.journal.layers)
    )
