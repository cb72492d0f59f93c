"""The contract of every family: nothing removed means the same bits as transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path

import folders
import numpy as np
import pytest
import torch
from conftest import MakeModel
from folders import TOKENS_BL, Case, Rows, all_kinds, edit_config, logits, make_case
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import CheckpointError, UnsupportedModel
from streamlap.families.opening import COMPUTE_DTYPES
from streamlap.families.stream import ModelStream, batch_of
from streamlap.families.table import FAMILIES
from streamlap.loader.forms import index_parameters
from streamlap.planning.workload import evaluation_workload
from streamlap.store.hidden import HiddenBank

CASES = [("llama", True), *((name, False) for name in FAMILIES)]


def load_tokens(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path).astype(np.int64))


def run_stream(
    folder: Path, tokens_NL: torch.Tensor, dtype: str = "float32"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states before every layer and after the last, and the logits."""
    stream = ModelStream(folder, dtype=dtype)
    shape_NLD, batch = (*tokens_NL.shape, stream.width), batch_of(tokens_NL.shape[1])
    bank = HiddenBank(shape_NLD, stream.dtype, batch)
    kwargs = stream.layer_kwargs(tokens_NL.shape[1])
    bank.write(0, stream.embed(tokens_NL))
    states = [torch.cat(list(bank.read(0)))]
    for index in range(stream.depth):
        layer = stream.layer(index, kwargs[index])
        bank.write(index + 1, (layer(x_BLD) for x_BLD in bank.read(index)))
        states.append(torch.cat(list(bank.read(index + 1))))
    head = stream.head()
    return states, torch.stack([head(x_LD) for x_LD in states[-1]])


@pytest.mark.parametrize(("tied", "sharded", "dtype"), [(False, False, "float32"), (True, True, "bfloat16")])
@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("preset", ["best", "lorap"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float16), ("llama", torch.float32), *((family, torch.bfloat16) for family in FAMILIES)],
)
def test_compressed_output_loads_with_the_shapes_and_dtype_that_were_written(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, dtype: torch.dtype, preset: str
) -> None:
    """The loaded model, the stream over the output and the layers as they ran during compression agree."""
    out = tmp_path / "out"
    report = streamlap.compress(pico(family, dtype=dtype), out, ratio=0.4, preset=preset, files=(str(tokens),))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens_NL = load_tokens(tokens)
    _, logits_NLV = run_stream(out, tokens_NL)
    with torch.no_grad():
        assert torch.equal(logits_NLV, model(input_ids=tokens_NL).logits)
    stream = ModelStream(out)
    orders = [stream.source.info(name) for name in stream.source.names() if name.endswith(".order")]
    assert {info.dtype for info in orders} == ({torch.int32} if preset == "best" else set())
    assert {stream.source.info(name).dtype for name in stream.source.names()} - {torch.int32} == {dtype}
    loaded = sum(parameter.numel() for parameter in model.parameters())
    loaded += sum(index_parameters(info.numel, dtype.itemsize) for info in orders)
    assert loaded == report.parameters.total_after == streamlap.inspect(out)["parameters"]["total_after"]


