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
from conftest import make_tokenizer
from crashes import crash_after
from outputs import contents
from outside import run_outside
from picos import IMAGE, PARTS, random_pico
from safetensors.torch import load_file, save_file
from test_stream import run_stream
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import streamlap
from streamlap.errors import CheckpointError, UnsupportedModel
from streamlap.families.opening import COMPUTE_DTYPES
from streamlap.families.stream import ModelStream
from streamlap.families.wrappers import WRAPPERS
from streamlap.output.nas import legacy_rope

MakeWrapper = Callable[..., Path]


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> MakeWrapper:
    """wrapper(model_type, tied) -> a source model; equal calls share one folder, so do not change it."""
    made: dict[tuple[str, bool], Path] = {}

    def make(kind: str, tied: bool = False) -> Path:
        if (kind, tied) not in made:
            made[kind, tied] = tmp_path_factory.mktemp(kind)
            random_pico(kind, tied=tied).save_pretrained(made[kind, tied])
            make_tokenizer().save_pretrained(made[kind, tied])
            (made[kind, tied] / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
        return made[kind, tied]

    return make


def opened(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=COMPUTE_DTYPES[dtype]).eval()
    return model


def rows(tokens: Path) -> torch.Tensor:
    """None of them stands for an image."""
    return torch.from_numpy(np.load(tokens).astype(np.int64)) % 290


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
    return flat([found.pooler_output, getattr(found, "deepstack_features", None) or ()])


def flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in flat(part)]


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


def in_both_ways(table: dict[str, Any]) -> dict[str, Any]:
    """The same with the positions of its language model in the older way too."""
    text = table["text_config"]
    return table | {"text_config": text | legacy_rope(text["rope_parameters"])}


