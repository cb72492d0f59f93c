"""Settings: sizes and times are numbers at once, what a run is resumed with is kept, and the rest is left to the recipe."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamlap
from streamlap.errors import RecipeError, shown
from streamlap.recipe import Calibration, Recipe
from streamlap.settings import KEPT, RunSettings, split_options

GIVEN: dict[str, Any] = {
    "device": "cuda:1", "work": "/a/b", "max_ram": 8 << 30, "max_vram": 1 << 30, "overlap": False, "stop_after": 90.0,
    "trust_remote_code": True,
}  # fmt: skip


def names(kind: type) -> set[str]:
    return {entry.name for entry in dataclasses.fields(kind)}


def test_text_becomes_numbers_and_a_folder_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = RunSettings(work="hidden", max_ram="8GiB", max_vram=7, stop_after="1h30m")
    assert settings.work == str(tmp_path / "hidden")
    assert (settings.max_ram, settings.max_vram, settings.stop_after) == (8 << 30, 7, 5400.0)
    assert (settings.caps.ram, settings.caps.vram) == (8 << 30, 7)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_ram", "much"), ("max_vram", "8 parsecs"), ("max_ram", "0"), ("stop_after", "soon"), ("stop_after", "-5")],
)
def test_a_bad_value_is_named(name: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} is '{value}'; wanted"):
        RunSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [("device", None, "cuda:N"), ("device", 0, "cuda:N"), ("overlap", "no", "true"), ("trust_remote_code", 1, "true")],
)
def test_a_value_of_another_type_is_refused_at_once(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} is {value!r}; wanted .*{wanted}"):
        RunSettings(**{name: value})


@pytest.mark.parametrize(
    "value", [5, True, False, 0, [], [1], b"x", np.array(["x"]), "", "\0", "\ud800", Path("a\0b")], ids=repr
)
def test_a_work_folder_that_is_no_path_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"work is .*; wanted a path\."):
        RunSettings(work=value)


@pytest.mark.parametrize("value", [[1], {}, b"1h", Path("1h"), np.array([1, 2]), True, 10**400, -(10**400)], ids=shown)
def test_what_is_no_time_is_refused_whatever_its_type(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"stop_after is .*; wanted a time"):
        RunSettings(stop_after=value)


def test_a_device_of_torch_is_its_name() -> None:
    assert RunSettings(device=torch.device("cuda", 1)) == RunSettings(device="cuda:1")  # type: ignore[arg-type]
    assert RunSettings(device=torch.device("cpu")).settled().device == "cpu"  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_refused_where_settings_are_settled() -> None:
    assert RunSettings(device="cpu").settled() == RunSettings(device="cpu")
    for device in ("tpu", "cuda:99"):
        with pytest.raises(RecipeError, match=f"device is '{device}'"):
            RunSettings(device=device).settled()


def test_a_deadline_is_counted_from_now() -> None:
    assert RunSettings().deadline() == math.inf
    begin = time.monotonic()
    assert begin + 60 <= RunSettings(stop_after="1m").deadline() <= time.monotonic() + 60


def test_what_a_run_goes_on_with_is_kept_and_the_rest_is_given_anew() -> None:
    settings = RunSettings(**GIVEN)
    kept = json.loads(json.dumps(settings.to_json()))
    assert list(kept) == list(KEPT)
    again = RunSettings.from_json(kept)
    assert again == dataclasses.replace(settings, stop_after=None, trust_remote_code=False)
    assert RunSettings.from_json(RunSettings().to_json()) == RunSettings()
    for name in KEPT:
        with pytest.raises(ValueError, match=f"setting {name} is absent"):
            RunSettings.from_json({key: value for key, value in kept.items() if key != name})


def test_options_go_to_the_settings_or_stay() -> None:
    settings, others = split_options(GIVEN | {"ratio": 0.3, "nonsense": 1})
    assert settings == RunSettings(**GIVEN)
    assert others == {"ratio": 0.3, "nonsense": 1}


def test_no_name_means_two_things() -> None:
    """An option of `compress` is a setting, or a field of the recipe, or one of the calibration."""
    parts = [names(RunSettings), names(Recipe) | {"refine"}, names(Calibration)]
    assert sum(map(len, parts)) == len(set().union(*parts))


@pytest.mark.parametrize("call", ["compress", "plan", "survey", "evaluate"])
def test_an_option_that_nobody_knows_is_refused(tmp_path: Path, call: str) -> None:
    out = [tmp_path / "out"] if call in ("compress", "survey") else []
    with pytest.raises(RecipeError, match="frobnicate"):
        getattr(streamlap, call)("nowhere-at-all", *out, frobnicate=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("function", [streamlap.compress, streamlap.plan, streamlap.survey, streamlap.evaluate])
def test_an_option_that_there_is_not_is_answered_with_all_that_there_are(function: Any, tmp_path: Path) -> None:
    places = [tmp_path / "model", tmp_path / "out"][: 1 + (function in (streamlap.compress, streamlap.survey))]
    wanted = {"device", "max_ram"} | {
        entry.name
        for entry in inspect.signature(function).parameters.values()
        if entry.kind is inspect.Parameter.KEYWORD_ONLY
    }
    if function in (streamlap.compress, streamlap.plan):
        wanted |= names(Recipe) | names(Calibration) | {"refine"}
    with pytest.raises(RecipeError, match="has no options 'speed'; wanted some of ") as found:
        function(*places, speed=7)
    assert wanted <= set(str(found.value).partition("some of ")[2].rstrip(".").split(", "))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: streamlap.compress("m", None), "out is None; wanted a path"),  # type: ignore[arg-type]
        (lambda: streamlap.compress("m", ""), "out is ''; wanted a path"),
        (lambda: streamlap.compress(None, "out"), "model is None; wanted a path"),  # type: ignore[arg-type]
        (lambda: streamlap.compress("m", "out", {"ratio": 0.3}), "recipe is {'ratio': 0.3}; wanted a Recipe"),  # type: ignore[arg-type]
        (lambda: streamlap.compress("m", "out", Path("r.yaml")), r"recipe is .*r\.yaml.*; wanted a Recipe"),  # type: ignore[arg-type]
        (lambda: streamlap.plan("m", "r.yaml"), "recipe is 'r.yaml'; wanted a Recipe, as Recipe.from_yaml"),  # type: ignore[arg-type]
        (lambda: streamlap.resume(None), "path is None; wanted a path"),  # type: ignore[arg-type]
        (lambda: streamlap.inspect(None), "model is None; wanted a path"),  # type: ignore[arg-type]
        (lambda: streamlap.verify(7), "out is 7; wanted a path"),  # type: ignore[arg-type]
        (lambda: streamlap.survey("m", None), "file is None; wanted a path"),  # type: ignore[arg-type]
        (lambda: streamlap.export("m", None), "destination is None; wanted a path"),  # type: ignore[arg-type]
        (lambda: streamlap.export(None, "d"), "out is None; wanted a path"),  # type: ignore[arg-type]
        (lambda: streamlap.compress("m", "a\0b"), r"out is 'a\\x00b'; wanted a path"),
        (lambda: streamlap.verify("\ud800"), r"out is '\\ud800'; wanted a path"),
        (lambda: streamlap.export("m", "d", to=np.array(["gguf", "nas"])), "export to .* is not known"),  # type: ignore[arg-type]
        (lambda: streamlap.survey("m", "s", shape=np.array(["nas", "free"])), "shape is .*; wanted one of"),  # type: ignore[arg-type]
        (lambda: streamlap.recover("m", None, "t"), "destination is None; wanted a path"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_path_or_recipe_is_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        call()
