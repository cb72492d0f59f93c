"""By a survey the shape stock loses KV heads and layers beside channels, and the shape nas layers: what is chosen, what comes
out, and that other programs read it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from crashes import crash_after
from outputs import contents
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import RecipeError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.linalg.allocation import POWER
from streamlap.linalg.moments import held_sequences
from streamlap.loader.forms import Removed
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.groups import AttentionGroups
from streamlap.output.formats import CONFIGS
from streamlap.planning.allocate import layer_parameters
from streamlap.planning.cuts import CUTS, LAYER, attention_parameters, cuts_of, group_counts
from streamlap.planning.layouts import dense_parameters
from streamlap.planning.survey_file import Point, Survey, model_digest
from streamlap.planning.whole import UNMENDED
from streamlap.recipe import Recipe

DEPTH, GONE = 4, 2
Kls = Callable[[int, str], float]


def survey_file(source: Path, file: Path, kls: Kls, shape: str) -> str:
    """A survey with the divergences of a formula, of all that this shape can lose, also where none measures it."""
    stream = ModelStream(source)
    layers = tuple(
        {name: (Point(keep=keep, kl=kls(index, name), error=0.5),) for name, keep in keeps.items()}
        for index, keeps in enumerate(losable(stream, shape))
    )
    found = Survey(model=model_digest(stream), calibration="", compute="", layers=layers, shape=shape)
    file.write_text(json.dumps(found.to_json()))
    return str(file)


def losable(stream: ModelStream, shape: str) -> list[dict[str, float]]:
    """What is measured of each layer, and the layer as a whole, which only surveys for stock measure."""
    both = zip(cuts_of(stream, shape), cuts_of(stream, "stock"), strict=True)
    return [
        {name: cut.keep for name, cut in cuts.items()} | ({LAYER: 0.0} if LAYER in plain else {})
        for cuts, plain in both
    ]


def one_layer(index: int, name: str) -> float:
    """Layer GONE is next to free, KV heads are cheap."""
    return {LAYER: 1e-4 if index == GONE else 9.0, "attention": 1e-3, "ffn": 0.02}[name]


def one_attention(index: int, name: str) -> float:
    """Layer GONE is next to free, and the attention behind it."""
    return {LAYER: 1e-4 if index == GONE else 9.0, "attention": 1e-4 if index == GONE + 1 else 9.0, "ffn": 0.02}[name]


KLS: dict[str, Kls] = {"stock": one_layer, "nas": one_attention}


def settings(source: Path, tokens: Path, folder: Path, shape: str, kls: Kls | None = None) -> dict[str, Any]:
    survey = survey_file(source, folder / f"{shape}.json", kls or KLS[shape], shape)
    return {"ratio": 0.4, "survey": survey, "files": (str(tokens),), "multiple": 4}


def ids(tokens: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(tokens).astype(np.int64))


@torch.no_grad()
def logits(folder: Path, tokens: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: torch.Tensor = model(ids(tokens)).logits
    return found


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


def config(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return table


@pytest.fixture(scope="module")
def source(pico: MakeModel) -> Path:
    return pico("llama", num_hidden_layers=DEPTH, intermediate_size=96, tokenizer=True)


# --- KV heads ----------------------------------------------------------------------------------------------------------


def test_heads_that_go_are_columns_of_o_that_are_masked_and_the_refit_does_not_lose(
    pico: MakeModel, tokens: Path, tmp_path: Path
) -> None:
    """Without a refit the narrow attention is the dense one with zeros in o. With one it is no further from the target."""
    source = pico("qwen3", num_key_value_heads=4)
    errors = {}
    for step in (0.0, None):
        out = tmp_path / str(step)
        methods = (AttentionGroups(step=step), FfnAnchored(shares=(1.0,)))
        report = streamlap.compress(source, out, ratio=0.3, methods=methods, files=(str(tokens),), survey=None)
        errors[step] = report.layers[0].errors["attention"]["attention_groups"]
    assert errors[None] <= errors[0.0]
    kept = json.loads((tmp_path / "0.0" / "streamlap_kept_channels.json").read_text())["0.self_attn.o_proj"]
    dense, narrow = (ModelStream(folder) for folder in (source, tmp_path / "0.0"))
    x_BLD = torch.randn(2, 16, 32)
    masked, small = (stream.layer(0, stream.layer_kwargs(16)[0]) for stream in (dense, narrow))
    mask_I = torch.zeros(32)
    mask_I[kept] = 1.0
    assert 0 < len(kept) < 32
    with torch.no_grad():
        masked.linear("o").weight.mul_(mask_I)
    wanted = masked.run_sublayer("attention", x_BLD)
    torch.testing.assert_close(small.run_sublayer("attention", x_BLD), wanted, rtol=1e-5, atol=1e-5)


COUNTS = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 4},
    "olmo2": {},
    "gpt_neox": {},
    "qwen3_next": {},
    "opt": {},
}


def test_numbers_of_heads_are_those_that_transformers_takes(pico: MakeModel) -> None:
    """A llama of 32 hidden states has no 6 heads, a qwen3 may. A norm over all heads, or a width that does not follow from
    their number, keeps all."""
    found = {family: group_counts(ModelStream(pico(family, **sizes))) for family, sizes in COUNTS.items()}
    assert found == {
        "llama": [4, 2, 1], "qwen3": [4, 3, 2, 1], "olmo2": [1], "gpt_neox": [4, 2, 1], "qwen3_next": [1], "opt": [1],
    }  # fmt: skip
    measured = {
        family: {name: cut.keep for name, cut in cuts_of(ModelStream(pico(family, **sizes)), "stock")[1].items()}
        for family, sizes in COUNTS.items()
    }
    assert measured == {
        "llama": {"attention": 0.5, "ffn": 0.8, LAYER: 0.0}, "qwen3": {"attention": 0.75, "ffn": 0.8, LAYER: 0.0},
        "olmo2": {"ffn": 0.8, LAYER: 0.0}, "gpt_neox": {"ffn": 0.8, LAYER: 0.0}, "qwen3_next": {"ffn": 0.8},
        "opt": {"ffn": 0.8, LAYER: 0.0},
    }  # fmt: skip


def test_no_more_heads_go_than_were_measured_or_than_the_ratio_asks(pico: MakeModel, tmp_path: Path) -> None:
    source = pico(
        "llama", num_attention_heads=8, num_key_value_heads=8, head_dim=4, hidden_size=64, intermediate_size=96
    )
    stream = ModelStream(source)
    assert group_counts(stream) == [8, 4, 2, 1]
    free = survey_file(
        source, tmp_path / "s.json", lambda _, name: {"attention": 1e-9, "ffn": 5.0, LAYER: 1e9}[name], "stock"
    )
    for ratio, heads in ((0.3, 4), (0.5, 4), (0.55, 4), (0.8, 2)):
        found = layer_parameters(stream, Recipe(ratio=ratio, shape="stock"), Survey.read(Path(free)))
        assert {row["attention"] for row in found} == {attention_parameters(stream, 0, heads)}


# --- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_stock_is_the_least_sum_of_all_choices(source: Path, tmp_path: Path, ratio: float, seed: int) -> None:
    """Against every set of layers, with each number of KV heads, at the width that follows."""
    stream, drawn = ModelStream(source), np.random.default_rng(seed)
    kls = {(i, name): drawn.lognormal(-4 if name == "ffn" else -3, 1.5) for i in range(DEPTH) for name in CUTS["stock"]}
    file = survey_file(source, tmp_path / "s.json", lambda i, name: kls[i, name], "stock")
    found = layer_parameters(stream, Recipe(ratio=ratio, shape="stock"), Survey.read(Path(file)))
    attention, ffn = (dense_parameters(stream, 0, name) for name in ("attention", "ffn"))
    channel, total = 3 * 32, int((1 - ratio) * DEPTH * (attention + ffn))

    def lost(index: int, own: int, wide: int) -> float:
        if not wide:
            return UNMENDED * kls[index, LAYER]
        return (
            kls[index, "attention"] * (attention / own - 1) ** POWER
            + kls[index, "ffn"] * (4 * (ffn / wide - 1)) ** POWER
        )

    def loss(rows: list[tuple[int, int]]) -> float:
        return sum(lost(index, own, wide) for index, (own, wide) in enumerate(rows))

    choices = []
    for own, number in itertools.product((attention, attention // 2), range(DEPTH)):
        width = min(96, (total // (DEPTH - number) - own) // channel)
        for gone in itertools.combinations(range(1, DEPTH), number) if width >= 10 else ():
            choices.append(loss([(0, 0) if i in gone else (own, width * channel) for i in range(DEPTH)]))
    assert loss([(row["attention"], row["ffn"]) for row in found]) == pytest.approx(min(choices))
    assert sum(map(sum, (row.values() for row in found))) <= total


def test_nas_loses_the_layers_and_attentions_that_are_cheap(source: Path, tmp_path: Path) -> None:
    """The first layer would be free, and stays."""

    def shares(kls: Kls) -> list[tuple[bool, bool]]:
        file = survey_file(source, tmp_path / "s.json", kls, "nas")
        found = layer_parameters(ModelStream(source), Recipe(ratio=0.4, shape="nas"), Survey.read(Path(file)))
        return [(row["attention"] > 0, row["ffn"] > 0) for row in found]

    both = (True, True)
    assert shares(one_attention) == [both, both, (False, False), (False, True)]
    assert shares(lambda i, name: 0.02 if name == "ffn" else 9.0) == [both] * DEPTH
    assert shares(lambda i, name: 0.0 if i == 0 and name != "ffn" else one_attention(i, name))[0] == both


def test_a_ratio_beyond_all_that_may_go_is_refused(source: Path, tmp_path: Path) -> None:
    for shape in ("stock", "nas"):
        survey = Survey.read(Path(survey_file(source, tmp_path / "s.json", KLS[shape], shape)))
        with pytest.raises(RecipeError, match=f"shape {shape} cannot reach ratio 0.99; wanted a lower one"):
            layer_parameters(ModelStream(source), Recipe(ratio=0.99, shape=shape), survey)


def test_a_survey_without_layers_and_heads_still_serves(source: Path, tmp_path: Path) -> None:
    """As those of earlier versions, and those of families that can lose neither."""
    file = Path(survey_file(source, tmp_path / "s.json", one_layer, "stock"))
    table = json.loads(file.read_text())
    table["layers"] = [{"ffn": layer["ffn"]} for layer in table["layers"]]
    file.write_text(json.dumps(table))
    plain, with_it = (streamlap.plan(source, ratio=0.4, shape="stock", survey=survey) for survey in (None, str(file)))
    assert [layer.layout for layer in plain.layers] == [layer.layout for layer in with_it.layers]
    table["layers"][0]["head"] = table["layers"][0]["ffn"]
    file.write_text(json.dumps(table))
    with pytest.raises(RecipeError, match="lacks a sub-layer of a layer"):
        streamlap.plan(source, ratio=0.4, shape="stock", survey=str(file))


def test_a_survey_for_the_free_shape_has_no_layers(source: Path, tmp_path: Path) -> None:
    file = survey_file(source, tmp_path / "s.json", one_layer, "free")
    with pytest.raises(RecipeError, match="lacks a sub-layer of a layer"):
        streamlap.plan(source, ratio=0.4, survey=file)


# --- what is measured --------------------------------------------------------------------------------------------------


def test_a_layer_that_goes_is_measured_as_a_model_without_it(source: Path, tokens: Path, tmp_path: Path) -> None:
    found = streamlap.survey(source, tmp_path / "s.json", files=(str(tokens),), shape="stock")
    assert [list(layer) for layer in found.layers] == [
        ["attention", "ffn"],
        *[["attention", "ffn", LAYER]] * (DEPTH - 1),
    ]
    assert {points[0].keep for layer in found.layers for points in (layer["attention"],)} == {0.5}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    whole = list(model.model.layers)
    with torch.no_grad():
        held_NL = ids(tokens)[list(held_sequences(*ids(tokens).shape))]
        p_NLV = model(held_NL, use_cache=False).logits.double().log_softmax(-1)
        for index in range(1, DEPTH):
            model.model.layers = torch.nn.ModuleList(layer for layer in whole if layer is not whole[index])
            q_NLV = model(held_NL, use_cache=False).logits.double().log_softmax(-1)
            wanted = float((p_NLV.exp() * (p_NLV - q_NLV)).sum(-1).mean())
            assert found.layers[index][LAYER][0].kl == pytest.approx(wanted, rel=1e-3)


def test_a_killed_survey_gives_the_same_bytes(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(file: Path) -> Survey:
        return streamlap.survey(source, file, files=(str(tokens),), shape="stock")

    run(tmp_path / "whole.json")
    crash_after(2, monkeypatch, lambda: run(tmp_path / "s.json"))
    streamlap.resume(tmp_path / "s.json")
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


# --- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", KLS)
def test_the_folder_is_a_model_of_fewer_layers(source: Path, tokens: Path, tmp_path: Path, shape: str) -> None:
    """Written at once or exported, loaded by transformers, streamed, looked at and verified: it is one and the same."""
    given = settings(source, tokens, tmp_path, shape)
    out, factored, exported = (tmp_path / name for name in ("out", "factored", "exported"))
    plan = streamlap.plan(source, format=shape, **given)
    report = streamlap.compress(source, out, format=shape, **given)
    streamlap.compress(source, factored, shape=shape, **given)
    streamlap.export(factored, exported, to=shape)
    assert shards(out) == shards(exported)
    assert config(out) == config(exported)
    assert sorted(report.shards) == sorted(name for name in shards(out) if name.endswith("safetensors"))
    assert len(report.shards) == DEPTH

    found = config(out)
    assert found["num_hidden_layers"] == DEPTH - 1
    if shape == "stock":
        assert (found["num_attention_heads"], found["num_key_value_heads"], found["head_dim"]) == (2, 1, 8)
    else:
        assert [block["attention"]["no_op"] for block in found["block_configs"]] == [False, False, True]
    assert plan.output_bytes == sum(len(data) for name, data in shards(out).items() if name.endswith("safetensors"))

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert len(model.model.layers) == DEPTH - 1
    assert report.parameters.total_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters.ratio_decoder == pytest.approx(0.4, abs=0.03)
    assert torch.equal(logits(out, tokens), logits(factored, tokens))
    mine = torch.nn.functional.cross_entropy(logits(out, tokens)[:, :-1].flatten(0, 1), ids(tokens)[:, 1:].flatten())
    assert streamlap.evaluate(out, tokens).nll == pytest.approx(float(mine), rel=1e-5)
    assert streamlap.evaluate(factored, tokens).nll == streamlap.evaluate(out, tokens).nll

    assert streamlap.verify(out)["ok"]
    assert [layer.place for layer in report.layers] == [0, 1, None, 2]
    errors = [layer["sites"]["mlp.down_proj"]["relative_error"] for layer in streamlap.inspect(out)["layers"]]
    down = [{edit.path: edit.error for edit in layer.edits}["mlp.down_proj"] for layer in report.layers]
    assert errors == [error for index, error in enumerate(down) if index != GONE]
    assert report.kv_cache.after == streamlap.inspect(out)["kv_cache_bytes_per_token"]["after"]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("shape", KLS)
def test_a_killed_run_gives_the_same_bytes(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, layers: int
) -> None:
    given = settings(source, tokens, tmp_path, shape)

    def run(out: Path) -> streamlap.Report:
        return streamlap.compress(source, out, format=shape, refine=1, **given)

    run(tmp_path / "whole")
    crash_after(layers, monkeypatch, lambda: run(tmp_path / "out"))
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_comes_behind_makes_up_for_a_layer_that_went(source: Path, tokens: Path, tmp_path: Path) -> None:
    """The model is nearer to the dense one than with the layer taken out of the source, and nothing else done."""

    def kls(index: int, name: str) -> float:
        return 1e-6 if (index, name) == (GONE, LAYER) else 9.0

    given = settings(source, tokens, tmp_path, "stock", kls) | {"ratio": 0.25, "multiple": 1}
    streamlap.compress(source, tmp_path / "out", format="stock", **given)
    assert config(tmp_path / "out")["intermediate_size"] == 96
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        dense = model(ids(tokens), use_cache=False).logits
        del model.model.layers[GONE]
        bare = model(ids(tokens), use_cache=False).logits
    assert (logits(tmp_path / "out", tokens) - dense).norm() < 0.9 * (bare - dense).norm()


def test_a_plan_counts_names_that_get_shorter(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """Layer 10 becomes layer 9."""
    source = pico("llama", num_hidden_layers=12)
    given = settings(source, tokens, tmp_path, "stock") | {"ratio": 0.3}
    plan = streamlap.plan(source, format="stock", **given)
    report = streamlap.compress(source, tmp_path / "out", format="stock", **given)
    assert [layer.place for layer in report.layers] == [0, 1, None, *range(2, 11)]
    assert plan.output_bytes == sum((tmp_path / "out" / name).stat().st_size for name in report.shards)


def test_a_target_is_met(source: Path, tokens: Path, tmp_path: Path) -> None:
    most = int(0.7 * sum(path.stat().st_size for path in source.glob("*.safetensors")))
    given = settings(source, tokens, tmp_path, "stock")
    del given["ratio"]
    report = streamlap.compress(source, tmp_path / "out", format="stock", target_size=most, **given)
    assert None in [layer.place for layer in report.layers]
    assert 0.9 * most <= sum((tmp_path / "out" / name).stat().st_size for name in report.shards) <= most


# --- families ----------------------------------------------------------------------------------------------------------

KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LISTED: dict[str, dict[str, Any]] = {
    "gemma2": {"layer_types": KINDS},
    "gemma3_text": {"layer_types": KINDS},
    "cohere2": {"layer_types": None, "sliding_window_pattern": 2},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gpt_neox": {},
    "granite": {},
    "opt": {},
    "glm4": {},
}
"""Family -> layers that differ; a pattern that is a number is written as a list."""


@pytest.mark.parametrize("family", LISTED)
def test_layers_keep_their_kind(pico: MakeModel, tokens: Path, tmp_path: Path, family: str) -> None:
    source = pico(family, num_hidden_layers=DEPTH, **LISTED[family])
    given = settings(source, tokens, tmp_path, "stock") | {"ratio": 0.3}
    report = streamlap.compress(source, tmp_path / "out", format="stock", **given)
    assert [layer.place for layer in report.layers] == [0, 1, None, 2]
    streamlap.compress(source, tmp_path / "factored", shape="stock", **given)
    torch.testing.assert_close(
        logits(tmp_path / "out", tokens), logits(tmp_path / "factored", tokens), rtol=1e-5, atol=1e-5
    )
    found = ModelStream(tmp_path / "out").config
    if kinds := getattr(ModelStream(source).config, "layer_types", None):
        assert found.layer_types == [kind for index, kind in enumerate(kinds) if index != GONE]
        assert config(tmp_path / "out")["layer_types"] == found.layer_types


def test_layers_of_a_hybrid_stay(pico: MakeModel) -> None:
    stream = ModelStream(pico("qwen3_5_text"))
    assert all(LAYER not in cuts for shape in ("nas", "stock") for cuts in cuts_of(stream, shape))
    gone = {role: Removed(form.shape) for role, form in stream.natives(1).items()}
    with pytest.raises(
        UnsupportedModel, match=r"some layer is removed, and a qwen3_5_text has linear_attn in some layers"
    ):
        CONFIGS["stock"](stream, [stream.natives(0), gone, stream.natives(2)])
    with pytest.raises(UnsupportedModel, match="all 3 layers are removed; wanted one that is not"):
        CONFIGS["stock"](stream, [gone] * 3)


def test_gguf_has_as_many_blocks_as_are_left(source: Path, tokens: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for shape, name in (("stock", "llama"), ("nas", "deci")):
        given = settings(source, tokens, tmp_path, shape)
        streamlap.compress(source, tmp_path / shape, format=shape, **given)
        streamlap.compress(source, tmp_path / f"{shape}-factored", shape=shape, **given)
        files = [tmp_path / f"{folder}.gguf" for folder in (shape, f"{shape}-factored")]
        for file in files:
            streamlap.export(file.with_suffix(""), file, to="gguf", type="f32")
        plain, factored = map(gguf.GGUFReader, files)
        assert plain.fields["general.architecture"].contents() == name
        assert (
            plain.fields[f"{name}.block_count"].contents()
            == factored.fields[f"{name}.block_count"].contents()
            == DEPTH - 1
        )
        pairs = zip(plain.tensors, factored.tensors, strict=True)
        assert all(one.name == other.name and np.array_equal(one.data, other.data) for one, other in pairs)
