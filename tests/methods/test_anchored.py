"""Layers rebuilt sub-layer by sub-layer beside the dense model: what these are, what they may store, and what they become."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import MakeModel
from picos import CONTEXT, PICO, VOCABULARY
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import streamlap
from streamlap.errors import RecipeError
from streamlap.families.layer import Edit
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES
from streamlap.linalg.gram import Gram
from streamlap.loader.forms import Dense, LowRank, Pivoted, read_row
from streamlap.loader.linears import LowRankLinear, PivotedLinear
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored, _channels
from streamlap.methods.anchored.fitting import Aim, low_rank_edit
from streamlap.methods.base import Captured, Layout, Solved
from streamlap.pipeline.observe import SublayerStatistics
from streamlap.planning.decide import decide
from streamlap.planning.layouts import Candidates, dense_parameters, layer_candidates, uniform_parameters
from streamlap.recipe import Recipe, method_name

HEADS = {"grouped": {"num_key_value_heads": 2}, "each its own": {"num_key_value_heads": 4}}
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 10


def logits(folder: Path, tokens: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.from_numpy(np.load(tokens).astype(np.int64))).logits
    return found


# --- sub-layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_sublayers_are_the_layer_and_the_middle_is_what_its_last_linear_reads(
    pico: MakeModel, family: str, heads: str
) -> None:
    stream = ModelStream(pico(family, **HEADS[heads]))
    layer = stream.layer(1, stream.layer_kwargs(16)[1])
    x_BLD = torch.randn(3, 16, 32)
    between_BLD = x_BLD if layer.parallel else layer.run_sublayer("attention", x_BLD)
    assert layer.parallel or torch.equal(layer.run_sublayer("ffn", between_BLD), layer(x_BLD))
    for name, given_BLD in (("attention", x_BLD), ("ffn", between_BLD)):
        role = layer.family.sublayers[name].writes
        last = layer.linear(role)
        with torch.no_grad():
            made_BLD = given_BLD + layer.added(name, last(layer.sublayer_middle(name, given_BLD)))
        assert torch.equal(made_BLD, layer.run_sublayer(name, given_BLD))
        assert layer.linear(role) is last


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


def stored(stream: ModelStream, sublayer: str, layout: Layout) -> int:
    """Parameters of a sub-layer that has become `layout`."""
    natives, itemsize = stream.natives(0), stream.storage_itemsize(0)
    roles = stream.family.sublayers[sublayer].roles
    return sum(layout.get(role, natives[role]).parameters(itemsize) for role in roles)


def layouts_by_name(candidates: Candidates, sublayer: str) -> dict[str, Layout]:
    """What a sub-layer may become, by the names that reports give."""
    return {
        f"{found.name} {variant}".strip(): layout
        for found in candidates[sublayer]
        for variant, layout in found.layouts.items()
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.4, 0.5])
def test_the_ratio_that_was_asked_for_is_reached_and_no_budget_exceeded(
    headers: Callable[[dict[str, int]], ModelStream], shape: str, ratio: float
) -> None:
    """Whatever is chosen in the end. What the first sub-layer leaves over, the second may use."""
    sizes, tolerance = SHAPES[shape]
    stream, recipe = headers(sizes), Recipe(ratio=ratio)
    budgets = uniform_parameters(stream, 0, ratio)
    dense = sum(dense_parameters(stream, 0, name) for name in stream.family.sublayers)
    candidates = layer_candidates(stream, recipe, 0, budgets)
    kept = {
        name: [stored(stream, name, layout) for layout in layouts_by_name(candidates, name).values()]
        for name in stream.family.sublayers
    }
    assert [len(sizes) for sizes in kept.values()] == [1, 4]
    assert max(kept["attention"]) <= budgets["attention"]
    for first, second in itertools.product(*kept.values()):
        assert first + second <= sum(budgets.values())
        assert 1 - (first + second) / dense == pytest.approx(ratio, abs=tolerance)
    assert len(decide(stream, recipe).candidates) == stream.depth


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
        FfnAnchored(shares=(0,), output="low_rank", storage=storage, step=step, input_step=step),
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


def test_of_several_layouts_the_one_that_errs_least_is_applied(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    report = streamlap.compress(pico("llama"), tmp_path / "out", ratio=0.4, files=(str(tokens),))
    stream, chosen = ModelStream(pico("llama")), set()
    candidates, family = decide(stream, Recipe.from_dict(report.recipe)).candidates, stream.family
    for layer in report.layers:
        for name, errors in layer.errors.items():
            layouts = layouts_by_name(candidates[layer.index], name)
            assert list(errors) == list(layouts)
            assert all(0 < error < math.inf for error in errors.values())
            best = min(errors, key=lambda name: errors[name])
            chosen.add(best)
            planned = {
                family.path(role): form.row(stream.native(layer.index, role)) for role, form in layouts[best].items()
            }
            paths = [family.path(role) for role in family.sublayers[name].roles]
            assert {edit.path: edit.row for edit in layer.edits if edit.path in paths and edit.row} == planned
    assert len(chosen) > 2, "the same layout won everywhere, so nothing was chosen"
    saved = json.loads((tmp_path / "out" / "streamlap_report.json").read_text())
    assert [layer["errors"] for layer in saved["layers"]] == [layer.errors for layer in report.layers]


def test_of_layouts_that_can_be_compared_only_the_best_is_built(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that differs in more than the shares has a comparison of its own."""
    methods = (
        AttentionAnchored(),
        *(FfnAnchored(shares=(0.25, 0.5, 1), storage=name) for name in ("pivoted", "factors")),
    )
    build, built = FfnAnchored._build, list[FfnAnchored]()

    def count(method: FfnAnchored, *args: Any) -> Solved:
        built.append(method)
        return build(method, *args)

    monkeypatch.setattr(FfnAnchored, "_build", count)
    report = streamlap.compress(pico("llama"), tmp_path / "out", ratio=0.4, methods=methods, files=(str(tokens),))
    assert [method.storage for method in built] == ["pivoted", "factors"] * len(report.layers)
    for layer in report.layers:
        assert len(layer.errors["ffn"]) == 6
        assert all(0 < error < math.inf for error in layer.errors["ffn"].values())


