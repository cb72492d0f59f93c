"""The command line: words -> a Recipe -> one call. The only place that prints, configures logging, or exits."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import streamlap
from streamlap.allocate import Survey
from streamlap.cgroups import usable_cpus
from streamlap.demo import run_demo
from streamlap.errors import BudgetError, Interrupted, StreamlapError, first_line
from streamlap.memory import is_out_of_memory
from streamlap.options import (
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
from streamlap.recipe import Recipe
from streamlap.stopping import Stopped, stops_at_once
from streamlap.wording import (
    describe_demo,
    describe_evaluation,
    describe_export,
    describe_inventory,
    describe_plan,
    describe_report,
    describe_survey,
)

app = typer.Typer(
    help="Compress a huge language model on small hardware, one decoder layer at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def recipe_of(path: Path | None, files: list[str] | None, **options: Any) -> Recipe:
    """The recipe of the file, or the default, with the options that were given in place of its own."""
    options["files"] = tuple(files) if files else None
    base = Recipe.from_yaml(path) if path else Recipe()
    return base.override(**{key: value for key, value in options.items() if value is not None})


def how_small(ratio: float | None, target_size: str | None, target_params: str | None) -> dict[str, Any]:
    """The one of them that was given; of several the call complains."""
    wishes = {"ratio": ratio, "target_size": target_size, "target_params": target_params}
    return {name: value for name, value in wishes.items() if value is not None}


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text or token ids, as for --calibration; default: the bundled validation text."),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window; default 2048 or the model's context.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Overlapping windows, each scoring its last STRIDE tokens.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many tokens.")] = None,
    dtype: Dtype = None,
    device: Device = "auto",
    max_ram: MaxRam = None,
    max_vram: MaxVram = None,
    work: Work = None,
    overlap: Overlap = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Streaming perplexity of any checkpoint, original or compressed; never more than one layer in memory."""
    result = streamlap.evaluate(
        model, text, length=length, stride=stride, limit=limit, device=device, dtype=dtype or "auto", work=work,
        max_ram=max_ram, max_vram=max_vram, overlap=overlap, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    emit(as_json, result.to_json(), describe_evaluation(result))


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint, output folder or hub id.")],
    as_json: Json = False,
) -> None:
    """What is in a checkpoint or output folder: kinds, shapes, ranks, widths and parameters of every site."""
    table = streamlap.inspect(path)
    emit(as_json, table, describe_inventory(table))


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder, or any checkpoint folder.")],
    as_json: Json = False,
) -> None:
    """Check every shard: header, hash, shapes against config.json, no NaN; exit 3 with the list of faults."""
    result = streamlap.verify(out)
    lines = [f"{row['file']}{' ' + row['tensor'] if row['tensor'] else ''}: {row['fault']}" for row in result["faults"]]
    emit(as_json, result, lines or [f"{out} is whole"])
    if not result["ok"]:
        raise typer.Exit(3)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that streamlap wrote.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="New folder.")],
    to: Annotated[str, typer.Option(help="dense: factors multiplied back, removed channels as zeros.")],
    stop_after: StopAfter = None,
    as_json: Json = False,
) -> None:
    """Write a compressed model in another container."""
    if to != "dense":
        raise typer.BadParameter(f"{to!r} is not known; wanted dense", param_hint="--to")
    result = streamlap.export_dense(out, destination, stop_after=stop_after)
    emit(as_json, result, describe_export(destination, result))


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the compressed model.")] = Path(
        "streamlap-demo"
    ),
    ratio: Annotated[float, typer.Option(help="Fraction of the decoder-linear parameters to remove.")] = 0.2,
    as_json: Json = False,
) -> None:
    """Offline, in two minutes: compress the bundled trained model, show what it cost and what it kept."""
    result = run_demo(out, ratio)
    emit(as_json, result.to_json(), describe_demo(result))


def emit(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    typer.echo(json.dumps(value) if as_json else "\n".join(lines))


def main() -> None:
    """Entry point of the console script: a StreamlapError becomes one line on stderr and its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if "OMP_NUM_THREADS" not in os.environ:  # torch counts the machine's cores, also those that a container may not use
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    try:
        with stops_at_once():
            app(prog_name="streamlap")
    except StreamlapError as error:
        fail(str(error), error.exit_code)
    except Stopped as stop:
        fail(f"stopped ({stop}) with nothing under way; give the same command again", Interrupted.exit_code)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory ({first_line(error)}) before the first layer. Free some.", BudgetError.exit_code)


def fail(message: str, code: int) -> None:
    typer.echo(f"streamlap: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
