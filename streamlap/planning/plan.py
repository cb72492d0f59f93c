"""A compression before it begins: what every layer becomes, what that takes, and the schedule that fits.

`make_plan` gives the value. `plan` shows it; `compress` goes by it, so that the sizes it claims and the forms it solves for are
those that were shown. From headers alone, before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from streamlap.data.calibration import calibration_tokens
from streamlap.errors import UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.planning.allocate import Survey, layer_parameters, read_survey
from streamlap.planning.disk import COMPANION_BYTES
from streamlap.planning.forecast import LayerPlan, compression_workload, forecast_layers, shape_key
from streamlap.planning.layouts import Candidates, layer_candidates
from streamlap.planning.machine import Machine, this_machine
from streamlap.planning.sample import check_sample, fitted_inputs
from streamlap.planning.schedule import Fit, advice, fit, require_fit
from streamlap.planning.target import Target, meet, parse_target
from streamlap.recipe import Recipe
from streamlap.settings import Caps, RunSettings, split_options
from streamlap.store.hub import header_source
from streamlap.store.sink import shard_bytes
from streamlap.system.allocator import steady_heap
from streamlap.system.disk_speed import Disk

SLACK = 1.8
"""Upper end of the range of seconds over its lower end: what lies between products and decompositions, and other programs."""


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """What a layer takes under the plan's schedule."""

    index: int
    output_bytes: int
    read_bytes: int
    write_bytes: int
    flops: int
    seconds_low: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compression to come."""

    recipe: Recipe
    """With the ratio as asked for, or the one that keeps to the target."""
    layers: tuple[LayerPlan, ...]
    fit: Fit
    caps: Caps
    outer_bytes: int
    """Of the first shard: what lies outside the layers."""
    first_read: int
    """What is read before the first layer."""
    inputs: int
    """Of the widest linear that is fitted."""
    machine: Machine | None = None
    """Where seconds are asked for."""

    @property
    def fits(self) -> bool:
        return self.fit.fits

    @property
    def ratio(self) -> float:
        return self.recipe.ratio

    @property
    def output_bytes(self) -> int:
        """Of all shards."""
        return self.outer_bytes + sum(layer.output_bytes for layer in self.layers)

    @property
    def peak_ram_bytes(self) -> int:
        return self.fit.peak_ram

    @property
    def peak_vram_bytes(self) -> int:
        return self.fit.peak_vram

    @property
    def disk_bytes(self) -> int:
        """Most that is on the disk at one time beside the source: shards, two generations of hidden states, small files."""
        return self.output_bytes + self.fit.work.disk_bytes + COMPANION_BYTES

    @property
    def read_bytes(self) -> int:
        return self.first_read + sum(row.read_bytes for row in self.figures)

    @property
    def write_bytes(self) -> int:
        return self._first_write + sum(row.write_bytes for row in self.figures)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.figures)

    @property
    def seconds_low(self) -> float:
        """With every product and decomposition at its measured rate and nothing else; 0 where no rate is known."""
        return self._seconds(self.machine, self.machine.fastest_disk) if self.machine else 0.0

    @property
    def seconds_high(self) -> float:
        """More than that by SLACK; where the disk was not measured, with a slow one."""
        return SLACK * self._seconds(self.machine, self.machine.slowest_disk) if self.machine else 0.0

    @property
    def disk_measured(self) -> bool:
        return self.machine is not None and self.machine.disk is not None

    @property
    def advice(self) -> tuple[str, ...]:
        """Which knob to turn where it does not fit."""
        return tuple(advice(self.fit, self.caps))

    @property
    def calibration_tokens(self) -> tuple[int, int]:
        return self.fit.work.sequences, self.fit.work.length

    @property
    def calibration(self) -> dict[str, int]:
        """Tokens to fit on, and inputs of the widest linear that is fitted."""
        return {"tokens": math.prod(self.calibration_tokens), "inputs": self.inputs}

    @property
    def overlap(self) -> bool:
        return self.fit.schedule.overlap

    @property
    def hidden_states(self) -> str:
        """Where they stay between layers: vram, ram or disk."""
        return self.fit.schedule.tier

    @property
    def forward_tokens(self) -> int:
        """Tokens in one forward."""
        sequences, length = self.calibration_tokens
        return min(self.fit.schedule.micro, sequences) * length

    @cached_property
    def figures(self) -> tuple[LayerFigures, ...]:
        return tuple(self._figures(layer) for layer in self.layers)

    @property
    def _first_write(self) -> int:
        return self.outer_bytes + self.fit.work.generation * self.layers[0].generations_written

    def _figures(self, layer: LayerPlan) -> LayerFigures:
        generation, last = self.fit.work.generation, layer.index + 1 == len(self.layers)
        on_disk = self.hidden_states == "disk"
        read = layer.source_bytes + layer.copied_bytes + round((layer.generations_read - last) * generation) * on_disk
        written = layer.generations_written - last + layer.generations_spilled * on_disk
        write, machine = layer.output_bytes + layer.state_bytes + written * generation, self.machine
        return LayerFigures(
            index=layer.index, output_bytes=layer.output_bytes, read_bytes=read, write_bytes=write,
            flops=layer.flops + layer.flops64 + layer.flops32,
            seconds_low=machine.layer_seconds(layer, (read, write), machine.fastest_disk, self.overlap) if machine else 0.0,
        )  # fmt: skip

    def _seconds(self, machine: Machine, disk: Disk) -> float:
        """The least that the run takes with such a disk."""
        first = self.first_read / disk.read + self._first_write / disk.write
        rows = (
            (layer, (row.read_bytes, row.write_bytes)) for layer, row in zip(self.layers, self.figures, strict=True)
        )
        return first + sum(machine.layer_seconds(layer, moved, disk, self.overlap) for layer, moved in rows)

    def to_json(self) -> dict[str, Any]:
        names = (
            "fits", "ratio", "output_bytes", "peak_ram_bytes", "peak_vram_bytes", "disk_bytes", "read_bytes", "write_bytes",
            "flops", "seconds_low", "seconds_high", "disk_measured", "advice", "calibration_tokens", "calibration",
            "overlap", "hidden_states", "forward_tokens",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"layers": [asdict(row) for row in self.figures]}

    def require_fit(self) -> None:
        """Raise BudgetError, with the smallest caps that would do, where even the leanest schedule does not fit."""
        require_fit(self.fit, self.caps)


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What every layer may become, before it is known on how many tokens."""

    recipe: Recipe
    """With the ratio that it comes to."""
    candidates: Sequence[Candidates]
    """A table for each layer."""


