"""Rates of this machine: measured for real at small sizes; kept, and measured again, with made-up ones."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from streamlap.errors import BudgetError, CheckpointError, StreamlapError
from streamlap.system import speed
from streamlap.system.speed import Speed, calibrated, measure

RATES = Speed(matmul=1e12, matmul64=2e11, matmul32=4e11, eigh=5e9, read=2e9, write=1e9, upload=2e10)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "streamlap" / "machine.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What has been measured, each in no time."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(speed, "measure", lambda *words: calls.append(words) or RATES)
    return calls


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CPU_MATMUL", {"tokens": 16, "columns": 64, "rows": 32})
    monkeypatch.setattr(speed, "DISK_BYTES", 1 << 16)
    monkeypatch.setattr(speed, "UPLOAD_BYTES", 1 << 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rates_are_numbers_and_nothing_is_left(tmp_path: Path, small: None, dtype: torch.dtype) -> None:
    before = torch.random.get_rng_state()
    rates = measure("cpu", dtype, tmp_path / "not" / "there")
    for name, rate in asdict(rates).items():
        assert 1e3 < rate < 1e18, name
        assert math.isfinite(rate)
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_rate_is_work_by_the_shortest_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a clock that says that the first call takes 4 s, the second 2 s and so on."""
    monkeypatch.setattr(speed, "PATIENCE", 100.0)
    ticks = iter([0.0, 0.0, 4.0, 4.0, 4.0, 6.0, 6.0, 6.0, 9.0, 9.0, 9.0, 19.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    assert speed.matmul_rate("cpu", torch.float32, tokens=3, columns=5, rows=7) == 2 * 3 * 5 * 7 / 2.0


def test_what_is_slow_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.0, 3.0, 3.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))
    assert speed.eigh_rate("cpu", size=6) == 6**3 / 3.0