def with_config(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of `source` with `changes` in its config.json; None takes a key out."""
    table = {key: value for key, value in (config_of(source) | changes).items() if value is not None}
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def test_each_wrapper_is_run() -> None:
    assert PARTS.keys() == WRAPPERS.keys()


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stream_is_bitwise_the_whole_model_on_text(
    wrapper: MakeWrapper, tokens: Path, kind: str, dtype: str
) -> None:
    tokens_NL = rows(tokens)
    states, logits_NLV = run_stream(wrapper(kind), tokens_NL, dtype)
    with torch.no_grad():
        expected = opened(wrapper(kind), dtype)(input_ids=tokens_NL, output_hidden_states=True)
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
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert plan.output_bytes == written if preset == "lorap" else plan.output_bytes >= written
    assert streamlap.verify(out) == {"ok": True, "faults": []}
    assert streamlap.inspect(out)["parameters"] == report.parameters.to_json()
    assert (out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    ours = ("auto_map", "quantization_config")
    assert {key: value for key, value in config_of(out).items() if key not in ours} == config_of(source)

    dense, model = opened(source), opened(out)
    for before, after in zip(seen(dense, kind), seen(model, kind), strict=True):
        assert torch.equal(before, after)
    tokens_NL = rows(tokens)
    with torch.no_grad():
        logits_NLV = model(input_ids=tokens_NL).logits
    torch.testing.assert_close(run_stream(out, tokens_NL)[1], logits_NLV, rtol=1e-5, atol=1e-5)
    prompted = told(model, kind)
    assert not torch.allclose(prompted, told(dense, kind), atol=1e-3)

    if kind == "qwen3_5":  # whose language model has a class of its own
        alone = AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad():
            torch.testing.assert_close(alone(input_ids=tokens_NL).logits, logits_NLV, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path / "saved")  # as transformers names the tensors on the disk
    assert torch.equal(told(streamlap.load(tmp_path / "saved"), kind), prompted)
    assert torch.equal(run_stream(tmp_path / "saved", tokens_NL)[1], run_stream(out, tokens_NL)[1])

    streamlap.export(out, tmp_path / "dense")
    assert config_of(tmp_path / "dense") == in_both_ways(config_of(source))
    assert not list((tmp_path / "dense").glob("*.py"))
    torch.testing.assert_close(told(opened(tmp_path / "dense"), kind), prompted, rtol=1e-4, atol=1e-4)


def test_a_killed_run_goes_on_and_is_measured(
    wrapper: MakeWrapper, text: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "text.npy", rows(tokens))
    settings: dict[str, Any] = {"ratio": 0.4, "files": (str(text),), "length": 16, "samples": 12}
    source, out = wrapper("gemma3", True), tmp_path / "out"
    crash_after(1, monkeypatch, lambda: streamlap.compress(source, out, **settings))
    streamlap.resume(out)
    streamlap.compress(source, tmp_path / "whole", **settings)
    assert contents(out) == contents(tmp_path / "whole")

    with torch.no_grad():
        model: Any = opened(out)
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows(tokens)]
    assert streamlap.evaluate(out, tmp_path / "text.npy").nll == pytest.approx(np.mean(losses), rel=1e-6)


def test_recovery(wrapper: MakeWrapper, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tokens = tmp_path / "lesson.npy"  # each id is three more than the one before
    np.save(tokens, (np.random.default_rng(0).integers(0, 290, (16, 1)) + 3 * np.arange(16)) % 290)
    source, out, better = wrapper("gemma3", True), tmp_path / "out", tmp_path / "better"
    streamlap.compress(source, out, ratio=0.6, preset="lorap", files=(str(tokens),))
    knobs: dict[str, Any] = {"distil": 1.0, "epochs": 2, "rank": 3, "learning_rate": 3e-3, "batch": 4, "top": 64}
    assert streamlap.recover(out, better, tokens, dense=source, **knobs).kept
    assert streamlap.verify(better)["ok"]
    assert config_of(better) == config_of(out)
    before, after = opened(out), opened(better)
    assert torch.equal(seen(after, "gemma3")[0], seen(before, "gemma3")[0])
    assert not torch.equal(told(after, "gemma3"), told(before, "gemma3"))


@pytest.mark.parametrize("kind", ["mistral3", "qwen3_vl"])
def test_formats(wrapper: MakeWrapper, tokens: Path, tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"ratio": 0.3, "files": (str(tokens),)}
    streamlap.compress(wrapper(kind), tmp_path / "stock", format="stock", **settings)
    wanted = in_both_ways(config_of(wrapper(kind)))
    width = config_of(tmp_path / "stock")["text_config"]["intermediate_size"]
    assert config_of(tmp_path / "stock") == wanted | {
        "text_config": wanted["text_config"] | {"intermediate_size": width}
    }
    assert width < wanted["text_config"]["intermediate_size"]
    model = opened(tmp_path / "stock")
    assert torch.equal(seen(model, kind)[0], seen(opened(wrapper(kind)), kind)[0])
    logits_NLV = run_stream(tmp_path / "stock", rows(tokens))[1]
    with torch.no_grad():
        torch.testing.assert_close(logits_NLV, model(input_ids=rows(tokens)).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedModel, match=f"and this is a {kind}; wanted the format stock or factored"):
        streamlap.compress(wrapper(kind), tmp_path / "nas", format="nas", **settings)
    assert not (tmp_path / "nas").exists()


def test_sizes_beside_the_vision_tower_are_those_of_text(wrapper: MakeWrapper, tokens: Path, tmp_path: Path) -> None:
    """As the first folders of qwen2_5_vl have them; and the tower, whatever it asks for, is not built."""
    source = wrapper("qwen2_5_vl")
    text = {key: value for key, value in config_of(source)["text_config"].items() if key != "model_type"}
    vision = {"vision_config": {"depth": 10**9, "hidden_size": 1}}
    found = run_stream(with_config(source, tmp_path / "flat", text_config=None, **text, **vision), rows(tokens))[1]
    assert torch.equal(found, run_stream(source, rows(tokens))[1])


def test_a_language_model_of_another_kind(wrapper: MakeWrapper, tmp_path: Path) -> None:
    source = wrapper("mistral3")
    text = config_of(source)["text_config"]
    other = with_config(source, tmp_path / "other", text_config=text | {"model_type": "ministral3"})
    assert ModelStream(other).depth == 3
    unknown = with_config(source, tmp_path / "unknown", text_config=text | {"model_type": "llama"})
    with pytest.raises(UnsupportedModel, match="of this mistral3 is a llama; wanted mistral or ministral3"):
        ModelStream(unknown)
    with pytest.raises(CheckpointError, match="of a mistral3 has text_config None; wanted its language model there"):
        ModelStream(with_config(source, tmp_path / "none", text_config=None))
    large = with_config(source, tmp_path / "large", text_config=text | {"num_hidden_layers": 10**9})
    with pytest.raises(CheckpointError, match="has num_hidden_layers 1000000000; wanted a whole number"):
        ModelStream(large)
    quantised = with_config(source, tmp_path / "quantised", text_config=text | {"quantization_config": {"bits": 4}})
    with pytest.raises(UnsupportedModel, match="the checkpoint is quantised"):
        ModelStream(quantised)
    code = with_config(source, tmp_path / "code", vision_config={"attn_implementation": "some/kernel"})
    with pytest.raises(CheckpointError, match="attn_implementation 'some/kernel', code on a hub"):
        streamlap.load(code)


@pytest.mark.nightly
def test_other_names_and_spellings(wrapper: MakeWrapper, tokens: Path, tmp_path: Path) -> None:
    """A tower whose tensors have the names of the hub; sizes beside it, with the old words for mrope; layers of ministral3."""
    named = Path(shutil.copytree(wrapper("gemma3"), tmp_path / "gemma3"))
    stored = load_file(named / "model.safetensors")
    hub = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in stored.items()}
    save_file(hub, named / "model.safetensors", metadata={"format": "pt"})

    text = {**config_of(wrapper("qwen2_5_vl"))["text_config"], "rope_parameters": None, "model_type": "qwen2_5_vl"}
    text |= {"rope_theta": 10_000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    flat = with_config(wrapper("qwen2_5_vl"), tmp_path / "qwen2_5_vl", text_config=None, **text)

    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8}
    text = config_of(wrapper("mistral3"))["text_config"] | {"model_type": "ministral3"}
    text |= {"rope_parameters": rope | {"llama_4_scaling_beta": 0.1}}
    other = with_config(wrapper("mistral3"), tmp_path / "mistral3", text_config=text)

    for source in (named, flat, other):
        out, kind = tmp_path / f"{source.name}-out", source.name
        streamlap.compress(source, out, files=(str(tokens),))
        model: Any = opened(out)
        assert torch.equal(seen(model, kind)[0], seen(opened(wrapper(kind)), kind)[0])
        with torch.no_grad():
            logits_NLV = model(input_ids=rows(tokens)).logits
        torch.testing.assert_close(run_stream(out, rows(tokens))[1], logits_NLV, rtol=1e-5, atol=1e-5)


OUTSIDE = """
import torch
from transformers import AutoModelForImageTextToText

folder, saved, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.arange(8)[None]).logits, saved)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("kind", PARTS)
def test_it_loads_where_streamlap_is_not(wrapper: MakeWrapper, tokens: Path, tmp_path: Path, kind: str) -> None:
    out, saved = tmp_path / "out", tmp_path / "logits.pt"
    streamlap.compress(wrapper(kind), out, files=(str(tokens),))
    run_outside(OUTSIDE, tmp_path, out, saved, str(torch.get_num_threads()))
    model: Any = opened(out)
    with torch.no_grad():
        assert torch.equal(torch.load(saved), model(torch.arange(8)[None]).logits)
