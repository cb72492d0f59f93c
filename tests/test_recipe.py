"""Recipes: what is saved says everything, and what is read back is the same recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from streamlap import recipe as module
from streamlap.errors import RecipeError
from streamlap.methods import DISTILLED, FINAL, METHODS, PRESETS, TRAINED
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.groups import AttentionGroups
from streamlap.methods.lorap.ffn import FfnLorap
from streamlap.methods.rows import known_methods, preset_methods
from streamlap.methods.trained.refine import Refine
from streamlap.recipe import Calibration, Recipe

FULL = Recipe(ratio=0.35, dtype="float32", calibration=Calibration(files=("a.txt",), samples=3, length=16, seed=7))
TRAINED_TOO = Recipe(
    preset="custom", survey="s.json",
    methods=(
        AttentionAnchored(step=0.5), AttentionGroups(input_step=None), FfnAnchored(shares=(0.0, 1 / 3)),
        FfnAnchored(shares=(1,), storage="factors"), Refine(epochs=7, learning_rate=0.003, seed=5),
    ),
)  # fmt: skip
RECIPES = {
    "written out": FULL,
    "lorap": FULL.override(preset="lorap"),
    "trained": FULL.override(refine=4),
    "by hand": TRAINED_TOO,
    "loraprune": FULL.override(preset="loraprune"),
    "pclora": FULL.override(preset="pclora"),
    "with a text column": FULL.override(text_column="body"),
}


def test_a_text_column_is_written_where_there_is_one() -> None:
    """So recipes without one are those of earlier versions."""
    assert list(FULL.to_dict()["calibration"]) == ["files", "samples", "length", "seed", "redraw"]
    assert FULL.override(text_column="body").to_dict()["calibration"]["text_column"] == "body"


@pytest.mark.parametrize("name", RECIPES)
def test_yaml_round_trip(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[name].to_yaml())
    assert Recipe.from_yaml(path) == RECIPES[name]
    assert Recipe.from_dict(json.loads(json.dumps(RECIPES[name].to_dict()))) == RECIPES[name]
    assert Recipe.from_yaml(path).to_yaml() == path.read_text()


def test_the_form_that_the_module_shows_is_the_one_that_is_saved() -> None:
    assert module.__doc__
    shown, saved = yaml.safe_load(module.__doc__.partition("\n")[2]), Recipe().override(refine=25).to_dict()
    assert shown.keys() == saved.keys()
    short = {"method": "refine", "epochs": 25}
    assert shown["methods"] == [*saved["methods"][:-1], short]
    assert Recipe.from_dict(shown).methods == Recipe.from_dict(saved).methods


def test_every_knob_of_a_preset_is_visible_in_the_saved_recipe() -> None:
    saved = yaml.safe_load(Recipe().override(preset="lorap").to_yaml())
    assert saved["methods"] == [
        {"method": "attention_awsvd", "alpha": 3.0},
        {"method": "ffn_lorap", "protect": 0.01},
    ]


def test_every_knob_of_shares_and_training_is_visible_too() -> None:
    saved = yaml.safe_load(Recipe().override(refine=3).to_yaml())
    assert saved["methods"] == [
        {"method": "attention_anchored", "step": None, "input_step": 0.0, "output": "dense", "storage": "pivoted"},
        {"method": "ffn_anchored", "step": None, "input_step": 0.0, "output": "dense", "storage": "pivoted",
         "shares": [0.25, 0.5, 0.75, 1.0]},
        {"method": "final_gain"},
        {"method": "refine", "epochs": 3, "learning_rate": 0.01, "warm_up": 0.1, "patience": 0.5, "seed": 0},
    ]  # fmt: skip


def test_every_method_has_a_name_of_its_own() -> None:
    assert known_methods() == {**METHODS, **DISTILLED, **TRAINED, **FINAL}
    assert len(set(known_methods().values())) == sum(map(len, (METHODS, DISTILLED, TRAINED, FINAL)))
    for methods in PRESETS.values():
        assert {type(method) for method in methods} <= {*METHODS.values(), *DISTILLED.values(), *FINAL.values()}


# --- training in short ---------------------------------------------------------------------------------------------------


def test_epochs_alone_stand_for_a_training() -> None:
    """The same in a file, in a call, and written out."""
    wanted = Recipe(methods=(*PRESETS["best"], Refine(epochs=3)))
    row = {"method": "refine", "epochs": 3}
    assert Recipe.from_dict({"refine": 3}) == Recipe().override(refine=3) == wanted
    written = Recipe.from_dict({"preset": "best", "methods": [*Recipe().to_dict()["methods"], row]})
    assert written == wanted
    assert (wanted.trained, wanted.solving) == ((Refine(epochs=3),), PRESETS["best"][:2])
    assert Recipe().trained == ()


def test_no_epochs_stand_for_none() -> None:
    trained = TRAINED_TOO.override(refine=0)
    assert (trained.trained, trained.solving) == ((), TRAINED_TOO.solving)
    rows = [*Recipe().to_dict()["methods"], {"method": "refine", "epochs": 3}]
    assert Recipe.from_dict({"methods": rows, "refine": 0}).trained == ()
    assert Recipe().override(refine=0) == Recipe.from_dict({"refine": 0}) == Recipe()
    assert TRAINED_TOO.override(refine=None) == TRAINED_TOO, "not given"


def test_other_epochs_leave_the_other_knobs() -> None:
    assert TRAINED_TOO.override(refine=2).trained == (Refine(epochs=2, learning_rate=0.003, seed=5),)
    rows = {"methods": TRAINED_TOO.to_dict()["methods"], "refine": 2}
    assert Recipe.from_dict(rows).trained == (Refine(epochs=2, learning_rate=0.003, seed=5),)
    assert len(TRAINED_TOO.override(refine=2).methods) == len(TRAINED_TOO.methods)


def test_another_preset_leaves_the_training() -> None:
    changed = TRAINED_TOO.override(preset="best")
    assert changed.methods == (*PRESETS["best"], *TRAINED_TOO.trained)
    assert TRAINED_TOO.override(methods=PRESETS["best"]).trained == ()


def test_methods_of_a_sublayer_have_names_that_tell_them_apart() -> None:
    assert list(TRAINED_TOO.of_sublayer("attention")) == ["attention_anchored", "attention_groups"]
    assert list(TRAINED_TOO.of_sublayer("ffn")) == ["ffn_anchored 0", "ffn_anchored 1"]
    assert tuple(TRAINED_TOO.of_sublayer("ffn").values()) == TRAINED_TOO.methods[2:4]
    assert Recipe(preset="custom", methods=(FfnLorap(),)).of_sublayer("attention") == {}


# --- as people write it --------------------------------------------------------------------------------------------------

DTYPES: dict[str, list[Any]] = {
    "bfloat16": ["bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16],
    "float16": ["fp16", "f16", "half", "Float16", torch.half],
    "float32": ["fp32", "f32", "float", torch.float32, " float32 "],
    "auto": ["auto", "AUTO"],
}


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, words in DTYPES.items() for word in words], ids=str)
def test_a_dtype_has_one_name_however_it_is_written(name: str, word: Any) -> None:
    """In a call, in a file, and in what is kept of it: so runs that were begun by either go on by the other."""
    assert (
        Recipe(dtype=word) == Recipe().override(dtype=word) == Recipe.from_dict({"dtype": word}) == Recipe(dtype=name)
    )
    assert Recipe(dtype=word).to_dict()["dtype"] == name


@pytest.mark.parametrize("word", ["int8", "fp8", "bf", "", 16, None, torch.int8, "torch.float64"], ids=str)
def test_what_is_no_compute_dtype_is_refused(word: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"dtype is .*; wanted one of auto, float32, float16, bfloat16, or short fp32"
    ):
        Recipe(dtype=word)


def test_percent_in_a_file_and_in_a_call(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("ratio: 35%\ndtype: bf16\n")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == Recipe(ratio=0.35, dtype="bfloat16")
    assert Recipe().override(ratio="35%").to_dict()["ratio"] == 0.35
    assert Recipe.from_dict({"ratio": "0.35"}) == Recipe(ratio=0.35)


def test_python_values_become_those_of_a_file() -> None:
    rows = [{"method": "attention_anchored"}, {"method": "ffn_anchored", "shares": [1.0]}]
    values: Any = {"methods": rows, "calibration": {"files": [Path("a.txt")], "seed": 3}, "survey": Path("s.json")}
    wanted = Recipe.from_dict({"methods": rows, "calibration": {"files": ["a.txt"], "seed": 3}, "survey": "s.json"})
    assert Recipe(preset="custom", **values) == Recipe().override(**values) == wanted
    assert Recipe().override(files=(Path("a.txt"),)) == Recipe(calibration=Calibration(files=("a.txt",)))
    assert Recipe().override(methods=rows, refine=2).methods[:2] == wanted.methods
    assert json.dumps(wanted.to_dict()) == json.dumps(Recipe(preset="custom", **values).to_dict())


@pytest.mark.parametrize(
    "values",
    [
        {"methods": "best"}, {"methods": None}, {"methods": [1]}, {"methods": [{"method": "magic"}]}, {"calibration": None},
        {"calibration": {"sample": 1}}, {"calibration": "a.txt"}, {"survey": 3}, {"calibration": {"files": Path("a.txt")}},
    ],
)  # fmt: skip
def test_python_values_of_another_type_are_refused_by_name(values: dict[str, Any]) -> None:
    for make in (Recipe, Recipe().override):
        with pytest.raises(RecipeError, match=next(iter(values))):
            make(**values)


# --- the rest ------------------------------------------------------------------------------------------------------------


def test_a_short_recipe_takes_the_preset() -> None:
    assert Recipe.from_dict({"ratio": 0.4}) == Recipe(ratio=0.4)
    knobs = Recipe.from_dict({"methods": [{"method": "ffn_lorap", "protect": 0.0}]})
    assert (knobs.preset, knobs.methods[0].protect) == ("custom", 0.0)


def test_overrides_replace_single_fields() -> None:
    changed = FULL.override(ratio=0.5, seed=1)
    assert (changed.ratio, changed.calibration.seed, changed.calibration.samples) == (0.5, 1, 3)
    assert changed.methods == FULL.methods
    assert FULL.override(preset="lorap").methods == preset_methods("lorap", "free")


def test_methods_that_were_chosen_stay_where_a_default_is_said_again() -> None:
    chosen = Recipe.from_dict({"preset": "best", "methods": [{"method": "ffn_anchored", "shares": [1.0]}]})
    for same in ({"format": "factored"}, {"shape": "free"}):
        assert chosen.override(**same).methods == chosen.methods
    assert (
        chosen.override(preset="best").methods == chosen.override(shape="free", preset="best").methods != chosen.methods
    )


def test_custom_stands_for_methods_that_are_given() -> None:
    """It has none of its own: what a preset has would go by a name that is not its own."""
    wanted = "preset is custom, and no methods are given; wanted them, or one of best, lorap"
    for made in (
        lambda: Recipe(preset="custom"), lambda: Recipe().override(preset="custom"),
        lambda: Recipe(preset="lorap").override(preset="custom"), lambda: Recipe.from_dict({"preset": "custom"}),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=wanted):
            made()
    assert TRAINED_TOO.override(preset="custom") == TRAINED_TOO
    best = preset_methods("best", "free")
    assert Recipe(preset="custom", methods=best).methods == Recipe().override(methods=best).methods == best


def test_a_file_with_an_empty_list_of_methods_is_refused(tmp_path: Path) -> None:
    """A call may ask for none: what comes out is the original."""
    (tmp_path / "recipe.yaml").write_text("methods: []\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml has no methods, so nothing would be compressed"):
        Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert Recipe().override(methods=()).methods == ()


def test_a_file_is_named_by_text_or_by_a_path(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("survey: s.json\n")
    (tmp_path / "s.json").write_text("{}")
    read = Recipe.from_yaml(str(tmp_path / "recipe.yaml"))
    assert read == Recipe.from_yaml(tmp_path / "recipe.yaml") == Recipe(survey=str(tmp_path / "s.json"))
    with pytest.raises(RecipeError, match="path is 7; wanted a path"):
        Recipe.from_yaml(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("table", [None, [1], "best", 7], ids=str)
def test_what_is_no_table_is_no_recipe(table: Any) -> None:
    with pytest.raises(RecipeError, match=r"a recipe is .*; wanted a table with keys like ratio and preset"):
        Recipe.from_dict(table)


@pytest.mark.parametrize("value", [[], False, 0, ""], ids=repr)
def test_a_calibration_that_is_none_is_not_the_bundled_text(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"calibration is .*; wanted files, samples"):
        Recipe.from_dict({"calibration": value})
    assert Recipe.from_dict({"calibration": None}) == Recipe()


@pytest.mark.parametrize("name", ["preset", "format", "shape", "survey"])
@pytest.mark.parametrize("value", [np.array(["best", "free"]), np.array([1, 2]), ["best"]], ids=repr)
def test_what_is_no_word_is_refused_in_the_place_of_one(name: str, value: Any) -> None:
    for make in (Recipe, Recipe().override, lambda **given: Recipe.from_dict(given)):
        with pytest.raises(RecipeError, match=f"{name} is .*; wanted "):
            make(**{name: value})
    with pytest.raises(RecipeError, match=r"methods holds .*; wanted rows"):
        Recipe(methods=({"method": value},))  # type: ignore[arg-type]


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# nothing yet\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml is empty; wanted keys like ratio and preset"):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_a_survey_goes_with_the_shape_that_it_was_measured_for() -> None:
    """One that the call gives is taken all the same."""
    given = Recipe(survey="s.json")
    assert given.override(shape="nas").survey == given.override(format="nas").survey == "auto"
    assert given.override(format="stock").survey is None, "where none is made by itself"
    assert given.override(preset="lorap").survey is None
    assert TRAINED_TOO.override(preset="best").survey == "auto"
    assert given.override(shape="nas", survey="n.json").survey == "n.json"
    assert given.override(shape="nas", survey=None).survey is None
    for same in ({"ratio": 0.3}, {"shape": "free"}, {"preset": "best"}, {"methods": TRAINED_TOO.methods}):
        assert given.override(**same).survey == "s.json"
    assert Recipe(shape="nas", survey="s.json").override(format="nas").survey == "s.json"


def test_a_name_that_nothing_has_is_answered_with_all_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"has no 'ratoi' to override; wanted some of ratio, .*, samples, .*, refine"):
        Recipe().override(ratoi=0.3)


def test_a_shape_in_a_call_is_settled_as_in_a_recipe() -> None:
    assert Recipe().override(shape="free", format="stock") == Recipe(shape="free", format="stock")
    assert Recipe(format="stock").override(shape="free") == Recipe(format="stock")
    with pytest.raises(RecipeError, match="format is stock and shape nas"):
        Recipe().override(shape="nas", format="stock")


def test_what_could_have_no_survey_gets_the_default_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEFAULT_SURVEY", "auto")
    assert Recipe(preset="lorap").override(preset="best") == Recipe()
    assert Recipe.from_dict({"shape": "stock"}).override(shape="nas") == Recipe(shape="nas")
    assert Recipe(preset="lorap").override(preset="best", survey=None) == Recipe(survey=None)
    assert Recipe(survey=None).override(shape="nas") == Recipe(shape="nas", survey=None), "somebody wanted none"
    assert Recipe(preset="lorap").override(ratio=0.3) == Recipe(preset="lorap", ratio=0.3)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"ratoi": 0.2}, ["ratoi", "ratio"]),
        ({"ratio": 0.2, "calibration": {"sample": 4}}, ["sample", "samples"]),
        ({"calibration": 7}, ["calibration", "7", "text_column"]),
        ({"calibration": {"text_column": ""}}, ["text_column", "''", "name of a column"]),
        ({"calibration": {"text_column": 3}}, ["text_column", "3", "name of a column"]),
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
        ({"refine": 1.5}, ["refine: epochs", "1.5", "whole number"]),
        ({"methods": [{"method": "refine", "epochs": 2}]}, ["refine", "anchored"]),
        ({"methods": [{"method": "refine", "epoch": 2}]}, ["unknown keys epoch;", "epochs"]),
        ({"methods": [{"method": "ffn_anchored", "share": 1}]}, ["unknown keys share;", "shares"]),
        ({"methods": [{"method": "ffn_anchored", "shares": 1}]}, ["shares", "a list of numbers"]),
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


def test_a_survey_beside_the_recipe_comes_first(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{}")
    (tmp_path / "auto").write_text("{}")
    (tmp_path / "None").write_text("{}")
    wanted = {
        "s.json": str(tmp_path / "s.json"),
        "other.json": "other.json",
        "auto": "auto",
        "null": None,
        "x" * 300: "x" * 300,
    }
    for written, survey in wanted.items():
        (tmp_path / "recipe.yaml").write_text(f"survey: {written}\n")
        assert Recipe.from_yaml(tmp_path / "recipe.yaml").survey == survey
