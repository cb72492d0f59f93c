"""What `compress` would take, on this machine or on one that is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from streamlap.data.calibration import calibration_tokens
from streamlap.families.stream import ModelStream
from streamlap.planning.decide import decide
from streamlap.planning.machine import this_machine
from streamlap.planning.machine_file import find_sheet
from streamlap.planning.plan import Plan, make_plan, windows_of
from streamlap.planning.sample import check_sample
from streamlap.planning.target import parse_target
from streamlap.recipe import OVERRIDES, Recipe
from streamlap.settings import refuse_options, split_options
from streamlap.store.hub import header_source
from streamlap.system.allocator import steady_heap


def plan(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    target_size: int | str | None = None,
    target_params: int | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    machine: str | Path | None = None,
    **options: Any,
) -> Plan:
    """What `compress` with the same arguments would take. Of a hub id only config, tokenizer and shard headers are fetched.

    `options` are single fields of RunSettings and of the recipe, as for `compress`. Raises the
    StreamlapError that `compress` would raise over its arguments, headers and text. Where the memory does not do, the plan says
    so in `fits` and `advice`. The free disk, the output folder and the weights are not looked at. Nothing has to be writable:
    a disk whose rates cannot be measured makes the range of seconds wider.

    Args: machine, one that need not be there, by the name of a known one or by a YAML file: docs/cookbook.md.
    """
    settings, changes = split_options(options)
    refuse_options(plan, changes, OVERRIDES)
    target = parse_target(target_size, target_params, changes.get("ratio"), context, batch)
    recipe, sheet = Recipe.of(recipe).override(**changes), None if machine is None else find_sheet(machine)
    settings = sheet.settled(settings) if sheet else settings.settled()
    steady_heap()
    folder, source = header_source(model, settings.trust_remote_code)
    stream = ModelStream(folder, settings.device, recipe.dtype, source, sheet.bfloat16 if sheet else None)
    planned = sheet.machine(settings.device, stream.dtype) if sheet else None
    decided = decide(stream, recipe, target)
    tokens_NL = calibration_tokens(
        recipe.calibration, folder, stream.vocabulary, stream.context, settings.trust_remote_code, settings.caps.ram
    )
    memory = sheet.memory(settings.device) if sheet else None
    found = make_plan(stream, decided, windows_of(tokens_NL), settings, memory)
    check_sample(tokens_NL, found.inputs)
    return replace(found, machine=planned or this_machine(settings, stream.dtype))
