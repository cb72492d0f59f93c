"""One writer per output folder, on local and on network file systems."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path

import filelock

from streamlap.errors import ResumeMismatch
from streamlap.store.journal import STATE_FOLDER
from streamlap.store.sink import disk_error, make_folder, remove_file

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems say that cannot lock."""

LOCKS = LOCK, SOFT_LOCK = "lock", "lock.soft"
"""In the state folder: the lock, and the file that takes its place where there are no locks."""


HOLDER = "holder"
"""Beside them: who holds the lock, for those who ask."""


def empty_state(out: Path, but: Collection[str] = LOCKS) -> None:
    """Remove all that an earlier run has left in the state folder, but for the lock, which the caller holds."""
    for path in (out / STATE_FOLDER).iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in but:
            remove_file(path)


class OutputLock:
    """One writer per output folder.

    The kernel lets go of the lock when its process dies, however it dies; on network file systems the server does. Where the
    file system knows no such locks, a file that is there while the process is takes its place. One that a dead process of this
    machine has left does not count; of another machine nobody here can tell, so the message says which file to delete.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._holder = out, out / STATE_FOLDER / HOLDER
        self._lock: filelock.BaseFileLock = filelock.FileLock(str(out / STATE_FOLDER / LOCK))

    def __enter__(self) -> OutputLock:
        try:
            for folder in (self._out, self._holder.parent):
                make_folder(folder)
            self._acquire()
            self._holder.write_text(f"{os.getpid()} on {os.uname().nodename}")
        except filelock.Timeout as error:
            raise ResumeMismatch(
                f"{self._out} is being written by process {self._read_holder()}; wanted it free. Wait for that run or stop it"
                + (f", or, if it is gone, delete {self._lock.lock_file}." if self._is_soft else ".")
            ) from error
        except OSError as error:
            self._lock.release()
            raise disk_error(error, self._holder) from error
        return self

    def _acquire(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # filelock falls back by itself where the call is not known at all, and says so
            try:
                self._lock.acquire(timeout=0)
            except OSError as error:
                if isinstance(error, filelock.Timeout) or error.errno not in NO_LOCKS:
                    raise
                self._lock = filelock.SoftFileLock(str(self._out / STATE_FOLDER / SOFT_LOCK))
                self._lock.acquire(timeout=0)

    @property
    def _is_soft(self) -> bool:
        return isinstance(self._lock, filelock.SoftFileLock)

    def _read_holder(self) -> str:
        with contextlib.suppress(OSError):
            return self._holder.read_text(errors="replace")[:200]
        return "unknown"

    def __exit__(self, *_: object) -> None:
        self._lock.release()
