"""The gain of the final norm: its fit against a search, what noise does to it, and what a compression writes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from crashes import dies_at
from safetensors.torch import load_file
from transformers import AutoModel

import streamlap
from streamlap.errors import RecipeError
from streamlap.families.shell import AfterLayers
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES
from streamlap.methods.final.gain import LEAST, MOST, STEPS, FinalGain, GainStep
from streamlap.pipeline import divergence as measuring
from streamlap.pipeline import final_gain, layers
from streamlap.pipeline.divergence import last_rows
from streamlap.pipeline.streams import Streams
from streamlap.recipe import Recipe
from streamlap.store.journal import STATE_FOLDER, Journal


def fitted(dense_TV: torch.Tensor, z_TV: torch.Tensor) -> float:
    gain = 1.0
    for _ in range(STEPS):
        step = GainStep(gain=gain)
        for dense, z in zip(dense_TV.split(7), z_TV.split(7), strict=True):
            step.update(dense, z)
        gain = step.next
    return gain


def divergence(dense_TV: torch.Tensor, z_TV: torch.Tensor, gain: float) -> float:
    p_TV, q_TV = dense_TV.double().log_softmax(-1), (gain * z_TV.double()).log_softmax(-1)
    return float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())


def test_the_gain_is_the_best_of_all() -> None:
    torch.manual_seed(0)
    dense_TV = 3 * torch.randn(60, 50)
    z_TV = dense_TV + 2 * torch.randn(60, 50)
    gain = fitted(dense_TV, z_TV)
    tried = [divergence(dense_TV, z_TV, 0.5 + 0.001 * place) for place in range(1001)]
    assert 0.5 + 0.001 * tried.index(min(tried)) == pytest.approx(gain, abs=1e-3)
    assert gain < 0.8, "noise makes predictions too sure"


def test_predictions_that_are_right_stay() -> None:
    torch.manual_seed(0)
    dense_TV = 3 * torch.randn(20, 50)
    assert fitted(dense_TV, dense_TV + 5) == pytest.approx(1.0, abs=1e-5), "a shift of all logits is nothing"
    assert fitted(dense_TV, 0.8 * dense_TV) == pytest.approx(1.25, abs=1e-3)


def test_threads_do_not_move_a_bit_of_the_gain_or_the_divergence(threads: Callable[[int], None]) -> None:
    dense_TV = 4 * torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))
    z_TV, found = dense_TV + 0.3 * torch.randn(40, 5000, generator=torch.Generator().manual_seed(1)), set()
    for count in (1, 2, 3, 4):
        threads(count)
        step = GainStep(gain=1.0)
        step.update(dense_TV, z_TV)
        found.add((step.slope, step.curvature, measuring.divergence(dense_TV, z_TV)))
    assert len(found) == 1


@pytest.mark.parametrize(("z", "wanted"), [(0.0, 1.0), (float("nan"), 1.0), (1e-3, MOST), (1e3, LEAST)])
def test_the_gain_stays_in_bounds(z: float, wanted: float) -> None:
    torch.manual_seed(0)
    dense_TV = torch.randn(20, 50)
    assert fitted(dense_TV, z * dense_TV) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_scales_the_logits(pico: MakeModel, family: str) -> None:
    """Of every family: else a gain of the norm would be no temperature. Where logits are bent it is none, and not taken."""
    assert ModelStream(pico(family)).caps_logits == (family == "gemma2")
    stream = ModelStream(pico(family, **{"final_logit_softcapping": None} if family == "gemma2" else {}))
    after = AfterLayers(stream.model, stream.family, stream.device)
    stored = {
        name: stream.source.read(stream.head_name if name == f"{stream.family.head}.weight" else name)
        for name in after.weights
    }
    x_TD = torch.randn(9, stream.width)
    after.load(stored)
    before_TV = after.logits(x_TD)
    norm = f"{stream.family.norm}."
    offset = stream.family.norm_offset
    scaled = {name: (tensor + offset) * 0.75 - offset for name, tensor in stored.items() if name.startswith(norm)}
    after.load(stored | scaled)
    torch.testing.assert_close(after.logits(x_TD), 0.75 * before_TV, rtol=1e-4, atol=1e-5)


def test_a_compression_writes_it(source: Path, tokens: Path, tmp_path: Path) -> None:
    made = {}
    for name, methods in (("with", None), ("without", Recipe().without_final().methods)):
        changes = {} if methods is None else {"methods": methods}
        made[name] = streamlap.compress(
            source, tmp_path / name, Recipe(ratio=0.5).override(**changes), files=(str(tokens),)
        )
    assert made["without"].final_gain == 1.0
    gain = made["with"].final_gain
    assert LEAST <= gain <= MOST
    assert abs(gain - 1) > 0.01
    outer, *others = made["with"].shards
    tensors = {name: load_file(tmp_path / name / outer) for name in made}
    for name, tensor in tensors["without"].items():
        scaled = (gain * tensor.float()).to(tensor.dtype) if name == "model.norm.weight" else tensor
        assert torch.equal(tensors["with"][name], scaled), name
    for shard in others:
        assert (tmp_path / "with" / shard).read_bytes() == (tmp_path / "without" / shard).read_bytes()
    assert made["with"].to_json()["final_gain"] == gain


def test_it_brings_predictions_closer_to_the_dense_ones(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tokens that it was fitted to, the divergence at the gain is below that at 1, and least around it."""
    seen = []
    real = final_gain.best_gain

    def watched(stream: ModelStream, streams: Streams) -> float:
        gain, head = real(stream, streams), stream.head()
        assert streams.dense is not None
        held = streams.windows.held
        pairs = last_rows(stream, streams.dense, streams.compressed, held)
        rows = [(head(dense), head(x)) for dense, x in pairs]
        seen.extend(sum(divergence(*row, at) for row in rows) for at in (gain, 1.0, gain - 0.01, gain + 0.01))
        return gain

    monkeypatch.setattr(final_gain, "best_gain", watched)
    report = streamlap.compress(source, tmp_path / "out", ratio=0.3, files=(str(tokens),))
    assert LEAST < report.final_gain < MOST
    assert seen[0] == min(seen)


