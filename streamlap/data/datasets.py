"""The name of a text -> its files: a file here, or a split of a data set of the hub, of which no other file is fetched.

    org/name[@revision][/configuration][:split]        org/name[@revision]/path/of/a/file.parquet

Only files are read, never a script. `splits` says which are those of a split.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants

from streamlap.data.splits import UNSPLIT, DataSet, is_data, kind_of, read_data_set, split_by_names
from streamlap.data.text import TEXT_SUFFIXES
from streamlap.errors import BudgetError, CheckpointError, RecipeError, one_line, shown
from streamlap.store.hub import fetch_data_files, list_data_set
from streamlap.system.budget import existing_ancestor
from streamlap.untrusted.paths import looking_at

log = logging.getLogger(__name__)

NAME = re.compile(
    r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/:\s]+))?"
    r"(?:/(?P<inside>[^:]+))?(?::(?P<split>[^/:\s]+))?"
)
CALIBRATION, EVALUATION = (UNSPLIT, "train"), (UNSPLIT, "validation", "test")
"""Which split is taken where none is named: the first of these that is there."""

MOST_NAMED = 20
"""Names that a message lists."""


def text_files(name: str, wanted: Collection[str] = CALIBRATION) -> list[Path]:
    """The file `name` itself, or those of the split that `name` means, in the hub's cache, in order of their names.

    `wanted` are the splits of which the first that is there is taken where `name` has none. A name of neither kind is given
    back as it is: the reader says what is wrong with it. Raises RecipeError for a data set, configuration, split or file that
    is not there, or where one of several must be named, and lists them; BudgetError where the split does not fit on the disk.
    """
    if not name:
        raise RecipeError("the name of a text is empty; wanted a file or a data set.")
    match = NAME.fullmatch(name)
    with looking_at(name, RecipeError):
        if Path(name).exists() or not match or _is_local(name, match):
            return [Path(name)]
    hub_id, revision, inside, split = match.group("id", "revision", "inside", "split")
    full = hub_id if revision is None else f"{hub_id}@{unquote(revision)}"
    try:
        folder, listing = list_data_set(full)
        files = choose_files(read_data_set(full, folder, listing), inside, split, wanted)
        _require_room(name, sum(listing[path] for path in files if not (folder / path).exists()))
        return fetch_data_files(full, folder.name, files)
    except CheckpointError as error:
        raise RecipeError(
            f"there is no file {one_line(name)} here; as a data set: {error}; wanted a text file or a data set."
        ) from error


def choose_files(data: DataSet, inside: str | None, split: str | None, wanted: Collection[str]) -> list[str]:
    """Paths of what is meant, in order. Raises RecipeError where it is not there, or where it could be several."""
    if not data.files:
        raise RecipeError(_no_text(data.name))
    if inside is not None and inside in data.files and split is None:
        return [inside]
    key = data.default if inside is None else inside.strip("/")
    if key is None:
        raise RecipeError(_choice(data.name, "configurations", data.configurations, "/"))
    below = [path for path in data.files if path.startswith(f"{key}/")]
    splits = data.configurations.get(key) or (split_by_names(below) if below else {})
    place = data.name if inside is None else f"{data.name}/{key}"
    if not splits:
        kind, names = ("files", list(data.files)) if is_data(key) else ("configurations", list(data.configurations))
        raise RecipeError(_choice(data.name, kind, names, "/", f"no {shown(key)}, but "))
    if not any(splits.values()):
        raise RecipeError(_no_text(place))
    return sorted(splits[choose_split(place, [name for name in splits if splits[name]], split, wanted)])


def choose_split(place: str, names: Sequence[str], split: str | None, wanted: Collection[str]) -> str:
    """Which of the splits `names` of `place` is meant by `split`, or by None. Raises RecipeError as `choose_files` does."""
    if split is not None:
        kind = kind_of(split)
        meant = [name for name in names if kind in (kind_of(name), "train" if name == UNSPLIT else None)]
        if split in names or meant:
            return split if split in names else meant[0]
        raise RecipeError(_choice(place, "splits", names, ":", f"no split {shown(split)}, but "))
    found = next((name for kind in wanted for name in names if kind_of(name) == kind), None)
    if found is None:
        raise RecipeError(_choice(place, "splits", names, ":"))
    if len(names) > 1:
        log.warning("%s: its split %s is read, of %s", place, found, ", ".join(map(_plain, names[:MOST_NAMED])))
    return found


def _is_local(name: str, match: re.Match[str]) -> bool:
    """Whether a name that could be a data set's is that of a file here which is absent."""
    return is_data(name) and (match["inside"] is None or Path(name).parent.is_dir())


def _require_room(name: str, wanted: int) -> None:
    """Raise BudgetError unless that many bytes are free in the hub's cache."""
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(existing_ancestor(cache)).free
    if wanted > free:
        raise BudgetError(
            f"{name} takes {wanted:,} bytes in {cache}, and {free:,} are free. Name a single file of it, org/name/path, or set "
            "HF_HOME to a folder on another disk."
        )


def _no_text(place: str) -> str:
    return f"data set {place} has no {', '.join(TEXT_SUFFIXES)} file; wanted text. No script of a data set is run."


def _choice(place: str, kind: str, names: Collection[str], mark: str, absent: str = "") -> str:
    """The message that has a user choose; `mark` stands between a place and a name."""
    given = [_plain(name) for name in names if name]
    if not given:
        return f"data set {place} has no {kind}; wanted its name alone."
    listed = ", ".join(given[:MOST_NAMED]) + (", ..." if len(given) > MOST_NAMED else "")
    return f"data set {place} has {absent}the {kind} {listed}; wanted one of them, as in {place}{mark}{given[0]}."


def _plain(name: str) -> str:
    return shown(name)[1:-1]
