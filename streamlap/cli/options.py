"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id, org/name[@revision].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="Compute dtype: auto, float32, float16 or bfloat16.")]
MaxRam = Annotated[str | None, typer.Option(help="Cap on RAM, Python included, like 8GiB; default what is free.")]
MaxVram = Annotated[str | None, typer.Option(help="Cap on GPU memory, like 8GiB; default what is free.")]
Overlap = Annotated[
    bool,
    typer.Option("--overlap/--no-overlap", help="Read, write and compute at the same time; the result is the same."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the model folder's own tokenizer code; read it first."),
]
Work = Annotated[Path | None, typer.Option(help="Folder for hidden states between layers.")]
Ratio = Annotated[float | None, typer.Option(help="Fraction of the decoder-linear parameters to remove.")]
TargetSize = Annotated[str | None, typer.Option(help="In place of --ratio: most that all shards may take, like 24GB.")]
TargetParams = Annotated[
    str | None, typer.Option(help="In place of --ratio: most parameters of the whole model, like 50B or 7.5M.")
]
Preset = Annotated[str | None, typer.Option(help="best or lorap.  [default: best]")]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML file of settings; other options replace single ones.")]
CalibrationFiles = Annotated[
    list[str] | None, typer.Option(help="Text (.txt, .jsonl, .parquet) or token ids (.npy); may be repeated.")
]
Refine = Annotated[
    int | None,
    typer.Option(
        metavar="EPOCHS", help="Recovery: train each rebuilt layer for so many epochs of the calibration windows."
    ),
]
SurveyFile = Annotated[
    str | None, typer.Option(help="File of streamlap survey: layers that matter more keep more; default all alike.")
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows; default 128.")]
Length = Annotated[int | None, typer.Option(help="Tokens a window; default 2048 or the model's context.")]
StopAfter = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Stop at the first commit after so long, like 3h50m, with exit code 75; resume goes on."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the choice of windows.")]
