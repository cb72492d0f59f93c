"""Keys and values as counted from shapes, against what transformers keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.families.cache import cache_bytes
from streamlap.families.stream import ModelStream

LENGTH = 12


@torch.no_grad()
def kept_bytes(folder: Path, sequences: int, length: int) -> int:
    """Of a loaded model after one forward."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids_BL = torch.zeros(sequences, length, dtype=torch.long)
    layers = model(ids_BL, use_cache=True).past_key_values.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if getattr(layer, "keys", None) is not None)


def counted(folder: Path, sequences: int, length: int) -> int:
    stream = ModelStream(folder)
    roles = [stream.natives(index).keys() & {"k", "v"} for index in range(stream.depth)]
    forms = [{role: stream.form(index, role) for role in found} for index, found in enumerate(roles)]
    return sum(cache_bytes(stream, index, found, length, sequences) for index, found in enumerate(forms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "smollm3", "qwen3_5_text"])
def test_what_is_counted_is_what_is_kept(pico: MakeModel, model_type: str, dtype: torch.dtype) -> None:
    changes = {"use_sliding_window": False, "sliding_window": None} if model_type == "smollm3" else {}
    source = pico(model_type, dtype=dtype, **changes)
    assert counted(source, 3, LENGTH) == kept_bytes(source, 3, LENGTH)
    found = streamlap.inspect(source)["kv_cache_bytes_per_token"]
    assert found == {"before": counted(source, 1, 1), "after": counted(source, 1, 1), "ratio": 0.0}


def test_a_window_keeps_no_more_than_it_sees(pico: MakeModel) -> None:
    """transformers keeps one token less: the last of a window is the one that asks."""
    source = pico("ministral")  # layers 0 and 2 see five tokens
    each = 2 * 16 * 4
    assert counted(source, 1, LENGTH) == each * (5 + LENGTH + 5)
    assert kept_bytes(source, 1, LENGTH) == each * (4 + LENGTH + 4)
    assert counted(source, 1, 3) == each * 9 == kept_bytes(source, 1, 3)


def test_heads_that_are_gone_keep_nothing(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    rows = ({"method": "attention_groups"}, {"method": "ffn_anchored"})
    recipe = streamlap.Recipe.from_dict({"methods": list(rows), "ratio": 0.5, "survey": None})
    report = streamlap.compress(pico("llama"), tmp_path / "out", recipe, files=(str(tokens),))
    assert report.kv_cache.ratio == 0.5
    assert (
        counted(tmp_path / "out", 2, LENGTH)
        == kept_bytes(tmp_path / "out", 2, LENGTH)
        == 2 * LENGTH * report.kv_cache.after
    )
    assert streamlap.inspect(tmp_path / "out")["kv_cache_bytes_per_token"] == report.kv_cache.to_json()
    assert f"| {report.kv_cache.before:,} | {report.kv_cache.after:,} |" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_without_a_layer_of_attention_has_none(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source = pico("qwen3_5_text", num_hidden_layers=1, layer_types=["linear_attention"])
    none = {"before": 0, "after": 0, "ratio": 0.0}
    assert streamlap.inspect(source)["kv_cache_bytes_per_token"] == none
    report = streamlap.compress(source, tmp_path / "out", preset="lorap", files=(str(tokens),))
    assert report.kv_cache.to_json() == none
