"""Layers rebuilt half by half beside the dense model: what the halves are, what they may store, and what they become."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CONTEXT, PICO, VOCABULARY, MakeModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import streamlap
from streamlap.errors import RecipeError
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES
from streamlap.linalg.moments import Moments, Sample, take_means
from streamlap.methods import fitting
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.base import Built, HalfView, Layout, Seen
from streamlap.output.inspect import site_parameters
from streamlap.planning.allocate import dense_parameters, half_budgets
from streamlap.planning.forecast import dense_shapes, edited_shape, plan_halves, plan_layers
from streamlap.recipe import Recipe, method_name

HEADS = {"grouped": {"num_key_value_heads": 2}, "each its own": {"num_key_value_heads": 4}}
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 10


def logits(folder: Path, tokens: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.from_numpy(np.load(tokens).astype(np.int64))).logits
    return found


# --- halves --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_halves_are_the_layer_and_the_middle_is_what_its_last_linear_reads(
    pico: MakeModel, family: str, heads: str
) -> None:
    stream = ModelStream(pico(family, **HEADS[heads]))
    layer = stream.layer(1, stream.layer_kwargs(16)[1])
    x_BLD = torch.randn(3, 16, 32)
    between_BLD = layer.run_half("attention", x_BLD)
    assert torch.equal(layer.run_half("ffn", between_BLD), layer(x_BLD))
    for half, given_BLD in (("attention", x_BLD), ("ffn", between_BLD)):
        last = layer.linear(layer.family.last(half))
        with torch.no_grad():
            made_BLD = given_BLD + last(layer.middle(half, given_BLD))
        assert torch.equal(made_BLD, layer.run_half(half, given_BLD))
        assert layer.linear(layer.family.last(half)) is last


# --- budgets ---------------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8, "head_dim": 32}
WIDE = {"hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32, "head_dim": 128}
SHAPES: dict[str, tuple[dict[str, int], float]] = {
    "small": (SMALL | {"num_key_value_heads": 8}, 0.002),
    "small, grouped": (SMALL | {"num_key_value_heads": 2}, 0.002),
    "llama-2-7b": (WIDE | {"intermediate_size": 11008, "num_key_value_heads": 32}, 0.001),
    "llama-3-8b": (WIDE | {"intermediate_size": 14336, "num_key_value_heads": 8}, 0.001),
}


@pytest.fixture
def headers(tmp_path: Path) -> Callable[[dict[str, int]], ModelStream]:
    """A checkpoint of some shape of which only the header is there: its weights are a hole in a file."""

    def make(shape: dict[str, int]) -> ModelStream:
        config = AutoConfig.for_model("llama", **(PICO | {"tie_word_embeddings": False} | shape))
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config).state_dict()
        end, table = 0, {}
        for name, tensor in state.items():
            begin, end = end, end + 2 * tensor.numel()
            table[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        raw = json.dumps(table).encode()
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
        config.save_pretrained(tmp_path)
        return ModelStream(tmp_path)

    return make


def stored(stream: ModelStream, half: str, layout: Layout) -> int:
    """Parameters of a half that has become `layout`."""
    shapes, itemsize = dense_shapes(stream, 0), stream.storage_itemsize(0)
    rows = {path: layout.get(path, {}) for path in stream.family.half_linears(half)}
    return sum(
        site_parameters(edited_shape(shapes[path], row), row, stream.has_bias(0, path), itemsize)
        for path, row in rows.items()
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.4, 0.5])
def test_the_ratio_that_was_asked_for_is_reached_and_no_budget_exceeded(
    headers: Callable[[dict[str, int]], ModelStream], shape: str, ratio: float
) -> None:
    """Whichever methods are chosen in the end. What the first half leaves over, the second may use."""
    sizes, tolerance = SHAPES[shape]
    stream, recipe = headers(sizes), Recipe(ratio=ratio)
    budgets = {half: budget.parameters for half, budget in half_budgets(stream, ratio, 0).items()}
    dense = sum(dense_parameters(stream, 0, half) for half in stream.family.halves)
    kept = {
        half: [stored(stream, half, layout) for _, layout in candidates.values()]
        for half, candidates in plan_halves(stream, recipe, 0).items()
    }
    assert max(kept["attention"]) <= budgets["attention"]
    for first, second in itertools.product(*kept.values()):
        assert first + second <= sum(budgets.values())
        assert 1 - (first + second) / dense == pytest.approx(ratio, abs=tolerance)
    assert len(plan_layers(stream, recipe)) == stream.depth


# --- maps of low rank -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "qwen2"])
def lowly(request: pytest.FixtureRequest, pico: MakeModel, tmp_path: Path) -> Path:
    """A model whose linears have rank 10 or less, one KV head for each query head."""
    folder = tmp_path / "lowly"
    shutil.copytree(pico(request.param, num_key_value_heads=4), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, w_OI in tensors.items():
        if any(f"{site}.weight" in name for site in SITES):
            u_OO, s_K, vh_II = torch.linalg.svd(w_OI, full_matrices=False)
            tensors[name] = ((u_OO * s_K)[:, :RANK] @ vh_II[:RANK]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("storage", ["pivoted", "factors"])
@pytest.mark.parametrize("step", [None, 0, 1])
def test_what_has_a_rank_that_fits_is_kept_to_rounding(
    lowly: Path, tokens: Path, tmp_path: Path, storage: str, step: float | None
) -> None:
    """In every storage: rows that are folded from v into o, and from gate and up into down, are where they were."""
    methods = (
        AttentionAnchored(output="low_rank", storage=storage, step=step, input_step=step),
        FfnAnchored(share=0, output="low_rank", storage=storage, step=step, input_step=step),
    )
    report = streamlap.compress(lowly, tmp_path / "out", ratio=0.2, methods=methods, files=(str(tokens),))
    rows = {edit.path.rpartition(".")[2]: edit.row for edit in report.layers[0].edits}
    if storage == "pivoted":
        assert {name for name, row in rows.items() if "groups" in row} == {"v_proj", "gate_proj", "up_proj"}
        assert rows["v_proj"]["groups"] == 4
    else:
        assert all("rank" in row for row in rows.values())
    assert min(row.get("rank", row.get("pivots", 0)) for row in rows.values()) >= RANK
    torch.testing.assert_close(logits(tmp_path / "out", tokens), logits(lowly, tokens), rtol=1e-3, atol=1e-3)


def test_almost_nothing_removed_is_almost_the_same_model(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """And the nearer, the less goes."""
    source, nll = pico("llama"), streamlap.evaluate(pico("llama"), tokens).nll
    lost = []
    for ratio in (0.002, 0.5):
        streamlap.compress(source, tmp_path / str(ratio), ratio=ratio, files=(str(tokens),))
        lost.append(abs(streamlap.evaluate(tmp_path / str(ratio), tokens).nll - nll))
    assert lost[0] < 0.02 < lost[1]


# --- what is chosen ---------------------------------------------------------------------------------------------------------


def test_of_several_methods_the_one_that_errs_least_is_applied(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    report = streamlap.compress(pico("llama"), tmp_path / "out", ratio=0.4, files=(str(tokens),))
    recipe = Recipe.from_dict(report.recipe)
    stream, chosen = ModelStream(pico("llama")), set()
    for layer in report.layers:
        planned = plan_halves(stream, recipe, layer.index)
        for half, errors in layer.errors.items():
            assert list(errors) == list(planned[half])
            assert all(0 < error < math.inf for error in errors.values())
            best = min(errors, key=lambda name: errors[name])
            chosen.add(best)
            made = {edit.path: edit.row for edit in layer.edits if edit.path in stream.family.half_linears(half)}
            assert {path: row for path, row in made.items() if row} == planned[half][best][1]
    assert len(chosen) > 2, "the same method won everywhere, so nothing was chosen"
    saved = json.loads((tmp_path / "out" / "streamlap_report.json").read_text())
    assert [layer["errors"] for layer in saved["layers"]] == [layer.errors for layer in report.layers]


def test_of_settings_that_can_be_compared_only_the_best_is_built(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that differ in more than the share are of another kin, which has a comparison of its own."""
    methods = (
        AttentionAnchored(),
        *(FfnAnchored(share=share, storage=storage) for storage in ("pivoted", "factors") for share in (0.25, 0.5, 1)),
    )
    build, built = FfnAnchored.build, list[FfnAnchored]()

    def count(method: FfnAnchored, view: HalfView, layout: Layout) -> Built:
        built.append(method)
        return build(method, view, layout)

    monkeypatch.setattr(FfnAnchored, "build", count)
    report = streamlap.compress(pico("llama"), tmp_path / "out", ratio=0.4, methods=methods, files=(str(tokens),))
    assert [method.storage for method in built] == ["pivoted", "factors"] * len(report.layers)
    for layer in report.layers:
        assert len(layer.errors["ffn"]) == 6
        assert all(0 < error < math.inf for error in layer.errors["ffn"].values())


