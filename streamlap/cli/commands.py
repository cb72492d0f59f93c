"""The commands: options -> one call of the Python interface -> text or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import streamlap
from streamlap.cli.options import (
    RATIO,
    TEXT,
    CapOptions,
    Dtype,
    Json,
    Length,
    Machine,
    MaybeModel,
    Model,
    Overwrite,
    RecipeOptions,
    RecoveryOptions,
    RunOptions,
    Shape,
    StopAfter,
    TextColumn,
    TextOptions,
    given,
    named,
    takes,
    worded,
)
from streamlap.cli.show import (
    describe_demo,
    describe_evaluation,
    describe_export,
    describe_inventory,
    describe_plan,
    describe_recovery,
    describe_report,
    describe_sheets,
    describe_survey,
    describe_tasks,
    emit,
)
from streamlap.demo import run_demo
from streamlap.errors import BudgetError
from streamlap.pipeline.adapt import Recovered
from streamlap.planning.machine_file import known_sheets
from streamlap.planning.survey_file import Survey
from streamlap.recipe import Recipe

SIZES = ("ratio", "target_size", "target_params", "context", "batch")
"""Options that say how small the result is to be."""


def recipe_of(options: RecipeOptions) -> Recipe:
    """The recipe of the file, or the default, with the options that were given in place of its own."""
    base = Recipe.from_yaml(options.recipe) if options.recipe else Recipe()
    changes = given(options, "recipe", "calibration", *SIZES, "no_survey")
    if options.no_survey:
        if options.survey is not None:
            raise typer.BadParameter("there is a --survey too; wanted one of them", param_hint="--no-survey")
        changes["survey"] = None
    files = {"files": tuple(options.calibration)} if options.calibration else {}
    return base.override(**changes, **files)


def how_small(options: RecipeOptions) -> dict[str, Any]:
    """Those of SIZES that were given; `streamlap.compress` refuses those that exclude each other."""
    wishes = {name: getattr(options, name) for name in SIZES}
    return {name: value for name, value in wishes.items() if value is not None}


@takes
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=named, help="New folder for the result.")],
    recipe: RecipeOptions,
    run: RunOptions,
    stop_after: StopAfter = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL into the new folder OUT. A run that was killed goes on when the command is given again."""
    report = streamlap.compress(
        model, out, recipe_of(recipe), overwrite=overwrite, stop_after=stop_after, **given(run), **how_small(recipe)
    )
    emit(as_json, report.to_json(), describe_report(report))


@takes
def plan(
    recipe: RecipeOptions, run: RunOptions, model: MaybeModel = None, machine: Machine = None, as_json: Json = False
) -> None:
    """What compress with the same options would take: size, memory, disk, time. From headers; exit 4 if it does not fit."""
    if machine == "list":
        sheets = known_sheets()
        emit(as_json, {"machines": [sheet.to_json() for sheet in sheets]}, describe_sheets(sheets))
        return
    if model is None:
        raise typer.BadParameter("it is missing; wanted a checkpoint folder or a hub id", param_hint="MODEL")
    result = streamlap.plan(model, recipe_of(recipe), machine=machine, **given(run), **how_small(recipe))
    emit(as_json, result.to_json(), describe_plan(result))
    if not result.fits:
        raise typer.Exit(BudgetError.exit_code)


