"""Norms and multipliers behind the last linear of a sub-layer: what is fitted is what counts behind them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES
from streamlap.families.watch import norm_sizes
from streamlap.linalg.gram import Gram
from streamlap.linalg.moments import Sample
from streamlap.loader.forms import Form, LowRank, Pivoted
from streamlap.loader.linears import StoredLinear
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.fitting import Aim, low_rank_edit, map_error, output_aim, without
from streamlap.methods.anchored.groups import AttentionGroups
from streamlap.methods.base import Captured
from streamlap.pipeline.observe import SublayerStatistics

WHOLE = (AttentionGroups(), FfnAnchored(shares=(1.0,)))
KINDS = ("olmo2", "gemma2", "granite", "cohere2", "starcoder2", "opt")
"""One of each: norms behind the sub-layers, also with an offset; a multiplier; parallel sub-layers; biases and no gate."""


def layer_of(folder: Path) -> StreamLayer:
    stream = ModelStream(folder)
    return stream.layer(1, stream.layer_kwargs(16)[1])


@pytest.mark.parametrize("family", KINDS)
def test_where_nothing_is_lost_the_last_linear_is_what_is_fitted(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """On the dense stream it gives just what the sub-layer adds, and from other numbers the fit finds back to it."""
    real, seen = SublayerStatistics.middles, list[tuple[float, float, float]]()

    def middles(statistics: SublayerStatistics, edits: Sequence[Edit]) -> Captured:
        layer, role = statistics.layer, statistics.layer.family.sublayers[statistics.sublayer].writes
        whole, weight_OI, dense_OI = real(statistics, ()), layer.linear(role).weight, layer.acting(role).clone()
        before_OI = weight_OI.clone()
        weight_OI += 0.1 * torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(0))
        spoiled = map_error(layer.acting(role), whole.held)
        weight_OI.copy_(output_aim(layer, role, None, whole, 1.0).value.t_OI)
        found = map_error(layer.acting(role), whole.held)
        weight_OI.copy_(before_OI)
        seen.append((map_error(dense_OI, whole.held), found, spoiled))
        return real(statistics, edits)

    monkeypatch.setattr(SublayerStatistics, "middles", middles)
    streamlap.survey(pico(family), tmp_path / "survey.json", files=(str(tokens),), length=16)
    assert len(seen) == 6
    for dense, found, spoiled in seen:
        assert dense < 1e-10
        assert found < 2e-3 * spoiled


@pytest.mark.parametrize("form", [LowRank((32, 48), rank=9), Pivoted((32, 48), rank=9)], ids=["factors", "pivoted"])
def test_a_rank_is_cut_where_it_costs_least_behind_the_gain(pico: MakeModel, form: Form) -> None:
    layer, generator = layer_of(pico("olmo2")), torch.Generator().manual_seed(0)
    t_OI, x_TI = (torch.randn(rows, 48, generator=generator, dtype=torch.float64) for rows in (32, 400))
    gain_O = torch.logspace(-1, 1, 32, dtype=torch.float64)
    square_II = x_TI.T @ x_TI
    gram = Gram(square_II, square_II.diagonal().clone())
    lost = []
    for gain in (gain_O, None):
        edit, _ = low_rank_edit(layer, Aim(role="down", t_OI=t_OI, bias_O=None, gram=gram, gain_O=gain), form)
        assert isinstance(edit.module, StoredLinear)
        away_OI = (edit.module.merged(torch.float64) - t_OI) * gain_O[:, None]
        lost.append(float(torch.trace(away_OI @ square_II @ away_OI.T)))
        if gain is not None:
            acting_OI = t_OI * gain_O[:, None]
            least = torch.linalg.eigvalsh(acting_OI @ square_II @ acting_OI.T)[: 32 - 9].sum()
            assert lost[0] == pytest.approx(float(least), rel=1e-3)
    assert lost[0] < 0.8 * lost[1]


def test_a_row_of_hardly_any_gain_stays(pico: MakeModel) -> None:
    torch.testing.assert_close(without(torch.tensor([2.0, -0.5, 1.0])), torch.tensor([0.5, -2.0, 1.0]))
    assert float(without(torch.tensor([1e-6, 0.0, 1.0, 1.0])).abs()[:2].max()) < 2e-3
    assert without(torch.zeros(3)).tolist() == [0, 0, 0]


def silenced(folder: Path, out: Path, channels: slice) -> Path:
    """A copy of a checkpoint whose norms behind the sub-layers have a gain of zero in these channels."""
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    none = -1 if "gemma" in (out / "config.json").read_text() else 0  # there it is added to 1
    for name in weights:
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            weights[name][channels] = none
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(params=["olmo2", "gemma2", "granite"])
def silent(request: pytest.FixtureRequest, pico: MakeModel, tmp_path: Path) -> Path:
    """A model whose sub-layers all add nothing."""
    if request.param == "granite":
        return pico("granite", residual_multiplier=0.0)
    return silenced(pico(request.param), tmp_path / "silent", slice(None))


SILENT: dict[str, dict[str, Any]] = {"best": {}, "stock": {"format": "stock"}, "survey": {"survey": "auto"}}


@pytest.mark.parametrize("settings", SILENT)
def test_a_layer_that_adds_nothing_is_compressed(silent: Path, tokens: Path, tmp_path: Path, settings: str) -> None:
    report = streamlap.compress(silent, tmp_path / "out", ratio=0.3, files=(str(tokens),), **SILENT[settings])
    assert report.parameters.ratio_decoder >= 0.3
    assert streamlap.verify(tmp_path / "out")["ok"]


def test_the_last_linear_of_what_adds_nothing_stays_and_is_cut_as_if_all_were_heard(silent: Path) -> None:
    layer, generator = layer_of(silent), torch.Generator().manual_seed(0)
    w_OI = layer.linear("down").weight
    x_TI, target_TO = (torch.randn(90, width, generator=generator) for width in reversed(w_OI.shape))
    gram, sample = Gram.of((x_TI.T @ x_TI).double()), Sample(10)
    sample.update(x_TI[:10], target_TO[:10])
    for step in (None, 1.0):
        seen = Captured(gram=gram, cross_IA=(x_TI.T @ target_TO).double(), held=sample)
        aim = output_aim(layer, "down", None, seen, step).value
        assert torch.equal(aim.t_OI.float(), w_OI)
        edit, _ = low_rank_edit(layer, aim, Pivoted((32, w_OI.shape[1]), rank=9))
        assert isinstance(edit.module, StoredLinear)
        assert 0 < edit.error < 1
        assert bool(edit.module.merged().any(dim=1).all()), "each row is made of what was kept"


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_a_norm_of_no_gain_divides_by_no_tiny_number(pico: MakeModel, tmp_path: Path, family: str) -> None:
    layer = layer_of(silenced(pico(family), tmp_path / "silent", slice(None)))
    for size_BL in norm_sizes(layer, torch.randn(2, 16, 32)).values():
        assert bool((size_BL == 1).all())


@pytest.mark.parametrize("storage", ["pivoted", "factors"])
def test_a_rank_above_the_rows_that_are_heard_is_cut(
    pico: MakeModel, tokens: Path, tmp_path: Path, storage: str
) -> None:
    """Four rows are. The basis of the others, behind their gain, is zero."""
    source = silenced(pico("olmo2"), tmp_path / "source", slice(28))
    methods = (
        AttentionAnchored(output="low_rank", storage=storage), FfnAnchored(output="low_rank", storage=storage),
    )  # fmt: skip
    streamlap.compress(source, tmp_path / "out", ratio=0.3, methods=methods, files=(str(tokens),))
    assert streamlap.verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize("family", ["olmo2", "stablelm", "opt"])
def test_where_no_head_can_go_the_ffn_takes_the_whole_cut(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str
) -> None:
    report = streamlap.compress(pico(family), tmp_path / "out", methods=WHOLE, ratio=0.2, files=(str(tokens),))
    assert 0.2 - 1e-9 <= report.parameters.ratio_decoder < 0.24
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    q, down = (
        model.get_submodule(f"{FAMILIES[family].layers}.0.{FAMILIES[family].path(role)}") for role in ("q", "down")
    )
    assert q.weight.shape == (32, 32)
    assert down.weight.shape[1] < 40


@pytest.mark.parametrize("family", ["gemma2", "cohere2", "starcoder2"])
def test_where_heads_can_go_the_rest_runs(pico: MakeModel, tokens: Path, tmp_path: Path, family: str) -> None:
    streamlap.compress(pico(family), tmp_path / "out", methods=WHOLE, ratio=0.45, files=(str(tokens),))
    model, ids_NL = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        torch.from_numpy(np.load(tokens).astype(int)),
    )
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    with torch.no_grad():
        loss = float(model(input_ids=ids_NL, labels=ids_NL).loss)
    assert streamlap.evaluate(tmp_path / "out", tokens).nll == pytest.approx(loss, rel=1e-5)
