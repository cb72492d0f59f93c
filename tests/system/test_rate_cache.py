"""Rates are kept for a month; a cache that is spoiled, or cannot be read or written, costs time and nothing else."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamlap.system.rate_cache import kept


@dataclass(frozen=True, kw_only=True)
class Rates:
    read: float
    write: float


@dataclass(frozen=True, kw_only=True)
class Others:
    read: float


RATES = Rates(read=2e9, write=1e9)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "streamlap" / "machine.json"


class Measurements:
    """How often something was measured."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Rates:
        self.count += 1
        return RATES


@pytest.fixture
def measure() -> Measurements:
    return Measurements()


def test_a_second_call_measures_nothing(measure: Measurements, cache: Path) -> None:
    for _ in range(2):
        assert kept("a", Rates, measure) == RATES
    assert measure.count == 1
    assert [path.name for path in cache.parent.iterdir()] == ["machine.json"]


def test_every_key_has_rates_of_its_own(measure: Measurements) -> None:
    for key in ("a", "b", "a", "b"):
        assert kept(key, Rates, measure) == RATES
    assert measure.count == 2


def test_rates_of_another_kind_are_measured(measure: Measurements) -> None:
    kept("a", Others, lambda: Others(read=1.0))
    assert kept("a", Rates, measure) == RATES
    assert measure.count == 1


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{", b'{"a": 1}', b"[" * 100_000])
def test_a_spoiled_cache_is_written_anew(measure: Measurements, cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    for _ in range(2):
        assert kept("a", Rates, measure) == RATES
    assert measure.count == 1
    assert len(json.loads(cache.read_text())) == 1


SPOILED: dict[str, dict[str, object]] = {
    "old": {"measured": time.time() - 31 * 86400},
    "of tomorrow": {"measured": time.time() + 86400},
    "zero": {"read": 0.0},
    "negative": {"read": -1.0},
    "infinite": {"write": math.inf},
    "text": {"write": "fast"},
    "of another version": {"disk": 1.0},
}


@pytest.mark.parametrize("kind", SPOILED)
def test_an_entry_that_is_no_good_is_measured_again(measure: Measurements, cache: Path, kind: str) -> None:
    kept("a", Rates, measure)
    row = json.loads(cache.read_text())["a"]
    cache.write_text(json.dumps({"a": row | SPOILED[kind], "other": row}))
    assert kept("a", Rates, measure) == RATES
    assert measure.count == 2
    assert json.loads(cache.read_text()).keys() == {"a", "other"}
    assert json.loads(cache.read_text())["other"] == row


def test_an_entry_of_four_weeks_is_good(measure: Measurements, cache: Path) -> None:
    kept("a", Rates, measure)
    row = json.loads(cache.read_text())["a"]
    cache.write_text(json.dumps({"a": row | {"measured": time.time() - 28 * 86400.0}}))
    kept("a", Rates, measure)
    assert measure.count == 1


def test_a_cache_that_cannot_be_written_is_no_error(
    measure: Measurements, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, "streamlap"):
        for _ in range(2):
            assert kept("a", Rates, measure) == RATES
    assert measure.count == 2
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


@pytest.mark.parametrize("place", ["machine.json", "."])
def test_a_cache_that_may_not_be_read_is_no_error(
    measure: Measurements, cache: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    kept("a", Rates, measure)
    (cache.parent / place).chmod(0)
    try:
        assert kept("a", Rates, measure) == RATES
    finally:
        (cache.parent / place).chmod(0o700)


def test_a_write_that_fails_leaves_the_old_cache(
    measure: Measurements, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept("a", Rates, measure)
    before = cache.read_bytes()

    def fail(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "replace", fail)
    assert kept("b", Rates, measure) == RATES
    assert cache.read_bytes() == before
    assert [path.name for path in cache.parent.iterdir()] == ["machine.json"]


@pytest.mark.parametrize("chosen", ["", "relative", None])
def test_the_cache_is_in_the_home_folder_by_default(
    tmp_path: Path, measure: Measurements, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    if chosen is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", chosen)
    kept("a", Rates, measure)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / ".cache" / "streamlap" / "machine.json").is_file()


def test_without_a_home_nothing_is_kept(tmp_path: Path, measure: Measurements, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert kept("a", Rates, measure) == RATES
    assert not list(tmp_path.iterdir())