def test_killed_behind_the_last_layer_it_comes_out_the_same(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = streamlap.compress(source, tmp_path / "whole", ratio=0.5, files=(str(tokens),))
    with monkeypatch.context() as patch:
        patch.setattr(final_gain, "best_gain", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streamlap.compress(source, tmp_path / "out", ratio=0.5, files=(str(tokens),))
    monkeypatch.setattr(layers, "compress_layer", lambda *_: 1 / 0)  # all layers are done
    again = streamlap.compress(source, tmp_path / "out", ratio=0.5, files=(str(tokens),))
    assert again.shards == whole.shards


def test_killed_while_it_tidies_up_it_comes_out_the_same(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states are gone then, and the gain could not be found again."""
    whole = streamlap.compress(source, tmp_path / "whole", ratio=0.5, files=(str(tokens),))
    out = tmp_path / "out"
    compress = functools.partial(streamlap.compress, source, out, ratio=0.5, files=(str(tokens),))
    dies_at(Journal, "remove", monkeypatch, compress)
    assert not list(out.rglob("*.bin"))
    assert compress().shards == whole.shards
    assert not (out / STATE_FOLDER).exists()


def test_it_wants_the_dense_stream() -> None:
    with pytest.raises(RecipeError, match="final_gain, which is fitted to the dense model's stream"):
        Recipe.from_dict({"methods": [{"method": "ffn_lorap"}, {"method": "final_gain"}]})


def test_one_is_enough() -> None:
    recipe = Recipe(methods=(*Recipe().methods, FinalGain()), preset="custom")
    with pytest.raises(RecipeError, match="2 rows of final_gain"):
        recipe.check_methods(FAMILIES["llama"])


def test_a_decoder_without_a_head_goes_without(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(pico("mistral")).save_pretrained(tmp_path / "source")
    report = streamlap.compress(tmp_path / "source", tmp_path / "out", ratio=0.5, files=(str(tokens),))
    assert report.final_gain == 1.0
    assert {"method": "final_gain"} not in report.recipe["methods"]
