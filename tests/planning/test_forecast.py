"""What is foretold from headers is what a run then writes, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file
from torch import nn

import streamlap
from streamlap.errors import UnsupportedModel
from streamlap.families.layer import Edit
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES
from streamlap.linalg.budget import index_parameters, low_rank_parameters, pivot_rank, pivoted_parameters
from streamlap.loader.modules import PaddedLinear, PivotedLinear, SlicedLinear
from streamlap.methods import METHODS, Method
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.output.inspect import count_parameters, site_parameters
from streamlap.planning import forecast as foretelling
from streamlap.planning.forecast import compression_workload, forecast, planned_tensors
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
    layers = foretold(source, ratio=ratio, preset="lorap")
    streamlap.compress(source, tmp_path / "out", ratio=ratio, preset="lorap", files=(str(tokens),))
    assert [layer.output_bytes for layer in layers] == [path.stat().st_size for path in shards(tmp_path / "out")]
    for layer, path in zip(layers, shards(tmp_path / "out"), strict=True):
        tensors = load_file(path)
        edited = {
            name: tensor.nbytes for name, tensor in tensors.items() if any(f".{site}." in name for site in layer.layout)
        }
        assert layer.edits_bytes == sum(edited.values())
        assert layer.edits_bytes + layer.copied_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_shard_is_larger_than_was_foretold_where_methods_compete(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str
) -> None:
    """Which of them rebuilds a half is known only later; where one alone tries, the size is the one foretold."""
    source, out = pico(family, dtype=torch.bfloat16), tmp_path / "out"
    rows = zip(foretold(source, ratio=0.5), compressed_sizes(source, out, tokens), strict=True)
    assert all(0.9 * layer.output_bytes < size <= layer.output_bytes for layer, size in rows)
    alone = {"methods": (METHODS["attention_anchored"](), METHODS["ffn_anchored"](share=0.5))}  # type: ignore[call-arg]
    sizes = compressed_sizes(source, tmp_path / "alone", tokens, **alone)
    assert [layer.output_bytes for layer in foretold(source, ratio=0.5, **alone)] == sizes


def compressed_sizes(source: Path, out: Path, tokens: Path, **settings: object) -> list[int]:
    streamlap.compress(source, out, ratio=0.5, files=(str(tokens),), **settings)
    return [path.stat().st_size for path in shards(out)]


def test_names_of_ten_layers_and_more_are_longer(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """The header of layer 10 takes more bytes than that of layer 9."""
    source = pico("llama", num_hidden_layers=11)
    layers = foretold(source, preset="lorap")
    streamlap.compress(source, tmp_path / "out", preset="lorap", files=(str(tokens),))
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
    assert sorted(foretold(pico("llama"), ratio=0.5, preset="lorap")[0].decompositions) == [16, 16, 32, 32]
    assert sorted(foretold(pico("llama"), ratio=0.2, preset="lorap")[0].decompositions) == [16, 32]
    assert foretold(pico("llama"), methods=(METHODS["ffn_lorap"](),))[0].decompositions == ()


def test_of_settings_that_are_compared_one_is_built(pico: MakeModel) -> None:
    """Time is that of the costliest, memory somewhat more; settings of another kin come on top."""
    shares = (0.25, 0.5, 1.0)
    single = [foretold(pico("llama"), methods=recipe_of(share))[1] for share in shares]
    (_, compared, _) = foretold(pico("llama"), methods=recipe_of(*shares))
    assert compared.flops64 == max(layer.flops64 for layer in single)
    assert compared.flops == pytest.approx(max(layer.flops for layer in single), rel=1e-3)
    assert compared.decompositions == max((layer.decompositions for layer in single), key=len)
    assert max(layer.solve_bytes for layer in single) < compared.solve_bytes
    other = FfnAnchored(share=0.5, storage="factors")
    (_, both, _) = foretold(pico("llama"), methods=(*recipe_of(*shares), other))
    assert both.flops64 > compared.flops64


def recipe_of(*shares: float) -> tuple[Method, ...]:
    return AttentionAnchored(), *(FfnAnchored(share=share) for share in shares)


def test_the_workload_is_that_of_the_largest_layer(pico: MakeModel) -> None:
    source = pico("llama", dtype=torch.bfloat16)
    stream, layers = ModelStream(source, dtype="bfloat16"), foretold(source, ratio=0.5, preset="lorap")
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


def edits_of_every_kind(dtype: torch.dtype) -> list[Edit]:
    """Of a pico llama's layer."""

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=dtype)

    ordered = PivotedLinear.from_parts(weight(6, 32), weight(26, 6), None, torch.randperm(32))
    folded = PivotedLinear.from_parts(weight(8, 32), weight(40, 8), None, groups=2)
    padded = PaddedLinear(nn.Linear(32, 6, bias=False, dtype=dtype), heads=2, full=8)
    sliced = SlicedLinear(nn.Linear(12, 32, dtype=dtype), heads=4, full=8)
    return [
        Edit(path="self_attn.q_proj", module=ordered, of=(32, 32), error=0.0),
        Edit(path="self_attn.v_proj", module=padded, of=(16, 32), error=0.0),
        Edit(path="self_attn.o_proj", module=sliced, of=(32, 32), error=0.0, added_bias=True),
        Edit(path="mlp.gate_proj", module=folded, of=(48, 32), error=0.0),
        Edit(path="mlp.down_proj", module=nn.Linear(48, 32, dtype=dtype), of=(32, 48), error=0.0, added_bias=True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_every_kind_is_written_as_it_was_foretold(pico: MakeModel, dtype: torch.dtype) -> None:
    stream, edits = ModelStream(pico("llama", dtype=dtype), dtype="float32"), edits_of_every_kind(dtype)
    layout = {edit.path: edit.row for edit in edits}
    assert layout["self_attn.q_proj"] == {"pivots": 6}
    assert layout["self_attn.o_proj"] == {"in_heads": 4, "head_dim": 3, "bias": 1}
    assert layout["mlp.gate_proj"] == {"pivots": 8, "groups": 2}
    assert layout["mlp.down_proj"] == {"bias": 1}
    layer = stream.layer(1, stream.layer_kwargs(8)[1])
    layer.apply(edits)
    layer(torch.randn(1, 8, 32))
    copied, made = planned_tensors(stream, 1, layout)
    written = layer.tensors()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in written.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in {**copied, **made}.items()
    }
    rows = {f"model.layers.1.{path}": row for path, row in layout.items()}
    before, stored = count_parameters(stream, {}), sum(t.nbytes for t in written.values()) // dtype.itemsize
    dense = sum(info.numel for info in stream.layer_tensors(1).values())
    assert before.total_after - count_parameters(stream, rows).total_after == dense - stored


def test_a_bias_that_no_one_announced_is_a_fault(pico: MakeModel) -> None:
    stream = ModelStream(pico("llama"))
    edit = Edit(path="mlp.up_proj", module=nn.Linear(32, 48), of=(48, 32), error=0.0)
    with pytest.raises(AssertionError, match=r"mlp\.up_proj: added_bias is wrong"):
        stream.layer(0, stream.layer_kwargs(8)[0]).apply([edit])


@pytest.mark.parametrize("shape", [(32, 32), (16, 40), (40, 16)])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 1.0])
def test_the_pivot_rank_is_the_largest_that_fits(shape: tuple[int, int], keep: float) -> None:
    rank, budget = pivot_rank(*shape, keep), keep * shape[0] * shape[1]
    assert pivoted_parameters(*shape, rank) <= budget
    assert rank == min(shape) or pivoted_parameters(*shape, rank + 1) > budget
    assert pivoted_parameters(*shape, rank) == low_rank_parameters(*shape, rank) - rank * rank
    assert rank == min(shape) or low_rank_parameters(*shape, rank) > pivoted_parameters(*shape, rank)


def test_an_index_counts_as_its_bytes() -> None:
    assert (index_parameters(100, 4), index_parameters(100, 2)) == (100, 200)
    assert site_parameters((40, 32), {"pivots": 8}, False, 2) == 8 * (40 + 32 - 8) + 80
    assert site_parameters((40, 32), {"pivots": 8, "bias": 1}, False, 2) == 8 * (40 + 32 - 8) + 80 + 40
    assert site_parameters((40, 32), {"pivots": 8, "groups": 4}, True, 2) == 8 * (40 + 32 - 8) + 40
