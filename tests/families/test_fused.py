"""A phi3 is a llama, or a mistral, whose matrices are stored together; a gpt2 is an opt by other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from crashes import crash_after
from folders import edit_config
from safetensors.torch import load_file, save_file
from test_stream import run_stream
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import CheckpointError, UnsupportedModel
from streamlap.families.stream import ModelStream

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("phi3", {"sliding_window": None}),
    "mistral": ("phi3", {"sliding_window": 5}),
    "opt": ("gpt2", {"tied": True, "n_inner": None}),
}
"""What it is -> how it is stored."""


def logits(folder: Path, tokens: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(torch.from_numpy(np.load(tokens).astype(np.int64))).logits
    return found


@pytest.mark.parametrize("kind", CASES)
def test_it_gives_the_logits_of_transformers(pico: MakeModel, tokens: Path, tmp_path: Path, kind: str) -> None:
    """As it is, and with nothing removed as what it comes out as."""
    (family, settings), out = CASES[kind], tmp_path / "out"
    folder = pico(family, **settings)
    assert ModelStream(folder).family.model_type == kind
    wanted_NLV = logits(folder, tokens)
    streamed_NLV = run_stream(folder, torch.from_numpy(np.load(tokens).astype(np.int64)))[1]
    torch.testing.assert_close(streamed_NLV, wanted_NLV, rtol=1e-5, atol=1e-5)
    streamlap.compress(folder, out, methods=(), files=(str(tokens),))
    assert json.loads((out / "config.json").read_text())["model_type"] == kind
    torch.testing.assert_close(logits(out, tokens), wanted_NLV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "preset"),
    [("phi3", "best"), ("phi3", "lorap"), *(("gpt2", preset) for preset in ("best", "lorap", "loraprune", "pclora"))],
)
def test_it_is_compressed_like_any_other(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, preset: str
) -> None:
    folder, out = pico(family, dtype=torch.bfloat16, shard_size="30KB"), tmp_path / "out"
    report = streamlap.compress(folder, out, preset=preset, ratio=0.4, files=(str(tokens),))
    assert {"phi3": "mlp.up_proj", "gpt2": "fc1"}[family] in {edit.path for edit in report.layers[0].edits}
    assert streamlap.verify(out)["ok"]
    logits_NLV = logits(out, tokens)[:, :-1]
    ids_NL = torch.from_numpy(np.load(tokens).astype(np.int64))[:, 1:]
    loss = float(torch.nn.functional.cross_entropy(logits_NLV.flatten(0, 1), ids_NL.flatten()))
    assert streamlap.evaluate(out, tokens, dtype="float32").nll == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ],
)
def test_heads_that_are_turned_otherwise_are_refused(pico: MakeModel, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = shutil.copytree(pico("phi3"), tmp_path / "source")
    edit_config(Path(folder), **config)
    with pytest.raises(UnsupportedModel, match=r"a phi3 with (rope_scaling|partial_rotary_factor) .*; wanted"):
        ModelStream(folder)


@pytest.mark.parametrize("window", [None, 8])
def test_heads_that_are_not_said_are_as_many_as_those_of_q(pico: MakeModel, tmp_path: Path, window: int | None) -> None:
    folder = Path(shutil.copytree(pico("phi3", num_key_value_heads=4, sliding_window=window), tmp_path / "source"))
    edit_config(folder, num_key_value_heads=None)
    assert ModelStream(folder).config.num_key_value_heads == 4
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "num_key_value_heads"}))
    assert ModelStream(folder).config.num_key_value_heads == 4


def test_a_matrix_of_other_rows_is_refused(pico: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(pico("phi3"), tmp_path / "source")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.self_attn.qkv_proj.weight"
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.qkv_proj.weight.* wants 32 \+ 16 \+ 16 rows"):
        ModelStream(folder)


# --- gpt2 ------------------------------------------------------------------------------------------------------------------


def test_a_gpt2_is_turned_and_taken_apart_number_by_number(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, from names without `transformer.` and beside the masks of old checkpoints, by a run that died and went on."""
    monkeypatch.setattr("streamlap.store.source.CHUNK_BYTES", 1000)
    monkeypatch.setattr("streamlap.store.source.TURNED_BYTES", 1000)
    folder, out = Path(shutil.copytree(pico("gpt2"), tmp_path / "source")), tmp_path / "out"
    stored = {name.removeprefix("transformer."): w for name, w in load_file(folder / "model.safetensors").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for i in range(3)}
    save_file(stored | masks, folder / "model.safetensors", {"format": "pt"})

    def run() -> object:
        return streamlap.compress(folder, out, methods=(), files=(str(tokens),), max_ram="2GiB")

    crash_after(1, monkeypatch, run)
    run()
    found = {name: w for path in out.glob("*.safetensors") for name, w in load_file(path).items()}
    layer, attention = "model.decoder.layers.1", stored["h.1.attn.c_attn.weight"]
    for place, role in enumerate("qkv"):
        rows = slice(32 * place, 32 * place + 32)
        assert torch.equal(found[f"{layer}.self_attn.{role}_proj.weight"], attention[:, rows].t())
        assert torch.equal(found[f"{layer}.self_attn.{role}_proj.bias"], stored["h.1.attn.c_attn.bias"][rows])
    for name, path in (("attn.c_proj", "self_attn.out_proj"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2")):
        assert torch.equal(found[f"{layer}.{path}.weight"], stored[f"h.1.{name}.weight"].t())
    positions = found["model.decoder.embed_positions.weight"]
    assert torch.equal(positions, torch.cat((torch.zeros(2, 32), stored["wpe.weight"])))
    assert len(found) == len(stored) + 3 * 4, "q, k and v of three layers, weights and biases"


@pytest.mark.parametrize(
    "config",
    [
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
    ],
)
def test_a_gpt2_that_is_no_opt_is_refused(pico: MakeModel, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(pico("gpt2"), tmp_path / "source"))
    edit_config(folder, **config)
    with pytest.raises(UnsupportedModel, match=rf"a gpt2 with {next(iter(config))} .*; wanted .*, as in an opt"):
        ModelStream(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("attn.c_attn.weight", r"c_attn.weight' .* has shape \[32, 95\]; wanted 3 equal parts"),
        ("mlp.c_fc.weight", r"fc1.weight' .* has shape \[47, 32\]; config.json wants \[48, 32\]"),
    ],
)
def test_a_gpt2_of_other_sizes_is_refused(pico: MakeModel, tmp_path: Path, name: str, words: str) -> None:
    folder, path = Path(shutil.copytree(pico("gpt2"), tmp_path / "source")), f"transformer.h.1.{name}"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {path: tensors[path][:, :-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        ModelStream(folder)


def test_an_opt_without_a_norm_behind_its_last_layer_is_refused(pico: MakeModel) -> None:
    """As opt-350m: its norms come behind what is added."""
    with pytest.raises(
        UnsupportedModel, match=r"this opt has no model\.decoder\.final_layer_norm behind its last layer"
    ):
        ModelStream(pico("opt", do_layer_norm_before=False))