def test_a_comparison_tells_about_what_building_gives(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """Each share built alone, beside what the comparison said of it."""
    told = compared(pico("llama"), tokens, tmp_path / "all", (0.25, 0.5, 0.75, 1))
    made = [compared(pico("llama"), tokens, tmp_path / str(share), (share,))[0] for share in (0.25, 0.5, 0.75, 1)]
    assert told == pytest.approx(made, rel=0.15)


def compared(model: Path, tokens: Path, out: Path, shares: Sequence[float]) -> list[float]:
    """Errors of the first layer's FFN."""
    methods = AttentionAnchored(), FfnAnchored(shares=tuple(shares))
    report = streamlap.compress(model, out, ratio=0.4, methods=methods, files=(str(tokens),), redraw=False)
    return list(report.layers[0].errors["ffn"].values())


def test_every_knob_is_saved_and_loads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe().to_yaml())
    assert Recipe.from_yaml(path) == Recipe()
    for row, method in zip(yaml.safe_load(path.read_text())["methods"], Recipe().methods, strict=True):
        knobs = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(method).items()}
        assert row == {"method": method_name(method), **knobs}
        assert {"step", "input_step", "storage"} <= row.keys() or row == {"method": "final_gain"}


# --- what is written --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "heads"), [("qwen2", "each its own"), *((family, "grouped") for family in FAMILIES)]
)
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


@pytest.mark.parametrize("shape", [(1, CONTEXT), (1, 8), (2, 8)])
def test_a_single_window_is_fitted_to_and_held_out(pico: MakeModel, tmp_path: Path, shape: tuple[int, int]) -> None:
    """Fewer tokens than a linear has inputs, too."""
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, VOCABULARY, shape))
    report = streamlap.compress(pico("llama"), tmp_path / "out", ratio=0.4, files=(str(ids),))
    assert streamlap.verify(tmp_path / "out")["ok"]
    assert report.calibration_tokens == shape


