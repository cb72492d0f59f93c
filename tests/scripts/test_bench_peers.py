"""`best` meets its peers at their own size, and one defeat is enough."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_peers

from streamlap.families.stream import ModelStream
from streamlap.output.inspect import count_parameters


def peer(method: str, ratio: float, stored: int, perplexity: float, variant: str | None = None) -> dict[str, Any]:
    return {"method": method, "variant": variant, "asked_ratio": ratio, "removed": ratio,
            "stored_decoder_parameters": stored, "perplexity": perplexity}  # fmt: skip


def run(words: list[object], rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code."""
    (tmp_path / "peers.json").write_text(json.dumps({"protocol": "", "rows": rows}))
    given = [*words, "--peers", tmp_path / "peers.json", "--length", 16, "--work", tmp_path / "work"]
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *map(str, given)])
    try:
        bench_peers.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_every_row_is_met_at_the_size_of_the_smallest(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pico("llama", tied=True)
    dense = count_parameters(ModelStream(model), {}).decoder_before
    rows = [peer("dense", 0.4, 10, 1.0), peer("worse", 0.4, int(0.62 * dense), 1e9, "fp16"),
            peer("small", 0.4, int(0.58 * dense), 1e8), peer("other", 0.6, int(0.4 * dense), 1e9)]  # fmt: skip
    words = [model, "--calibration", tokens, "--validation", tokens]
    assert run([*words, "--ratios", 0.4, "--json"], rows, tmp_path, monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    (part,) = result["ratios"]
    assert result["won"]
    assert part["allowed"] == int(0.58 * dense)
    assert 0.95 * part["allowed"] < part["stored_decoder_parameters"] <= part["allowed"]
    assert [(row["method"], row["win"]) for row in part["peers"]] == [("worse", True), ("small", True)]
    assert str(tmp_path) not in json.dumps(result)
    assert not list((tmp_path / "work").iterdir())

    rows.append(peer("better", 0.6, dense, 1.0))
    assert run(words, rows, tmp_path, monkeypatch) == 1
    table = capsys.readouterr().out
    assert table.count("**best**") == 2
    assert f"| 0.4 | worse fp16 | {int(0.62 * dense):,} | 1000000000.000 | wins |" in table
    assert f"| 0.6 | better | {dense:,} | 1.000 | **loses** |" in table


def test_a_ratio_that_nobody_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model", "--calibration", "c.npy", "--validation", "v.npy", "--ratios", 0.7]
    with pytest.raises(ValueError, match="has no rows of these ratios"):
        run(words, [peer("small", 0.4, 10, 1.0)], tmp_path, monkeypatch)
