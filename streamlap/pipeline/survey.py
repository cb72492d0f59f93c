"""The measuring sweep: how far the model's predictions move when one half of one layer is cut and all else stays dense.

One pass over the layers carries the dense stream and, of every layer passed, a copy for each half and each cut, in which that
half alone is rebuilt smaller. At the head the divergence of every copy from the dense model is measured. The result is a small
file, which serves every ratio; `allocate` reads it.

What a killed sweep needs to go on lies in a folder beside the file. The loop is in `sweep`.

Shape suffixes: N windows, L length.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from streamlap.data.calibration import calibration_tokens
from streamlap.errors import RecipeError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.pipeline.runner import open_bank
from streamlap.pipeline.session import check_apart, forecast_disk, hidden_folder, pick_device, stream_marks
from streamlap.pipeline.sweep import Sweep, points, sweep_layers
from streamlap.planning.allocate import Survey, model_digest
from streamlap.planning.cuts import all_cuts, disk_generations, survey_workload
from streamlap.planning.schedule import Caps, Fit, fit, require_fit
from streamlap.recipe import Calibration
from streamlap.store.hub import local_folder
from streamlap.store.journal import STATE_FOLDER, Journal, save_tokens, saved_tokens
from streamlap.store.lock import OutputLock
from streamlap.store.sink import remove_file, write_durably
from streamlap.system.allocator import steady_heap
from streamlap.system.budget import parse_size
from streamlap.system.meters import reset_peaks
from streamlap.system.signals import parse_time, stop_requests

DEFAULT_SAMPLES = 16
DEFAULT_LENGTH = 256


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
    stop_after: float | str | None = None,
    trust_remote_code: bool = False,
) -> Survey:
    """Measure what each half of each layer of a checkpoint loses by being cut, write it into the new JSON `file`.

    A killed run goes on when it is called again, or by `resume`; till then its state is in the folder `file` + ".streamlap".

    Args: files, samples, length, seed, the calibration windows (default: 16 of 256 tokens); dtype, compute dtype; work, where
    hidden states go; max_ram, max_vram, caps as bytes or as text like 8GiB (default: what is free). Without `overlap` nothing
    runs beside the loop. After the time `stop_after` (seconds, or text like 3h50m) the sweep ends at its next commit.
    `trust_remote_code` lets a tokenizer that is code in the model folder run. Raises a StreamlapError before the first layer
    for what can be checked from headers, and Interrupted where it was stopped.
    """
    deadline = time.monotonic() + parse_time(stop_after, "stop_after")
    folder, file, device = local_folder(str(model), trust_remote_code), Path(file), pick_device(device)
    state = state_of(file)
    steady_heap()
    reset_peaks()
    stream = ModelStream(folder, device, dtype)
    if stream.rows:
        raise UnsupportedModel(f"{folder} is already compressed by streamlap; wanted the original checkpoint.")
    settings = Calibration(files=files, samples=samples, length=length, seed=seed)
    tokens_NL = survey_windows(stream, settings, trust_remote_code)
    arguments = {
        "command": "survey", "model": str(folder.resolve()) if Path(model).is_dir() else str(model),
        "dtype": dtype, "device": device, "work": work and str(Path(work).resolve()), "overlap": overlap,
        "max_ram": parse_size(max_ram, "max_ram"), "max_vram": parse_size(max_vram, "max_vram"),
    }  # fmt: skip
    choice = choose_schedule(stream, tokens_NL, arguments)
    check_apart(folder, state)
    check_file(file, state, overwrite)
    return run(stream, tokens_NL, file, arguments, choice, deadline)


def resume_survey(
    file: Path, *, max_ram: int | str | None = None, max_vram: int | str | None = None,
    stop_after: float | str | None = None,
) -> Survey:  # fmt: skip
    """Go on with a stopped survey into `file`: its state knows everything that is needed. Other caps may be given."""
    deadline = time.monotonic() + parse_time(stop_after, "stop_after")
    steady_heap()
    reset_peaks()
    arguments = Journal.load(state_of(file)).arguments
    caps = {"max_ram": parse_size(max_ram, "max_ram"), "max_vram": parse_size(max_vram, "max_vram")}
    stream = ModelStream(local_folder(arguments["model"]), pick_device(arguments["device"]), arguments["dtype"])
    tokens_NL = saved_tokens(state_of(file))
    choice = choose_schedule(stream, tokens_NL, arguments | {key: cap for key, cap in caps.items() if cap})
    return run(stream, tokens_NL, file, arguments, choice, deadline)


def state_of(file: Path) -> Path:
    """The folder beside the file in which its run keeps what it needs to go on."""
    return file.with_name(file.name + STATE_FOLDER)


def choose_schedule(stream: ModelStream, tokens_NL: torch.Tensor, arguments: Mapping[str, Any]) -> Fit:
    """How to go about it inside the caps. Raises BudgetError, with the smallest caps that would do, where nothing fits."""
    caps = Caps(ram=arguments["max_ram"], vram=arguments["max_vram"])
    choice = fit(survey_workload(stream, *tokens_NL.shape), caps, arguments["overlap"])
    require_fit(choice, caps)
    return choice


def survey_windows(stream: ModelStream, settings: Calibration, trust_remote_code: bool = False) -> torch.Tensor:
    """The windows to measure on, [N, L]: few and short unless told otherwise; token ids are taken as they are."""
    if not (len(settings.files) == 1 and settings.files[0].endswith(".npy")):
        length = settings.length or min(DEFAULT_LENGTH, stream.context)
        settings = replace(settings, samples=settings.samples or DEFAULT_SAMPLES, length=length)
    return calibration_tokens(settings, stream.folder, stream.vocabulary, stream.context, trust_remote_code)


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


def run(
    stream: ModelStream, tokens_NL: torch.Tensor, file: Path, arguments: dict[str, Any], choice: Fit, deadline: float
) -> Survey:
    """The checked sweep, from its next layer to the finished file."""
    state, marks = state_of(file), stream_marks(stream, tokens_NL)
    if not Journal.exists(state):
        disk_bytes = disk_generations(stream.depth) * choice.work.generation
        forecast_disk(0, disk_bytes, state, hidden_folder(state, arguments["work"]))
    with OutputLock(state), stop_requests(deadline, f"streamlap resume {file}") as stops:
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
            copies={cut: bank for cut, bank in opened.items() if cut}, stops=stops,
        )  # fmt: skip
        result = written(sweep, marks) if file.exists() else None
        if result is None:
            sweep_layers(sweep)
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