@takes
def survey(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", parser=named, help="New JSON file for compress --survey.")],
    text: TextOptions,
    run: RunOptions,
    shape: Shape = None,
    stop_after: StopAfter = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure how far the predictions move when one sub-layer is cut; FILE serves compress --survey at every ratio."""
    found = streamlap.survey(
        model, file, files=tuple(text.calibration or ()), shape=shape or "free", overwrite=overwrite, stop_after=stop_after,
        **given(text, "calibration"), **given(run),
    )  # fmt: skip
    emit(as_json, found.to_json(), describe_survey(found))


@takes
def resume(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", parser=named, help="Folder of an interrupted run, or file of a survey.")
    ],
    caps: CapOptions,
    stop_after: StopAfter = None,
    as_json: Json = False,
) -> None:
    """Go on with an interrupted compress, survey, recover or export. All settings are kept in OUT, the caps included."""
    result = streamlap.resume(out, stop_after=stop_after, **given(caps))
    if isinstance(result, dict):
        emit(as_json, result, describe_export(out, result))
    elif isinstance(result, Survey):
        emit(as_json, result.to_json(), describe_survey(result))
    elif isinstance(result, Recovered):
        emit(as_json, result.to_json(), describe_recovery(out, result))
    else:
        emit(as_json, result.to_json(), describe_report(result))


@takes
def recover(
    out: Annotated[str, typer.Argument(metavar="OUT", parser=worded, help="Compressed model.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", parser=named, help="New folder.")],
    knobs: RecoveryOptions,
    run: RunOptions,
    stop_after: StopAfter = None,
    as_json: Json = False,
) -> None:
    """Train a compressed model by LoRA and merge it; ranks and widths stay. Written only if the held-out loss falls."""
    result = streamlap.recover(out, destination, stop_after=stop_after, **given(knobs), **given(run))
    emit(as_json, result.to_json(), describe_recovery(destination, result))


@takes
def evaluate(
    model: Model,
    run: RunOptions,
    text: Annotated[list[str] | None, TEXT] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|NAME",
            help="In place of a text: a task of lm-eval, a YAML file without code or a name that it knows; may be repeated.",
        ),
    ] = None,
    length: Length = None,
    stride: Annotated[
        int | None, typer.Option(help="Overlapping windows, each scoring its last STRIDE tokens.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use at most this many tokens, or documents of a task; the rest is not read."),
    ] = None,
    text_column: TextColumn = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Perplexity of any checkpoint, original or compressed, layer by layer, so that it need not fit into memory."""
    if tasks:
        asked = {"text": text or None, "length": length, "stride": stride, "text-column": text_column}
        if others := [name for name, value in asked.items() if value is not None]:
            raise typer.BadParameter(f"--{others[0]} is given too; wanted one of them", param_hint="--tasks")
        found = streamlap.evaluate_tasks(model, tasks, limit=limit, dtype=dtype or "auto", **given(run))
        emit(as_json, found, describe_tasks(found))
        return
    result = streamlap.evaluate(
        model, text or None, length=length, stride=stride, limit=limit, text_column=text_column, dtype=dtype or "auto",
        **given(run),
    )  # fmt: skip
    emit(as_json, result.to_json(), describe_evaluation(result))


@takes
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", parser=worded, help="Checkpoint, output folder or hub id.")],
    as_json: Json = False,
) -> None:
    """What is in a checkpoint or output folder: kinds, shapes, ranks, widths and parameters of every linear."""
    table = streamlap.inspect(path)
    emit(as_json, table, describe_inventory(table))


@takes
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=named, help="Output folder, or any checkpoint folder.")],
    as_json: Json = False,
) -> None:
    """Check every shard: header, hash, shapes against config.json, no NaN; exit 3 with the list of faults."""
    result = streamlap.verify(out)
    lines = [f"{row['file']}{' ' + row['tensor'] if row['tensor'] else ''}: {row['fault']}" for row in result["faults"]]
    emit(as_json, result, lines or [f"{out} is whole"])
    if not result["ok"]:
        raise typer.Exit(3)


@takes
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=named, help="Folder that streamlap wrote.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", parser=named, help="New folder.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="stock: a plain checkpoint of the same size, where all linears are dense and all layers have the same widths; "
            "nas: the architecture DeciLM, where widths differ or layers lack attention; gguf: one file, DEST, of a folder "
            "whose linears are dense; dense: the size of the original, factors multiplied back, removed channels as zeros.",
        ),
    ],
    type: Annotated[
        str | None,
        typer.Option(
            help="Type of the numbers with --to gguf: f32, f16, bf16 or q8_0.  [default: the checkpoint's dtype]"
        ),
    ] = None,
    stop_after: StopAfter = None,
    as_json: Json = False,
) -> None:
    """Write a compressed model in another format."""
    result = streamlap.export(out, destination, to=to, type=type, stop_after=stop_after)
    emit(as_json, result, describe_export(destination, result))


@takes
def demo(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", parser=named, help="New folder for the compressed model.")
    ] = Path("streamlap-demo"),
    ratio: Annotated[str, RATIO] = "0.2",
    as_json: Json = False,
) -> None:
    """Offline, in two minutes: compress the bundled trained model, show what it cost and what it kept."""
    result = run_demo(out, ratio)
    emit(as_json, result.to_json(), describe_demo(result))


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"streamlap {streamlap.__version__}")
        raise typer.Exit


def whole(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compress a huge language model on small hardware, one decoder layer at a time."""
