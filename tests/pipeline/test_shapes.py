"""What a result may be made of: dense linears with attentions gone (nas), or of the same widths everywhere (stock)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from crashes import crash_after
from outputs import contents
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import RecipeError, ResumeMismatch
from streamlap.families.stream import ModelStream
from streamlap.linalg.allocation import POWER
from streamlap.methods import WHOLE
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.lorap.attention import AttentionAwsvd
from streamlap.planning.allocate import layer_parameters
from streamlap.planning.cuts import removable
from streamlap.planning.decide import decide
from streamlap.planning.layouts import dense_parameters, largest_layout, layer_entries
from streamlap.planning.survey_file import Point, Survey, model_digest
from streamlap.planning.target import STEPS, meter, parameters, parse_target
from streamlap.planning.whole import UNMENDED
from streamlap.recipe import Recipe

DEPTH = 4


@pytest.fixture(scope="module")
def source(pico: MakeModel) -> Path:
    return pico("llama", num_hidden_layers=DEPTH, intermediate_size=96)


def survey_file(source: Path, file: Path, kls: Callable[[int, str], float], shape: str = "nas") -> str:
    """A survey with the divergences of a formula."""
    stream = ModelStream(source)
    cuts = {"attention": 0.0, "ffn": 0.8}
    layers = tuple(
        {name: (Point(keep=keep, kl=kls(index, name), error=0.5),) for name, keep in cuts.items()}
        for index in range(stream.depth)
    )
    found = Survey(model=model_digest(stream), calibration="", compute="", layers=layers, shape=shape)
    file.write_text(json.dumps(found.to_json()))
    return str(file)


def shares(source: Path, recipe: Recipe) -> list[dict[str, float]]:
    stream = ModelStream(source)
    survey = Survey.read(Path(recipe.survey)) if recipe.survey not in (None, "auto") else None
    return [
        {name: count / dense_parameters(stream, index, name) for name, count in row.items()}
        for index, row in enumerate(layer_parameters(stream, recipe, survey))
    ]


# --- what is shared out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["nas", "stock"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_without_a_survey_ffns_take_the_cut(source: Path, shape: str, ratio: float) -> None:
    found = shares(source, Recipe(ratio=ratio, shape=shape, survey=None))
    assert {row["attention"] for row in found} == {1.0}
    assert len({row["ffn"] for row in found}) == 1
    stream = ModelStream(source)
    counts = [dense_parameters(stream, 0, name) for name in ("attention", "ffn")]
    kept = counts[0] + found[0]["ffn"] * counts[1]
    assert kept == pytest.approx((1 - ratio) * sum(counts), abs=1)


@pytest.mark.parametrize("shape", ["nas", "stock"])
def test_a_ratio_that_the_ffns_cannot_hold_is_refused(source: Path, shape: str) -> None:
    with pytest.raises(RecipeError, match=rf"shape {shape} at ratio 0.8 would leave less than 10% of the FFNs; wanted"):
        shares(source, Recipe(ratio=0.8, shape=shape, survey=None))


def test_a_survey_to_come_may_remove_what_the_ffns_cannot_hold(source: Path, tmp_path: Path) -> None:
    found = shares(source, Recipe(ratio=0.79, shape="nas", survey="auto"))
    assert [row["attention"] for row in found] == [1.0, 1.0, 0.0, 0.0]
    assert {round(row["ffn"], 2) for row in found} == {0.11}
    with pytest.raises(RecipeError, match=r"wanted a ratio of at most 0\.862"):
        shares(source, Recipe(ratio=0.87, shape="nas", survey="auto"))
    file = survey_file(source, tmp_path / "s.json", lambda *_: 0.1)
    measured = shares(source, Recipe(ratio=0.79, shape="nas", survey=file))
    assert [row["attention"] for row in measured].count(0.0) >= 2


def test_cheap_attention_goes_and_dear_stays(source: Path, tmp_path: Path) -> None:
    """All FFNs alike, and the attention of layer 2 next to free; that of layer 0 would be too, and stays."""
    file = survey_file(
        source,
        tmp_path / "s.json",
        lambda i, name: 1e-4 if name == "attention" and i in (0, 2) else 0.3 if name == "attention" else 0.02,
    )
    found = shares(source, Recipe(ratio=0.3, shape="nas", survey=file))
    assert [row["attention"] for row in found] == [1.0, 1.0, 0.0, 1.0]
    assert len({round(row["ffn"], 2) for row in found}) == 1


def test_none_goes_where_all_are_dear(source: Path, tmp_path: Path) -> None:
    file = survey_file(source, tmp_path / "s.json", lambda i, name: 9.0 if name == "attention" else 0.01 * (1 + i))
    found = shares(source, Recipe(ratio=0.3, shape="nas", survey=file))
    assert {row["attention"] for row in found} == {1.0}
    widths = [row["ffn"] for row in found]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_the_least_sum_of_losses_decides_how_many_go(source: Path, tmp_path: Path) -> None:
    """Against every number of them, by the same curves. What is removed counts more than what was measured."""
    stream, alone = ModelStream(source), [0.003 * 4**i for i in range(DEPTH)]
    file = survey_file(source, tmp_path / "s.json", lambda i, name: alone[i] if name == "attention" else 0.02)
    recipe = Recipe(ratio=0.4, shape="nas", survey=file)
    counts = {name: dense_parameters(stream, 0, name) for name in ("attention", "ffn")}
    losses = []
    for gone in range(DEPTH):
        kept = 0.6 * DEPTH * sum(counts.values()) - (DEPTH - gone) * counts["attention"]
        cut = 1 - kept / (DEPTH * counts["ffn"])
        losses.append(UNMENDED * sum(alone[1 : gone + 1]) + DEPTH * 0.02 * (4 * (1 / (1 - cut) - 1)) ** POWER)
    best = min(range(DEPTH), key=losses.__getitem__)
    assert 0 < best < DEPTH - 1
    assert [row["attention"] for row in shares(source, recipe)] == [1.0, *[0.0] * best, *[1.0] * (DEPTH - 1 - best)]


def test_the_first_attention_of_each_kind_stays(pico: MakeModel) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    alternating = pico("ministral", num_hidden_layers=4, layer_types=kinds)
    assert removable(ModelStream(alternating)) == [2, 3]


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_settings_that_do_not_go_together_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="shape is 'small'; wanted one of free, nas, stock"):
        Recipe(shape="small")
    for shape in ([1], None, 3):
        with pytest.raises(RecipeError, match=r"shape is .*; wanted one of free, nas, stock"):
            Recipe.from_dict({"shape": shape, "methods": [{"method": "attention_groups"}]})
    with pytest.raises(RecipeError, match="preset lorap has no shape nas; wanted shape free, or preset best"):
        Recipe(preset="lorap", shape="nas")
    with pytest.raises(RecipeError, match="shape is nas and methods have attention_awsvd"):
        Recipe(shape="nas", methods=(AttentionAwsvd(), FfnAnchored(shares=(1.0,))))
    with pytest.raises(RecipeError, match="shape is stock and methods have ffn_anchored"):
        Recipe(shape="stock", methods=(WHOLE[0], FfnAnchored()))
    free = survey_file(source, tmp_path / "free.json", lambda *_: 0.1, shape="free")
    with pytest.raises(RecipeError, match=r"serves results of shape 'free', and wanted is shape nas"):
        decide(ModelStream(source), Recipe(shape="nas", survey=free))
    nas = survey_file(source, tmp_path / "nas.json", lambda *_: 0.1)
    with pytest.raises(RecipeError, match=r"serves results of shape 'nas', and wanted is shape free"):
        decide(ModelStream(source), Recipe(survey=nas))
    with pytest.raises(RecipeError, match="serves results of shape 'nas', and wanted is shape stock"):
        decide(ModelStream(source), Recipe(shape="stock", survey=nas))
    with pytest.raises(RecipeError, match="shape is 'small'; wanted one of free, nas, stock"):
        streamlap.survey(source, tmp_path / "small.json", shape="small")


def test_a_survey_of_before_there_were_shapes_is_of_the_free_one(source: Path, tmp_path: Path) -> None:
    file = Path(survey_file(source, tmp_path / "s.json", lambda *_: 0.1, shape="free"))
    table = json.loads(file.read_text())
    del table["shape"]
    file.write_text(json.dumps(table))
    assert Survey.read(file).shape == "free"


def test_recipes_with_a_shape_are_read_back() -> None:
    found = Recipe(shape="nas", ratio=0.3)
    assert found.methods == WHOLE
    assert Recipe.from_dict(found.to_dict()) == found == Recipe(ratio=0.3).override(shape="nas")
    assert Recipe.from_dict({"shape": "nas"}).methods == WHOLE
    assert "shape" not in Recipe().to_dict()
    assert found.override(refine=3).override(shape="free") == Recipe(ratio=0.3).override(refine=3)


# --- what comes out ----------------------------------------------------------------------------------------------------


def test_a_survey_for_nas_removes_attention(source: Path, tokens: Path, tmp_path: Path) -> None:
    found = streamlap.survey(source, tmp_path / "s.json", files=(str(tokens),), shape="nas")
    assert found.shape == "nas"
    for layer in found.layers:
        assert [point.keep for points in layer.values() for point in points] == [0.0, 0.8]
        assert all(point.kl > 0 and point.error > 0 for points in layer.values() for point in points)


def test_a_survey_of_another_shape_is_not_gone_on_with(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(shape: str) -> Survey:
        return streamlap.survey(source, tmp_path / "s.json", files=(str(tokens),), shape=shape)

    crash_after(2, monkeypatch, lambda: measure("free"))
    with pytest.raises(ResumeMismatch, match="shape: the folder has 'free', this run has 'nas'"):
        measure("nas")


def test_a_nas_result_is_dense_linears_and_gaps(source: Path, tokens: Path, tmp_path: Path) -> None:
    survey = survey_file(source, tmp_path / "s.json", lambda i, name: 1e-4 if name == "attention" else 0.01 * (1 + i))
    out = tmp_path / "out"
    report = streamlap.compress(source, out, ratio=0.4, shape="nas", survey=survey, files=(str(tokens),))
    assert report.parameters.ratio_decoder >= 0.4
    assert report.parameters.ratio_decoder == pytest.approx(0.4, abs=0.01)
    sites = [layer["sites"] for layer in streamlap.inspect(out)["layers"]]
    assert [layer["self_attn.o_proj"]["kind"] for layer in sites] == ["dense", "removed", "removed", "removed"]
    assert {layer["mlp.down_proj"]["kind"] for layer in sites} <= {"dense", "pruned"}
    assert len({layer["mlp.down_proj"]["width"] for layer in sites}) > 1
    assert streamlap.verify(out)["ok"]
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert sum(isinstance(part, torch.nn.Linear) for part in loaded.modules()) == 1 + 4 + DEPTH * 3
    assert [layer.errors["attention"].keys() for layer in report.layers[1:]] == [{"removed"}] * 3


def test_a_stock_result_has_the_same_widths_everywhere(source: Path, tokens: Path, tmp_path: Path) -> None:
    report = streamlap.compress(source, tmp_path / "out", ratio=0.3, shape="stock", files=(str(tokens),))
    assert report.parameters.ratio_decoder == pytest.approx(0.3, abs=0.02)
    sites = [layer["sites"] for layer in streamlap.inspect(tmp_path / "out")["layers"]]
    assert {site["kind"] for layer in sites for site in layer.values()} == {"dense", "pruned"}
    shapes = [{path: tuple(site["shape"]) for path, site in layer.items()} for layer in sites]
    assert shapes == shapes[:1] * DEPTH


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_killed_run_gives_the_same_bytes(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    """Layers 1 to 3 have no attention."""
    survey = survey_file(source, tmp_path / "s.json", lambda _, name: 1e-4 if name == "attention" else 0.01)

    def run(out: Path) -> streamlap.Report:
        return streamlap.compress(source, out, ratio=0.4, shape="nas", survey=survey, files=(str(tokens),))

    run(tmp_path / "whole")
    crash_after(layers, monkeypatch, lambda: run(tmp_path / "out"))
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_plan_counts_it(source: Path, tokens: Path, tmp_path: Path) -> None:
    survey = survey_file(source, tmp_path / "s.json", lambda _, name: 1e-4 if name == "attention" else 0.01)
    settings = {"ratio": 0.4, "shape": "nas", "survey": survey, "files": (str(tokens),)}
    plan = streamlap.plan(source, **settings)
    streamlap.compress(source, tmp_path / "out", **settings)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert plan.output_bytes == written


def test_a_target_counts_layers_that_differ_one_by_one(source: Path) -> None:
    """With a survey to come the attention of the last layers goes; the first one keeps its own in any case."""
    stream = ModelStream(source)
    recipe, wish = Recipe(shape="nas", survey="auto"), parse_target(None, "1M")
    assert wish is not None
    found = replace(recipe, ratio=0.79)
    layouts = [largest_layout(stream, index, each) for index, each in enumerate(decide(stream, found).candidates)]
    stored = sum(parameters(layer_entries(stream, index, layout)) for index, layout in enumerate(layouts))
    outer = parameters(stream.outer_tensors())
    assert meter(stream, recipe, None, wish)(round(0.79 * STEPS)) == stored + outer


def test_a_share_of_nothing_is_no_removal_in_a_free_shape(source: Path) -> None:
    with pytest.raises(RecipeError, match="a lower ratio"):
        decide(ModelStream(source), Recipe(ratio=0.99999, preset="lorap"))


def test_a_target_is_met_in_a_shape(source: Path, tokens: Path, tmp_path: Path) -> None:
    whole = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    most = int(0.8 * whole)
    streamlap.compress(source, tmp_path / "out", shape="stock", target_size=most, files=(str(tokens),))
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0.95 * most <= written <= most
