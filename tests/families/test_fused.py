"""A phi3 is a llama, or a mistral, whose matrices are stored together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from folders import edit_config
from safetensors.torch import load_file, save_file
from test_stream import run_stream
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import CheckpointError, UnsupportedModel
from streamlap.families.stream import ModelStream

WINDOWS = {"llama": None, "mistral": 5}


def logits(folder: Path, tokens: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(torch.from_numpy(np.load(tokens).astype(np.int64))).logits
    return found


@pytest.mark.parametrize("kind", WINDOWS)
def test_it_gives_the_logits_of_transformers(pico: MakeModel, tokens: Path, tmp_path: Path, kind: str) -> None:
    """As it is, and with nothing removed as what it comes out as."""
    folder, out = pico("phi3", sliding_window=WINDOWS[kind]), tmp_path / "out"
    assert ModelStream(folder).family.model_type == kind
    wanted_NLV = logits(folder, tokens)
    streamed_NLV = run_stream(folder, torch.from_numpy(np.load(tokens).astype(np.int64)))[1]
    torch.testing.assert_close(streamed_NLV, wanted_NLV, rtol=1e-5, atol=1e-5)
    streamlap.compress(folder, out, methods=(), files=(str(tokens),))
    assert json.loads((out / "config.json").read_text())["model_type"] == kind
    torch.testing.assert_close(logits(out, tokens), wanted_NLV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["best", "lorap"])
def test_it_is_compressed_like_any_other(pico: MakeModel, tokens: Path, tmp_path: Path, preset: str) -> None:
    folder, out = pico("phi3", dtype=torch.bfloat16, shard_size="30KB"), tmp_path / "out"
    report = streamlap.compress(folder, out, preset=preset, ratio=0.4, files=(str(tokens),))
    assert {edit.path for edit in report.layers[0].edits} >= {"self_attn.q_proj", "mlp.up_proj"}
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


def test_a_matrix_of_other_rows_is_refused(pico: MakeModel, tmp_path: Path) -> None:
    folder = shutil.copytree(pico("phi3"), tmp_path / "source")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.self_attn.qkv_proj.weight"
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.qkv_proj.weight.* wants 32 \+ 16 \+ 16 rows"):
        ModelStream(folder)
