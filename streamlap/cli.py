"""The command line: words -> a Recipe -> one call. The only place that prints, configures logging, or exits."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import streamlap
from streamlap.demo import DemoResult, run_demo
from streamlap.errors import StreamlapError
from streamlap.recipe import Recipe

app = typer.Typer(
    help="Compress a huge language model on small hardware, one decoder layer at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id, org/name[@revision].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="Compute dtype: auto, float32, float16 or bfloat16.")]
Work = Annotated[Path | None, typer.Option(help="Folder for hidden states between layers.")]


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the result.")],
    ratio: Annotated[float | None, typer.Option(help="Fraction of the decoder-linear parameters to remove.")] = None,
    preset: Annotated[str | None, typer.Option(help="lorap.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of settings; other options replace single ones.")
    ] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help="Text (.txt, .jsonl, .parquet) or token ids (.npy); may be repeated.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows; default 128.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window; default 2048 or the model's context.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of windows.")] = None,
    dtype: Dtype = None,
    device: Device = "auto",
    work: Work = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier streamlap output.")] = False,
    as_json: Json = False,
) -> None:
    """Compress MODEL into the new folder OUT. A run that was killed goes on when the command is given again."""
    options: dict[str, Any] = {
        "ratio": ratio,
        "preset": preset,
        "samples": samples,
        "length": length,
        "seed": seed,
        "dtype": dtype,
    }
    options["files"] = tuple(calibration) if calibration else None
    overrides = {key: value for key, value in options.items() if value is not None}
    base = Recipe.from_yaml(recipe) if recipe else Recipe()
    report = streamlap.compress(model, out, base, device=device, work=work, overwrite=overwrite, **overrides)
    emit(as_json, report.to_json(), describe_report(report))


@app.command()
def resume(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an interrupted run.")], as_json: Json = False
) -> None:
    """Go on with an interrupted compress; OUT knows everything that is needed."""
    report = streamlap.resume(out)
    emit(as_json, report.to_json(), describe_report(report))


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
    work: Work = None,
    as_json: Json = False,
) -> None:
    """Streaming perplexity of any checkpoint, original or compressed; never more than one layer in memory."""
    result = streamlap.evaluate(
        model, text, length=length, stride=stride, limit=limit, device=device, dtype=dtype or "auto", work=work
    )
    lines = [
        f"perplexity {result.perplexity:.4f}  (mean NLL {result.nll:.6f} nats, {result.tokens:,} predicted tokens, "
        f"windows of {result.length})",
        f"{result.seconds:.1f} s, peak RAM {size(result.peak_ram_bytes)}",
    ]
    emit(as_json, result.to_json(), lines)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint, output folder or hub id.")],
    as_json: Json = False,
) -> None:
    """What is in a checkpoint or output folder: kinds, shapes, ranks, widths and parameters of every site."""
    table = streamlap.inspect(path)
    lines = [f"{table['model_type']}, {len(table['layers'])} layers"]
    for layer in table["layers"]:
        lines.append(f"layer {layer['index']}")
        lines += [f"  {path:<22}{describe_site(site)}" for path, site in layer["sites"].items()]
    emit(as_json, table, lines + describe_parameters(table["parameters"]))


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
    as_json: Json = False,
) -> None:
    """Write a compressed model in another container."""
    if to != "dense":
        raise typer.BadParameter(f"{to!r} is not known; wanted dense", param_hint="--to")
    result = streamlap.export_dense(out, destination)
    emit(as_json, result, [f"{destination}: {result['shards']} shards, {size(result['bytes'])}, for comparison only"])


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


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def describe_parameters(table: dict[str, Any]) -> list[str]:
    return [
        f"decoder linears {table['decoder_before']:,} -> {table['decoder_after']:,} ({table['ratio_decoder']:.2%} removed)",
        f"whole model     {table['total_before']:,} -> {table['total_after']:,} ({table['ratio_total']:.2%} removed)",
    ]


def describe_site(site: dict[str, Any]) -> str:
    shape = " x ".join(map(str, site["shape"]))
    detail = f" rank {site['rank']}" if site["rank"] is not None else ""
    error = f"  error {site['relative_error']:.4f}" if "relative_error" in site else ""
    return f"{site['kind']:<9} {shape}{detail}  {site['parameters']:,} parameters{error}"


def describe_report(report: streamlap.Report) -> list[str]:
    return [
        f"{report.out}: {len(report.layers)} layers in {report.seconds:.1f} s, peak RAM {size(report.peak_ram_bytes)}",
        *describe_parameters(report.parameters.to_json()),
        f"load it with: import streamlap; AutoModelForCausalLM.from_pretrained({report.out!r})",
    ]


def describe_demo(result: DemoResult) -> list[str]:
    rows = [("", "before", "after")]
    rows += [(label, before, after) for label, before, after in result.table()]
    lines = [f"{label:<28}{before:>16}{after:>16}" for label, before, after in rows]
    samples = [f"\n{name} goes on from {result.prompt!r}:\n  {text}" for name, text in result.samples.items()]
    return [*lines, *samples, f"\ncompressed model and its report: {result.out} ({result.seconds:.0f} s in all)"]


def main() -> None:
    """Entry point of the console script: a StreamlapError becomes one line on stderr and its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app(prog_name="streamlap")
    except StreamlapError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)


def fail(message: str, code: int) -> None:
    typer.echo(f"streamlap: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
