"""Goes on with whatever was stopped: the first line of its journal says which command it was, and with what."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from streamlap.errors import CheckpointError, ResumeMismatch, shown
from streamlap.output.report import Report
from streamlap.pipeline.adapt import Recovered
from streamlap.pipeline.compress import resume_compression
from streamlap.pipeline.export import Exported, resume_export
from streamlap.pipeline.recover import resume_recovery
from streamlap.pipeline.session import Run, read_run
from streamlap.pipeline.survey import resume_survey, state_of
from streamlap.planning.survey_file import Survey
from streamlap.settings import RunSettings
from streamlap.store.journal import STATE_FOLDER, Journal
from streamlap.untrusted.paths import looking_at, path_of

COMMANDS: dict[str, Callable[[Run, RunSettings], Report | Survey | Recovered | Exported]] = {
    "compress": resume_compression,
    "survey": resume_survey,
    "recover": resume_recovery,
    "export": resume_export,
}

AGAIN = {
    "compress": "streamlap compress MODEL {out}, and the same options",
    "survey": "streamlap survey MODEL {out}, and the same options",
    "recover": "streamlap recover MODEL {out}, and the same options",
    "export": "streamlap export MODEL {out} --to {to}",
}
"""How a run goes on whose source has another place: what tells it is its contents."""


def resume(
    path: str | Path, *, max_ram: int | str | None = None, max_vram: int | str | None = None,
    stop_after: float | str | None = None,
) -> Report | Survey | Recovered | Exported:  # fmt: skip
    """Go on with an interrupted `compress`, `survey`, `recover` or `export`; gives what that command gives.

    Args: path, the output folder, or the file of a survey; what else is needed is known there. max_ram, max_vram, other caps
    than the run began with, as bytes or as text like 8GiB; stop_after, as for `compress`.
    Raises ResumeMismatch where there is nothing to go on with, CheckpointError where the source is not where it was.
    """
    given = RunSettings(max_ram=max_ram, max_vram=max_vram, stop_after=stop_after)
    path = path_of(path, "path")
    path = path if path.name else path.absolute()  # `.` has none
    with looking_at(path):
        folder = state_of(path) if not path.is_dir() and Journal.exists(state_of(path)) else path
    run = read_run(folder)
    if run.command == "survey":  # its state lies beside its file
        run = replace(run, out=folder.with_name(folder.name.removesuffix(STATE_FOLDER)))
    if run.command not in COMMANDS:
        raise ResumeMismatch(f"{folder} was begun by {shown(run.command)}; wanted one of {', '.join(COMMANDS)}.")
    caps = {name: getattr(given, name) or getattr(run.settings, name) for name in ("max_ram", "max_vram")}
    try:
        return COMMANDS[run.command](run, replace(run.settings, **caps, stop_after=given.stop_after))
    except CheckpointError as error:
        with looking_at(run.model):
            is_gone = Path(run.model).is_absolute() and not Path(run.model).is_dir()
        if is_gone:
            again = AGAIN[run.command].format(out=shlex.quote(str(run.out)), **run.own)
            raise CheckpointError(
                f"{run.model}, of which {run.out} is made, is not there; wanted the same checkpoint. Put it back, or give the "
                f"first command again with the place where it is now: {again}."
            ) from error
        raise
