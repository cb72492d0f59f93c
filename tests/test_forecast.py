"""What is foretold from headers is what a run then writes, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file

import streamlap
from streamlap import forecast as foretelling
from streamlap.errors import UnsupportedModel
from streamlap.families import FAMILIES
from streamlap.families.stream import ModelStream
from streamlap.forecast import compression_workload, forecast
from streamlap.methods import METHODS
from streamlap.recipe import Recipe

SHAPE_NL = (12, 16)


def foretold(source: Path, **settings: object) -> list[foretelling.LayerForecast]:
    recipe = Recipe().override(**settings)
    return forecast(ModelStream(source, dtype=recipe.dtype), recipe, SHAPE_NL)


def shards(out: Path) -> list[Path]:
    """Those of the layers."""
    return sorted(out.glob("model-*.safetensors"))[1:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stored", "ratio"), [(torch.bfloat16, 0.2), (torch.float32, 0.5)])
def test_every_shard_has_the_size_that_was_foretold(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, stored: torch.dtype, ratio: float
) -> None:
    source = pico(family, dtype=stored)
    layers = foretold(source, ratio=ratio)
    streamlap.compress(source, tmp_path / "out", ratio=ratio, files=(str(tokens),))
    assert [layer.output_bytes for layer in layers] == [path.stat().st_size for path in shards(tmp_path / "out")]
    for layer, path in zip(layers, shards(tmp_path / "out"), strict=True):
        tensors = load_file(path)
        edited = {
            name: tensor.nbytes for name, tensor in tensors.items() if any(f".{site}." in name for site in layer.layout)
        }
        assert layer.edits_bytes == sum(edited.values())
        assert layer.edits_bytes + layer.copied_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_names_of_ten_layers_and_more_are_longer(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """The header of layer 10 takes more bytes than that of layer 9."""
    source = pico("llama", num_hidden_layers=11)
    layers = foretold(source)
    streamlap.compress(source, tmp_path / "out", files=(str(tokens),))
    assert [layer.output_bytes for layer in layers] == [path.stat().st_size for path in shards(tmp_path / "out")]
    assert layers[10].output_bytes > layers[9].output_bytes == layers[0].output_bytes


def test_layers_of_equal_shapes_are_worked_out_once(pico: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    worked_out: list[int] = []
    real = foretelling.forecast_layer

    def note(*args: object) -> object:
        worked_out.append(args[2])  # type: ignore[arg-type]
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(foretelling, "forecast_layer", note)
    layers = foretold(pico("llama", num_hidden_layers=11))
    assert worked_out == [0, 10], "the last has a longer name and goes through the model once"
    assert len(layers) == 11


def test_operations_are_those_of_two_forwards_and_of_the_last_layer_one(pico: MakeModel) -> None:
    """Two a parameter and token, and causal attention, which is half of all pairs: 2 x L/2 x 2 x heads a token."""
    layers = foretold(pico("llama"), methods=())
    parameters = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    forward = 12 * 16 * (2 * parameters + 2 * 16 * 32)
    assert [layer.flops for layer in layers] == [2 * forward, 2 * forward, forward]
    assert [layer.flops64 for layer in layers] == [0, 0, 0]


def test_only_what_is_factored_is_decomposed(pico: MakeModel) -> None:
    """k and v are 16 rows high; at a ratio of a fifth v and o stay as they are."""
    assert sorted(foretold(pico("llama"), ratio=0.5)[0].decompositions) == [16, 16, 32, 32]
    assert sorted(foretold(pico("llama"), ratio=0.2)[0].decompositions) == [16, 32]
    assert foretold(pico("llama"), methods=(METHODS["ffn_lorap"](),))[0].decompositions == ()


def test_the_workload_is_that_of_the_largest_layer(pico: MakeModel) -> None:
    source = pico("llama", dtype=torch.bfloat16)
    stream, layers = ModelStream(source, dtype="bfloat16"), foretold(source, ratio=0.5)
    work = compression_workload(stream, layers, SHAPE_NL)
    assert (work.sequences, work.length) == SHAPE_NL
    assert work.edits == max(layer.edits_bytes for layer in layers) > 0
    assert work.solve >= work.edits
    assert (work.inner, work.inner_after) == (48, 32)
    assert work.copied == 48 * 32 * 2, "no piece is larger than the largest tensor"


def test_a_compressed_model_is_refused(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),))
    with pytest.raises(UnsupportedModel, match="already compressed"):
        foretold(tmp_path / "out")
