"""Recipes: what is saved says everything, and what is read back is the same recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from streamlap.errors import RecipeError
from streamlap.recipe import Calibration, Recipe, preset_methods

FULL = Recipe(ratio=0.35, dtype="float32", calibration=Calibration(files=("a.txt",), samples=3, length=16, seed=7))


def test_yaml_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(FULL.to_yaml())
    assert Recipe.from_yaml(path) == FULL


def test_every_knob_of_a_preset_is_visible_in_the_saved_recipe() -> None:
    saved = yaml.safe_load(Recipe().override(preset="lorap").to_yaml())
    assert saved["methods"] == [
        {"method": "attention_awsvd", "alpha": 3.0},
        {"method": "ffn_lorap", "protect": 0.01},
    ]


def test_a_short_recipe_takes_the_preset() -> None:
    assert Recipe.from_dict({"ratio": 0.4}) == Recipe(ratio=0.4)
    knobs = Recipe.from_dict({"methods": [{"method": "ffn_lorap", "protect": 0.0}]})
    assert (knobs.preset, knobs.methods[0].protect) == ("custom", 0.0)


def test_overrides_replace_single_fields() -> None:
    changed = FULL.override(ratio=0.5, seed=1)
    assert (changed.ratio, changed.calibration.seed, changed.calibration.samples) == (0.5, 1, 3)
    assert changed.methods == FULL.methods
    assert FULL.override(preset="lorap").methods == preset_methods("lorap")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"ratoi": 0.2}, ["ratoi", "ratio"]),
        ({"ratio": 0.2, "calibration": {"sample": 4}}, ["sample", "samples"]),
        ({"calibration": 7}, ["calibration", "7"]),
        ({"ratio": 1.0}, ["ratio", "1.0", "between 0 and 1"]),
        ({"ratio": True}, ["ratio", "True"]),
        ({"ratio": float("nan")}, ["ratio", "nan"]),
        ({"dtype": "int8"}, ["dtype", "int8", "float32"]),
        ({"preset": "magic"}, ["preset", "magic", "lorap"]),
        ({"methods": [{"method": "magic"}]}, ["magic", "attention_awsvd"]),
        ({"methods": ["ffn_lorap"]}, ["ffn_lorap", "method"]),
        ({"methods": [{"method": "ffn_lorap", "protect": "x"}]}, ["protect", "'x'"]),
        ({"methods": [{"method": "ffn_lorap", "alpha": 1}]}, ["alpha", "protect"]),
        ({"methods": [{"method": "ffn_lorap", "protect": 1.0}]}, ["protect", "1.0"]),
        ({"methods": [{"method": "attention_awsvd", "alpha": 0.5}]}, ["alpha", "0.5"]),
        ({"calibration": {"samples": 0}}, ["samples", "0", "1"]),
        ({"calibration": {"length": 1}}, ["length", "1", "2"]),
        ({"calibration": {"seed": -1}}, ["seed", "-1"]),
        ({"calibration": {"seed": 10**23}}, ["seed", "2^63"]),
        ({"preset": 7, "methods": []}, ["preset", "7", "lorap"]),
        ({"calibration": {"files": "a.txt"}}, ["files", "a.txt"]),
    ],
)
def test_a_bad_value_is_named_with_what_was_wanted(table: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(table)
    for word in words:
        assert word in str(caught.value)


def test_a_recipe_file_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"ratio: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]")
    with pytest.raises(RecipeError):
        Recipe.from_yaml(path)
    assert not (tmp_path / "ran").exists()