def test_a_comparison_tells_about_what_building_gives(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """Each setting built alone, beside what the comparison said of it."""
    told = compared(pico("llama"), tokens, tmp_path / "all", (0.25, 0.5, 0.75, 1))
    made = [compared(pico("llama"), tokens, tmp_path / str(share), (share,))[0] for share in (0.25, 0.5, 0.75, 1)]
    assert told == pytest.approx(made, rel=0.15)


def compared(model: Path, tokens: Path, out: Path, shares: Sequence[float]) -> list[float]:
    """Errors of the first layer's FFN."""
    methods = AttentionAnchored(), *(FfnAnchored(share=share) for share in shares)
    report = streamlap.compress(model, out, ratio=0.4, methods=methods, files=(str(tokens),))
    return list(report.layers[0].errors["ffn"].values())


def test_every_knob_is_saved_and_loads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe().to_yaml())
    assert Recipe.from_yaml(path) == Recipe()
    for row, method in zip(yaml.safe_load(path.read_text())["methods"], Recipe().methods, strict=True):
        assert row == {"method": method_name(method), **vars(method)}
        assert {"step", "input_step", "storage"} <= row.keys()


# --- what is written --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_is_a_model_like_any_other(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, heads: str
) -> None:
    out = tmp_path / "out"
    report = streamlap.compress(pico(family, **HEADS[heads]), out, ratio=0.3, files=(str(tokens),))
    assert streamlap.verify(out) == {"ok": True, "faults": []}
    assert streamlap.inspect(out)["parameters"] == report.parameters.to_json()
    assert 0.3 <= report.parameters.ratio_decoder < 0.34
    assert not [path.name for path in out.rglob("*") if path.suffix in (".tmp", ".bin") or path.name == ".streamlap"]
    ids_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        loss = float(model(input_ids=ids_NL, labels=ids_NL).loss)
        grown = model.generate(ids_NL[:1, :4], max_new_tokens=5, do_sample=False)
    assert streamlap.evaluate(out, tokens, dtype="float32").nll == pytest.approx(loss, rel=1e-5)
    assert grown.shape[1] > 4