def test_biases_survive(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source, out = pico("qwen2"), tmp_path / "out"
    streamlap.compress(source, out, ratio=0.4, files=(str(tokens),))
    before, after = ModelStream(source).source, ModelStream(out).source
    for path in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{path}.bias"
        assert torch.equal(before.read(name), after.read(name))


@pytest.mark.parametrize("preset", ["best", "lorap", "loraprune"])
def test_ffn_biases_follow_the_kept_channels(pico: MakeModel, tokens: Path, tmp_path: Path, preset: str) -> None:
    source, out = pico("llama", mlp_bias=True, attention_bias=True), tmp_path / "out"
    report = streamlap.compress(source, out, ratio=0.4, preset=preset, files=(str(tokens),))
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


def native_biases(family: str) -> Rows:
    """Every kind, without the biases that the family cannot hold."""
    flagged = {"llama": "", "qwen3": "self_attn"}.get(family, "no path")
    rows = all_kinds(16 if family in ("mistral", "qwen3") else 8)
    return {path: {k: v for k, v in row.items() if k != "bias" or flagged in path} for path, row in rows.items()}


@pytest.fixture(params=["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def kinds(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """A folder with every kind of row."""
    rows = {path: row for path, row in native_biases(request.param.split("-")[0]).items() if row}
    return make_case(tmp_path / "kinds", folders.FAMILIES[request.param](), rows)


def test_every_kind_streams_as_it_runs_in_memory(kinds: Case) -> None:
    _, logits_NLV = run_stream(kinds.folder, TOKENS_BL)
    assert torch.equal(logits_NLV, logits(kinds.reference))
    np.save(kinds.folder / "tokens.npy", TOKENS_BL.numpy())
    wanted = kinds.reference(input_ids=TOKENS_BL, labels=TOKENS_BL).loss.item()
    found = streamlap.evaluate(kinds.folder, kinds.folder / "tokens.npy")
    assert found.nll == pytest.approx(wanted, rel=1e-5)
    assert streamlap.verify(kinds.folder) == {"ok": True, "faults": []}


def test_every_kind_streams_in_half_precision(tmp_path: Path) -> None:
    """An order among weights that are converted stays what it is."""
    case = make_case(tmp_path, folders.FAMILIES["llama"](), all_kinds(8), torch.bfloat16)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(run_stream(tmp_path, TOKENS_BL)[1], logits(wide))
    np.save(tmp_path / "tokens.npy", TOKENS_BL.numpy())
    for dtype, model, rel in (("bfloat16", case.reference, 1e-2), ("float32", wide, 1e-6)):
        wanted = model(input_ids=TOKENS_BL, labels=TOKENS_BL).loss.item()
        for overlap in (True, False):
            found = streamlap.evaluate(tmp_path, tmp_path / "tokens.npy", dtype=dtype, overlap=overlap)
            assert found.nll == pytest.approx(wanted, rel=rel)


def test_every_kind_exports_to_a_dense_model(kinds: Case, tmp_path: Path) -> None:
    streamlap.export_dense(kinds.folder, tmp_path / "dense")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(model), logits(kinds.reference), atol=1e-4, rtol=1e-4)
    assert streamlap.verify(tmp_path / "dense")["ok"]


@pytest.mark.parametrize(
    ("family", "path"), [("mistral", "self_attn.o_proj"), ("qwen2", "self_attn.o_proj"), ("qwen3", "mlp.down_proj")]
)
def test_a_bias_that_the_family_cannot_hold_is_not_exported(tmp_path: Path, family: str, path: str) -> None:
    case = make_case(tmp_path / "out", folders.FAMILIES[family](), {f"model.layers.1.{path}": {"bias": 1}})
    with pytest.raises(UnsupportedModel, match=rf"model\.layers\.1\.{path} has a bias, and {family} has no place"):
        streamlap.export_dense(case.folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inspect_counts_what_is_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    case = make_case(tmp_path, folders.FAMILIES["llama"](), all_kinds(8), dtype)
    table = streamlap.inspect(tmp_path)
    # An order counts as the weights that would take its bytes.
    stored = {name: t.nbytes // dtype.itemsize for name, t in case.tensors.items()}
    assert table["parameters"]["total_after"] == sum(stored.values())
    for layer in table["layers"]:
        for path, site in layer["sites"].items():
            prefix = f"model.layers.{layer['index']}.{path}."
            assert site["parameters"] == sum(n for name, n in stored.items() if name.startswith(prefix)), path
    first, second = (layer["sites"] for layer in table["layers"])
    seen = {path: (site["kind"], site["shape"], site["rank"], site["width"]) for path, site in first.items()}
    assert seen == {
        "self_attn.q_proj": ("pivoted", [32, 32], 7, None),
        "self_attn.k_proj": ("pivoted", [16, 32], 4, None),
        "self_attn.v_proj": ("low_rank", [16, 32], 5, None),
        "self_attn.o_proj": ("low_rank", [32, 32], 6, None),
        "mlp.gate_proj": ("pivoted", [33, 32], 6, None),
        "mlp.up_proj": ("pivoted", [33, 32], 5, None),
        "mlp.down_proj": ("pruned", [32, 33], None, 33),
    }
    assert [second[f"mlp.{name}_proj"]["kind"] for name in ("gate", "up", "down")] == ["low_rank", "dense", "dense"]
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    assert streamlap.inspect(tmp_path)["parameters"]["total_after"] > wanted, "num_parameters knows no buffers"


def test_an_order_is_no_reason_to_convert_a_layer(tmp_path: Path) -> None:
    """It stays int32 in memory too, and the weights stay where they were read."""
    case = make_case(tmp_path, folders.FAMILIES["llama"](), all_kinds(8), torch.bfloat16)
    layers = [{n: t for n, t in case.tensors.items() if n.startswith(f"model.layers.{i}.")} for i in (0, 1)]
    work = evaluation_workload(ModelStream(tmp_path, dtype="bfloat16"), 2, 12)
    assert not work.converts
    assert work.computed == max(sum(t.nbytes for t in tensors.values()) for tensors in layers)
    wide = evaluation_workload(ModelStream(tmp_path, dtype="float32"), 2, 12)
    assert wide.converts
    assert wide.computed == max(4 * sum(t.numel() for t in tensors.values()) for tensors in layers)


def test_an_order_is_checked(tmp_path: Path) -> None:
    row = {"model.layers.0.self_attn.o_proj": {"pivots": 7}}
    case, name = make_case(tmp_path / "out", folders.FAMILIES["llama"](), row), "model.layers.0.self_attn.o_proj.order"
    out = case.folder
    np.save(out / "tokens.npy", TOKENS_BL.numpy())
    twice = case.tensors | {name: torch.zeros(32, dtype=torch.int32)}
    save_file(twice, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{name}' is no permutation"):
        streamlap.evaluate(out, out / "tokens.npy")
    with pytest.raises(CheckpointError, match=f"'{name}' is no permutation"):
        streamlap.export_dense(out, tmp_path / "dense")
    (fault,) = streamlap.verify(out)["faults"]
    assert fault["tensor"] == name
    long = case.tensors | {name: torch.arange(32)}
    save_file(long, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=f"'{name}' has dtype torch.int64; wanted torch.int32"):
        ModelStream(out)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    case = make_case(tmp_path, folders.FAMILIES["llama"](), all_kinds(8))
    name = "model.layers.0.self_attn.q_proj.rest.weight"
    save_file(case.tensors | {name: case.tensors[name].int()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=f"'{name}' has dtype torch.int32; wanted float32"):
        ModelStream(tmp_path)


def test_version_1_is_read_and_a_later_one_is_not(tmp_path: Path) -> None:
    make_case(tmp_path, folders.FAMILIES["llama"](), folders.MIXED)
    table = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for version in (1, 2):
        edit_config(tmp_path, quantization_config=table | {"format_version": version})
        assert ModelStream(tmp_path).rows == folders.MIXED
    edit_config(tmp_path, quantization_config=table | {"format_version": 3})
    with pytest.raises(UnsupportedModel, match="format_version 3; this streamlap reads 1 and 2"):
        ModelStream(tmp_path)
