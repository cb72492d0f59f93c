"""Families some layers of which have something else in place of attention: it stays as it is, and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, make_pico
from crashes import crash_after
from outputs import contents
from picos import HYBRID
from torch import nn
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import RecipeError, UnsupportedModel
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.trained.loraprune import LoraPrune
from streamlap.methods.trained.pclora import PcLora
from streamlap.planning.layouts import budget_of

HYBRIDS = ("qwen3_next", "qwen3_5_text")
LINEAR = 32 * (2 * 16 + 32) + 2 * 32 * 32 + 2 * 32 * 4
"""Parameters of the linears of a gated delta net: q, k and v; z and the output; two numbers for each of four heads."""
FULL, FFN = 32 * (64 + 2 * 16 + 32), 3 * 32 * 48
DECODER = 2 * LINEAR + FULL + 3 * FFN
QUICK: dict[str, Any] = {"epochs": 1, "rank": 4, "every": 2}
RUNS: dict[str, dict[str, Any]] = {
    "best": {"preset": "best"},
    "lorap": {"preset": "lorap"},
    "loraprune": {"methods": (LoraPrune(**QUICK),)},
    "loraprune by the whole model": {"methods": (LoraPrune(**QUICK, importance="model"),)},
    "pclora": {"methods": (PcLora(epochs=2),)},
    "best, trained": {"preset": "best", "refine": 1},
    "stock": {"format": "stock", "multiple": 1},
    "a survey": {"preset": "best", "survey": "auto"},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_roles_go_by_the_layer_and_all_linears_count(pico: MakeModel, family: str) -> None:
    stream = ModelStream(pico(family))
    assert [len(stream.natives(index)) for index in range(3)] == [3, 7, 3]
    linears = [module for module in stream.model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert sum(weight.numel() for linear in linears for weight in linear.parameters()) == DECODER
    table = streamlap.inspect(pico(family))
    assert [len(layer["sites"]) for layer in table["layers"]] == [3, 7, 3]
    assert table["parameters"]["decoder_before"] == table["parameters"]["decoder_after"] == DECODER


@pytest.mark.parametrize("run", RUNS)
def test_the_rest_makes_up_for_what_stays(pico: MakeModel, tokens: Path, tmp_path: Path, run: str) -> None:
    """The share that was asked for is of all linears; what has no role is copied bit for bit."""
    source, out = pico("qwen3_5_text", dtype=torch.bfloat16), tmp_path / "out"
    report = streamlap.compress(source, out, ratio=0.2, files=(str(tokens),), **RUNS[run])
    assert report.parameters.decoder_before == DECODER
    assert 0.19 < report.parameters.ratio_decoder < 0.3
    found = streamlap.inspect(out)["parameters"]
    assert found["total_after"] == report.parameters.total_after
    assert run == "stock" or found == report.parameters.to_json()
    assert streamlap.verify(out)["ok"]
    before, after = ModelStream(source).source, ModelStream(out).source
    for name in before.names():
        if "linear_attn" in name:
            assert torch.equal(before.read(name), after.read(name)) or run == "best, trained"
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids_NL = torch.arange(48).view(3, 16)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids_NL).logits).all()
        assert model.generate(ids_NL[:1, :4], max_new_tokens=3, do_sample=False).shape[1] > 4


def test_a_target_is_met_and_what_cannot_be_is_refused(pico: MakeModel, tokens: Path) -> None:
    source, files = pico("qwen3_5_text"), (str(tokens),)
    whole = streamlap.inspect(source)["parameters"]["total_before"]
    plan = streamlap.plan(source, target_params=whole - DECODER // 4, preset="lorap", files=files)
    assert plan.ratio == pytest.approx(0.25, abs=0.05)
    with pytest.raises(RecipeError, match=r"ratio is 0.9, and 3\d\.\d% of the linears .*linear_attn.*below 0\.6"):
        streamlap.plan(source, ratio=0.9, files=files)


def test_gates_keep_the_order_of_what_they_multiply(pico: MakeModel) -> None:
    """q writes a gate for each number that v brings, so that v cannot give its rows in another order."""
    for family, groups in (("qwen3_5_text", None), ("qwen3", 2)):
        stream = ModelStream(pico(family))
        (layout,) = AttentionAnchored().layouts(stream.natives(1), budget_of(stream, 1, 0.5, FULL // 3)).values()
        assert getattr(layout["v"], "groups") == groups, family  # noqa: B009


def test_the_first_layer_of_each_kind_is_checked(
    pico: MakeModel, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(StreamLayer, "check_sublayers", lambda self, *_: seen.append(self.prefix))
    ModelStream(pico("qwen3_5_text")).check_sublayers(torch.arange(16)[None], writes=True)
    assert seen == ["model.layers.0", "model.layers.1"]


def test_a_layer_with_experts_is_refused(tmp_path: Path) -> None:
    experts = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 2}
    folder = make_pico(tmp_path / "model", "qwen3_next", **HYBRID, mlp_only_layers=[0, 2], num_experts=4, **experts)
    with pytest.raises(
        UnsupportedModel, match=r"layer 1 of qwen3_next has a mixture of experts \(mlp.experts\); wanted"
    ):
        ModelStream(folder)


@pytest.mark.parametrize("done", [1, 2])
def test_a_run_that_dies_goes_on_to_the_same_bytes(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    settings = {"ratio": 0.2, "files": (str(tokens),)}
    streamlap.compress(pico("qwen3_5_text"), tmp_path / "whole", **settings)
    crash_after(done, monkeypatch, lambda: streamlap.compress(pico("qwen3_5_text"), tmp_path / "out", **settings))
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("to", ["dense", "nas"])
def test_a_result_is_exported_as_dense_and_not_as_nas(pico: MakeModel, tokens: Path, tmp_path: Path, to: str) -> None:
    streamlap.compress(pico("qwen3_5_text"), tmp_path / "out", ratio=0.2, files=(str(tokens),))
    if to == "nas":
        with pytest.raises(UnsupportedModel, match="the format nas is for"):
            streamlap.export(tmp_path / "out", tmp_path / "export", to=to)
        return
    streamlap.export(tmp_path / "out", tmp_path / "export", to=to)
    found, wanted = (streamlap.evaluate(tmp_path / name, tokens).nll for name in ("export", "out"))
    assert found == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(UnsupportedModel, match=r"a qwen3_5_text with layers that differ .* is not written as GGUF"):
        streamlap.export(tmp_path / "export", tmp_path / "x.gguf", to="gguf")