def test_biases_are_those_of_the_dense_model(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """Where v gives its rows in another order, inside a head, its biases go with them."""
    source = pico("qwen2", num_key_value_heads=4)
    streamlap.compress(source, tmp_path / "out", ratio=0.3, files=(str(tokens),))
    before, after = ModelStream(source).source, ModelStream(tmp_path / "out").source
    for index, name in itertools.product(range(3), "qkv"):
        path = f"model.layers.{index}.self_attn.{name}_proj.bias"
        heads = [torch.unflatten(side.read(path), 0, (4, -1)) for side in (before, after)]
        if name == "v":
            heads = [bias.sort(dim=1).values for bias in heads]
        assert torch.equal(*heads), path


AFFINE = (AttentionAnchored(bias=True), *(FfnAnchored(share=share, bias=True) for share in (0.25, 0.75)))


@pytest.mark.parametrize("own", [False, True])
def test_a_bias_is_fitted_with_the_last_linear_of_a_half(
    pico: MakeModel, tokens: Path, tmp_path: Path, own: bool
) -> None:
    """It counts as parameters, and where the dense linear has its own that one moves."""
    flags = {"attention_bias": own, "mlp_bias": own}
    source, out = pico("llama", **flags), tmp_path / "out"
    report = streamlap.compress(source, out, ratio=0.3, methods=AFFINE, files=(str(tokens),))
    assert report.parameters.ratio_decoder >= 0.3
    assert streamlap.inspect(out)["parameters"] == report.parameters.to_json()
    rows = {edit.path.rpartition(".")[2]: edit.row for edit in report.layers[0].edits}
    assert {name for name, row in rows.items() if "bias" in row} == (set() if own else {"o_proj", "down_proj"})
    read = ModelStream(out).source.read
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        bias = read(f"model.layers.0.{path}.bias")
        before = ModelStream(source).source.read(f"model.layers.0.{path}.bias") if own else torch.zeros_like(bias)
        assert not torch.equal(bias, before), path
    assert streamlap.verify(out) == {"ok": True, "faults": []}
    streamlap.export_dense(out, tmp_path / "dense")
    torch.testing.assert_close(logits(tmp_path / "dense", tokens), logits(out, tokens), rtol=1e-4, atol=1e-4)


def test_a_bias_makes_up_for_a_mean_that_is_missing() -> None:
    """Tokens that are met by W x + c: W is found in spite of c, and c in the bias; a bias of its own counts towards it."""
    generator = torch.Generator().manual_seed(0)
    x_TI, w_OI, c_O = (
        torch.randn(500, 8, generator=generator) + 2,
        torch.randn(5, 8, generator=generator),
        torch.randn(5, generator=generator),
    )
    weight_T1 = torch.rand(500, 1, generator=generator) + 0.5
    moments, held = Moments(), Sample(500)
    rows = torch.cat([x_TI * weight_T1, weight_T1], dim=1), (x_TI @ w_OI.T + c_O) * weight_T1
    moments.update(*rows)
    held.update(*rows)
    means = take_means(moments)
    seen = Seen(
        gram_II=moments.gram_II[:-1, :-1], cross_AI=moments.cross_AI[:, :-1], held=held.less(*means), means=means
    )
    for own in (None, torch.ones(5)):
        dense = nn.Linear(8, 5, bias=own is not None).requires_grad_(False)
        dense.weight.data.copy_(w_OI + 0.1 * torch.randn(5, 8, generator=generator))
        if own is not None:
            dense.bias.data.copy_(own)
        layer: Any = SimpleNamespace(linear=lambda _, dense=dense: dense, storage_dtype=lambda _: torch.float32)
        aim = fitting.output_aim(layer, "o", None, seen, None)
        edit = fitting.with_bias(layer, fitting.dense_edit(layer, aim, (5, 8)), seen)
        assert edit.added_bias == (own is None)
        assert own is None or torch.equal(dense.bias, own), "the dense layer stays as it was"
        assert isinstance(edit.module, nn.Linear)
        torch.testing.assert_close(edit.module.weight, w_OI, atol=2e-3, rtol=0)
        torch.testing.assert_close(edit.module.bias, c_O if own is None else c_O + own, atol=1e-2, rtol=0)
        assert fitting.held_error(edit, seen) < 1e-5


def test_a_bias_is_asked_for_by_yes_or_no() -> None:
    with pytest.raises(RecipeError, match="bias is 1; wanted true or false"):
        Recipe.from_dict({"methods": [{"method": "ffn_anchored", "bias": 1}]})


@pytest.mark.parametrize("shape", [(1, CONTEXT), (1, 8), (2, 8)])
def test_a_single_window_is_fitted_to_and_held_out(pico: MakeModel, tmp_path: Path, shape: tuple[int, int]) -> None:
    """Fewer tokens than a linear has inputs, too."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, VOCABULARY, shape))
    report = streamlap.compress(pico("llama"), tmp_path / "out", ratio=0.4, files=(str(ids),))
    assert streamlap.verify(tmp_path / "out")["ok"]
    assert report.calibration_tokens == shape


def test_a_half_may_have_another_number_of_methods(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    table: dict[str, Any] = {
        "methods": [{"method": "ffn_anchored", "share": 1}, {"method": "attention_anchored", "storage": "factors"}]
    }
    recipe = Recipe.from_dict(table)
    report = streamlap.compress(pico("llama"), tmp_path / "out", recipe, ratio=0.4, files=(str(tokens),))
    kinds = {edit.path.rpartition(".")[2]: set(edit.row) for edit in report.layers[2].edits}
    assert kinds["q_proj"] == kinds["o_proj"] == {"rank"}
    assert kinds["gate_proj"] == kinds["up_proj"] == {"out"}
    assert kinds["down_proj"] == {"in"}
