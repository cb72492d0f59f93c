"""Sub-layers that are gone: skipped where a model is loaded, with no keys and values kept, and zeros in a dense copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.loader.modules import Skipped, swap_modules
from streamlap.pipeline.export import export_dense

DEPTH = 4
ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
GONE = {1: ATTENTION, 2: FFN, 3: (*ATTENTION, *FFN)}
"""Layer -> its linears that are gone."""


def strip(source: Path, out: Path) -> Path:
    """A copy of a checkpoint in which the sub-layers of `GONE` are removed, as the format has it."""
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    weights, config, rows = load_file(source / "model.safetensors"), json.loads((out / "config.json").read_text()), {}
    for name in list(weights):
        path = name.rpartition(".")[0]
        layer = int(path.split(".")[2]) if ".layers." in path else -1
        if path.rpartition(".")[2] in GONE.get(layer, ()):
            rows[path] = {"removed": 1}
            del weights[name]
            weights[f"{path}.weight"] = torch.zeros(1, 1)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = {"quant_method": "streamlap", "format_version": 2, "modules": rows}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(params=["llama", "qwen2", "mistral", "qwen3"])
def source(request: pytest.FixtureRequest, pico: MakeModel) -> Path:
    return pico(request.param, num_hidden_layers=DEPTH)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return strip(source, tmp_path / "stripped")


@pytest.fixture
def ids_BL() -> torch.Tensor:  # noqa: N802
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def dense_logits(source: Path, ids_BL: torch.Tensor) -> torch.Tensor:
    """Of the source with zeros for what its missing sub-layers write."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        last = {"o_proj", "down_proj"} & set(GONE.get(int(parts[2]), ())) if ".layers." in name else ()
        if any(part in last for part in parts):
            parameter.zero_()
    logits: torch.Tensor = model(ids_BL).logits
    return logits


@torch.no_grad()
def test_it_computes_what_is_left(source: Path, folder: Path, ids_BL: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model(ids_BL).logits, dense_logits(source, ids_BL), rtol=1e-5, atol=1e-5)
    model.dequantize()
    assert not any(isinstance(module.__dict__.get("forward"), Skipped) for module in model.modules())
    torch.testing.assert_close(model(ids_BL).logits, dense_logits(source, ids_BL), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_keys_and_values_are_kept_of_the_rest_alone(folder: Path, ids_BL: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    begun = model(ids_BL[:, :10], use_cache=True)
    logits = model(ids_BL[:, 10:], past_key_values=begun.past_key_values).logits
    torch.testing.assert_close(logits, model(ids_BL).logits[:, 10:], rtol=1e-5, atol=1e-5)
    kept = [layer.keys.numel() > 0 for layer in begun.past_key_values.layers]
    assert kept == [index not in (1, 3) for index in range(DEPTH)]
    asked = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda *_, index=index: asked.append(index))
        layer.mlp.down_proj.register_forward_hook(lambda *_, index=index: asked.append(10 + index))
    model.generate(ids_BL[:1], max_new_tokens=2, do_sample=False)
    assert set(asked) == {0, 2, 10, 11}


@torch.no_grad()
def test_guessed_tokens_are_taken_back_where_a_window_is_gone(
    pico: MakeModel, ids_BL: torch.Tensor, tmp_path: Path
) -> None:
    """A cache counts the tokens of each window, also of one whose attention is gone."""
    source = pico("mistral", num_hidden_layers=DEPTH, sliding_window=5)
    model, dense = map(AutoModelForCausalLM.from_pretrained, (strip(source, tmp_path / "stripped"), source))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids_BL[:1], use_cache=False, **settings)
    static = {"cache_implementation": "static", "disable_compile": True}
    for way in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": dense}, static):
        assert torch.equal(model.generate(ids_BL[:1], **settings, **way), wanted), way


@torch.no_grad()
def test_it_is_saved_and_loaded_again(folder: Path, ids_BL: torch.Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids_BL).logits, model(ids_BL).logits)
    rows = [
        json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, tmp_path / "again")
    ]
    assert rows[0] == rows[1]


def test_streamlap_knows_it(source: Path, folder: Path, ids_BL: torch.Tensor, tmp_path: Path) -> None:
    assert streamlap.verify(folder)["ok"]
    found = streamlap.inspect(folder)
    for index, layer in enumerate(found["layers"]):
        for path, site in layer["sites"].items():
            gone = path.rpartition(".")[2] in GONE.get(index, ())
            assert (site["kind"], site["parameters"] == 1) == (("removed", True) if gone else ("dense", False))
    export_dense(folder, tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BL).logits, dense_logits(source, ids_BL), rtol=1e-5, atol=1e-5)


def test_nothing_else_loads_it(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"mismatch|size"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
def test_adapters_by_name_pass_it_by(folder: Path, ids_BL: torch.Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    adapted(input_ids=ids_BL, labels=ids_BL).loss.backward()
    moved = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("layers.0.self_attn.q_proj" in name for name in moved)
    assert not any("layers.3." in name for name in moved)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids_BL).logits, model(ids_BL).logits)


@torch.no_grad()
def test_a_layer_whose_own_linears_are_gone_still_runs(pico: MakeModel, ids_BL: torch.Tensor) -> None:
    """The FFN of OPT has no module of its own; with it gone the layer is its attention."""
    model, lean = (AutoModelForCausalLM.from_pretrained(pico("opt")) for _ in range(2))
    path = "model.decoder.layers.1"
    for parameter in model.get_submodule(f"{path}.fc2").parameters():
        parameter.zero_()
    swap_modules(lean, {f"{path}.{name}": {"removed": 1} for name in ("fc1", "fc2")})
    torch.testing.assert_close(lean(ids_BL).logits, model(ids_BL).logits)
