"""A long run gathers nothing: as many files, threads and temporary files after every layer, and none at the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_hygiene


def measure(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> list[dict[str, Any]]:
    given = ["bench_hygiene.py", *words, "--work", folder / "work", "--out", folder / "result.json"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in given])
    bench_hygiene.main()
    result = json.loads((folder / "result.json").read_text())
    assert result["verdict"] == {"constant": True, "nothing_left": True}
    return list(result["runs"])


def test_twelve_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = measure(tmp_path, monkeypatch, "--layers", 12, "--tokens", "3x16", "--presets", "best")
    assert [run["layers"] for run in runs] == [12]
    assert runs[0]["figures"]["objects"]["per_layer"] < 2


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_two_hundred_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in measure(tmp_path, monkeypatch):
        figures = run["figures"]
        assert figures["objects"]["per_layer"] < 2
        assert figures["rss_bytes"]["per_layer"] < 3 * run["journal_bytes_per_layer"] + 20_000
