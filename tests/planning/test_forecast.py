"""What is foretold from headers is what a run then writes, to the byte."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

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
from streamlap.loader.forms import Dense, Form, LowRank, Pivoted
from streamlap.loader.linears import LowRankLinear, PivotedLinear
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.costs import input_sum_bytes
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.groups import AttentionGroups
from streamlap.methods.anchored.ranks import RankSite
from streamlap.methods.base import Method
from streamlap.methods.lorap.ffn import FfnLorap
from streamlap.output.inspect import count_parameters
from streamlap.pipeline import layers
from streamlap.pipeline.layer_in_hand import LayerEdits, LayerInHand
from streamlap.planning import forecast as foretelling
from streamlap.planning.decide import decide
from streamlap.planning.forecast import LayerPlan, compression_workload, forecast_layers
from streamlap.planning.layouts import planned_tensors
from streamlap.recipe import Recipe

SHAPE_NL = (12, 16)


def foretold(source: Path, **settings: object) -> tuple[LayerPlan, ...]:
    recipe = Recipe().override(**settings)
    stream = ModelStream(source, dtype=recipe.dtype)
    return forecast_layers(stream, recipe, decide(stream, recipe).candidates, SHAPE_NL, 1)


def anchored_with(*shares: float) -> tuple[Method, ...]:
    return AttentionAnchored(), FfnAnchored(shares=shares)


def shards(out: Path) -> list[Path]:
    """Those of the layers."""
    return sorted(out.glob("model-*.safetensors"))[1:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("stored", "ratio"), [(torch.bfloat16, 0.5)])
def test_every_shard_has_the_size_that_was_foretold(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, stored: torch.dtype, ratio: float
) -> None:
    source = pico(family, dtype=stored)
    layers = foretold(source, ratio=ratio, preset="lorap")
    streamlap.compress(source, tmp_path / "out", ratio=ratio, preset="lorap", files=(str(tokens),))
    assert [layer.output_bytes for layer in layers] == [path.stat().st_size for path in shards(tmp_path / "out")]
    for layer, path in zip(layers, shards(tmp_path / "out"), strict=True):
        tensors, edited_paths = load_file(path), [FAMILIES[family].path(role) for role in layer.layout]
        edited = {
            name: tensor.nbytes for name, tensor in tensors.items() if any(f".{site}." in name for site in edited_paths)
        }
        assert layer.edits_bytes == sum(edited.values())
        assert layer.edits_bytes + layer.copied_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_shard_is_larger_than_was_foretold_where_methods_compete(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str
) -> None:
    """Which of them rebuilds a sub-layer is known only later; where one alone tries, the size is the one foretold."""
    source, out = pico(family, dtype=torch.bfloat16), tmp_path / "out"
    rows = zip(foretold(source, ratio=0.5), compressed_sizes(source, out, tokens), strict=True)
    assert all(0.9 * layer.output_bytes < size <= layer.output_bytes for layer, size in rows)
    alone = {"methods": (AttentionAnchored(), FfnAnchored(shares=(0.5,)))}
    sizes = compressed_sizes(source, tmp_path / "alone", tokens, **alone)
    assert [layer.output_bytes for layer in foretold(source, ratio=0.5, **alone)] == sizes


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"methods": anchored_with(0.5)}, {"k", "v"}),
        ({"methods": (AttentionAnchored(input_step=0.5), FfnAnchored(shares=(0.5,)))}, set()),
        ({"shape": "nas", "methods": (AttentionGroups(), FfnAnchored(shares=(1.0,)))}, {"q", "k", "v"}),
    ],
)
def test_edits_beside_the_dense_model_are_those_foretold(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any],
    kept: set[str],
) -> None:  # fmt: skip
    """A linear that is fitted or moved is made anew, dense or not; one that is neither is copied."""
    real, seen = layers.write_shard, []

    def note(job: layers.Job, hand: LayerInHand, made: LayerEdits) -> Future[str]:
        assert set(hand.layer.family.roles) - {edit.role for edit in made.edits} == kept
        tensors = [tensor for edit in made.edits for tensor in edit.module.state_dict().values()]
        seen.append(sum(tensor.nbytes for tensor in tensors))
        return real(job, hand, made)

    monkeypatch.setattr(layers, "write_shard", note)
    source, settings = pico("llama", num_key_value_heads=1), {"ratio": 0.3, "survey": None} | settings
    streamlap.compress(source, tmp_path / "out", files=(str(tokens),), **settings)
    planned = foretold(source, **settings)
    assert [layer.edits_bytes for layer in planned] == seen
    stored = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in shards(tmp_path / "out")]
    assert [layer.edits_bytes + layer.copied_bytes for layer in planned] == stored


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
    assert worked_out == [0, 1, 10], (
        "the first sums its own inputs; the last has a longer name and leaves nothing to a next"
    )
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
    assert foretold(pico("llama"), methods=(FfnLorap(),))[0].decompositions == ()


def test_of_settings_that_are_compared_one_is_built(pico: MakeModel) -> None:
    """Time is that of the costliest, memory somewhat more; another method comes on top."""
    shares = (0.25, 0.5, 1.0)
    single = [foretold(pico("llama"), methods=anchored_with(share))[1] for share in shares]
    (_, compared, _) = foretold(pico("llama"), methods=anchored_with(*shares))
    assert compared.flops64 == max(layer.flops64 for layer in single)
    assert compared.flops == pytest.approx(max(layer.flops for layer in single), rel=2e-2)
    assert compared.decompositions == max((layer.decompositions for layer in single), key=len)
    assert max(layer.solve_bytes for layer in single) <= compared.solve_bytes
    other = FfnAnchored(shares=(0.5,), storage="factors")
    (_, both, _) = foretold(pico("llama"), methods=(*anchored_with(*shares), other))
    assert both.flops64 > compared.flops64


def test_the_workload_is_that_of_the_largest_layer(pico: MakeModel) -> None:
    source = pico("llama", dtype=torch.bfloat16)
    stream, layers = ModelStream(source, dtype="bfloat16"), foretold(source, ratio=0.5, preset="lorap")
    work = compression_workload(stream, layers, SHAPE_NL)
    assert (work.sequences, work.length) == SHAPE_NL
    assert work.edits == max(layer.edits_bytes for layer in layers) > 0
    assert work.solve >= work.edits
    assert (work.inner, work.inner_after) == (48, 32)
    assert work.copied == 48 * 32 * 2, "no piece is larger than the largest tensor"


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_what_sums_the_inputs_of_the_next_layer_is_counted(pico: MakeModel, family: str) -> None:
    """Also where nothing lies between sub-layers."""
    source = pico(family)
    works = [
        compression_workload(ModelStream(source), foretold(source, preset=preset), SHAPE_NL)
        for preset in ("best", "lorap")
    ]
    assert [work.inputs for work in works] == [input_sum_bytes(32), 0]


def test_a_compressed_model_is_refused(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),))
    with pytest.raises(UnsupportedModel, match="already compressed"):
        foretold(tmp_path / "out")


def edits_of_every_kind(dtype: torch.dtype) -> list[Edit]:
    """Of a pico llama's layer, which has no biases."""

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=dtype)

    def edit(role: str, module: nn.Module, native: tuple[int, int]) -> Edit:
        return Edit(role=role, module=module, native=Dense(native), error=0.0)

    ordered = PivotedLinear.from_parts(weight(6, 32), weight(26, 6), None, torch.randperm(32))
    factors = LowRankLinear.from_factors(weight(16, 5), weight(5, 32), None)
    mended = LowRankLinear.from_factors(weight(32, 7), weight(7, 32), torch.randn(32, dtype=dtype))
    folded = PivotedLinear.from_parts(weight(8, 32), weight(32, 8), None, groups=2)
    return [
        edit("q", ordered, (32, 32)),
        edit("v", factors, (16, 32)),
        edit("o", mended, (32, 32)),
        edit("gate", folded, (48, 32)),
        edit("up", nn.Linear(32, 40, bias=False, dtype=dtype), (48, 32)),
        edit("down", nn.Linear(40, 32, dtype=dtype), (32, 48)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_every_kind_is_written_as_it_was_foretold(pico: MakeModel, dtype: torch.dtype) -> None:
    stream, edits = ModelStream(pico("llama", dtype=dtype), dtype="float32"), edits_of_every_kind(dtype)
    layout = {edit.role: edit.form for edit in edits}
    rows = {stream.linear_name(1, edit.role): edit.form.row(edit.native) for edit in edits}
    assert {name.removeprefix("model.layers.1."): row for name, row in rows.items()} == {
        "self_attn.q_proj": {"pivots": 6},
        "self_attn.v_proj": {"rank": 5},
        "self_attn.o_proj": {"rank": 7, "bias": 1},
        "mlp.gate_proj": {"pivots": 8, "groups": 2, "out": 40},
        "mlp.up_proj": {"out": 40},
        "mlp.down_proj": {"in": 40, "bias": 1},
    }
    layer = stream.layer(1, stream.layer_kwargs(8)[1])
    layer.apply(edits)
    layer(torch.randn(1, 8, 32))
    copied, made = planned_tensors(stream, 1, layout)
    written = layer.tensors()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in written.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in {**copied, **made}.items()
    }
    before, stored = count_parameters(stream, {}), sum(t.nbytes for t in written.values()) // dtype.itemsize
    dense = sum(info.numel for info in stream.layer_tensors(1).values())
    assert before.total_after - count_parameters(stream, rows).total_after == dense - stored


def test_a_bias_that_gets_lost_is_a_fault(pico: MakeModel) -> None:
    """No row could say so. One that comes on top the row says by itself."""
    stream = ModelStream(pico("qwen2"))
    layer, native = stream.layer(0, stream.layer_kwargs(8)[0]), stream.native(0, "q")
    assert native.bias
    edit = Edit(role="q", module=nn.Linear(32, 32, bias=False), native=native, error=0.0)
    with pytest.raises(AssertionError, match=r"self_attn\.q_proj: its bias is lost"):
        layer.apply([edit])


@pytest.mark.parametrize("shape", [(32, 32), (16, 40), (40, 16)])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_rank_is_the_largest_that_fits(shape: tuple[int, int], keep: float, groups: int) -> None:
    site, budget = RankSite(name="q", shape=shape, itemsize=4, groups=groups), keep * shape[0] * shape[1]
    rank = site.rank_within(budget)
    assert (rank is None) == (keep == 1.0)
    if rank is not None:
        assert site.at(rank) == Pivoted(shape, rank=rank, groups=groups)
        assert rank % groups == 0
        assert site.stored(rank) <= budget < site.stored(rank + groups)
        assert site.stored(rank) == LowRank(shape, rank=rank).parameters(4) - rank * rank


def test_an_index_counts_as_its_bytes() -> None:
    ordered: Form = Pivoted((40, 32), rank=8)
    assert (ordered.parameters(4), ordered.parameters(2)) == (8 * (40 + 32 - 8) + 40, 8 * (40 + 32 - 8) + 80)
    assert Pivoted((40, 32), bias=True, rank=8).parameters(2) == 8 * (40 + 32 - 8) + 80 + 40
    assert Pivoted((40, 32), bias=True, rank=8, groups=4).parameters(2) == 8 * (40 + 32 - 8) + 40
