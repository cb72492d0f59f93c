"""A survey that `compress` makes for itself: where it lies, who uses it again, and what happens without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from crashes import crash_after, dies_at, in_layer, stopped_at
from outputs import STATE, contents
from transformers import AutoModel

import streamlap
from streamlap.cli.show import describe_plan
from streamlap.errors import BudgetError, RecipeError, ResumeMismatch, StreamlapError
from streamlap.families.stream import ModelStream
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.groups import AttentionGroups
from streamlap.pipeline import layers
from streamlap.pipeline import survey as surveying
from streamlap.pipeline.survey import DEFAULT_LENGTH, DEFAULT_SAMPLES, state_of, survey_pieces
from streamlap.planning import survey as planning
from streamlap.planning.decide import decide
from streamlap.planning.survey_file import Point, Survey, model_digest
from streamlap.recipe import AUTO, Recipe
from streamlap.store.lock import OutputLock


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of all surveys that are measured."""
    found: list[Path] = []
    real = surveying.sweep_layers

    def watched(sweep: Any) -> None:
        found.append(sweep.session.run.out)
        real(sweep)

    monkeypatch.setattr(surveying, "sweep_layers", watched)
    return found


def compress(source: Path, tokens: Path, out: Path, **options: Any) -> streamlap.Report:
    return streamlap.compress(
        source,
        out,
        files=(str(tokens),),
        **{**({} if "target_params" in options else {"ratio": 0.4}), "survey": AUTO, **options},
    )


def dies_in_the_second_layer(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    with monkeypatch.context() as patch:
        in_layer(1, patch, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()


def test_one_survey_serves_all_ratios(pico: MakeModel, tokens: Path, tmp_path: Path, made: list[Path]) -> None:
    """Of a model that is wide enough for whole ranks and channels to come near a ratio."""
    source = pico("llama", hidden_size=64, intermediate_size=160, num_attention_heads=4, head_dim=16)
    first = compress(source, tokens, tmp_path / "first")
    compress(source, tokens, tmp_path / "second", ratio=0.3)
    (file,) = made
    assert file.parent == tmp_path
    assert (tmp_path / "first" / "streamlap_survey.json").read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["first", "second", file.name])
    given = streamlap.compress(source, tmp_path / "given", ratio=0.4, files=(str(tokens),), survey=str(file))
    assert given.shards == first.shards
    uniform = compress(source, tokens, tmp_path / "uniform", survey=None)
    assert uniform.shards != first.shards
    assert uniform.parameters.decoder_after == pytest.approx(first.parameters.decoder_after, rel=0.01)


def test_the_result_says_all_of_itself(source: Path, tokens: Path, tmp_path: Path, made: list[Path]) -> None:
    """Its recipe goes by the survey beside it, so that moved elsewhere it gives the same bytes; no path is in any file."""
    first = compress(source, tokens, tmp_path / "folder42" / "first")
    moved = (tmp_path / "folder42" / "first").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "folder42")
    again = streamlap.compress(source, tmp_path / "again", Recipe.from_yaml(moved / "streamlap_recipe.yaml"))
    assert len(made) == 1, "the survey beside the recipe serves"
    assert again.shards == first.shards
    for path in moved.iterdir():
        assert b"folder42" not in path.read_bytes(), path.name


def test_the_survey_in_use_is_not_emptied_away(source: Path, tokens: Path, tmp_path: Path) -> None:
    """The result stays whole."""
    compress(source, tokens, tmp_path / "out")
    recipe = Recipe.from_yaml(tmp_path / "out" / "streamlap_recipe.yaml")
    with pytest.raises(
        RecipeError, match=r"--overwrite would remove survey .*streamlap_survey\.json; wanted one outside"
    ):
        streamlap.compress(source, tmp_path / "out", recipe, overwrite=True)
    assert streamlap.verify(tmp_path / "out")["ok"]
    copy = (tmp_path / "out" / "streamlap_survey.json").rename(tmp_path / "out" / "own.json")
    streamlap.compress(source, tmp_path / "out", recipe, survey=str(copy), overwrite=True)
    assert copy.is_file()
    (tmp_path / "out" / ".streamlap").mkdir()
    within = copy.rename(tmp_path / "out" / ".streamlap" / "own.json")  # which is emptied whole
    with pytest.raises(RecipeError, match=r"--overwrite would remove survey .*own\.json; wanted one outside"):
        streamlap.compress(source, tmp_path / "out", recipe, survey=str(within), overwrite=True)
    assert within.is_file()


