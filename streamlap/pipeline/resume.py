"""Goes on with whatever was stopped: the first line of its journal says which command it was."""

from __future__ import annotations

from pathlib import Path

from streamlap.output.report import Report
from streamlap.pipeline import compress as pipeline
from streamlap.pipeline.export import export_dense
from streamlap.pipeline.survey import resume_survey, state_of
from streamlap.planning.allocate import Survey
from streamlap.store.journal import STATE_FOLDER, Journal


def resume(
    path: str | Path, *, max_ram: int | str | None = None, max_vram: int | str | None = None,
    stop_after: float | str | None = None,
) -> Report | Survey | dict[str, int]:  # fmt: skip
    """Go on with an interrupted `compress`, `survey` or `export_dense`; gives what that command gives.

    Args: path, the output folder, or the file of a survey; what else is needed is known there. max_ram, max_vram, other caps
    than the run began with, as bytes or as text like 8GiB; stop_after, as for `compress`.
    Raises ResumeMismatch where there is nothing to go on with.
    """
    path = Path(path)
    path = path if path.name else path.absolute()  # `.` has none
    if not path.is_dir() and Journal.exists(state_of(path)):
        path = state_of(path)
    arguments = Journal.load(path).arguments
    command = arguments.get("command", "compress")  # in 0.3.0 no other said what it takes to go on
    if command == "survey":
        file = path.with_name(path.name.removesuffix(STATE_FOLDER))
        return resume_survey(file, max_ram=max_ram, max_vram=max_vram, stop_after=stop_after)
    if command == "export":
        return export_dense(arguments["model"], path, stop_after=stop_after)
    return pipeline.resume(path, max_ram=max_ram, max_vram=max_vram, stop_after=stop_after)
