"""The main job: shards in, one decoder layer at a time through, shards out.

`compress` checks and plans, `run_compression` runs the plan inside a session; the loop over layers is in `layers`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from streamlap.data.calibration import calibration_tokens
from streamlap.data.tokenizer import class_elsewhere
from streamlap.errors import RecipeError, ResumeMismatch, first_line
from streamlap.families.stream import ModelStream
from streamlap.loader.configuration_nas import NAS
from streamlap.output.folder import (
    KEPT_NAME,
    SURVEY_NAME,
    finish_folder,
    loader_of,
    module_rows,
)
from streamlap.output.inspect import count_cache, count_written
from streamlap.output.report import LayerReport, Report
from streamlap.pipeline.final_gain import write_outer
from streamlap.pipeline.gradients import loss_gradients
from streamlap.pipeline.layers import Job, compress_layers
from streamlap.pipeline.old_result import check_meanwhile, check_output, check_survey, empty_output, held_bytes
from streamlap.pipeline.place import check_places, contents
from streamlap.pipeline.redraw import with_redrawn
from streamlap.pipeline.runner import check_sublayers
from streamlap.pipeline.session import Run, goes_on, read_run, session, stream_marks, whole_name
from streamlap.pipeline.streams import open_streams
from streamlap.pipeline.survey import survey_beside
from streamlap.planning.decide import decide
from streamlap.planning.disk import COMPANION_BYTES, DiskNeeds
from streamlap.planning.plan import Plan, make_plan, windows_of
from streamlap.planning.sample import check_sample, fitted_inputs
from streamlap.planning.target import parse_target
from streamlap.recipe import AUTO, OVERRIDES, Recipe
from streamlap.settings import RunSettings, refuse_options, split_options
from streamlap.store.hub import local_folder, model_name
from streamlap.store.journal import STATE_FOLDER, Journal, saved_tokens
from streamlap.store.sink import ShardFolder, file_hash, shard_names
from streamlap.system.allocator import steady_heap
from streamlap.system.meters import reset_peaks
from streamlap.untrusted.paths import path_of

log = logging.getLogger(__name__)


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    overwrite: bool = False,
    target_size: int | str | None = None,
    target_params: int | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    **options: Any,
) -> Report:
    """Compress the checkpoint `model` (a folder or a hub id) into the new folder `out`, or go on where a killed run stopped.

    `options` are single fields of RunSettings (device, work, max_ram, max_vram, overlap, stop_after, trust_remote_code) and
    of the recipe (ratio, preset, shape, format, multiple, dtype, survey, refine, methods, and the calibration's files, samples,
    length, seed, text_column, redraw).

    In place of a ratio, `target_size` may say how many bytes all shards may take (a number, or text like 24GB), with `context`
    also the keys and values of `batch` sequences (1) of so many tokens; or `target_params` how many parameters the whole model
    may have (like 50B). The recipe gets the lowest ratio that will do. `overwrite` replaces an earlier result of `compress`,
    and leaves files there that streamlap did not write; a stopped run that is this very one goes on all the same. Raises a
    StreamlapError before the first layer for anything that can be checked from headers, and Interrupted where it was stopped.
    """
    settings, changes = split_options(options)
    refuse_options(compress, changes, OVERRIDES)
    deadline = settings.deadline()
    steady_heap()
    target = parse_target(target_size, target_params, changes.get("ratio"), context, batch)
    recipe, out = Recipe.of(recipe).override(**changes), path_of(out, "out")
    check_places(out, settings.work)
    folder = local_folder(model, settings.trust_remote_code)
    settings = settings.settled()
    reset_peaks()
    stream = ModelStream(folder, settings.device, recipe.dtype)
    decided = decide(stream, recipe, target)
    tokens_NL = calibration_tokens(
        recipe.calibration, folder, stream.vocabulary, stream.context, settings.trust_remote_code, settings.caps.ram
    )
    plan = make_plan(stream, decided, windows_of(tokens_NL), settings)
    check_sample(tokens_NL, plan.inputs)
    plan.require_fit()
    check_output(folder, out, overwrite)
    run = Run(command="compress", out=out, folder=out, model=whole_name(model, folder), settings=settings, own={})
    begun = None
    if Journal.exists(out) and not overwrite:
        begun = gone_on_with(run, fingerprint(stream, plan, tokens_NL), target is not None)
    else:
        disk_needs(plan).require(out, run.hidden, freed=held_bytes(out))
        check_sublayers(stream, plan.fit, tokens_NL, writes=plan.recipe.anchored)
    if plan.recipe.survey == AUTO:
        if begun and begun.survey is None:
            log.warning(
                "%s was begun without a survey, and goes on without one: all layers keep the same share. Give --no-survey, or "
                "start over with --overwrite.", out,
            )  # fmt: skip
        found = begun.survey if begun else survey_beside(stream, tokens_NL, out, run.model, settings, recipe, deadline)
        decided = decide(stream, replace(recipe, survey=str(found) if found else None), target)
        plan = make_plan(stream, decided, windows_of(tokens_NL), settings)
        plan.require_fit()
    if overwrite and contents(out) and not goes_on(run, fingerprint(stream, plan, tokens_NL)):
        check_survey(plan.recipe.survey, out)
        empty_output(out)  # after all that may go wrong
    survey = plan.recipe.survey and str(Path(plan.recipe.survey).resolve())
    own = {"recipe": plan.recipe.to_dict() | {"survey": survey}}
    return run_compression(replace(run, own=own), stream, plan, tokens_NL, deadline)


def gone_on_with(run: Run, marks: Mapping[str, Any], targeted: bool) -> Recipe:
    """The recipe of the run that the output folder holds. It is read before the survey, which may take hours.

    Args: marks, the fingerprint of this run, as far as it is known without a survey; targeted, whether the ratio is found by a
    target, and so goes by the survey too. Raises ResumeMismatch where the folder holds another run.
    """
    unknown = {"survey", "recipe ratio"} if targeted else {"survey"}
    Journal.load(run.folder).check(marks, run.command, but=unknown)
    return begun_recipe(read_run(run.folder))


def resume_compression(run: Run, settings: RunSettings) -> Report:
    """Go on with an interrupted run; `settings` are its own, with other caps where they were given."""
    deadline = settings.deadline()
    steady_heap()
    recipe, settings = begun_recipe(run), settings.settled()
    reset_peaks()
    stream = ModelStream(local_folder(run.model), settings.device, recipe.dtype)
    tokens_NL = saved_tokens(run.folder)
    plan = make_plan(stream, decide(stream, recipe), windows_of(tokens_NL), settings)
    plan.require_fit()
    return run_compression(run, stream, plan, tokens_NL, deadline)


def run_compression(run: Run, stream: ModelStream, plan: Plan, tokens_NL: torch.Tensor, deadline: float) -> Report:
    """The checked job, from its next layer to a finished folder."""
    out, needs = run.out, disk_needs(plan)
    marks, keep = fingerprint(stream, plan, tokens_NL), dict[str, Path]()
    if plan.recipe.survey is not None:
        keep[SURVEY_NAME] = Path(plan.recipe.survey)
    with session(run, marks, needs, deadline, lambda: check_meanwhile(out), tokens_NL, keep) as running:
        recipe = begun_recipe(running.run)
        ShardFolder(out).require(layer_shards(plan, journal_rows(running.journal)))
        survey = kept_survey(running.run, plan.recipe)
        recipe = replace(recipe, survey=SURVEY_NAME if survey else None)  # the folder keeps a copy, wherever it may go
        windows = with_redrawn(stream, plan, tokens_NL, running)
        streams = open_streams(
            stream, windows, plan.fit.schedule, running.run.hidden, recipe.beside_dense, recipe.anchored
        )
        streams = replace(streams, gradients=loss_gradients(stream, plan, windows.tokens_NL, running))
        job = Job(stream=stream, plan=plan, out=out, streams=streams, session=running)
        compress_layers(job)
        gain, outer = write_outer(job)
        report = build_report(stream, plan, recipe, out, tokens_NL, running.journal, gain, outer)
        ShardFolder(out).seal(report.shards)
        tokenizer = class_elsewhere(stream.folder, NAS if report.format == "nas" else stream.raw_config["model_type"])
        finish_folder(out, stream, model_name(running.run.model), report, recipe.to_yaml(), survey, tokenizer)
    return report


def disk_needs(plan: Plan) -> DiskNeeds:
    """Of a whole run, as its plan says."""
    return DiskNeeds(output_bytes=plan.output_bytes + COMPANION_BYTES, hidden_bytes=plan.fit.work.disk_bytes)


def begun_recipe(run: Run) -> Recipe:
    """The recipe that a run was begun with; its survey is the copy in the state. Raises ResumeMismatch where its journal has
    none."""
    try:
        recipe = Recipe.from_dict(run.own["recipe"])
    except (KeyError, TypeError, AttributeError, RecipeError) as error:
        raise ResumeMismatch(
            f"{run.folder} has no recipe that can be used ({first_line(error)}). Delete it and give the first command again."
        ) from error
    survey = kept_survey(run, recipe)
    return replace(recipe, survey=str(survey) if survey else None)


def kept_survey(run: Run, recipe: Recipe) -> Path | None:
    """The copy in the state of the run, which may have been moved; the file itself where that has none."""
    copy = run.folder / STATE_FOLDER / SURVEY_NAME
    if recipe.survey is None:
        return None
    return copy if copy.is_file() else Path(recipe.survey)


def build_report(
    stream: ModelStream, plan: Plan, recipe: Recipe, out: Path, tokens_NL: torch.Tensor, journal: Journal, gain: float,
    outer: str,
) -> Report:  # fmt: skip
    """Args: gain, of the final norm; outer, the hash of the shard of what lies outside the layers."""
    layers = journal_rows(journal)
    rows = module_rows(layers, stream.family.layers)
    names = shard_names(plan.depth)
    hashes = {names[0]: outer} | layer_shards(plan, layers)
    return Report(
        out=str(out), recipe=recipe.to_dict(), layers=layers,
        parameters=count_written(stream, rows, recipe.format, out, names),
        kv_cache=count_cache(stream, rows),
        shards=hashes, calibration_tokens=windows_of(tokens_NL), kept_channels=KEPT_NAME, loader=loader_of(stream.raw_config),
        seconds=sum(sum(layer.seconds.values()) for layer in layers), final_gain=gain, redrawn=plan.redrawn,
        calibration_inputs=fitted_inputs(stream, recipe.edited(stream.family)),
    )  # fmt: skip


def journal_rows(journal: Journal) -> tuple[LayerReport, ...]:
    """Of the layers that are done."""
    return tuple(LayerReport.from_json(line) for line in journal.layers)


def layer_shards(plan: Plan, layers: Iterable[LayerReport]) -> dict[str, str]:
    """Name and hash of the shards of these layers."""
    names = shard_names(plan.depth)
    return {names[layer.place + 1]: layer.sha256 for layer in layers if layer.place is not None}


def fingerprint(stream: ModelStream, plan: Plan, tokens_NL: torch.Tensor) -> dict[str, Any]:
    """All that the bytes of the output depend on."""
    recipe = plan.recipe
    # Not the names of files: the tokens that came out of them, or what a survey says, is what counts, however they are spelt.
    rows = recipe.to_dict().items()
    recipe_rows = {f"recipe {key}": value for key, value in rows if key not in ("calibration", "survey")}
    survey = None if recipe.survey in (None, AUTO) else file_hash(Path(str(recipe.survey)))[:16]
    drawn = f"{plan.redrawn}, seed {recipe.calibration.seed}" if plan.redrawn else None
    return {**recipe_rows, **stream_marks(stream, tokens_NL), "survey": survey, "redrawn windows": drawn}
