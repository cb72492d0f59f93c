"""The ablation runs end to end on a pico model, takes up where it stopped, and never calibrates on what it measures on."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import ablate
import line_chart
import named_recipes

import streamlap
from streamlap.methods import PRESETS
from streamlap.recipe import Recipe

RANGE_N1 = torch.arange(20)[:, None]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> list[dict[str, Any]]:
    """The cells on the disk afterwards."""
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, words)])
    ablate.main()
    folder = Path(words[words.index("--to") + 1])  # type: ignore[arg-type]
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def test_a_grid_from_end_to_end_and_again(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [pico("llama"), "--calibration", tokens, "--validation", tokens, "--recipes", "lorap", "+pivot",
             "--ratios", 0.3, 0.5, "--to", tmp_path / "to", "--work", tmp_path / "work"]  # fmt: skip
    rows = run(monkeypatch, *words, "--seeds", 0)
    assert [(row["cell"]["recipe"], row["cell"]["ratio"], row["cell"]["seed"]) for row in rows] == [
        ("dense", 0.0, None), ("lorap", 0.3, 0), ("lorap", 0.5, 0), ("+pivot", 0.3, 0), ("+pivot", 0.5, 0),
    ]  # fmt: skip
    assert rows[0]["perplexity"] == streamlap.evaluate(pico("llama"), tokens).perplexity
    assert all(row["phases"]["solve"] > 0 and row["decoder_parameters"] > 0 for row in rows[1:])
    assert rows[1]["decoder_parameters"] > rows[2]["decoder_parameters"]
    assert not (tmp_path / "work" / "out").exists()
    assert str(tmp_path) not in (tmp_path / "to" / "cells.jsonl").read_text()

    with (tmp_path / "to" / "cells.jsonl").open("a") as file:
        file.write('{"cell": {"rec')  # as a killed run may leave it
    monkeypatch.setattr(streamlap, "compress", lambda *_, **__: pytest.fail("a finished cell is computed again"))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, words), "--seeds", "0"])
    ablate.main()
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "to" / "table.md").read_text()
    first, last = rows[0]["nll"], rows[3]["nll"]
    assert f"| 0.3 | +pivot | {last - first:+.4f} | {last - first:+.4f} to" in printed
    chart = ElementTree.parse(tmp_path / "to" / "plot.svg").getroot()
    words_in_it = {text.text for text in chart.iter() if text.text}
    assert {"lorap", "+pivot", "ratio"} <= words_in_it


def test_only_what_is_missing_is_computed(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [pico("llama"), "--calibration", tokens, "--held-out", "--recipes", "lorap", "--to", tmp_path / "to"]
    assert len(run(monkeypatch, *words, "--ratios", 0.4, "--seeds", 0)) == 2
    rows = run(monkeypatch, *words, "--ratios", 0.4, "--seeds", 0, 1)
    assert len(rows) == 3
    assert rows[1]["cell"]["calibration"] != rows[2]["cell"]["calibration"], "another subset"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(Recipe().override(preset="lorap").to_yaml().replace("alpha: 3.0", "alpha: 2.0"))
    words[words.index("lorap")] = recipe
    rows = run(monkeypatch, *words, "--ratios", 0.4, "--seeds", 0)
    assert rows[-1]["cell"]["recipe"] == "mine"
    assert rows[-1]["cell"]["settings"]["methods"][0]["alpha"] == 2.0
    capsys.readouterr()
    rows = run(monkeypatch, *words, "--ratios", 0.4, 0.999, "--seeds", 0)
    assert len(rows) == 4
    assert "mine, ratio 0.999, seed 0 is left out: " in capsys.readouterr().err


def test_what_is_held_out_is_the_last_fifth_and_no_subset_has_any_of_it(
    pico: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids_NL = np.arange(20 * 8).reshape(20, 8)
    path = tmp_path / "ids.npy"
    np.save(path, ids_NL)
    monkeypatch.setattr(
        sys, "argv", ["ablate.py", str(pico("llama")), "--calibration", str(path), "--held-out", "--to", str(tmp_path)]
    )
    args = ablate.parser().parse_args()
    grid = ablate.make_grid(args, tmp_path)
    assert np.array_equal(np.load(grid.validation), ids_NL[16:])
    assert all(int(tokens_NL.max()) < 16 * 8 for tokens_NL in grid.subsets.values())


def test_subsets() -> None:
    def rows(way: str, samples: int | None, seed: int, seeds: int = 3) -> list[int]:
        chosen: list[int] = ablate.subset(RANGE_N1, way, samples, seed, seeds).flatten().tolist()
        assert chosen == sorted(chosen)
        assert chosen == ablate.subset(RANGE_N1, way, samples, seed, seeds).flatten().tolist()
        return chosen

    apart = [rows("disjoint", None, seed) for seed in range(3)]
    assert [len(part) for part in apart] == [6, 6, 6]
    assert len(set().union(*apart)) == 18
    assert len(rows("draw", None, 0)) == 20
    assert len(set(rows("draw", 5, 0))) == 5
    assert rows("draw", 5, 0) != rows("draw", 5, 1)
    assert len(rows("bootstrap", None, 0)) == 20 > len(set(rows("bootstrap", None, 0)))
    with pytest.raises(SystemExit, match="20 windows have no disjoint subset 2 of 8"):
        rows("disjoint", 8, 2)
    assert [len(part) for part in ablate.split(RANGE_N1)] == [16, 4]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [([], "one of --validation and --held-out"), (["--held-out", "--validation", "x.npy"], "one of --validation"),
     (["--held-out", "--recipes", "lorap", "bets"], "no recipe is called bets; wanted some of lorap, factors b=0")],
)  # fmt: skip
def test_what_cannot_be_meant(
    words: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=complaint):
        run(monkeypatch, "model", "--calibration", "x.npy", *words, "--to", tmp_path)


def test_every_named_recipe_is_one_and_no_two_are_equal() -> None:
    recipes = {name: named_recipes.named_recipe(name) for name in named_recipes.NAMED}
    assert len({recipe.methods for recipe in recipes.values()}) == len(recipes)
    assert recipes["best"] == Recipe()
    for name in ("best", "lorap"):
        assert recipes[name].preset == name
        assert recipes[name].methods == PRESETS[name]
    assert {method.step for method in recipes["best -anchor"].solving} == {0.0}  # type: ignore[union-attr]
    names = ("+pivot", "+prune .25", "+dense out", "prune .65", "prune 1")
    ffn = [vars(recipes[name].methods[1]) for name in names]
    assert [(*knobs["shares"], knobs["output"]) for knobs in ffn] == [
        (0.0, "low_rank"), (0.25, "low_rank"), (0.25, "dense"), (0.65, "dense"), (1.0, "dense"),
    ]  # fmt: skip


def test_the_mean_and_the_ends_of_several_subsets() -> None:
    def row(seed: int, dln: float) -> dict[str, Any]:
        cell = {"recipe": "lorap", "ratio": 0.3, "seed": seed, "model": ["demo"]}
        return {"cell": cell, "dln": dln, "decoder_parameters": 1000 + seed, "compress_seconds": 2.0 * seed,
                "phases": {"read": 0.1, "solve": 2.0, "capture": 1.0}}  # fmt: skip

    rows = [row(0, 0.1), row(1, 0.4), row(2, 0.1)]
    assert ablate.table(rows).splitlines()[2] == (
        "| 0.3 | lorap | +0.2000 | +0.1000 to +0.4000 | 1,001 | 2.0 | solve 2.0, capture 1.0 |"
    )
    assert "demo: loss by ratio" in ablate.plot(rows)


def test_ticks_are_round_and_reach_from_end_to_end() -> None:
    assert line_chart.ticks(0.2, 0.5) == [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]
    assert line_chart.ticks(-0.01, 0.02) == [-0.01, -0.005, 0.0, 0.005, 0.01, 0.015, 0.02]
    assert line_chart.ticks(0, 1234)[-1] == 1400
    for place in (0.0, 0.3):
        assert len(line_chart.ticks(place, place)) == 2, "a single point still has an axis"


def test_points_stand_where_they_should() -> None:
    points = [line_chart.Point(x=x, y=y, low=y, high=y + 0.1) for x, y in ((0.2, 0.0), (0.4, 1.0))]
    chart = ElementTree.fromstring(line_chart.line_chart("a < b", "x", "y", {"one": points, "two & three": points}))
    circles = [(float(mark.get("cx", 0)), float(mark.get("cy", 0))) for mark in chart.iter() if mark.get("cx")]
    assert circles[0] == (line_chart.LEFT, line_chart.BOTTOM)
    assert circles[1][0] == line_chart.RIGHT
    assert line_chart.TOP < circles[1][1] < line_chart.BOTTOM
    texts = [text.text for text in chart.iter() if text.text]
    assert {"a < b", "two & three"} <= set(texts)
    assert len(circles) == 4
