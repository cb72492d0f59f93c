"""A compression before it begins: what every layer becomes, what that takes, and the schedule that fits.

`make_plan` gives the value. The command `plan` shows it; `compress` goes by it, so that the sizes it claims and the forms it
solves for are those that were shown. From headers alone, before any weight is read.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from streamlap.families.stream import ModelStream
from streamlap.linalg.moments import fitted_sequences, held_sequences
from streamlap.planning.decide import Decided
from streamlap.planning.disk import COMPANION_BYTES
from streamlap.planning.figures import (
    LayerFigures,
    Traffic,
    first_traffic,
    flops_by_dtype,
    generations_moved,
    gradient_flops,
    gradient_traffic,
    layer_traffic,
    redraw_flops,
)
from streamlap.planning.forecast import LayerPlan, compression_workload, forecast_layers
from streamlap.planning.machine import Machine, Rates
from streamlap.planning.sample import fitted_inputs, redrawn_windows
from streamlap.planning.schedule import Fit, Memory, advice, fit, require_fit
from streamlap.planning.survey import SurveyCost, forecast_survey
from streamlap.recipe import Recipe
from streamlap.settings import Caps, RunSettings
from streamlap.store.sink import shard_bytes

SLACK = 1.8
"""Upper end of the range of seconds over its lower end: what lies between products and decompositions, and other programs."""


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
    first: Traffic
    """Before the first layer."""
    first_flops: int
    """Before the first layer, in the compute dtype."""
    dtype: str
    """In which layers are computed."""
    inputs: int
    """Of the widest linear that is fitted."""
    survey: SurveyCost | None = None
    """Of a survey that it would make for itself, if there is none yet."""
    survey_left_out: str = ""
    """Why it would make none, where one was to be made."""
    redrawn: int = 0
    """Windows beside those that were given, see `pipeline.redraw`."""
    machine: Machine | None = None
    """By whose rates seconds are counted; None in `compress`, which does not ask for them."""

    @property
    def fits(self) -> bool:
        return self.fit.fits

    @property
    def ratio(self) -> float:
        return self.recipe.ratio

    @property
    def depth(self) -> int:
        """Layers of the result."""
        return sum(layer.place is not None for layer in self.layers)

    @property
    def output_bytes(self) -> int:
        """Of all shards."""
        return self.outer_bytes + sum(layer.output_bytes for layer in self.layers)

    @property
    def peak_ram_bytes(self) -> int:
        return max(self.fit.peak_ram, self.survey.peak_ram if self.survey else 0)

    @property
    def peak_vram_bytes(self) -> int:
        return max(self.fit.peak_vram, self.survey.peak_vram if self.survey else 0)

    @property
    def disk_bytes(self) -> int:
        """Most that is on the disk at one time beside the source: shards, generations of hidden states, small files."""
        run = self.output_bytes + self.fit.work.disk_bytes
        return max(run, self.survey.disk_bytes if self.survey else 0) + COMPANION_BYTES

    @property
    def read_bytes(self) -> int:
        """From the disk."""
        survey = self.survey.read_bytes if self.survey else 0
        return survey + self.first.read + sum(row.read_bytes for row in self.figures)

    @property
    def write_bytes(self) -> int:
        """To the disk."""
        survey = self.survey.write_bytes if self.survey else 0
        return survey + self.first.written + sum(row.write_bytes for row in self.figures)

    @property
    def upload_bytes(self) -> int:
        """To a device of its own."""
        return self.first.up + sum(row.upload_bytes for row in self.figures)

    @property
    def download_bytes(self) -> int:
        """From it."""
        return self.first.down + sum(row.download_bytes for row in self.figures)

    @property
    def flops(self) -> int:
        return sum(self.flops_by_dtype.values())

    @property
    def flops_by_dtype(self) -> dict[str, int]:
        """Those of the forwards, in the compute dtype, and those of the solves."""
        found = flops_by_dtype([*self.layers, *([self.survey] if self.survey else [])], self.dtype)
        return found | {self.dtype: found[self.dtype] + self.first_flops}

    @property
    def eigen_problems(self) -> dict[int, int]:
        """Size -> number, the largest first; one in float32 goes by the size that takes as long in float64."""
        found = Counter(size for layer in self.layers for size in layer.decompositions)
        found.update(self.survey.decompositions if self.survey else ())
        return dict(sorted(found.items(), reverse=True))

    @property
    def generation_bytes(self) -> int:
        """Hidden states of all windows between two layers, of one stream."""
        return self.fit.work.generation

    @property
    def generations_read(self) -> float:
        """How often they are read from the disk in a layer, parts of them included; the first layer may read more."""
        return round(generations_moved(self.layers[:2][-1], self.fit.schedule)[0], 3)

    @property
    def generations_written(self) -> int:
        """How often they are written to it."""
        return generations_moved(self.layers[0], self.fit.schedule)[1]

    @property
    def seconds_low(self) -> float:
        """With all at the fastest rates of the machine and nothing else; 0 where no machine is known."""
        return self._seconds(self.machine.fastest) if self.machine else 0.0

    @property
    def seconds_high(self) -> float:
        """At the slowest rates, and more than that by SLACK."""
        return SLACK * self._seconds(self.machine.slowest) if self.machine else 0.0

    @property
    def disk_measured(self) -> bool:
        return self.machine is not None and self.machine.disk_measured

    @property
    def advice(self) -> tuple[str, ...]:
        """Which knob to turn where it does not fit."""
        return tuple(advice(self.fit, self.caps))

    @property
    def calibration_tokens(self) -> tuple[int, int]:
        """As they were given."""
        return self.fit.work.sequences - self.redrawn, self.fit.work.length

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
        sequences, length = self.fit.work.sequences, self.fit.work.length
        return min(self.fit.schedule.micro, sequences) * length

    @cached_property
    def figures(self) -> tuple[LayerFigures, ...]:
        return tuple(self._figures(layer) for layer in self.layers)

    def _traffic(self, layer: LayerPlan) -> Traffic:
        last = layer.index + 1 == len(self.layers) and not self.recipe.final
        return layer_traffic(layer, self.fit.work, self.fit.schedule, last)

    def _figures(self, layer: LayerPlan) -> LayerFigures:
        traffic, machine = self._traffic(layer), self.machine
        return LayerFigures(
            index=layer.index, output_bytes=layer.output_bytes, read_bytes=traffic.read, write_bytes=traffic.written,
            upload_bytes=traffic.up, download_bytes=traffic.down, flops=layer.flops + layer.flops64 + layer.flops32,
            seconds_low=machine.fastest.layer_seconds(layer, traffic, self.overlap) if machine else 0.0,
        )  # fmt: skip

    def _seconds(self, rates: Rates) -> float:
        """The least that the run takes at such rates."""
        layers = (rates.layer_seconds(layer, self._traffic(layer), self.overlap) for layer in self.layers)
        return (
            self._survey_seconds(rates)
            + rates.disk_seconds(self.first)
            + self.first_flops / rates.speed.matmul
            + sum(layers)
        )

    def _survey_seconds(self, rates: Rates) -> float:
        if self.survey is None:
            return 0.0
        moved = Traffic(read=self.survey.read_bytes, written=self.survey.write_bytes)
        return rates.compute_seconds(self.survey) + rates.disk_seconds(moved)

    @property
    def survey_seconds_low(self) -> float:
        """Of `seconds_low`, those of the survey."""
        return self._survey_seconds(self.machine.fastest) if self.machine else 0.0

    def to_json(self) -> dict[str, Any]:
        names = (
            "fits", "ratio", "output_bytes", "peak_ram_bytes", "peak_vram_bytes", "disk_bytes", "read_bytes", "write_bytes",
            "upload_bytes", "download_bytes", "flops", "flops_by_dtype", "generation_bytes", "generations_read",
            "generations_written", "seconds_low", "seconds_high", "survey_seconds_low", "survey_left_out", "disk_measured",
            "advice", "calibration_tokens", "redrawn", "calibration", "overlap", "hidden_states", "forward_tokens",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "eigen_problems": [{"size": size, "count": count} for size, count in self.eigen_problems.items()],
            "machine": self._machine(),
            "layers": [asdict(row) for row in self.figures],
        }

    def _machine(self) -> dict[str, Any] | None:
        """With the memory that the run may take of it."""
        memory = {"ram_bytes": self.fit.ram.cap, "vram_bytes": self.fit.vram.cap}
        return {**self.machine.to_json(), **memory} if self.machine else None

    def require_fit(self) -> None:
        """Raise BudgetError, with the smallest caps that would do, where even the leanest schedule does not fit."""
        require_fit(self.fit, self.caps)


def make_plan(
    stream: ModelStream, decided: Decided, shape_NL: tuple[int, int], settings: RunSettings, memory: Memory | None = None,
) -> Plan:  # fmt: skip
    """The plan of what was decided: its costs for so many calibration tokens, and the schedule that fits these settings.

    Args: shape_NL, windows and tokens in each, as given; memory, that of another machine.
    """
    redrawn = redrawn_windows(decided.recipe, stream.has_head, shape_NL)
    windows_NL, shape_NL = shape_NL, (shape_NL[0] + redrawn, shape_NL[1])
    for method in decided.recipe.distilled:
        method.require_steps(method.epochs * len(fitted_sequences(*windows_NL)))
    held = len(held_sequences(*windows_NL))
    layers = forecast_layers(stream, decided.recipe, decided.candidates, shape_NL, held)
    gradient = decided.recipe.reads_gradient
    work = compression_workload(stream, layers, shape_NL, bool(decided.recipe.final or redrawn), gradient)
    choice = fit(work, settings.caps, settings.overlap, memory)
    survey, left_out = forecast_survey(stream, decided.recipe, windows_NL, settings, memory)
    outer, final = stream.outer_tensors(), bool(decided.recipe.final)
    first = first_traffic(stream, choice, layers[0], redrawn, held * final)
    first_flops = redraw_flops(stream, redrawn, shape_NL[1])
    if gradient:
        first, first_flops = first + gradient_traffic(stream, choice), first_flops + gradient_flops(stream, shape_NL)
    return Plan(
        recipe=decided.recipe, layers=layers, fit=choice, caps=settings.caps, outer_bytes=shard_bytes(outer),
        first=first, first_flops=first_flops, dtype=str(stream.dtype).removeprefix("torch."),
        inputs=fitted_inputs(stream, decided.recipe.edited(stream.family)), redrawn=redrawn,
        survey=survey, survey_left_out=left_out,
    )  # fmt: skip


def windows_of(tokens_NL: torch.Tensor) -> tuple[int, int]:
    """Their number and length."""
    sequences, length = tokens_NL.shape
    return sequences, length
