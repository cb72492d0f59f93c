"""Where a result may go: a folder apart from the source, which can be made or is empty. All of it is asked before any work."""

from __future__ import annotations

import errno
import os
from fnmatch import fnmatchcase
from pathlib import Path

from streamlap.errors import RecipeError, StreamlapError, one_line
from streamlap.store.journal import STATE_FOLDER

LEFT_ALONE = (
    "lost+found", ".git", ".git[aikm]*", ".keep", ".cache", ".nfs*", ".fuse_hidden*", ".snapshot", ".Trash*",
    ".DS_Store", "._*", ".Spotlight-V100", ".fseventsd", "Thumbs.db", "desktop.ini", "System Volume Information",
    "$RECYCLE.BIN",
)  # fmt: skip
"""What file systems, desktops, git and the hub's downloads put into a folder that is empty to its owner. Nobody's result: it is
in no one's way, and is not ours to delete."""

LONGEST_INSIDE = Path(STATE_FOLDER, "hidden", "x" * 40)
"""As long as the longest name in an output folder."""


def contents(out: Path) -> set[str]:
    """Names of what is in a folder but for LEFT_ALONE; none where there is no folder."""
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    return {name for name in names if not any(fnmatchcase(name, pattern) for pattern in LEFT_ALONE)}


def check_apart(source: Path, out: Path) -> None:
    """Raise RecipeError for a place that is, holds or lies in the source, and what `check_place` raises."""
    check_place(out)
    inside, outside = source.resolve(), out.resolve()
    if outside == inside or inside in outside.parents or outside in inside.parents:
        raise RecipeError(
            f"output folder {out} is, holds or is inside the input {source}; wanted a folder apart from it."
        )


def check_places(out: Path, work: str | Path | None) -> None:
    """`check_place` of the output, and of the folder for hidden states where there is one."""
    check_place(out)
    if work is not None:
        check_place(Path(work), "--work")


def check_place(folder: Path, what: str = "output") -> None:
    """Raise RecipeError for what is no folder and cannot become one, StreamlapError where this user or the file system forbids
    to write there. `what` is what messages call it."""
    whole, name = folder.absolute(), f"{what} {one_line(str(folder))}"
    nearest = next(path for path in (whole, *whole.parents) if _is_there(path, name))
    if not nearest.exists():
        raise RecipeError(
            f"{name}: {nearest} is a link to {os.readlink(nearest)}, where nothing is; wanted a folder. Make that one, remove "
            "the link, or choose another."
        )
    if not nearest.is_dir():
        raise RecipeError(f"{name}: {nearest} is a file; wanted a folder.")
    _is_there(whole / LONGEST_INSIDE, name)
    needed = os.W_OK | os.X_OK | (os.R_OK if nearest == whole else 0)
    if not os.access(nearest, needed):
        read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
        why = os.strerror(errno.EROFS if read_only else errno.EACCES)
        raise StreamlapError(f"cannot write {folder}: {why} in {nearest}. Mend that or choose another folder.")


def _is_there(path: Path, what: str) -> bool:
    """Whether there is such a path; links are not followed."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        kind = StreamlapError if isinstance(error, PermissionError) else RecipeError
        raise kind(f"{what}: {error.strerror}; wanted the path of a folder. Choose another.") from error
    return True
