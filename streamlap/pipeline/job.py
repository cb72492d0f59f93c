"""What one compression consists of, how it goes about its work, and what it reports at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from streamlap.families.stream import ModelStream
from streamlap.output.folder import KEPT_NAME, module_rows
from streamlap.output.inspect import count_parameters
from streamlap.output.report import LayerReport, Report
from streamlap.pipeline.sublayers import Banks
from streamlap.planning.forecast import compression_workload, forecast
from streamlap.planning.schedule import Caps, Fit, fit, require_fit
from streamlap.recipe import Recipe
from streamlap.store.hidden import HiddenBank
from streamlap.store.journal import Journal
from streamlap.store.sink import file_hash, shard_names
from streamlap.system.meters import (
    bytes_moved,
)
from streamlap.system.signals import Stops


@dataclass(kw_only=True)
class Job:
    """Everything one run needs, checked."""

    stream: ModelStream
    recipe: Recipe
    out: Path
    tokens_NL: torch.Tensor
    journal: Journal
    hidden: HiddenBank
    banks: Banks | None
    """The dense model's stream and what lies between halves, where halves are rebuilt."""
    fit: Fit
    stops: Stops
    moved: tuple[int, int] = field(default_factory=bytes_moved)
    """Bytes read and written up to the last commit."""

    @property
    def streams(self) -> tuple[HiddenBank, ...]:
        """What a layer begins with and leaves to the next."""
        return (self.hidden,) if self.banks is None else (self.hidden, self.banks.dense)


def choose_schedule(stream: ModelStream, recipe: Recipe, tokens_NL: torch.Tensor, arguments: Mapping[str, Any]) -> Fit:
    """How to go about it inside the caps. Raises BudgetError, with the smallest caps that would do, where nothing fits."""
    sequences, length = tokens_NL.shape
    shape_NL = (sequences, length)
    work = compression_workload(stream, forecast(stream, recipe, shape_NL), shape_NL)
    caps = Caps(ram=arguments.get("max_ram"), vram=arguments.get("max_vram"))
    choice = fit(work, caps, arguments.get("overlap", True))
    require_fit(choice, caps)
    return choice


def build_report(job: Job) -> Report:
    layers = tuple(LayerReport.from_json(line) for line in job.journal.layers)
    rows = module_rows(layers, job.stream.family.layers)
    names = shard_names(job.stream.depth)
    hashes = {names[0]: file_hash(job.out / names[0])} | {names[layer.index + 1]: layer.sha256 for layer in layers}
    sequences, length = job.tokens_NL.shape
    return Report(
        out=str(job.out), recipe=job.recipe.to_dict(), parameters=count_parameters(job.stream, rows), layers=layers,
        shards=hashes, calibration_tokens=(sequences, length), kept_channels=KEPT_NAME,
        seconds=sum(sum(layer.seconds.values()) for layer in layers),
    )  # fmt: skip
