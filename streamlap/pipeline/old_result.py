"""What an output folder holds already: the run to go on with, an earlier result to replace, or what is somebody's own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from pathlib import Path

from streamlap.errors import CheckpointError, RecipeError, few
from streamlap.output.folder import RECIPE_NAME, REPORT_NAME, companions, written_files
from streamlap.output.recovered import MOST_REPORT_BYTES
from streamlap.pipeline.place import check_apart, contents
from streamlap.pipeline.session import remove_begun
from streamlap.store.foreign import ADAPTER
from streamlap.store.journal import JOURNAL_NAME, STATE_FOLDER, Journal
from streamlap.store.lock import OutputLock, empty_state
from streamlap.store.shards import SINGLE_NAME
from streamlap.store.sink import fsync_folder, remove_file
from streamlap.untrusted.paths import read_object

RIVALS = (SINGLE_NAME, ADAPTER)
"""Files that streamlap does not write, and that loaders read in place of the shards beside them."""

log = logging.getLogger(__name__)


def check_output(folder: Path, out: Path, overwrite: bool) -> None:
    """Refuse an output folder that is the input or holds something else; an earlier result is refused unless `overwrite`."""
    check_apart(folder, out)
    companions(folder)  # what cannot be copied at the end is said at the start
    entries = contents(out)
    if overwrite and entries and STATE_FOLDER not in entries and not is_finished(out):
        raise RecipeError(
            f"--overwrite: {out} holds no result of compress or recover to replace ({min(entries)}, ...); choose "
            "another folder."
        )
    if overwrite:
        check_rivals(out)
    else:
        check_new(out, entries - {STATE_FOLDER})


def check_meanwhile(out: Path) -> None:
    """Refuse, once nobody else can write there, what has come into the folder since `check_output`, or since a run that goes on
    was stopped."""
    check_new(out, {path.name for path in written_files(out)})
    check_rivals(out)


def check_rivals(out: Path) -> None:
    """Refuse an output folder with weights that loaders would take."""
    if rivals := contents(out).intersection(RIVALS):
        raise RecipeError(
            f"{out} holds {min(rivals)}, which streamlap did not write, and which would be read in place of the result; wanted "
            "none. Move it, or choose another folder."
        )


def check_new(out: Path, entries: Collection[str]) -> None:
    """Refuse an output folder with these entries, unless its run is to go on."""
    if entries and not Journal.exists(out):
        state = "holds a finished model" if is_finished(out) else f"is not empty ({min(entries)}, ...)"
        raise RecipeError(
            f"output folder {out} {state}; wanted a new one. Choose another, or --overwrite a streamlap output."
        )


def is_finished(out: Path) -> bool:
    """Whether a folder is the result of a compression, or of a recovery, which knows no recipe where its source had none."""
    if (out / RECIPE_NAME).is_file() or not (out / REPORT_NAME).is_file():
        return (out / RECIPE_NAME).is_file()
    with contextlib.suppress(CheckpointError):
        return "recovery" in read_object(out, REPORT_NAME, MOST_REPORT_BYTES)
    return False


def check_survey(survey: str | None, out: Path) -> None:
    """Refuse to remove the survey in use with the result that it lies in."""
    if not survey:
        return
    going, used = {path.resolve() for path in (*written_files(out), out / STATE_FOLDER)}, Path(survey).resolve()
    if going.intersection([used, *used.parents]):
        raise RecipeError(
            f"--overwrite would remove survey {survey}; wanted one outside {out}. Copy it and give the copy by --survey."
        )


def empty_output(out: Path) -> None:
    """Remove an earlier result, and nothing that streamlap did not write. Cut short, what is left is no model and no run that
    can be resumed, and is still known as ours."""
    with OutputLock(out):
        remove_begun(out)
        for mark in (out / "config.json", out / STATE_FOLDER / JOURNAL_NAME):
            remove_file(mark)
            fsync_folder(mark.parent)
        for path in written_files(out):
            remove_file(path)
            if path.parent != out:
                with contextlib.suppress(OSError):  # others may lie there
                    path.parent.rmdir()
        empty_state(out)
    if left := contents(out) - {STATE_FOLDER}:
        log.warning("%s keeps what streamlap did not write: %s", out, few(left))


def held_bytes(out: Path) -> int:
    """Of what `empty_output` removes; 0 where there is no folder."""
    files = [*written_files(out), *(out / STATE_FOLDER).rglob("*")] if out.exists() else []
    return sum(path.lstat().st_size for path in files if path.is_file())
