"""The commands that make something: words -> a Recipe -> one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import streamlap
from streamlap.cli.options import (
    CalibrationFiles,
    Device,
    Dtype,
    Json,
    Length,
    MaxRam,
    MaxVram,
    Model,
    Overlap,
    Preset,
    Ratio,
    RecipeFile,
    Refine,
    Samples,
    Seed,
    StopAfter,
    SurveyFile,
    TargetParams,
    TargetSize,
    TrustRemoteCode,
    Work,
)
from streamlap.cli.wording import (
    describe_export,
    describe_plan,
    describe_report,
    describe_survey,
    emit,
)
from streamlap.errors import BudgetError
from streamlap.planning.allocate import Survey
from streamlap.recipe import Recipe


def recipe_of(path: Path | None, files: list[str] | None, **options: Any) -> Recipe:
    """The recipe of the file, or the default, with the options that were given in place of its own."""
    options["files"] = tuple(files) if files else None
    base = Recipe.from_yaml(path) if path else Recipe()
    return base.override(**{key: value for key, value in options.items() if value is not None})


def how_small(ratio: float | None, target_size: str | None, target_params: str | None) -> dict[str, Any]:
    """The one of them that was given; of several the call complains."""
    wishes = {"ratio": ratio, "target_size": target_size, "target_params": target_params}
    return {name: value for name, value in wishes.items() if value is not None}


def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the result.")],
    ratio: Ratio = None,
    target_size: TargetSize = None,
    target_params: TargetParams = None,
    preset: Preset = None,
    recipe: RecipeFile = None,
    calibration: CalibrationFiles = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    refine: Refine = None,
    survey: SurveyFile = None,
    dtype: Dtype = None,
    device: Device = "auto",
    max_ram: MaxRam = None,
    max_vram: MaxVram = None,
    work: Work = None,
    overlap: Overlap = True,
    stop_after: StopAfter = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier streamlap output.")] = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL into the new folder OUT. A run that was killed goes on when the command is given again."""
    settings = recipe_of(
        recipe, calibration, preset=preset, samples=samples, length=length, seed=seed, dtype=dtype, refine=refine,
        survey=survey,
    )  # fmt: skip
    report = streamlap.compress(
        model, out, settings, device=device, work=work, overwrite=overwrite, max_ram=max_ram, max_vram=max_vram,
        overlap=overlap, stop_after=stop_after, trust_remote_code=trust_remote_code,
        **how_small(ratio, target_size, target_params),
    )  # fmt: skip
    emit(as_json, report.to_json(), describe_report(report))


def plan(
    model: Model,
    ratio: Ratio = None,
    target_size: TargetSize = None,
    target_params: TargetParams = None,
    preset: Preset = None,
    recipe: RecipeFile = None,
    calibration: CalibrationFiles = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    refine: Refine = None,
    survey: SurveyFile = None,
    dtype: Dtype = None,
    device: Device = "auto",
    max_ram: MaxRam = None,
    max_vram: MaxVram = None,
    work: Work = None,
    overlap: Overlap = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """What compress with the same options would take: size, memory, disk, time. From headers; exit 4 if it does not fit."""
    settings = recipe_of(
        recipe, calibration, preset=preset, samples=samples, length=length, seed=seed, dtype=dtype, refine=refine,
        survey=survey,
    )  # fmt: skip
    result = streamlap.plan(
        model, settings, device=device, work=work, max_ram=max_ram, max_vram=max_vram, overlap=overlap,
        trust_remote_code=trust_remote_code, **how_small(ratio, target_size, target_params),
    )  # fmt: skip
    emit(as_json, result.to_json(), describe_plan(result))
    if not result.fits:
        raise typer.Exit(BudgetError.exit_code)


def survey(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="New JSON file for compress --survey.")],
    calibration: CalibrationFiles = None,
    samples: Annotated[int | None, typer.Option(help="Windows to measure on; default 16.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window; default 256 or the model's context.")] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = "auto",
    max_ram: MaxRam = None,
    max_vram: MaxVram = None,
    work: Work = None,
    overlap: Overlap = True,
    stop_after: StopAfter = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier survey.")] = False,
    as_json: Json = False,
) -> None:
    """Measure once what each half of each layer loses by being cut; serves compress --survey at every ratio."""
    found = streamlap.survey(
        model, file, files=tuple(calibration or ()), samples=samples, length=length, seed=seed or 0, dtype=dtype or "auto",
        device=device, work=work, overwrite=overwrite, max_ram=max_ram, max_vram=max_vram, overlap=overlap,
        stop_after=stop_after, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    emit(as_json, found.to_json(), describe_survey(found))


def resume(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an interrupted run, or file of a survey.")],
    max_ram: MaxRam = None,
    max_vram: MaxVram = None,
    stop_after: StopAfter = None,
    as_json: Json = False,
) -> None:
    """Go on with an interrupted compress, survey or export; OUT knows everything that is needed, the caps included."""
    result = streamlap.resume(out, max_ram=max_ram, max_vram=max_vram, stop_after=stop_after)
    if isinstance(result, dict):
        emit(as_json, result, describe_export(out, result))
    elif isinstance(result, Survey):
        emit(as_json, result.to_json(), describe_survey(result))
    else:
        emit(as_json, result.to_json(), describe_report(result))
