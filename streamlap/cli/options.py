"""The options, each once: groups of them as dataclasses, which commands take as arguments.

    @takes
    def plan(model: Model, recipe: RecipeOptions, run: RunOptions, as_json: Json = False) -> None: ...

gives a command with one option for each field of the groups.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


def worded(text: str) -> str:
    """The word itself. Raises BadParameter for an empty one: `"$OUT"` where OUT is not set would mean the folder one is in."""
    if not text:
        raise typer.BadParameter("it is empty; wanted a name. Is a variable of the shell not set?")
    return text


def named(text: str) -> Path:
    """The path of that name, as `worded`."""
    return Path(worded(text))


Model = Annotated[
    str, typer.Argument(metavar="MODEL", parser=worded, help="Checkpoint folder or hub id, org/name[@revision].")
]
MaybeModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        parser=worded,
        help="Checkpoint folder or hub id, org/name[@revision]; not needed for --machine list.",
        show_default=False,
    ),
]
Machine = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        parser=worded,
        help="Plan for another machine: a known one, or a YAML file; list prints those that are known.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier result of this command; a stopped run with the same settings goes on all the same.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        parser=worded,
        help="Compute dtype: float32, float16, bfloat16, or short fp32, fp16, bf16; or auto, the checkpoint's dtype where the "
        "device is fast in it, else float32. For eval on a CPU auto is float32.  [default: auto]",
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(
        metavar="SHAPE",
        parser=worded,
        help="What linears and layers may become: free, every form (low-rank, pivoted, narrower); nas, dense linears, each FFN "
        "with a width of its own, and some layers without attention; stock, dense linears of the same widths in every layer, "
        "with a survey file also fewer KV heads and layers.  [default: free]",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="How the result is stored: factored, every form, opened by this package's loader; stock, a plain checkpoint of "
        "the same architecture; nas, a checkpoint of the architecture DeciLM. The last two imply the shapes of their names.  "
        "[default: factored]"
    ),
]
RATIO = typer.Option(
    metavar="FRACTION",
    show_default=False,
    help="Fraction of the parameters of the decoder's linears to remove, like 0.2 or 20%.  [default: 0.2]",
)
"""Of compress and plan, where a recipe file or a target may say it too, and of demo."""
TextColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Column of JSON or parquet rows that has the text; default text, or a chat's turns."
    ),
]
TEXT = typer.Option(
    metavar="TEXT",
    help="Text or token ids, as for --calibration. Of a data set recover takes the split train, eval the split validation, "
    "else test. Default of eval: the bundled validation text.",
)
Samples = Annotated[
    int | None,
    typer.Option(
        help="Windows to draw; default 128, for survey 32, for recover 1024. They are drawn from the first 2^20 tokens of the "
        "text, or from the first 4 x samples x length if that is more."
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a window; default 2048, for survey 256, for recover 512, or the model's context if that is shorter."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed for drawing windows; with recover also for their order and for the start of the adapters."),
]
StopAfter = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Stop at the first commit after this time, like 3h50m, with exit code 75; resume goes on."
    ),
]


@dataclass(frozen=True, kw_only=True)
class CapOptions:
    """Caps on memory, which a resumed run may be given anew."""

    max_ram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Cap on RAM, Python included, like 8GiB or 8G (2^30 bytes each), or 8GB (10^9); default: all that is free.",
        ),
    ] = None
    max_vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Cap on GPU memory, like 8GiB; default: all that is free.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions(CapOptions):
    """How a run goes about its work."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            parser=named,
            help="Folder for hidden states between layers; default inside OUT. Without it eval keeps them in memory alone.",
        ),
    ] = None
    overlap: Annotated[
        bool,
        typer.Option(
            "--overlap/--no-overlap", help="Read, write and compute at the same time; the result is the same."
        ),
    ] = True
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the model folder's own tokenizer code; read it first."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """On which calibration tokens statistics are taken, and in which dtype layers are computed."""

    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Text (.txt, .md, .jsonl, .json, .parquet, also .gz, .zst), token ids (.npy), or a data set of the hub, "
            "org/name[@revision][/configuration][:split] or org/name/path/to/file; may be repeated.",
        ),
    ] = None
    text_column: TextColumn = None
    samples: Samples = None
    length: Length = None
    seed: Seed = None
    dtype: Dtype = None


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(TextOptions):
    """All that decides the result."""

    ratio: Annotated[str | None, RATIO] = None
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="In place of --ratio: most bytes that all shards may take, like 24GB (10^9) or 24G (2^30).",
        ),
    ] = None
    target_params: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="In place of --ratio: most parameters of the whole model, like 50B (billions) or 150k.",
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(help="Tokens a sequence whose keys and values must fit into --target-size too.  [default: none]"),
    ] = None
    batch: Annotated[int | None, typer.Option(help="Sequences of --context tokens at a time.  [default: 1]")] = None
    preset: Annotated[str | None, typer.Option(help="best, lorap, loraprune or pclora.  [default: best]")] = None
    shape: Shape = None
    format: Format = None
    multiple: Annotated[
        int | None,
        typer.Option(
            metavar="CHANNELS",
            help="With shape nas or stock: the width of every FFN is a multiple of this; default 128 with format stock, 256 "
            "with format nas, less where the FFN is narrow, and 1 with format factored.",
        ),
    ] = None
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=named,
            help="YAML file of settings, see docs/formats.md; other options replace single ones.",
        ),
    ] = None
    refine: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS",
            help="Train each rebuilt layer for at most so many epochs over the calibration windows; with preset best.",
        ),
    ] = None
    survey: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            parser=worded,
            help="File of streamlap survey: sub-layers that matter more keep more. Default auto, with preset best and shape "
            "free or nas: it is measured first and kept beside OUT; else none.",
        ),
    ] = None
    redraw: Annotated[
        bool | None,
        typer.Option(
            "--redraw/--no-redraw",
            help="See each calibration window that is fitted to again, with half of its tokens drawn from the model's "
            "predictions, where all windows together hold fewer than 131,072 tokens; default yes, with preset best.",
        ),
    ] = None
    no_survey: Annotated[
        bool, typer.Option("--no-survey", help="Make no survey: all sub-layers keep the same share.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """How `recover` trains a compressed model."""

    text: Annotated[list[str], TEXT]
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            parser=worded,
            help="The model that OUT was made of: half of the loss is then the divergence from its predictions. It goes "
            "through memory layer by layer, once.",
        ),
    ] = None
    samples: Samples = None
    length: Length = None
    text_column: TextColumn = None
    epochs: Annotated[int | None, typer.Option(help="Epochs over the windows.  [default: 2]")] = None
    rank: Annotated[int | None, typer.Option(help="Rank of each adapter.  [default: 32]")] = None
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.  [default: 0.001]")] = None
    seed: Seed = None
    dtype: Dtype = None


def given(group: Any, *without: str) -> dict[str, Any]:
    """The options of a group that were given, by name."""
    values = {entry.name: getattr(group, entry.name) for entry in fields(group) if entry.name not in without}
    return {name: value for name, value in values.items() if value is not None}


def takes(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its groups in their place, as typer reads options from signatures."""
    hints = typing.get_type_hints(command, include_extras=True)
    own = inspect.signature(command).parameters.values()
    groups = {entry.name: hints[entry.name] for entry in own if is_dataclass(hints[entry.name])}
    parameters = []
    for entry in own:
        if entry.name in groups:
            parameters += list(_options(groups[entry.name]))
        else:
            annotation = hints[entry.name]
            parameters.append(entry.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        made = {
            name: group(**{entry.name: values.pop(entry.name) for entry in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return call


def _options(group: Any) -> typing.Iterator[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    for entry in fields(group):
        default = inspect.Parameter.empty if entry.default is MISSING else entry.default
        yield inspect.Parameter(
            entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[entry.name]
        )
