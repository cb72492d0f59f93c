"""The measuring sweep: how far the model's predictions move when one half of one layer is cut and all else stays dense.

One pass over the layers carries the dense stream and, of every layer passed, a copy for each half and each cut, in which that
half alone is rebuilt smaller. At the head the divergence of every copy from the dense model is measured. The result is a small
file, which serves every ratio; `allocate` reads it.

What a killed sweep needs to go on lies in a folder beside the file. A layer is committed as in `pipeline`: the streams that
feed the next one are on the disk, then comes the journal line, then those that fed it go.

Shape suffixes: N windows, L length, B batch, D hidden.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from streamlap.allocate import Point, Survey, model_digest
from streamlap.calibration import calibration_tokens
from streamlap.cuts import CUTTERS, LEVELS, Cut, all_cuts, cut_layout, disk_generations, survey_workload
from streamlap.divergence import divergences
from streamlap.engine import Engine, open_bank, start_engine
from streamlap.errors import Interrupted, RecipeError, UnsupportedModel
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.halves import half_of
from streamlap.heap import steady_heap, trim_heap
from streamlap.memory import parse_size
from streamlap.meters import PhaseClock, reset_peaks
from streamlap.preflight import check_apart, forecast_disk, hidden_folder, pick_device, stream_marks
from streamlap.recipe import Calibration
from streamlap.sizing import Caps, Fit, fit, require_fit
from streamlap.stopping import stop_requests
from streamlap.store.hidden import HiddenBank
from streamlap.store.hub import local_folder
from streamlap.store.journal import STATE_FOLDER, Journal, OutputLock, save_tokens, saved_tokens
from streamlap.store.sink import remove_file, write_durably
from streamlap.views import Place, View

DEFAULT_SAMPLES = 16
DEFAULT_LENGTH = 256


@dataclass(kw_only=True)
class Sweep:
    """Everything one survey needs, checked."""

    stream: ModelStream
    tokens_NL: torch.Tensor
    file: Path
    journal: Journal
    fit: Fit
    dense: HiddenBank
    dense_middle: HiddenBank
    copies: dict[Cut, HiddenBank]

    def begun(self, layers: int) -> list[HiddenBank]:
        """The streams that have something in them once so many layers are done."""
        return [self.dense, *(bank for cut, bank in self.copies.items() if cut.index < layers)]


def survey(
    model: str | Path,
    file: str | Path,
    *,
    files: tuple[str, ...] = (),
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    work: str | Path | None = None,
    overwrite: bool = False,
    max_ram: int | str | None = None,
    max_vram: int | str | None = None,
    overlap: bool = True,
) -> Survey:
    """Measure what each half of each layer of a checkpoint loses by being cut, write it into the new JSON `file`.

    A killed run goes on when it is called again, or by `resume`; till then its state is in the folder `file` + ".streamlap".

    Args: files, samples, length, seed, the calibration windows (default: 16 of 256 tokens); dtype, compute dtype; work, where
    hidden states go; max_ram, max_vram, caps as bytes or as text like 8GiB (default: what is free). Without `overlap` nothing
    runs beside the loop. Raises a StreamlapError before the first layer for what can be checked from headers.
    """
    folder, file, device = local_folder(str(model)), Path(file), pick_device(device)
    state = state_of(file)
    steady_heap()
    reset_peaks()
    stream = ModelStream(folder, device, dtype)
    if stream.rows:
        raise UnsupportedModel(f"{folder} is already compressed by streamlap; wanted the original checkpoint.")
    tokens_NL = survey_windows(stream, Calibration(files=files, samples=samples, length=length, seed=seed))
    arguments = {
        "command": "survey", "model": str(folder.resolve()) if Path(model).is_dir() else str(model),
        "dtype": dtype, "device": device, "work": work and str(Path(work).resolve()), "overlap": overlap,
        "max_ram": parse_size(max_ram, "max_ram"), "max_vram": parse_size(max_vram, "max_vram"),
    }  # fmt: skip
    choice = choose_schedule(stream, tokens_NL, arguments)
    check_apart(folder, state)
    check_file(file, state, overwrite)
    return run(stream, tokens_NL, file, arguments, choice)


def resume_survey(file: Path, *, max_ram: int | str | None = None, max_vram: int | str | None = None) -> Survey:
    """Go on with a stopped survey into `file`: its state knows everything that is needed. Other caps may be given."""
    steady_heap()
    reset_peaks()
    arguments = Journal.load(state_of(file)).start["arguments"]
    caps = {"max_ram": parse_size(max_ram, "max_ram"), "max_vram": parse_size(max_vram, "max_vram")}
    stream = ModelStream(local_folder(arguments["model"]), pick_device(arguments["device"]), arguments["dtype"])
    tokens_NL = saved_tokens(state_of(file))
    choice = choose_schedule(stream, tokens_NL, arguments | {key: cap for key, cap in caps.items() if cap})
    return run(stream, tokens_NL, file, arguments, choice)


def state_of(file: Path) -> Path:
    """The folder beside the file in which its run keeps what it needs to go on."""
    return file.with_name(file.name + STATE_FOLDER)


def choose_schedule(stream: ModelStream, tokens_NL: torch.Tensor, arguments: Mapping[str, Any]) -> Fit:
    """How to go about it inside the caps. Raises BudgetError, with the smallest caps that would do, where nothing fits."""
    caps = Caps(ram=arguments["max_ram"], vram=arguments["max_vram"])
    choice = fit(survey_workload(stream, *tokens_NL.shape), caps, arguments["overlap"])
    require_fit(choice, caps)
    return choice


def survey_windows(stream: ModelStream, settings: Calibration) -> torch.Tensor:
    """The windows to measure on, [N, L]: few and short unless told otherwise; token ids are taken as they are."""
    if not (len(settings.files) == 1 and settings.files[0].endswith(".npy")):
        length = settings.length or min(DEFAULT_LENGTH, stream.context)
        settings = replace(settings, samples=settings.samples or DEFAULT_SAMPLES, length=length)
    return calibration_tokens(settings, stream.folder, stream.vocabulary, stream.context)


def check_file(file: Path, state: Path, overwrite: bool) -> None:
    """Refuse a file that is there, unless its run is to go on; take away what an earlier run left where `overwrite` allows."""
    if overwrite:
        if file.exists():
            Survey.read(file)  # nothing else is ours to replace
            remove_file(file)
        if state.exists():
            with OutputLock(state):
                shutil.rmtree(state)
    elif file.exists() and not Journal.exists(state):
        raise RecipeError(f"survey {file} is there already; choose another name, or --overwrite it.")


def run(stream: ModelStream, tokens_NL: torch.Tensor, file: Path, arguments: dict[str, Any], choice: Fit) -> Survey:
    """The checked sweep, from its next layer to the finished file."""
    state, marks = state_of(file), stream_marks(stream, tokens_NL)
    if not Journal.exists(state):
        disk_bytes = disk_generations(stream.depth) * choice.work.generation
        forecast_disk(0, disk_bytes, state, hidden_folder(state, arguments["work"]))
    with OutputLock(state), stop_requests() as stopped:
        check_file(file, state, overwrite=False)  # again, now that nobody else can write there
        if not Journal.exists(state):
            save_tokens(state, tokens_NL)
        journal = Journal.open(state, marks, arguments)
        folder = hidden_folder(
            state, journal.start["arguments"].get("work", arguments["work"])
        )  # of the run that began
        banks = [(None, "dense"), *((cut, f"{cut.half}-{cut.index:05d}-{cut.keep}") for cut in all_cuts(stream))]
        opened = {cut: open_bank(stream, tokens_NL, choice.schedule, folder, name) for cut, name in banks}
        between = folder if choice.schedule.tier == "disk" else None
        sweep = Sweep(
            stream=stream, tokens_NL=tokens_NL, file=file, journal=journal, fit=choice,
            dense=opened.pop(None), dense_middle=open_bank(stream, tokens_NL, choice.schedule, between, "dense-middle"),
            copies={cut: bank for cut, bank in opened.items() if cut},
        )  # fmt: skip
        result = written(sweep, marks) if file.exists() else None
        if result is None:
            sweep_layers(sweep, stopped)
            result = Survey(**identity(stream, marks), layers=points(sweep))
        write_durably(file, (json.dumps(result.to_json(), indent=1) + "\n").encode())
        sweep.dense.remove()
        sweep.journal.remove()
    shutil.rmtree(state, ignore_errors=True)
    return result


def identity(stream: ModelStream, marks: Mapping[str, Any]) -> dict[str, str]:
    """What a survey was measured on, as its file says it."""
    return {"model": model_digest(stream), "calibration": marks["calibration tokens"], "compute": marks["compute"]}


def written(sweep: Sweep, marks: Mapping[str, Any]) -> Survey | None:
    """The result of a run that died while it tidied up, with no hidden states left to make it of again."""
    found = Survey.read(sweep.file)
    same = all(getattr(found, key) == value for key, value in identity(sweep.stream, marks).items())
    return found if same and sweep.journal.next_layer == sweep.stream.depth else None


def sweep_layers(sweep: Sweep, stopped: Callable[[], bool]) -> None:
    """The loop over decoder layers."""
    stream, first = sweep.stream, sweep.journal.next_layer
    kwargs = stream.layer_kwargs(sweep.tokens_NL.shape[1])
    beside = (sweep.dense_middle, *sweep.copies.values())
    with start_engine(stream, sweep.fit, sweep.dense, "survey", first, (), beside) as engine:
        if first == 0:
            sweep.dense.write(0, stream.embed(sweep.tokens_NL), engine.writer)
        else:
            for bank in sweep.begun(first):
                bank.drop(first - 1)  # where the run died between the commit and this
        for index in range(first, stream.depth):
            if stopped():
                raise Interrupted(
                    f"stopped at layer {index} of {stream.depth}; go on with: streamlap resume {sweep.file}"
                )
            layer = engine.layer(index, kwargs[index])
            errors = carry_through(sweep, engine, layer, index)
            del layer
            commit(sweep, index, errors)
            engine.require_baseline(index)
            engine.progress.next()


def commit(sweep: Sweep, index: int, errors: dict[str, list[float]]) -> None:
    """All streams are before the next layer, on the disk, and now the journal says so."""
    banks = sweep.begun(index + 1)
    for bank in banks:
        bank.settle()
    sweep.journal.append({"index": index, "errors": errors})
    for bank in (*banks, sweep.dense_middle):
        bank.drop(index)


def carry_through(sweep: Sweep, engine: Engine, layer: StreamLayer, index: int) -> dict[str, list[float]]:
    """Every stream through a layer, and new copies in which a half of it is cut. Gives half -> its own error at each level."""
    attention, ffn = half_of(layer, "attention"), half_of(layer, "ffn")

    def whole(x_BLD: torch.Tensor) -> torch.Tensor:
        return ffn(attention(x_BLD))

    with engine.claim("propagate"):
        for cut, bank in sweep.copies.items():
            if cut.index < index:
                engine.carry(whole, index, bank.read(index), bank, index + 1)
        engine.carry(attention, index, sweep.dense.read(index), sweep.dense_middle, index)
    before, between, after = (
        Place(bank=sweep.dense, generation=index), Place(bank=sweep.dense_middle, generation=index),
        Place(bank=sweep.dense, generation=index + 1),
    )  # fmt: skip
    errors = {"attention": cut_half(sweep, engine, layer, index, "attention", (before, between), whole)}
    with engine.claim("propagate"):
        engine.carry(ffn, index, between.read(), sweep.dense, index + 1)
    return errors | {"ffn": cut_half(sweep, engine, layer, index, "ffn", (between, after), ffn)}


def cut_half(
    sweep: Sweep, engine: Engine, layer: StreamLayer, index: int, half: str, ends: tuple[Place, Place],
    rest: Callable[[torch.Tensor], torch.Tensor],
) -> list[float]:  # fmt: skip
    """New copies of the dense stream, through a half that is cut and the `rest` of the layer. Gives the half's own errors.

    Args: ends, the dense stream before and after the half.
    """
    with engine.claim("solve"):
        view = View(
            engine=engine, clock=PhaseClock(engine.progress.phase), layer=layer, index=index, half=half,
            dense=ends[0], goal=ends[1], stream=ends[0],
        )  # fmt: skip
        made = {keep: CUTTERS[half].build(view, cut_layout(sweep.stream, index, half, keep)) for keep in LEVELS}
        del view  # and the sums that it holds
    for keep, built in made.items():
        copy = sweep.copies[Cut(index=index, half=half, keep=keep)]
        with engine.claim("propagate"), layer.tried(built.edits):
            engine.carry(rest, index, ends[0].read(), copy, index + 1)
    return [built.error for built in made.values()]


def points(sweep: Sweep) -> tuple[dict[str, tuple[Point, ...]], ...]:
    """What was measured, with the divergences at the head."""
    schedule = sweep.fit.schedule
    trim_heap()  # of what the layers have left
    with sweep.fit.ram.claim(schedule.ram["head"]), sweep.fit.vram.claim(schedule.vram.get("head", {})):
        kl = divergences(sweep.stream, sweep.dense, sweep.copies)
    rows = []
    for index, line in enumerate(sweep.journal.layers):
        errors = {half: dict(zip(LEVELS, values, strict=True)) for half, values in line["errors"].items()}
        rows.append(
            {
                half: tuple(
                    Point(keep=keep, kl=kl[Cut(index=index, half=half, keep=keep)], error=errors[half][keep])
                    for keep in LEVELS
                )
                for half in errors
            }
        )
    return tuple(rows)
