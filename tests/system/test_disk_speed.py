"""Rates of a disk: measured at small sizes, in a file that never has a name, or not known where none can be written."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from streamlap.errors import CheckpointError
from streamlap.system import disk_speed
from streamlap.system.disk_speed import Disk, disk_folders, known_disk, measure_disk

RATES = Disk(read=2e9, write=1e9)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The folders where a disk may be measured, all of them there. What is written is small."""
    folders = {name: tmp_path / name for name in ("cache", "temporary", "work", "here")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders["cache"]))
    monkeypatch.setenv("TMPDIR", str(folders["temporary"]))
    monkeypatch.chdir(folders["here"])
    monkeypatch.setattr(disk_speed, "DISK_BYTES", 1 << 16)
    return folders


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders in which a disk has been measured, in no time."""
    calls: list[Path] = []
    monkeypatch.setattr(disk_speed, "measure_disk", lambda folder: calls.append(folder) or RATES)
    return calls


def test_both_rates_are_numbers_and_nothing_is_left(tmp_path: Path) -> None:
    for rate in asdict(measure_disk(tmp_path)).values():
        assert 1e3 < rate < 1e18


def test_a_kill_at_any_moment_leaves_nothing(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has no name, neither while it is written nor while it is read."""
    folder, seen = places["work"], list[list[Path]]()
    fsync, drop = os.fsync, disk_speed._drop_cache
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(list(folder.iterdir())), fsync(handle)))
    monkeypatch.setattr(disk_speed, "_drop_cache", lambda handle: (seen.append(list(folder.iterdir())), drop(handle)))
    measure_disk(folder)
    assert len(seen) >= 3
    assert not any(seen)


def test_all_is_synced_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "DISK_BYTES", 1000)
    monkeypatch.setattr(disk_speed, "PIECE_BYTES", 400)
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    assert measure_disk(tmp_path).write > 0
    assert sizes[:3] == [400, 800, 1000]


def test_a_slow_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "DISK_BYTES", 1000)
    monkeypatch.setattr(disk_speed, "PIECE_BYTES", 400)
    monkeypatch.setattr(disk_speed, "DISK_PATIENCE", 1.0)
    monkeypatch.setattr(disk_speed.time, "perf_counter", iter([0.0, 0.5, 1.5, 2.0] * 2).__next__)
    assert measure_disk(tmp_path) == Disk(read=400 / 1.5, write=400 / 2.0)


def test_a_file_is_read_as_far_as_asked_and_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "PIECE_BYTES", 400)
    (tmp_path / "file").write_bytes(bytes(1000))
    events: list[str] = []
    read, drop = os.preadv, disk_speed._drop_cache

    def preadv(handle: int, buffers: list[memoryview], offset: int) -> int:
        count = read(handle, buffers, offset)
        events.append(f"{count} at {offset}")
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(disk_speed, "_drop_cache", lambda handle: (events.append("drop"), drop(handle)))
    assert disk_speed.read_rate(tmp_path / "file", 900) > 0
    assert events == ["drop", "400 at 0", "400 at 400", "100 at 800", "drop"]
    events.clear()
    assert disk_speed.read_rate(tmp_path / "file", 5000) > 0
    assert events[-2:] == ["0 at 1000", "drop"]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_the_page_cache_is_dropped_for_the_whole_file_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(("fsync",)))
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *words: calls.append(words))
    (tmp_path / "file").write_bytes(b"x")
    disk_speed.read_rate(tmp_path / "file", 1)
    assert calls == [("fsync",), (0, 0, os.POSIX_FADV_DONTNEED)] * 2


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: No such file"):
        disk_speed.read_rate(tmp_path / "absent", 10)
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        disk_speed.read_rate(tmp_path / "empty", 10)


# --- where ---------------------------------------------------------------------------------------------------------------


def test_the_folder_for_hidden_states_comes_first_and_need_not_be_there(places: dict[str, Path]) -> None:
    assert disk_folders(places["work"] / "not" / "there") == [places["work"], places["cache"], places["temporary"]]
    assert disk_folders(None) == [places["cache"], places["temporary"]]


def test_never_where_it_stands(places: dict[str, Path], measured: list[Path]) -> None:
    assert known_disk(None) == RATES
    assert measured == [places["cache"]]


def test_the_disk_of_the_current_folder_is_preferred(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {places["cache"]: 1, places["temporary"]: 2, Path(): 2}
    monkeypatch.setattr(disk_speed, "_device", devices.__getitem__)
    assert disk_folders(None) == [places["temporary"], places["cache"]]


def test_a_second_call_measures_nothing(places: dict[str, Path], measured: list[Path]) -> None:
    assert known_disk(places["work"]) == known_disk(None) == RATES
    assert measured == [places["work"]], "one disk, one measurement"


def fails(number: int) -> Callable[..., Any]:
    def fail(*words: Any, **names: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


FAULTS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]


@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("act", ["open", "sync"])
def test_where_nothing_can_be_written_the_disk_is_not_known(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, number: int, act: str
) -> None:
    owner, name = {"open": (disk_speed.tempfile, "TemporaryFile"), "sync": (os, "fsync")}[act]
    monkeypatch.setattr(owner, name, fails(number))
    assert known_disk(places["work"]) is None
    assert not any(list(folder.iterdir()) for folder in places.values())


def test_one_folder_that_fails_gives_way_to_the_next(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = disk_speed.tempfile.TemporaryFile

    def open_file(dir: Path, **words: Any) -> Any:
        return fails(errno.EROFS)() if dir != places["temporary"] else real(dir=dir, **words)

    monkeypatch.setattr(disk_speed.tempfile, "TemporaryFile", open_file)
    assert known_disk(places["work"]) is not None


def test_a_limit_on_file_sizes_is_no_error(places: dict[str, Path]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    try:
        assert known_disk(places["work"]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_nearly_full_is_left_alone(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    free = disk_speed.SPARE * disk_speed.DISK_BYTES
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    assert known_disk(None) is None
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert known_disk(None) is not None


@pytest.mark.parametrize(("kind", "known"), [("tmpfs", False), ("ramfs", False), ("ext4", True)])
def test_memory_is_no_disk(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, known: bool) -> None:
    """The nearest mount above a folder counts, and of several there the last."""
    mounts = [("/", "ext4"), (str(places["work"].parent), "xfs"), (str(places["work"].parent), kind)]
    rows = [SimpleNamespace(mountpoint=place, fstype=name) for place, name in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: rows)
    assert (known_disk(places["work"]) is not None) == known


def test_mounts_that_the_system_does_not_tell_are_no_error(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "disk_partitions", fails(errno.ENOENT))
    assert known_disk(places["work"]) is not None


def test_folders_that_may_not_be_looked_at_are_passed_over(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.is_dir

    def is_dir(path: Path) -> bool:
        return fails(errno.EACCES)() if path.is_relative_to(places["cache"]) else real(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert disk_folders(None) == [places["temporary"]]


def test_without_a_home_the_current_folder_is_no_cache(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert disk_folders(None) == [places["temporary"]]