def test_methods_come_in_any_order(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    table: dict[str, Any] = {
        "methods": [{"method": "ffn_anchored", "shares": [1]}, {"method": "attention_anchored", "storage": "factors"}]
    }
    recipe = Recipe.from_dict(table)
    report = streamlap.compress(pico("llama"), tmp_path / "out", recipe, ratio=0.4, files=(str(tokens),))
    kinds = {edit.path.rpartition(".")[2]: set(edit.row) for edit in report.layers[2].edits}
    assert kinds["q_proj"] == kinds["o_proj"] == {"rank"}
    assert kinds["gate_proj"] == kinds["up_proj"] == {"out"}
    assert kinds["down_proj"] == {"in"}


# --- heads of too few rows -------------------------------------------------------------------------------------------------


def metric_error(w_OI: torch.Tensor, made_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    missed_OI = w_OI - made_OI
    return float((missed_OI @ gram_II * missed_OI).sum() / (w_OI @ gram_II * w_OI).sum())


def dead_heads(shape: tuple[int, int], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """v whose first rows are zero, and a Gram of its inputs, both in float64."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(400, shape[1], generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, shape[1])
    w_OI[:rows] = 0
    return w_OI, x_TI.T @ x_TI


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("dead", [0, 1, 2, 4])
def test_heads_of_too_few_rows_keep_what_is_reported(pico: MakeModel, dead: int, rank: int) -> None:
    stream = ModelStream(pico("llama"))
    layer, asked = stream.layer(0, stream.layer_kwargs(16)[0]), Pivoted((64, 64), rank=rank, groups=8)
    w_OI, gram_II = dead_heads((64, 64), 8 * dead)
    edit, order_O = low_rank_edit(layer, Aim(role="v", t_OI=w_OI, bias_O=None, gram=Gram.of(gram_II)), asked)
    assert isinstance(edit.module, PivotedLinear)
    made_OI = edit.module.merged(torch.float64)
    made_OI = made_OI if order_O is None else made_OI[order_O.argsort()]
    assert metric_error(w_OI, made_OI, gram_II) == pytest.approx(edit.error, rel=1e-4, abs=1e-9)
    assert edit.form.parameters(4) <= asked.parameters(4)
    if dead:
        assert edit.form == Pivoted((64, 64), rank=edit.form.rank)
        assert edit.form.rank >= rank - 2
        assert f"self_attn.v_proj: a head has too few independent rows, so that rank {edit.form.rank}" in edit.notes[-1]
    else:
        assert edit.form == asked
        assert not edit.notes


def test_where_an_order_leaves_too_little_there_are_two_factors(pico: MakeModel) -> None:
    stream = ModelStream(pico("llama", dtype=torch.bfloat16))
    layer, asked = stream.layer(0, stream.layer_kwargs(16)[0]), Pivoted((64, 16), rank=2, groups=2)
    w_OI, gram_II = dead_heads((64, 16), 32)
    edit, order_O = low_rank_edit(layer, Aim(role="v", t_OI=w_OI, bias_O=None, gram=Gram.of(gram_II)), asked)
    assert edit.form == LowRank((64, 16), rank=1)
    assert order_O is None
    assert isinstance(edit.module, LowRankLinear)
    assert metric_error(w_OI, edit.module.merged(torch.float64), gram_II) == pytest.approx(edit.error, rel=1e-2)


def test_a_model_with_dead_value_heads_is_what_its_plan_says_and_no_more(
    pico: MakeModel, tokens: Path, tmp_path: Path
) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    source = tmp_path / "source"
    shutil.copytree(pico("llama", **shape), source)
    weights = load_file(source / "model.safetensors")
    for name in weights:
        if "v_proj" in name:
            weights[name][:32] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    settings: dict[str, Any] = {"ratio": 0.3, "files": (str(tokens),)}
    plan = streamlap.plan(source, **settings)
    report = streamlap.compress(source, tmp_path / "out", **settings)
    itemsize = ModelStream(source).storage_itemsize(0)
    for planned, layer in zip(plan.layers, report.layers, strict=True):
        (row,) = (edit.row for edit in layer.edits if edit.path.endswith("v_proj"))
        form, asked = read_row("v", row, Dense((64, 64))), planned.layout["v"]
        assert asked == Pivoted((64, 64), rank=asked.rank, groups=4)
        assert form == Pivoted((64, 64), rank=form.rank)
        assert form.parameters(itemsize) <= asked.parameters(itemsize)
        assert any("too few independent rows" in note for note in layer.numerics)
    assert report.parameters.ratio_decoder >= 0.3
    assert streamlap.verify(tmp_path / "out")["ok"]
    assert logits(tmp_path / "out", tokens).isfinite().all()


def test_an_ffn_that_is_left_less_than_nothing_holds_no_channel() -> None:
    with pytest.raises(RecipeError, match="-31 parameters hold no channel of 64; lower the ratio"):
        _channels(-31, 48, 64, 0, 0.25)


# --- memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["pivoted", "factors"])
def test_what_an_ffn_read_is_gone_before_its_last_linear_is_fitted(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    """The Gram of its input, which the plan counts no longer by then."""
    read, still = list[weakref.ref[Gram]](), list[bool]()
    gram_of, middles = SublayerStatistics.input_gram, SublayerStatistics.middles

    def input_gram(self: SublayerStatistics) -> Gram:
        gram = gram_of(self)
        read.append(weakref.ref(gram))
        return gram

    def last(self: SublayerStatistics, edits: Sequence[Edit]) -> Captured:
        if self.sublayer == "ffn":
            still.append(read[-1]() is not None)
        return middles(self, edits)

    monkeypatch.setattr(SublayerStatistics, "input_gram", input_gram)
    monkeypatch.setattr(SublayerStatistics, "middles", last)
    methods = (AttentionAnchored(storage=storage), FfnAnchored(storage=storage))
    streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),), ratio=0.4, methods=methods, redraw=False)
    assert still
    assert not any(still)
