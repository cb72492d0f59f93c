"""The contract of every family: nothing removed means the same bits as transformers' own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeModel
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.families import FAMILIES
from streamlap.families.stream import COMPUTE_DTYPES, ModelStream, batch_of
from streamlap.store.hidden import HiddenBank

CASES = [(name, tied) for name in FAMILIES for tied in (False, True)]


def load_tokens(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path).astype(np.int64))


def run_stream(
    folder: Path, tokens_NL: torch.Tensor, dtype: str = "float32"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states before every layer and after the last, and the logits."""
    stream = ModelStream(folder, dtype=dtype)
    shape_NLD, batch = (*tokens_NL.shape, stream.width), batch_of(tokens_NL.shape[1])
    bank = HiddenBank(shape_NLD, stream.dtype, batch, cache=torch.device("cpu"))
    kwargs = stream.layer_kwargs(tokens_NL.shape[1])
    bank.write(0, stream.embed(tokens_NL))
    states = [torch.cat(list(bank.read(0)))]
    for index in range(stream.depth):
        layer = stream.layer(index, kwargs[index])
        bank.write(index + 1, (layer(x_BLD) for x_BLD in bank.read(index)))
        states.append(torch.cat(list(bank.read(index + 1))))
    head = stream.head()
    return states, torch.stack([head(x_LD) for x_LD in states[-1]])


@pytest.mark.parametrize(("family", "tied"), CASES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_and_logits_are_bitwise_those_of_transformers(
    pico: MakeModel, tokens: Path, family: str, tied: bool, sharded: bool, dtype: str
) -> None:
    folder = pico(family, tied=tied, shard_size="30KB" if sharded else "1GB", dtype=torch.bfloat16)
    assert (folder / "model.safetensors").exists() != sharded
    tokens_NL = load_tokens(tokens)
    states, logits_NLV = run_stream(folder, tokens_NL, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=COMPUTE_DTYPES[dtype])
    with torch.no_grad():
        expected = model(input_ids=tokens_NL, output_hidden_states=True)
    for mine, theirs in zip(states[:-1], expected.hidden_states[:-1], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(logits_NLV, expected.logits)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_recipe_without_methods_gives_the_original_back(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, tied: bool
) -> None:
    folder = pico(family, tied=tied, dtype=torch.float16)
    streamlap.compress(folder, tmp_path / "out", methods=(), files=(str(tokens),))
    tokens_NL = load_tokens(tokens)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (folder, tmp_path / "out")]
    with torch.no_grad():
        before, after = (model(input_ids=tokens_NL).logits for model in models)
    assert torch.equal(before, after)


def test_a_sliding_window_is_part_of_the_layer(pico: MakeModel, tokens: Path) -> None:
    folder = pico("mistral", sliding_window=5)
    tokens_NL = load_tokens(tokens)
    _, logits_NLV = run_stream(folder, tokens_NL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(logits_NLV, model(input_ids=tokens_NL).logits)
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, sliding_window=None)
    with torch.no_grad():
        assert not torch.equal(logits_NLV, wide(input_ids=tokens_NL).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_compressed_output_loads_with_the_shapes_and_dtype_that_were_written(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """The loaded model, the stream over the output and the layers as they ran during compression agree."""
    out = tmp_path / "out"
    report = streamlap.compress(pico(family, dtype=dtype), out, ratio=0.4, files=(str(tokens),))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens_NL = load_tokens(tokens)
    _, logits_NLV = run_stream(out, tokens_NL)
    with torch.no_grad():
        assert torch.equal(logits_NLV, model(input_ids=tokens_NL).logits)
    stream = ModelStream(out)
    assert {stream.source.info(name).dtype for name in stream.source.names()} == {dtype}
    loaded = sum(parameter.numel() for parameter in model.parameters())
    assert loaded == report.parameters.total_after == streamlap.inspect(out)["parameters"]["total_after"]


def test_biases_survive(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source, out = pico("qwen2"), tmp_path / "out"
    streamlap.compress(source, out, ratio=0.4, files=(str(tokens),))
    before, after = ModelStream(source).source, ModelStream(out).source
    for path in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{path}.bias"
        assert torch.equal(before.read(name), after.read(name))


def test_ffn_biases_follow_the_kept_channels(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source, out = pico("llama", mlp_bias=True, attention_bias=True), tmp_path / "out"
    report = streamlap.compress(source, out, ratio=0.4, files=(str(tokens),))
    before, after = ModelStream(source).source, ModelStream(out).source
    kept = torch.tensor(next(e.kept for e in report.layers[1].edits if e.path == "mlp.gate_proj"))
    name = "model.layers.1.mlp.{}_proj.bias"
    assert torch.equal(before.read(name.format("up"))[kept], after.read(name.format("up")))
    assert torch.equal(before.read(name.format("down")), after.read(name.format("down")))


@pytest.mark.parametrize(
    ("stored", "native", "computed"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.float32, True, torch.float32),
    ],
)
def test_a_processor_computes_in_bfloat16_where_it_can_and_the_checkpoint_has_it(
    pico: MakeModel, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, native: bool, computed: torch.dtype
) -> None:
    monkeypatch.setattr("streamlap.families.stream.cpu_has_bfloat16", lambda: native)
    assert ModelStream(pico("llama", dtype=stored)).dtype == computed
    assert ModelStream(pico("llama", dtype=stored), dtype="float16").dtype == torch.float16


def test_peak_memory_holds_one_layer(pico: MakeModel) -> None:
    """The stream's own modules stay on meta after a layer was made and used."""
    stream = ModelStream(pico("llama"))
    stream.layer(0, stream.layer_kwargs(8)[0])(torch.zeros(1, 8, stream.width))
    assert {tensor.device.type for tensor in stream.model.state_dict().values()} == {"meta"}