def test_a_survey_that_was_renamed_serves_the_rest_of_the_run(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(source, tokens, tmp_path / "whole")
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_bytes((tmp_path / "whole" / "streamlap_survey.json").read_bytes())
    crash_after(1, monkeypatch, lambda: compress(source, tokens, tmp_path / "out", survey=str(first)))
    first.rename(second)
    compress(source, tokens, tmp_path / "out", survey=str(second))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_that_was_moved_has_its_survey_with_it(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole" / "out", tmp_path / "here" / "out"
    compress(source, tokens, whole)
    dies_in_the_second_layer(monkeypatch, lambda: compress(source, tokens, out))
    copy = out / STATE / "streamlap_survey.json"
    (tmp_path / "here").rename(tmp_path / "there")
    streamlap.resume(tmp_path / "there" / "out")
    assert contents(tmp_path / "there" / "out") == contents(whole)
    dies_in_the_second_layer(monkeypatch, lambda: compress(source, tokens, out))
    copy.unlink()  # as earlier versions left it
    streamlap.resume(out)
    assert contents(out) == contents(whole)


def test_a_run_goes_on_by_its_own_survey(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[Path]
) -> None:
    """No other is measured for it; and another run is refused before one is."""
    compress(source, tokens, tmp_path / "whole", target_params="0.028M")
    out, bare = tmp_path / "a" / "out", tmp_path / "b" / "out"
    dies_in_the_second_layer(monkeypatch, lambda: compress(source, tokens, out, target_params="0.028M"))
    dies_in_the_second_layer(monkeypatch, lambda: compress(source, tokens, bare, survey=None))
    (file,) = out.parent.glob("*.json")
    file.unlink()
    count = len(made)
    for other in (out, bare):
        with pytest.raises(ResumeMismatch, match="calibration tokens: the folder has") as refusal:
            compress(source, tokens, other, samples=5)
        assert "survey" not in str(refusal.value)
    compress(source, tokens, out, target_params="0.028M")
    assert compress(source, tokens, bare).recipe["survey"] is None
    assert len(made) == count
    assert contents(out) == contents(tmp_path / "whole")


def test_a_plan_counts_it(source: Path, tokens: Path) -> None:
    plan, without = (streamlap.plan(source, files=(str(tokens),), survey=survey) for survey in (AUTO, None))
    assert plan.survey is not None
    assert without.survey is None
    assert plan.flops - without.flops == plan.survey.flops + plan.survey.flops64 + plan.survey.flops32
    assert plan.read_bytes - without.read_bytes == plan.survey.read_bytes
    assert plan.seconds_low - without.seconds_low == pytest.approx(plan.survey_seconds_low)
    assert plan.survey_seconds_low > 0
    assert without.survey_seconds_low == 0
    assert streamlap.plan(source, files=(str(tokens),), shape="stock").survey is None
    assert streamlap.plan(source, files=(str(tokens),), preset="lorap").survey is None


def test_other_windows_get_another(source: Path, tokens: Path, tmp_path: Path, made: list[Path]) -> None:
    compress(source, tokens, tmp_path / "first")
    compress(source, tokens, tmp_path / "second", samples=6)
    assert len(set(made)) == 2


def test_pieces_are_few_short_and_from_everywhere() -> None:
    tokens_NL = torch.arange(64 * 2048).view(64, 2048)
    pieces_NL = survey_pieces(tokens_NL)
    assert pieces_NL.shape == (DEFAULT_SAMPLES, DEFAULT_LENGTH)
    assert pieces_NL[:, 0].tolist() == [4096 * place for place in range(32)]
    assert survey_pieces(tokens_NL[:, :100]).shape == (64, 100)
    assert torch.equal(survey_pieces(tokens_NL[:3, :7]), tokens_NL[:3, :7])


@pytest.mark.parametrize("options", [{"preset": "lorap"}, {"survey": None}])
def test_who_needs_none_makes_none(
    source: Path, tokens: Path, tmp_path: Path, made: list[Path], options: dict[str, Any]
) -> None:
    report = compress(source, tokens, tmp_path / "out", **options)
    assert not made
    assert report.recipe["survey"] is None


def test_the_default_is_to_measure() -> None:
    """In a process of its own: this one's default is another, see `conftest`."""
    program = "from streamlap.recipe import Recipe; print(Recipe().survey, Recipe().override(preset='lorap').survey)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["auto", "None"]


def test_stopped_in_the_survey_the_same_command_goes_on(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(source, tokens, tmp_path / "whole" / "out")
    message = "of the survey; give the same command again to go on"
    stopped_at(surveying, "open_sweep", monkeypatch, lambda: compress(source, tokens, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()
    compress(source, tokens, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_one_begun_in_another_ratio_goes_on(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies_at(surveying, "points", monkeypatch, lambda: compress(source, tokens, tmp_path / "one"))
    monkeypatch.setattr(surveying, "sweep_layers", lambda sweep: None if sweep.session.journal.next_layer else 1 / 0)
    assert compress(source, tokens, tmp_path / "two", ratio=0.3)


def test_a_second_run_does_not_pass_by_the_first_one_in_its_survey(source: Path, tokens: Path, tmp_path: Path) -> None:
    """Else it would take the lock of the output, and the first would die after its survey."""
    compress(source, tokens, tmp_path / "out")
    (file,) = tmp_path.glob("streamlap-survey-*.json")
    file.unlink()
    with (
        OutputLock(state_of(file)),
        pytest.raises(ResumeMismatch, match=r"streamlap-survey-.* is being written by process .*; wanted it free"),
    ):
        compress(source, tokens, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def raises(error: Exception) -> Callable[..., Any]:
    def failing(*_: Any) -> Any:
        raise error

    return failing


@pytest.mark.parametrize("case", ["head", "wide", "memory", "disk"])
def test_without_a_survey_all_share_alike(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source = pico("mistral")
    if case == "head":
        AutoModel.from_pretrained(source).save_pretrained(tmp_path / "source")
        source = tmp_path / "source"
    if case == "wide":
        monkeypatch.setattr(planning, "MOST_INPUTS_ALONE", 0.1)
    if case == "memory":
        monkeypatch.setattr(planning, "plan_survey", raises(BudgetError("it needs 9 GiB of RAM")))
    if case == "disk":
        full = StreamlapError("no room. Mend that and run again to resume.")
        monkeypatch.setattr(surveying, "run_survey", raises(full))
    report = compress(source, tokens, tmp_path / "out")
    assert report.recipe["survey"] is None
    assert "no survey, so all layers keep the same share: " in caplog.text
    plan = streamlap.plan(source, files=(str(tokens),), survey=AUTO)
    assert (plan.survey is None) == (plan.survey_left_out != "") == (case != "disk"), "a plan does not write"
    assert plan.survey_left_out in caplog.text
    assert plan.to_json()["survey_left_out"] == plan.survey_left_out
    assert any("same share: " + plan.survey_left_out in line for line in describe_plan(plan)) == (case != "disk")
    assert "run again to resume" not in caplog.text, "there is nothing to resume"
    assert not list(tmp_path.glob("*.json"))


def test_a_run_that_was_begun_without_one_says_so_when_it_goes_on(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    dies_in_the_second_layer(monkeypatch, lambda: compress(source, tokens, out, survey=None))
    assert "without a survey" not in caplog.text
    assert compress(source, tokens, out).recipe["survey"] is None
    assert caplog.text.count("out was begun without a survey, and goes on without one") == 1


def test_what_the_disk_says_of_a_survey_comes_whole(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But for what only a run that stopped can do."""
    refusal = StreamlapError("cannot write a: no. Mend that or choose another folder.")
    monkeypatch.setattr(surveying, "run_survey", lambda *_: (_ for _ in ()).throw(refusal))
    compress(source, tokens, tmp_path / "out")
    assert "cannot write a: no. Mend that or choose another folder." in caplog.text


def test_shares_below_what_a_method_can_hold_name_the_way_out(source: Path, tmp_path: Path) -> None:
    """Attention that is cheap to cut gets 0.7 of the uniform share, which is less than one of two KV heads."""
    stream, file = ModelStream(source), tmp_path / "s.json"
    layers = tuple(
        {name: (Point(keep=0.5, kl=kl, error=0.5),) for name, kl in (("attention", 9.0**index), ("ffn", 9.0))}
        for index in range(stream.depth)
    )
    found = Survey(model=model_digest(stream), calibration="", compute="", layers=layers)
    file.write_text(json.dumps(found.to_json()))
    recipe = Recipe(
        ratio=0.3, preset="custom", methods=(AttentionGroups(), FfnAnchored(shares=(1.0,))), survey=str(file)
    )
    with pytest.raises(RecipeError, match=r"hold no KV head .* --no-survey gives all the same share\.$"):
        decide(stream, recipe)
    assert decide(stream, replace(recipe, survey=None))
    with pytest.raises(RecipeError, match=r"lower the ratio\.$"):
        decide(stream, replace(recipe, survey=None, ratio=0.6))


def test_a_resumed_compression_reads_it_again(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[Path]
) -> None:
    real = layers.compress_layer
    compress(source, tokens, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            layers,
            "compress_layer",
            lambda job, runner, index, *rest: real(job, runner, index, *rest) if index < 1 else 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            compress(source, tokens, tmp_path / "out")
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(made) == 1
    assert Survey.read(made[0])
