"""Where the files of a checkpoint folder may lie. Every reader of such a folder goes through here.

A folder that a stranger made may hold links, pipes and devices. A link `tokenizer.json` to somebody's key would be copied into
the output and published with it; a pipe in place of config.json would block for ever. So each file must be a plain one
inside the folder, or, in a snapshot of the hub's cache, at one of the two places where the hub puts what its links lead to:

    CACHE/models--org--name/snapshots/REVISION/file -> ../../blobs/ETAG       the repository's part of the cache
    CACHE/models--org--name/blobs/ETAG -> ../../blobs/ab/abcd...              the store that all repositories share
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamlap.errors import CheckpointError, RecipeError, StreamlapError, first_line, one_line, shown
from streamlap.untrusted.json import parse_json, read_limited

CONFIG_BYTES = 16 << 20
INDEX_BYTES = 64 << 20
REPORT_BYTES = 256 << 20

STORED = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
"""A file in the cache's shared store, relative to it: its name is the hash of what is in it."""

KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip


def path_of(value: object, what: str) -> Path:
    """A path that a caller gives. Raises RecipeError, naming `what`, for what is none: `str` would make a name of it."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or not _can_be_path(text):
        raise RecipeError(f"{what} is {shown(value)}; wanted a path.")
    return Path(text)


@contextlib.contextmanager
def looking_at(place: str | Path, kind: type[StreamlapError] = CheckpointError) -> Iterator[None]:
    """What the system says in the block of a place that cannot be looked at is raised as an error of that kind."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"{one_line(str(error.filename or place))} cannot be looked at: {error.strerror}; wanted a place that can be read. "
            "Mend that, or give another."
        ) from error


def check_folder(folder: Path, inner: str = "additional_chat_templates") -> None:
    """Raise CheckpointError unless every file right in `folder`, and in the folder `inner` there, may be read and copied.

    Nothing is opened. Other inner folders are never read, so whatever is in them is left alone.
    """
    try:
        for path in (*folder.iterdir(), *(folder / inner).glob("*")):
            if path.is_symlink() or not path.is_dir():
                checked(folder, path)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}; wanted a checkpoint folder.") from error


def checked(folder: Path, path: Path) -> Path:
    """`path` where it leads to a plain file, or a folder, within bounds. Raises CheckpointError; what is not there passes."""
    try:
        target = path.resolve()
        inside = _inside(folder, target)
        mode = target.stat().st_mode if target.exists() else 0
    except (OSError, RuntimeError) as error:  # Python before 3.13 raises the latter for links in a circle
        raise CheckpointError(
            f"{_name(path)} in {folder} cannot be looked at: {first_line(error)}; wanted a file."
        ) from error
    if not inside:
        absent = "" if target.exists() else ", where nothing is"
        raise CheckpointError(
            f"{_name(path)} in {folder} leads to {shown(str(target))}, outside the checkpoint{absent}; wanted the file itself. "
            "If it belongs to the checkpoint, copy it in its place (cp -rL makes a folder without links), else remove the link."
        )
    kind = KINDS.get(stat.S_IFMT(mode))
    if kind and not (kind == "a folder" and path.is_symlink()):
        raise CheckpointError(
            f"{_name(path)} in {folder} is {kind}; wanted a plain file. Put it there, or take that away."
        )
    return path


def read_bytes(folder: Path, name: str, most: int) -> bytes:
    """All of a file of a checkpoint. Raises CheckpointError where it is absent, out of bounds or longer than `most` bytes."""
    path = checked(folder, folder / name)
    try:
        return read_limited(path, most)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; wanted a checkpoint folder with a {name}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} has {error}; wanted a {name}. Do not trust this checkpoint.") from error


def read_object(folder: Path, name: str, most: int) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises CheckpointError as `read_bytes` does, and where it is none."""
    raw = read_bytes(folder, name, most)
    try:
        table = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{folder / name} is not JSON ({error}); wanted a JSON object. Mend it.") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{folder / name} holds a {type(table).__name__}; wanted a JSON object.")
    return table


def _inside(folder: Path, target: Path) -> bool:
    """Whether `target`, a path without links, is where a file of the checkpoint in `folder` may lie."""
    real = Path(os.path.realpath(folder))
    repository = _repository(Path(os.path.abspath(folder))) or _repository(real)
    if repository is None:
        return target.is_relative_to(real)
    store = repository.parent / "blobs"
    shared = target.is_relative_to(store) and STORED.fullmatch(target.relative_to(store).as_posix())
    return target.is_relative_to(repository) or bool(shared)


def _repository(snapshot: Path) -> Path | None:
    """A repository's part of the hub's cache, without links, where the folder is called like a snapshot in one.

    The cache may be a link itself, so a folder is looked at by the name it was called by, and by its real one.
    """
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not repository.name.startswith(("models--", "datasets--")):
        return None
    return Path(os.path.realpath(repository))


def _can_be_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a character, which no bytes on a disk stand for
        return False


def _name(path: Path) -> str:
    return shown(path.name)[1:-1]
