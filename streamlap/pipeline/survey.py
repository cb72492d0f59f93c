"""The measuring sweep: how far the model's predictions move when one sub-layer is cut and all else stays dense.

One pass over the layers carries the dense stream and, of every layer passed, a copy for each sub-layer, in which that
sub-layer alone is rebuilt smaller. A copy has the windows that are held out, to which nothing is fitted. At the head the
divergence of every copy from the dense model is measured. The result is a small file, which serves every ratio;
`planning.allocate` reads it.

What a killed sweep needs to go on lies in a folder beside the file. The loop is in `sweep`.

Shape suffixes: N windows, L length.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from streamlap.data.calibration import calibration_tokens, find_files
from streamlap.data.text import is_ids
from streamlap.data.windows import open_ids
from streamlap.errors import (
    Interrupted,
    RecipeError,
    ResumeMismatch,
    StreamlapError,
    UnsupportedModel,
    few,
    first_line,
)
from streamlap.families.opening import parse_dtype
from streamlap.families.stream import ModelStream
from streamlap.pipeline.place import check_apart, check_places, contents
from streamlap.pipeline.runner import check_sublayers
from streamlap.pipeline.session import Run, goes_on, remove_state, session, stream_marks, whole_name
from streamlap.pipeline.sweep import Sweep, open_sweep, points, sweep_layers
from streamlap.planning.disk import COMPANION_BYTES, DiskNeeds
from streamlap.planning.plan import windows_of
from streamlap.planning.sample import check_sample, fitted_inputs
from streamlap.planning.survey import (
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    SurveyPlan,
    check_served,
    hidden_bytes,
    pieces_of,
    plan_own_survey,
    plan_survey,
)
from streamlap.planning.survey_file import Survey, model_digest
from streamlap.recipe import Calibration, Recipe
from streamlap.settings import RunSettings, refuse_options, split_options
from streamlap.store.hub import local_folder
from streamlap.store.journal import STATE_FOLDER, Journal, saved_tokens
from streamlap.store.sink import remove_file, write_durably
from streamlap.system.allocator import steady_heap
from streamlap.system.meters import reset_peaks
from streamlap.untrusted.paths import path_of

log = logging.getLogger(__name__)


def survey(
    model: str | Path,
    file: str | Path,
    *,
    files: tuple[str, ...] = (),
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    text_column: str | None = None,
    dtype: str = "auto",
    shape: str = "free",
    overwrite: bool = False,
    **options: Any,
) -> Survey:
    """Measure what each sub-layer of each layer of a checkpoint loses by being cut, write it into the new JSON `file`.

    A killed run goes on when it is called again, or by `resume`; till then its state is in the folder `file` + ".streamlap".

    Args: files, samples, length, seed, text_column, the calibration windows (default: 32 of 256 tokens); dtype, compute dtype;
    shape, that of the results which it serves, see `methods.SHAPES`; overwrite, whether an earlier survey is replaced, where it
    is not this very run, stopped; options, single fields of RunSettings. Raises a StreamlapError before the first layer for
    what can be checked from headers, and Interrupted where it was stopped.
    """
    settings, others = split_options(options)
    refuse_options(survey, others)
    deadline, settings = settings.deadline(), settings.settled()
    dtype, file = parse_dtype(dtype), path_of(file, "file")
    check_served(shape)
    if file.name:
        check_places(state_of(file), settings.work)
    if not file.name or file.is_dir():
        raise RecipeError(
            f"survey {file} is a folder; wanted the name of a new JSON file, like {file / 'survey.json'}."
        )
    folder = local_folder(model, settings.trust_remote_code)
    steady_heap()
    reset_peaks()
    stream = ModelStream(folder, settings.device, dtype)
    stream.require_head()
    if stream.compressed:
        raise UnsupportedModel(f"{folder} is already compressed by streamlap; wanted the original checkpoint.")
    wanted = Calibration(files=files, samples=samples, length=length, seed=seed, text_column=text_column)
    tokens_NL = survey_windows(stream, wanted, settings)
    check_sample(tokens_NL, fitted_inputs(stream, stream.family.sublayers))
    plan = plan_survey(stream, windows_of(tokens_NL), settings, shape)
    check_apart(folder, state_of(file))
    run = Run(
        command="survey", out=file, folder=state_of(file), model=whole_name(model, folder), settings=settings,
        own={"dtype": dtype, "shape": shape},
    )  # fmt: skip
    overwrite = overwrite and not goes_on(run, survey_marks(stream, plan, tokens_NL))
    if not overwrite:
        check_file(file, overwrite=False)
    if overwrite or not Journal.exists(state_of(file)):
        check_sublayers(stream, plan.fit, tokens_NL, writes=True)
    if overwrite:
        check_file(file, overwrite=True)  # which may remove an earlier survey, so it comes last
    return run_survey(run, stream, plan, tokens_NL, deadline)


def resume_survey(run: Run, settings: RunSettings) -> Survey:
    """Go on with a stopped survey; `settings` are its own, with other caps where they were given."""
    deadline = settings.deadline()
    steady_heap()
    reset_peaks()
    settings, dtype, shape = settings.settled(), run.own.get("dtype"), run.own.get("shape")
    if not isinstance(dtype, str) or not isinstance(shape, str):
        raise ResumeMismatch(
            f"{run.folder} does not say its dtype and shape. Delete it and give the first command again."
        )
    stream = ModelStream(local_folder(run.model), settings.device, dtype)
    tokens_NL = saved_tokens(run.folder)
    return run_survey(run, stream, plan_survey(stream, windows_of(tokens_NL), settings, shape), tokens_NL, deadline)


def survey_beside(
    stream: ModelStream,
    tokens_NL: torch.Tensor,
    out: Path,
    model: str,
    settings: RunSettings,
    recipe: Recipe,
    deadline: float,
) -> Path | None:
    """The survey of this model on these calibration windows, in a file beside the output, for all ratios: found, or made now.

    None, with a warning, where it cannot be had: see `plan_own_survey`; or for want of a place to write. Raises Interrupted
    where it was stopped; the same call goes on. Raises ResumeMismatch where another process makes it.
    """
    tokens_NL = survey_pieces(tokens_NL)
    marks = stream_marks(stream, tokens_NL)
    known = json.dumps([model_digest(stream), recipe.shape, sorted(marks.items())])
    mark = hashlib.sha256(known.encode()).hexdigest()[:16]
    file = out.absolute().parent / f"streamlap-survey-{mark}.json"
    if file.exists() and not Journal.exists(state_of(file)):
        return file
    try:
        plan = plan_own_survey(stream, windows_of(tokens_NL), settings, recipe.shape)
        run = Run(
            command="survey", out=file, folder=state_of(file), model=model, settings=settings,
            own={"dtype": recipe.dtype, "shape": recipe.shape},
        )  # fmt: skip
        run_survey(run, stream, plan, tokens_NL, deadline)
    except Interrupted as stopped:
        raise Interrupted(
            f"{str(stopped).split(';')[0]} of the survey; give the same command again to go on"
        ) from stopped
    except ResumeMismatch:
        raise  # another process is measuring it, and is about to write into the same output
    except StreamlapError as error:
        why = first_line(error).replace(" and run again to resume", "")  # this run goes on
        log.warning("no survey, so all layers keep the same share: %s", why)
        return None
    return file


def survey_pieces(tokens_NL: torch.Tensor) -> torch.Tensor:
    """Few and short windows out of these, evenly spread."""
    count, length = pieces_of(windows_of(tokens_NL))
    pieces_NL = tokens_NL[:, : tokens_NL.shape[1] // length * length].reshape(-1, length)
    return pieces_NL[[len(pieces_NL) * place // count for place in range(count)]]


def state_of(file: Path) -> Path:
    """The folder beside the file in which its run keeps what it needs to go on."""
    return file.with_name(file.name + STATE_FOLDER)


def survey_windows(stream: ModelStream, wanted: Calibration, settings: RunSettings) -> torch.Tensor:
    """The windows to measure on, [N, L]: few and short unless told otherwise; token ids in rows are taken as they are."""
    paths = find_files(wanted.files) if wanted.files else []
    if not (len(paths) == 1 and is_ids(paths[0]) and len(open_ids(paths[0]).shape) == 2):
        length = wanted.length or min(DEFAULT_LENGTH, stream.context)
        wanted = replace(wanted, samples=wanted.samples or DEFAULT_SAMPLES, length=length)
    return calibration_tokens(
        wanted, stream.folder, stream.vocabulary, stream.context, settings.trust_remote_code, settings.caps.ram
    )


def check_file(file: Path, overwrite: bool) -> None:
    """Refuse a file that is there, unless its run is to go on; take away what an earlier run left where `overwrite` allows."""
    state = state_of(file)
    if others := contents(state) - {STATE_FOLDER, f"{file.name}.tmp"}:
        raise RecipeError(
            f"{state} holds {few(others)}; wanted the state of survey {file} alone, which is removed at its end. Choose "
            "another name for the survey."
        )
    if overwrite:
        if file.exists():
            Survey.read(file)  # nothing else is ours to replace
            remove_file(file)
        if state.exists():
            remove_state(state)
    elif file.exists() and not Journal.exists(state):
        raise RecipeError(f"survey {file} is there already; choose another name, or --overwrite it.")


def run_survey(run: Run, stream: ModelStream, plan: SurveyPlan, tokens_NL: torch.Tensor, deadline: float) -> Survey:
    """The checked sweep, from its next layer to the finished file."""
    marks, file = survey_marks(stream, plan, tokens_NL), run.out
    hidden = hidden_bytes(plan.fit.work, stream.depth, plan.per_layer)
    needs = DiskNeeds(output_bytes=COMPANION_BYTES, hidden_bytes=hidden)
    with session(run, marks, needs, deadline, lambda: check_file(file, overwrite=False), tokens_NL) as running:
        sweep = open_sweep(stream, plan, tokens_NL, running)
        result = written(sweep, marks) if file.exists() else None
        if result is None:
            sweep_layers(sweep)
            result = Survey(**identity(stream, marks), shape=plan.shape, layers=points(sweep))
        write_durably(file, (json.dumps(result.to_json(), indent=1) + "\n").encode())
    shutil.rmtree(run.folder, ignore_errors=True)
    return result


def survey_marks(stream: ModelStream, plan: SurveyPlan, tokens_NL: torch.Tensor) -> dict[str, Any]:
    """All that the points of a survey depend on."""
    return {**stream_marks(stream, tokens_NL), "shape": plan.shape}


def identity(stream: ModelStream, marks: Mapping[str, Any]) -> dict[str, str]:
    """What a survey was measured on, as its file says it."""
    return {"model": model_digest(stream), "calibration": marks["calibration tokens"], "compute": marks["compute"]}


def written(sweep: Sweep, marks: Mapping[str, Any]) -> Survey | None:
    """The result of a run that died while it tidied up, with no hidden states left to make it of again."""
    found = Survey.read(sweep.session.run.out)
    same = all(getattr(found, key) == value for key, value in identity(sweep.stream, marks).items())
    same = same and found.shape == sweep.plan.shape
    return found if same and sweep.session.journal.next_layer == sweep.stream.depth else None