def decide(stream: ModelStream, recipe: Recipe, target: Target | None = None) -> Decided:
    """Raises RecipeError and UnsupportedModel for all in recipe and target that could stop a run later on."""
    if stream.rows:
        raise UnsupportedModel(f"{stream.folder} is already compressed by streamlap; wanted the original checkpoint.")
    recipe.check_methods(stream.family)
    survey = None if recipe.survey is None else read_survey(stream, Path(recipe.survey))
    recipe = meet(stream, recipe, survey, target)
    return Decided(recipe=recipe, candidates=all_candidates(stream, recipe, survey))


def make_plan(stream: ModelStream, decided: Decided, shape_NL: tuple[int, int], settings: RunSettings) -> Plan:
    """What that takes for so many calibration tokens, and how to go about it with these settings."""
    layers = forecast_layers(stream, decided.recipe, decided.candidates, shape_NL)
    choice = fit(compression_workload(stream, layers, shape_NL), settings.caps, settings.overlap)
    outer = stream.outer_tensors()
    return Plan(
        recipe=decided.recipe, layers=layers, fit=choice, caps=settings.caps, outer_bytes=shard_bytes(outer),
        first_read=sum(info.nbytes for info in outer.values()) + embedding_bytes(stream, choice),
        inputs=fitted_inputs(stream, {method.sublayer for method in decided.recipe.solving}),
    )  # fmt: skip


def all_candidates(stream: ModelStream, recipe: Recipe, survey: Survey | None) -> list[Candidates]:
    """Of every layer; those of equal shapes and budgets share them."""
    known: dict[str, Candidates] = {}
    result = []
    for index, parameters in enumerate(layer_parameters(stream, recipe.ratio, survey)):
        key = f"{shape_key(stream, index, {})} {parameters}"
        if key not in known:
            known[key] = layer_candidates(stream, recipe, index, parameters)
        result.append(known[key])
    return result


def plan(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    target_size: int | str | None = None,
    target_params: int | str | None = None,
    **options: Any,
) -> Plan:
    """What `compress` with the same arguments would take. Of a hub id only config, tokenizer and shard headers are fetched.

    `options` are single fields of RunSettings and of the recipe, as for `compress`. Raises the
    StreamlapError that `compress` would raise over its arguments, headers and text. Where the memory does not do, the plan says
    so in `fits` and `advice`. The free disk, the output folder and the weights are not looked at. Nothing has to be writable:
    a disk whose rates cannot be measured makes the range of seconds wider.
    """
    settings, changes = split_options(options)
    target = parse_target(target_size, target_params, changes.get("ratio"))
    recipe, settings = (recipe or Recipe()).override(**changes), settings.settled()
    steady_heap()
    folder, source = header_source(str(model), settings.trust_remote_code)
    stream = ModelStream(folder, settings.device, recipe.dtype, source)
    decided = decide(stream, recipe, target)
    tokens_NL = calibration_tokens(
        recipe.calibration, folder, stream.vocabulary, stream.context, settings.trust_remote_code, settings.caps.ram
    )
    found = make_plan(stream, decided, windows_of(tokens_NL), settings)
    check_sample(tokens_NL, found.inputs)
    return replace(found, machine=this_machine(settings, stream.dtype))


def windows_of(tokens_NL: torch.Tensor) -> tuple[int, int]:
    """Their number and length."""
    sequences, length = tokens_NL.shape
    return sequences, length


def embedding_bytes(stream: ModelStream, choice: Fit) -> int:
    """At most this is read of the embedding table for generation 0: a row a token."""
    stored = stream.source.info(f"{stream.family.embedding}.weight")
    return min(stored.nbytes, choice.work.sequences * choice.work.length * stored.nbytes // stored.shape[0])
