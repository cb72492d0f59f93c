"""Models with a vision tower: the language model is compressed, and all else comes through bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PICO, VOCABULARY
from crashes import crash_after
from outputs import contents
from safetensors.torch import load_file
from test_stream import run_stream
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import streamlap
from streamlap.errors import CheckpointError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.families.wrappers import WRAPPERS

IMAGE = VOCABULARY - 1
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
TOWER = VISION | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
BLOCKS = VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 32}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 298, "vision_start_token_id": 297, "vision_end_token_id": 296}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]

PARTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 298, "eoi_token_index": 297},
        {"query_pre_attn_scalar": 5, "sliding_window": 5, "layer_types": KINDS},
        TOWER,
    ),
    "mistral3": (
        {"image_token_index": IMAGE},
        {"model_type": "mistral", "sliding_window": None},
        TOWER | {"head_dim": 8, "model_type": "pixtral"},
    ),
    "qwen2_5_vl": (TOKENS, {"rope_parameters": MROPE}, BLOCKS | {"window_size": 16, "fullatt_block_indexes": [1]}),
    "qwen3_vl": (
        TOKENS,
        {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        BLOCKS | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
}
"""Wrapper -> its own settings, those of its language model, those of its vision tower. An image is four tokens."""

MakeWrapper = Callable[..., Path]


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> MakeWrapper:
    """wrapper(model_type, tied) -> a source model; equal calls share one folder, so do not change it."""
    made: dict[tuple[str, bool], Path] = {}

    def make(kind: str, tied: bool = False) -> Path:
        if (kind, tied) not in made:
            own, text, vision = PARTS[kind]
            config = AutoConfig.for_model(
                kind, text_config=PICO | text | {"tie_word_embeddings": tied}, vision_config=vision,
                tie_word_embeddings=tied, **own,
            )  # fmt: skip
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(("norm" in name) + torch.randn_like(parameter) * 0.15)
            model.tie_weights()
            made[kind, tied] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind, tied])
            (made[kind, tied] / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
        return made[kind, tied]

    return make


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def image(kind: str) -> dict[str, torch.Tensor]:
    """One image of 16 x 16, as the model of that kind takes it."""
    generator = torch.Generator().manual_seed(1)
    if kind.startswith("qwen"):
        patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    pixels = {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    return pixels | ({"image_sizes": torch.tensor([[16, 16]])} if kind == "mistral3" else {})


@torch.no_grad()
def seen(model: Any, kind: str) -> list[torch.Tensor]:
    """All that the language model is given of an image."""
    found = model.get_image_features(**image(kind), return_dict=True)
    return [*found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]


@torch.no_grad()
def told(model: Any, kind: str) -> torch.Tensor:
    """Logits for a prompt with an image in it."""
    prompt_BL = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 8]])
    types = "mm_token_type_ids" if kind.startswith("qwen") else "token_type_ids"
    marks = {} if kind == "mistral3" else {types: (prompt_BL == IMAGE).int()}
    logits_BLV: torch.Tensor = model(input_ids=prompt_BL, **image(kind), **marks).logits
    return logits_BLV


def config_of(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return table


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


def test_each_wrapper_is_run() -> None:
    assert PARTS.keys() == WRAPPERS.keys()


@pytest.mark.parametrize("kind", PARTS)
def test_the_stream_is_bitwise_the_whole_model_on_text(wrapper: MakeWrapper, tokens: Path, kind: str) -> None:
    tokens_NL = torch.from_numpy(np.load(tokens).astype(np.int64)) % 290
    states, logits_NLV = run_stream(wrapper(kind), tokens_NL)
    with torch.no_grad():
        expected = opened(wrapper(kind))(input_ids=tokens_NL, output_hidden_states=True)
    for mine, theirs in zip(states[:-1], expected.hidden_states[:-1], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(logits_NLV, expected.logits)


@pytest.mark.parametrize("preset", ["best", "lorap"])
@pytest.mark.parametrize("kind", PARTS)
def test_a_result_is_the_whole_model(
    wrapper: MakeWrapper, tokens: Path, tmp_path: Path, kind: str, preset: str
) -> None:
    source, out = wrapper(kind, preset == "lorap"), tmp_path / "out"
    plan = streamlap.plan(source, ratio=0.3, preset=preset, files=(str(tokens),))
    report = streamlap.compress(source, out, ratio=0.3, preset=preset, files=(str(tokens),))
    assert report.loader == "AutoModelForImageTextToText"
    assert plan.output_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert streamlap.verify(out) == {"ok": True, "faults": []}
    assert streamlap.inspect(out)["parameters"] == report.parameters.to_json()
    assert (out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    ours = ("auto_map", "quantization_config")
    assert {key: value for key, value in config_of(out).items() if key not in ours} == config_of(source)

    dense, model = opened(source), opened(out)
    for before, after in zip(seen(dense, kind), seen(model, kind), strict=True):
        assert torch.equal(before, after)
    tokens_NL = torch.from_numpy(np.load(tokens).astype(np.int64)) % 290
    with torch.no_grad():
        logits_NLV = model(input_ids=tokens_NL).logits
    torch.testing.assert_close(run_stream(out, tokens_NL)[1], logits_NLV, rtol=1e-5, atol=1e-5)
    prompted = told(model, kind)
    assert not torch.allclose(prompted, told(dense, kind), atol=1e-3)

    model.save_pretrained(tmp_path / "saved")  # as transformers names the tensors on the disk
    assert torch.equal(told(streamlap.load(tmp_path / "saved"), kind), prompted)
    assert torch.equal(run_stream(tmp_path / "saved", tokens_NL)[1], run_stream(out, tokens_NL)[1])

    streamlap.export(out, tmp_path / "dense")
    assert config_of(tmp_path / "dense") == config_of(source)
    assert not list((tmp_path / "dense").glob("*.py"))
    torch.testing.assert_close(told(opened(tmp_path / "dense"), kind), prompted, rtol=1e-4, atol=1e-4)
