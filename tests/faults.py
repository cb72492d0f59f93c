"""A disk that is watched: every operation of a run that reaches it is recorded, and one of them can be made to go wrong.

    disk = Disk(patch, root, at=7)                                                 the process dies at the seventh change
    disk = Disk(patch, root, at=2, kinds={"read"}, name="a.bin", error=errno.EIO)  the second reading of a.bin fails

The operations are those of `os` and of files opened by `Path.open`, in all threads, in the order in which they came.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHANGES = frozenset({"mkdir", "create", "write", "truncate", "sync", "sync folder", "rename", "unlink", "rmdir"})
"""Between two of these the disk stays as it is, so that to die at each of them is to die anywhere."""
STEPS = CHANGES - {"write"}
"""Without those by which a file grows that has no name yet."""


class Crash(BaseException):
    """The process is gone: nothing that tidies up may catch this."""


@dataclass(frozen=True)
class Operation:
    kind: str
    """One of CHANGES; or "open", for reading; or "read"."""
    path: Path
    data: bytes = b""
    """What was written."""
    offset: int | None = None
    """Where it was read, or to how many bytes it was cut."""
    target: Path | None = None
    """The new name."""


class Disk:
    """Records in `operations` what happens under `root`, the failed ones too, until `patch` is undone.

    Args: at, which operation goes wrong, counted from 1 among those of these `kinds` on files of this `name`, at this `offset`;
    0 is none. error, the errno that it fails with; without one it is the death of the process, and every later operation,
    in whatever thread, is refused as well. half: a write comes half through first. lasting: the later ones fail like this one.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, root: Path = Path("/"), *, at: int = 0, kinds: Collection[str] = CHANGES,
        name: str | None = None, offset: int | None = None, error: int | None = None, half: bool = False,
        lasting: bool = False,
    ) -> None:  # fmt: skip
        self.operations: list[Operation] = []
        self.counted = 0
        self.dead = False
        self._root, self._at, self._kinds, self._name, self._offset = root.resolve(), at, kinds, name, offset
        self._error, self._half, self._lasting, self._lock = error, half, lasting, threading.Lock()
        for call in ("mkdir", "open", "fsync", "replace", "unlink", "rmdir", "preadv"):
            patch.setattr(os, call, self._guard(call, getattr(os, call)))
        patch.setattr(Path, "open", self._opening(Path.open))

    def goes_wrong(self, operation: Operation) -> bool:
        """Take note of what is about to be done."""
        with self._lock:
            if self.dead:
                raise Crash
            self.operations.append(operation)
            named = self._name in (None, operation.path.name)
            if operation.kind not in self._kinds or not named or self._offset not in (None, operation.offset):
                return False
            self.counted += 1
            wrong = 0 < self._at <= self.counted if self._lasting else self.counted == self._at
            self.dead = wrong and self._error is None
            return wrong

    def fail(self) -> None:
        if self._error is None:
            raise Crash
        raise OSError(self._error, os.strerror(self._error))

    def write(self, file: Any, path: Path, data: Any) -> int:
        if self.goes_wrong(Operation("write", path, data.encode() if isinstance(data, str) else bytes(data))):
            if self._half:
                file.write(data[: len(data) // 2])
                file.flush()
            self.fail()
        count = file.write(data)
        file.flush()
        return int(count)

    def _guard(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(place: Any, *args: Any, **rest: Any) -> Any:
            path = whole_path(place, rest.get("dir_fd"))
            if path.is_relative_to(self._root):
                operation = describe(name, path, args)
                if operation and self.goes_wrong(operation):
                    self.fail()
            return real(place, *args, **rest)

        return call

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, mode: str = "r", *args: Any, **rest: Any) -> Any:
            place = whole_path(path)
            if not place.is_relative_to(self._root):
                return real(path, mode, *args, **rest)
            changes = mode.rstrip("bt") != "r"
            operation = Operation("create" if changes else "open", place)
            if (not changes or mode[0] == "w" or not place.exists()) and self.goes_wrong(operation):
                self.fail()
            file = real(path, mode, *args, **rest)
            return WatchedFile(self, file, place) if changes else file

        return call


class WatchedFile:
    """A file open for writing. What it is given goes on to the system at once, so that the record has the true order."""

    def __init__(self, disk: Disk, file: Any, path: Path) -> None:
        self._disk, self._file, self._path = disk, file, path

    def write(self, data: Any) -> int:
        return self._disk.write(self._file, self._path, data)

    def truncate(self, size: int) -> int:
        if self._disk.goes_wrong(Operation("truncate", self._path, offset=size)):
            self._disk.fail()
        return int(self._file.truncate(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def whole_path(place: Any, folder: int | None = None) -> Path:
    """The absolute path behind a handle, or behind a name, which may be relative to the handle of a folder."""
    if isinstance(place, int):
        return Path(os.readlink(f"/proc/self/fd/{place}"))
    parent = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
    return Path(os.path.normpath(os.path.join(parent, place)))


def describe(call: str, path: Path, args: tuple[Any, ...]) -> Operation | None:
    """The operation that a call of `os` is; None where it changes nothing."""
    if call == "open":
        return Operation("create" if args[0] & os.O_CREAT else "open", path)
    if call == "preadv":
        return Operation("read", path, offset=args[-1])
    if call == "replace":
        return Operation("rename", path, target=whole_path(args[0]))
    if call == "fsync":
        return Operation("sync folder" if path.is_dir() else "sync", path)
    return Operation(call, path) if path.exists() != (call == "mkdir") else None


def dies(run: Callable[[], object], root: Path = Path("/"), **settings: Any) -> bool:
    """Whether `run` gets to the operation at which it is to die."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, root, **settings)
        try:
            run()
        except Crash:
            return True
    assert not disk.dead, "somebody caught the death"
    return False
