"""Formats that other programs read: what is written is a plain model of the sizes that config.json says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from crashes import crash_after
from outputs import contents
from transformers import AutoConfig, AutoModelForCausalLM

import streamlap
from streamlap.errors import RecipeError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.output.formats import CONFIGS
from streamlap.output.nas import legacy_rope
from streamlap.planning.decide import decide
from streamlap.planning.widths import step_of
from streamlap.recipe import Recipe

STOCK_WIDTHS = {"llama": 32, "qwen2": 24, "seed_oss": 24}
IDS_BL = torch.arange(24).reshape(2, 12) * 7 % 96

NATIVE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert not any(name.split(".")[0] == "streamlap" for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.arange(24).reshape(2, 12) * 7 % 96).logits, sys.argv[2])
"""
"""Loads a folder where streamlap is not imported."""


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: torch.Tensor = model(IDS_BL).logits
    return found


def config(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return table


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


# --- stock -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", STOCK_WIDTHS)
def test_stock_is_a_native_model_of_other_sizes(pico: MakeModel, tokens: Path, tmp_path: Path, family: str) -> None:
    """Written at once, or exported from the factored folder, it is the same, and computes what that one does."""
    source, settings = pico(family, num_hidden_layers=2), {"ratio": 0.2, "files": (str(tokens),), "multiple": 8}
    streamlap.compress(source, tmp_path / "stock", format="stock", **settings)
    streamlap.compress(source, tmp_path / "factored", shape="stock", **settings)
    streamlap.export(tmp_path / "factored", tmp_path / "exported", to="stock")
    assert shards(tmp_path / "stock") == shards(tmp_path / "exported")
    assert config(tmp_path / "stock") == config(tmp_path / "exported")
    sizes = {"intermediate_size": STOCK_WIDTHS[family]}
    assert config(tmp_path / "stock") == config(source) | sizes | legacy_rope(config(source)["rope_parameters"])
    assert not list((tmp_path / "stock").glob("*.py"))
    assert streamlap.verify(tmp_path / "stock")["ok"]
    assert torch.equal(logits(tmp_path / "stock"), logits(tmp_path / "factored"))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(("family", "rope"), [("llama", {"rope_type": "default", "rope_theta": 500.0}), ("llama", LLAMA3),
                                              ("gemma3_text", None)])  # fmt: skip
def test_positions_are_said_in_the_older_way_too(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, rope: dict[str, Any] | None
) -> None:
    """An engine that reads the older keys takes a default without a word where they are not there."""
    source = pico(family, **({"rope_parameters": rope} if rope else {}))
    streamlap.compress(source, tmp_path / "out", format="stock", files=(str(tokens),), multiple=8)
    found = config(tmp_path / "out")
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"} if rope is LLAMA3 else None
    assert (found.get("rope_theta"), found.get("rope_scaling")) == ((500.0 if rope else None), scaling)
    assert (
        AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
        == AutoConfig.from_pretrained(source).rope_parameters
    )


def test_stock_loads_where_streamlap_is_not(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = streamlap.compress(pico("llama", tokenizer=True), out, format="stock", files=(str(tokens),), ratio=0.3)
    subprocess.run([sys.executable, "-c", NATIVE, out, tmp_path / "logits.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(out))
    card = (out / "README.md").read_text()
    assert "import streamlap" not in card
    assert f"{report.parameters.total_after:,}" in card
    assert report.parameters.total_after == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(out).parameters()
    )


def test_whole_groups_of_heads_are_other_head_counts(pico: MakeModel, tmp_path: Path) -> None:
    """All layers without their first KV head and its queries, as the factored format has it."""
    source, out, rows = pico("llama"), tmp_path / "out", {}
    kept = {"q_proj": slice(16, 32), "k_proj": slice(8, 16), "v_proj": slice(8, 16)}
    weights, place = {}, {"quant_method": "streamlap", "format_version": 2, "modules": rows}
    for name, weight in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        path, part = name.rpartition(".")[0], name.split(".")[-2]
        weights[name] = weight[kept[part]] if part in kept else weight[:, 16:] if part == "o_proj" else weight
        if part in kept or part == "o_proj":
            rows[path] = {"in": 16} if part == "o_proj" else {"out": len(weights[name])}
    write(out, weights, config(source) | {"quantization_config": place})
    streamlap.export(out, tmp_path / "stock", to="stock")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    positions = legacy_rope(config(source)["rope_parameters"])
    assert config(tmp_path / "stock") == config(source) | heads | positions
    assert torch.equal(logits(tmp_path / "stock"), logits(out))


def write(folder: Path, weights: dict[str, torch.Tensor], table: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(table))


def test_biases_may_change_what_a_layer_says_of_itself(pico: MakeModel) -> None:
    """As the attention of an opt does. Only where layers go does it matter which kind stands where."""
    stream = ModelStream(pico("opt", enable_bias=False))
    layers = [{role: replace(form, bias=True) for role, form in stream.natives(index).items()} for index in range(3)]
    assert CONFIGS["stock"](stream, layers)["enable_bias"]


def test_the_card_of_a_dense_export_has_the_sizes_of_the_original(
    pico: MakeModel, tokens: Path, tmp_path: Path
) -> None:
    settings = {"ratio": 0.5, "files": (str(tokens),), "shape": "nas"}
    report = streamlap.compress(pico("llama", tokenizer=True), tmp_path / "out", **settings)
    streamlap.export(tmp_path / "out", tmp_path / "dense", to="dense")
    card, numbers = (tmp_path / "dense" / "README.md").read_text(), report.parameters
    assert f"| whole model | {numbers.total_before:,} | {numbers.total_before:,} |" in card
    assert f"| decoder linears | {numbers.decoder_before:,} | {numbers.decoder_before:,} |" in card
    assert f"{numbers.total_after:,}" not in card


def test_what_stock_cannot_express_is_refused(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),))
    with pytest.raises(UnsupportedModel, match=r"\.0\.self_attn\.q_proj is pivoted, and the format stock holds dense"):
        streamlap.export(tmp_path / "out", tmp_path / "stock", to="stock")
    with pytest.raises(RecipeError, match="export to 'gml' is not known; wanted one of"):
        streamlap.export(tmp_path / "out", tmp_path / "stock", to="gml")
    assert not (tmp_path / "stock").exists()


# --- settings ----------------------------------------------------------------------------------------------------------


def test_a_format_implies_its_shape() -> None:
    found = Recipe(format="stock")
    assert (found.shape, found.survey) == ("stock", None)
    assert found == Recipe().override(format="stock") == Recipe.from_dict({"format": "stock", "survey": None})
    assert found.methods == Recipe(shape="stock").methods
    assert Recipe.from_dict(found.to_dict()) == found
    assert not {"format", "multiple", "shape"} & Recipe().to_dict().keys()
    with pytest.raises(RecipeError, match="format is stock and shape nas; wanted shape stock"):
        Recipe(format="stock", shape="nas")
    with pytest.raises(RecipeError, match=r"format is \['stock'\]; wanted one of factored, stock"):
        Recipe.from_dict({"format": ["stock"]})
    with pytest.raises(RecipeError, match="multiple is 8 and shape free; wanted shape nas or stock"):
        Recipe(multiple=8)
    with pytest.raises(RecipeError, match="multiple is 0; wanted a whole number"):
        Recipe(format="stock", multiple=0)


def test_steps_are_smaller_where_the_matrix_is() -> None:
    stock = Recipe(format="stock")
    assert [step_of(stock, width) for width in (14336, 8192, 8191, 1536, 48, 1)] == [128, 128, 64, 16, 1, 1]
    assert step_of(Recipe(shape="nas"), 14336) == 1
    assert step_of(Recipe(shape="nas", multiple=32), 14336) == 32
    with pytest.raises(RecipeError, match="multiple is 64; wanted at most 48"):
        step_of(Recipe(format="stock", multiple=64), 48)


def test_a_multiple_that_leaves_nothing_is_refused(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"would keep \d+ channels, and widths are multiples of 40; wanted"):
        streamlap.plan(pico("llama"), ratio=0.5, format="stock", multiple=40, files=(str(tokens),))


@pytest.mark.parametrize("shape", ["nas", "stock"])
@pytest.mark.parametrize(("depth", "wide", "multiple"), [(1, 48, 16), (3, 48, 16), (2, 30, 7), (1, 8, None)])
def test_the_ratio_that_is_advised_leaves_each_ffn_a_step(
    pico: MakeModel, shape: str, depth: int, wide: int, multiple: int | None
) -> None:
    stream = ModelStream(pico("llama", num_hidden_layers=depth, intermediate_size=wide))
    recipe = Recipe(shape=shape, multiple=multiple, survey="auto", ratio=0.95)
    with pytest.raises(
        RecipeError, match=r"less than 10% of the FFNs; wanted a ratio of at most 0\.\d+, or"
    ) as refused:
        decide(stream, recipe)
    advised = str(refused.value).partition("a ratio of at most ")[2].partition(",")[0]
    decide(stream, replace(recipe, ratio=float(advised)))


def test_no_ratio_is_advised_where_a_step_is_all_of_an_ffn(pico: MakeModel) -> None:
    stream = ModelStream(pico("llama", num_hidden_layers=1, intermediate_size=8))
    with pytest.raises(
        RecipeError, match=r"would leave less than 10% of the FFNs; wanted a smaller --multiple, or shape"
    ):
        decide(stream, Recipe(shape="nas", multiple=8, survey="auto", ratio=0.95))


def test_widths_that_may_differ_spend_what_rounding_leaves(pico: MakeModel, tokens: Path) -> None:
    """Each a multiple, and together no more than one step below what was asked for."""
    source = pico("llama", num_hidden_layers=4, intermediate_size=96)
    plan = streamlap.plan(source, ratio=0.23, shape="nas", multiple=8, files=(str(tokens),))
    widths = [layer.layout["down"].shape[1] for layer in plan.layers]
    assert len(set(widths)) == 2
    assert not any(width % 8 for width in widths)
    stream = ModelStream(source)
    linears = sum(form.weights for form in stream.natives(0).values())
    left = 4 * linears * 0.77 - sum(linears - 96 * (96 - width) for width in widths)
    assert 0 <= left < 8 * 96


# --- going on ----------------------------------------------------------------------------------------------------------


def test_a_killed_run_gives_the_same_bytes(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ratio": 0.3, "format": "stock", "files": (str(tokens),)}
    plan = streamlap.plan(pico("llama"), **settings)
    streamlap.compress(pico("llama"), tmp_path / "whole", **settings)
    assert plan.output_bytes == sum(
        map(len, (d for n, d in shards(tmp_path / "whole").items() if n.endswith("tensors")))
    )
    crash_after(2, monkeypatch, lambda: streamlap.compress(pico("llama"), tmp_path / "out", **settings))
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
