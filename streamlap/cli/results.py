"""The commands that look at a checkpoint or a result, and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import streamlap
from streamlap.cli.options import (
    Device,
    Dtype,
    Json,
    MaxRam,
    MaxVram,
    Model,
    Overlap,
    StopAfter,
    TrustRemoteCode,
    Work,
)
from streamlap.cli.wording import (
    describe_demo,
    describe_evaluation,
    describe_export,
    describe_inventory,
    emit,
)
from streamlap.demo import run_demo


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


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint, output folder or hub id.")],
    as_json: Json = False,
) -> None:
    """What is in a checkpoint or output folder: kinds, shapes, ranks, widths and parameters of every site."""
    table = streamlap.inspect(path)
    emit(as_json, table, describe_inventory(table))


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
