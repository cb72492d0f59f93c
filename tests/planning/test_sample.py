"""Too little calibration text is said, with both figures, before any work; far too little is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel

import streamlap
from streamlap.errors import RecipeError
from streamlap.families.stream import ModelStream
from streamlap.planning.decide import decide
from streamlap.planning.sample import check_sample, fitted_inputs
from streamlap.recipe import Recipe


def windows(sequences: int, length: int) -> torch.Tensor:
    """Tokens of which all differ."""
    return torch.arange(sequences * length).reshape(sequences, length)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "streamlap.planning.sample"]


@pytest.mark.parametrize(("tokens", "inputs"), [((4, 16), 64), ((1, 65), 64), ((128, 2048), 14336)])
def test_as_many_tokens_as_inputs_are_enough(
    tokens: tuple[int, int], inputs: int, caplog: pytest.LogCaptureFixture
) -> None:
    check_sample(windows(*tokens), inputs)
    assert warnings(caplog) == []


@pytest.mark.parametrize(("tokens", "inputs"), [((1, 63), 64), ((2, 2), 64), ((4, 1024), 14336)])
def test_fewer_are_warned_of_with_both_figures(
    tokens: tuple[int, int], inputs: int, caplog: pytest.LogCaptureFixture
) -> None:
    check_sample(windows(*tokens), inputs)
    (line,) = warnings(caplog)
    assert f"has {tokens[0] * tokens[1]:,} tokens" in line
    assert f"has {inputs:,} inputs" in line
    assert all(word in line for word in ("--samples", "--length", "text"))


@pytest.mark.parametrize(
    ("tokens", "inputs", "least"), [((1, 3), 64, "4"), ((1, 2), 48, "3"), ((1, 895), 14336, "896")]
)
def test_a_fit_that_would_mean_nothing_is_refused(tokens: tuple[int, int], inputs: int, least: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        check_sample(windows(*tokens), inputs)
    said = str(refusal.value)
    assert f"{inputs:,} inputs; wanted at least {least} tokens, and better {inputs:,} or more" in said
    assert f"has {tokens[0] * tokens[1]:,} tokens" in said


REPEATED: dict[str, tuple[torch.Tensor, bool]] = {
    "one token": (torch.zeros(1, 64, dtype=torch.int64), True),
    "all windows equal": (torch.arange(16).repeat(4, 1), True),
    "two windows equal": (torch.arange(32).repeat(2, 1), True),
    "a word of three tokens": (torch.arange(3).repeat(86)[:256].reshape(8, 32), True),
    "one window twice": (torch.cat([windows(3, 32), windows(1, 32)]), False),
    "two tokens in any order": (torch.randint(2, (8, 32), generator=torch.Generator().manual_seed(0)), False),
    "one window": (windows(1, 64), False),
}


@pytest.mark.parametrize("case", REPEATED)
def test_text_that_repeats_itself_is_warned_of(case: str, caplog: pytest.LogCaptureFixture) -> None:
    tokens_NL, said = REPEATED[case]
    check_sample(tokens_NL, 32)
    assert bool(warnings(caplog)) == said
    assert all("wanted text that does not repeat itself" in line for line in warnings(caplog))


def test_the_widest_linear_that_is_fitted_counts(pico: MakeModel) -> None:
    stream = ModelStream(pico("llama"))
    assert fitted_inputs(stream, ["attention"]) == 32
    assert fitted_inputs(stream, ["attention", "ffn"]) == fitted_inputs(stream, ["ffn"]) == 48


@pytest.fixture
def few(tmp_path: Path) -> Any:
    """Token ids in one window of so many."""

    def write(count: int) -> tuple[str, ...]:
        np.save(tmp_path / "few.npy", np.arange(count).reshape(1, count))
        return (str(tmp_path / "few.npy"),)

    return write


def test_too_few_tokens_stop_every_command_before_anything_is_made(pico: MakeModel, tmp_path: Path, few: Any) -> None:
    source, files = pico("llama"), few(2)
    with pytest.raises(RecipeError, match=r"2 tokens .* 48 inputs"):
        streamlap.plan(source, files=files)
    with pytest.raises(RecipeError, match=r"2 tokens .* 48 inputs"):
        streamlap.compress(source, tmp_path / "out", files=files)
    with pytest.raises(RecipeError, match=r"2 tokens .* 48 inputs"):
        streamlap.survey(source, tmp_path / "survey.json", files=files)
    assert [path.name for path in tmp_path.iterdir() if path.name != source.name] == ["few.npy"]


def test_few_tokens_are_warned_of_by_every_command(
    pico: MakeModel, tmp_path: Path, few: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source, files = pico("llama"), few(20)
    with caplog.at_level(logging.WARNING, "streamlap"):
        streamlap.plan(source, files=files)
        streamlap.compress(source, tmp_path / "out", files=files)
        streamlap.survey(source, tmp_path / "survey.json", files=files)
    assert len(warnings(caplog)) == 3
    assert all("has 20 tokens" in line for line in warnings(caplog))


def test_plan_and_report_have_both_figures(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"files": (str(tokens),)}
    plan = streamlap.plan(pico("llama"), **settings)
    report = streamlap.compress(pico("llama"), tmp_path / "out", **settings)
    sequences, length = report.calibration_tokens
    wanted = {"tokens": sequences * length, "inputs": 48}
    assert plan.to_json()["calibration"] == report.to_json()["calibration"] == wanted
    assert json.loads((tmp_path / "out" / "streamlap_report.json").read_text())["calibration"] == wanted


def test_a_report_without_the_figures_is_still_read(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """As versions before them wrote it."""
    out = tmp_path / "out"
    streamlap.compress(pico("llama"), out, files=(str(tokens),))
    report = json.loads((out / "streamlap_report.json").read_text())
    (out / "streamlap_report.json").write_text(json.dumps({k: v for k, v in report.items() if k != "calibration"}))
    assert streamlap.verify(out)["ok"]
    assert any("relative_error" in site for site in streamlap.inspect(out)["layers"][0]["sites"].values())


@pytest.mark.parametrize(("method", "whole"), [("ffn_lorap", "attention"), ("attention_awsvd", "ffn")])
def test_a_recipe_for_one_sub_layer_is_told_what_goes(
    pico: MakeModel, tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, whole: str
) -> None:
    given: dict[str, Any] = {"methods": [{"method": method}], "ratio": 0.3, "files": (str(tokens),)}
    streamlap.plan(pico("llama"), **given)
    (line,) = (record.getMessage() for record in caplog.records if record.name == "streamlap.planning.decide")
    assert f"no method compresses {whole}, so that the ratio holds for" in line
    share = float(line.partition("about ")[2].partition("%")[0]) / 100
    reached = streamlap.compress(pico("llama"), tmp_path / "out", **given).parameters.ratio_decoder
    assert share == pytest.approx(reached, abs=0.03)
    assert share < 0.25
    caplog.clear()
    streamlap.plan(pico("llama"), preset="lorap", ratio=0.3, files=(str(tokens),))
    streamlap.plan(pico("llama"), methods=given["methods"], target_params="40k", files=(str(tokens),))
    assert not [record for record in caplog.records if record.name == "streamlap.planning.decide"]


@pytest.mark.parametrize("preset", ["custom", "lorap"])
def test_a_recipe_without_methods_is_told_that_nothing_goes(
    pico: MakeModel, caplog: pytest.LogCaptureFixture, preset: str
) -> None:
    decide(ModelStream(pico("llama")), Recipe(preset=preset, methods=()))
    (line,) = (record.getMessage() for record in caplog.records if record.name == "streamlap.planning.decide")
    assert line == "no method compresses anything, so that nothing goes. Add methods, or give a preset."
