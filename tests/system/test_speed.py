"""Rates of this machine's processor: measured for real at small sizes; kept for what they are true for, with made-up ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from streamlap.system import speed
from streamlap.system.speed import Speed, known_speed, measure

RATES = Speed(matmul=1e12, matmul64=2e11, matmul32=4e11, eigh=5e9, upload=2e10)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What has been measured, each in no time."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "measure", lambda *words: calls.append(words) or RATES)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rates_are_numbers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(speed, "CPU_MATMUL", {"tokens": 16, "columns": 64, "rows": 32})
    monkeypatch.setattr(speed, "UPLOAD_BYTES", 1 << 16)
    before = torch.random.get_rng_state()
    for name, rate in asdict(measure("cpu", dtype)).items():
        assert 1e3 < rate < 1e18, name
        assert math.isfinite(rate)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_rate_is_work_by_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(str(device)))
    assert speed._seconds(lambda: events.append("work"), "cuda:1") == 3.0
    assert events == ["work", "cuda:1", "clock", "clock", "work", "cuda:1", "clock", "clock"]


def test_eigen_decompositions_are_timed_as_the_solvers_do_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(speed, "eigh", seen.append)
    speed.eigh_rate("cpu", size=8)
    assert {(gram.shape, gram.dtype) for gram in seen} == {((8, 8), torch.float64)}
    assert torch.equal(seen[0], seen[0].T)


def test_a_second_call_measures_nothing(measured: list[tuple[Any, ...]]) -> None:
    for _ in range(2):
        assert known_speed("cpu", torch.float32) == RATES
    assert measured == [("cpu", torch.float32)]


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "torch": lambda patch: patch.setattr(torch, "__version__", "77.0"),
    "processor": lambda patch: patch.setattr(speed, "_cpu_model", lambda: "another"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_machine_is_measured_and_the_first_stays_known(
    measured: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    known_speed("cpu", torch.float32)
    with monkeypatch.context() as patch:
        CHANGES[change](patch)
        known_speed("cpu", torch.float32)
    known_speed("cpu", torch.float32)
    assert len(measured) == 2


def test_another_dtype_is_measured(measured: list[tuple[Any, ...]]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        known_speed("cpu", dtype)
    assert [words[1] for words in measured] == [torch.float32, torch.bfloat16]


def test_another_gpu_is_measured(measured: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"cuda:0": "H200", "cuda:1": "T4", "cuda:2": "H200"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    for device in ("cpu", *names):
        known_speed(device, torch.float32)
    assert [words[0] for words in measured] == ["cpu", "cuda:0", "cuda:1"]
