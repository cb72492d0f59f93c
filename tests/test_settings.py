"""Settings: sizes and times are numbers at once, what a run is resumed with is kept, and the rest is left to the recipe."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import streamlap
from streamlap.errors import RecipeError
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