def test_the_first_call_on_a_gpu_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every time is taken once the device has come to an end."""
    events: list[str] = []
    ticks = iter([0.0, 0.0, 3.0, 3.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: events.append("clock") or next(ticks))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(str(device)))
    assert speed._seconds(lambda: events.append("work"), "cuda:1") == 3.0
    assert events == ["work", "cuda:1", "clock", "clock", "work", "cuda:1", "clock", "clock"]


def test_eigen_decompositions_are_timed_as_the_solvers_do_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(speed, "eigh", seen.append)
    speed.eigh_rate("cpu", size=8)
    assert {(gram.shape, gram.dtype) for gram in seen} == {((8, 8), torch.float64)}
    assert torch.equal(seen[0], seen[0].T)


def test_a_file_is_read_as_far_as_asked_and_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PIECE_BYTES", 400)
    (tmp_path / "file").write_bytes(bytes(1000))
    events: list[str] = []
    read, drop = os.preadv, speed._drop_cache

    def preadv(handle: int, buffers: list[memoryview], offset: int) -> int:
        count = read(handle, buffers, offset)
        events.append(f"{count} at {offset}")
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(speed, "_drop_cache", lambda handle: (events.append("drop"), drop(handle)))
    assert speed.read_rate(tmp_path / "file", 900) > 0
    assert events == ["drop", "400 at 0", "400 at 400", "100 at 800", "drop"]
    events.clear()
    assert speed.read_rate(tmp_path / "file", 5000) > 0
    assert events[-2:] == ["0 at 1000", "drop"]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_the_page_cache_is_dropped_for_the_whole_file_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(("fsync",)))
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *words: calls.append(words))
    (tmp_path / "file").write_bytes(b"x")
    speed.read_rate(tmp_path / "file", 1)
    assert calls == [("fsync",), (0, 0, os.POSIX_FADV_DONTNEED)] * 2


def test_what_is_written_is_synced_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PIECE_BYTES", 400)
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    assert speed.write_rate(tmp_path, 1000) > 0
    assert sizes == [400, 800, 1000]
    assert not list(tmp_path.iterdir())


def test_a_slow_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PIECE_BYTES", 400)
    monkeypatch.setattr(speed, "DISK_PATIENCE", 1.0)
    monkeypatch.setattr(speed.time, "perf_counter", iter([0.0, 0.5, 1.5, 2.0] * 2).__next__)
    assert speed.write_rate(tmp_path, 1000) == 400 / 2.0
    (tmp_path / "file").write_bytes(bytes(1000))
    assert speed.read_rate(tmp_path / "file", 1000) == 400 / 2.0


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: No such file"):
        speed.read_rate(tmp_path / "absent", 10)
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        speed.read_rate(tmp_path / "empty", 10)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, BudgetError), (errno.EROFS, StreamlapError)])
def test_what_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StreamlapError]
) -> None:
    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StreamlapError, match=os.strerror(number)) as failure:
        speed.write_rate(tmp_path, 10)
    assert failure.type is kind
    assert not list(tmp_path.iterdir())


def test_a_second_call_measures_nothing(tmp_path: Path, measured: list[tuple[Any, ...]], cache: Path) -> None:
    for _ in range(2):
        assert calibrated("cpu", torch.float32, tmp_path) == RATES
    assert measured == [("cpu", torch.float32, tmp_path)]
    assert [path.name for path in cache.parent.iterdir()] == ["machine.json"]


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "torch": lambda patch: patch.setattr(torch, "__version__", "77.0"),
    "processor": lambda patch: patch.setattr(speed, "_cpu_model", lambda: "another"),
    "disk": lambda patch: patch.setattr(speed, "_existing", lambda folder: Path("/proc")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_machine_is_measured_and_the_first_stays_known(
    tmp_path: Path, measured: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    calibrated("cpu", torch.float32, tmp_path)
    with monkeypatch.context() as patch:
        CHANGES[change](patch)
        calibrated("cpu", torch.float32, tmp_path)
    calibrated("cpu", torch.float32, tmp_path)
    assert len(measured) == 2


def test_another_dtype_is_measured(tmp_path: Path, measured: list[tuple[Any, ...]]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        calibrated("cpu", dtype, tmp_path)
    assert [words[1] for words in measured] == [torch.float32, torch.bfloat16]


def test_another_gpu_is_measured(
    tmp_path: Path, measured: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"cuda:0": "H200", "cuda:1": "T4", "cuda:2": "H200"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    for device in ("cpu", *names):
        calibrated(device, torch.float32, tmp_path)
    assert [words[0] for words in measured] == ["cpu", "cuda:0", "cuda:1"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{", b'{"a": 1}', b"[" * 100_000])
def test_a_spoiled_cache_is_written_anew(
    tmp_path: Path, measured: list[tuple[Any, ...]], cache: Path, content: bytes
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    for _ in range(2):
        assert calibrated("cpu", torch.float32, tmp_path) == RATES
    assert len(measured) == 1
    assert len(json.loads(cache.read_text())) == 1


SPOILED: dict[str, dict[str, object]] = {
    "old": {"measured": time.time() - 31 * 86400},
    "of tomorrow": {"measured": time.time() + 86400},
    "zero": {"read": 0.0},
    "negative": {"eigh": -1.0},
    "infinite": {"write": math.inf},
    "text": {"matmul": "fast"},
    "of another version": {"disk": 1.0},
}


@pytest.mark.parametrize("kind", SPOILED)
def test_an_entry_that_is_no_good_is_measured_again(
    tmp_path: Path, measured: list[tuple[Any, ...]], cache: Path, kind: str
) -> None:
    calibrated("cpu", torch.float32, tmp_path)
    ((key, row),) = json.loads(cache.read_text()).items()
    cache.write_text(json.dumps({key: row | SPOILED[kind], "other": row}))
    assert calibrated("cpu", torch.float32, tmp_path) == RATES
    assert len(measured) == 2
    assert json.loads(cache.read_text())["other"] == row


def test_an_entry_of_four_weeks_is_good(tmp_path: Path, measured: list[tuple[Any, ...]], cache: Path) -> None:
    calibrated("cpu", torch.float32, tmp_path)
    ((key, row),) = json.loads(cache.read_text()).items()
    cache.write_text(json.dumps({key: row | {"measured": time.time() - 28 * 86400.0}}))
    calibrated("cpu", torch.float32, tmp_path)
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, measured: list[tuple[Any, ...]], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, "streamlap"):
        for _ in range(2):
            assert calibrated("cpu", torch.float32, tmp_path) == RATES
    assert len(measured) == 2
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


def test_a_write_that_fails_leaves_the_old_cache(
    tmp_path: Path, measured: list[tuple[Any, ...]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated("cpu", torch.float32, tmp_path)
    before = cache.read_bytes()

    def fail(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "replace", fail)
    assert calibrated("cpu", torch.bfloat16, tmp_path) == RATES
    assert cache.read_bytes() == before
    assert [path.name for path in cache.parent.iterdir()] == ["machine.json"]


@pytest.mark.parametrize("chosen", ["", "relative", None])
def test_the_cache_is_in_the_home_folder_by_default(
    tmp_path: Path, measured: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    if chosen is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", chosen)
    calibrated("cpu", torch.float32, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / ".cache" / "streamlap" / "machine.json").is_file()


def test_without_a_home_nothing_is_kept(
    tmp_path: Path, measured: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert calibrated("cpu", torch.float32, tmp_path) == RATES
    assert not list(tmp_path.iterdir())
