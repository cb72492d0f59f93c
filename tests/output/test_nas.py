"""The format nas: what is written, what transformers makes of it with and without streamlap, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from crashes import crash_after
from folders import FAMILIES as CONFIGS_OF
from folders import logits as model_logits
from folders import make_case
from outputs import contents
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import CheckpointError, UnsupportedModel
from streamlap.families.linears import ROLES
from streamlap.families.stream import ModelStream
from streamlap.loader.configuration_nas import DeciLMConfig, ffn_width
from streamlap.loader.forms import Dense, Form, LowRank, Removed
from streamlap.output.formats import CONFIGS
from streamlap.output.nas import block
from streamlap.planning.survey_file import Point, Survey, model_digest

IDS_BL = torch.arange(24).reshape(2, 12) * 7 % 96
GONE = 1
"""The layer whose attention is gone."""

REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True)
assert "streamlap" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.arange(24).reshape(2, 12) * 7 % 96).logits, sys.argv[2])
"""


def survey_of(source: Path, file: Path) -> str:
    """One by which the attention of GONE goes, and later FFNs keep more."""
    stream = ModelStream(source)

    def kl(index: int, name: str) -> float:
        return 0.01 * (1 + index) if name == "ffn" else 1e-4 if index == GONE else 9.0

    layers = tuple(
        {name: (Point(keep=keep, kl=kl(index, name), error=0.5),) for name, keep in (("attention", 0.0), ("ffn", 0.8))}
        for index in range(stream.depth)
    )
    found = Survey(model=model_digest(stream), calibration="", compute="", layers=layers, shape="nas")
    file.write_text(json.dumps(found.to_json()))
    return str(file)


def settings(source: Path, tokens: Path, folder: Path) -> dict[str, Any]:
    return {"ratio": 0.3, "survey": survey_of(source, folder / "survey.json"), "files": (str(tokens),), "multiple": 4}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: torch.Tensor = model(IDS_BL).logits
    return found


@pytest.fixture(params=["llama", "qwen2"])
def source(request: pytest.FixtureRequest, pico: MakeModel) -> Path:
    return pico(request.param, intermediate_size=96, tied=request.param == "qwen2")


def test_it_is_what_the_factored_folder_is(source: Path, tokens: Path, tmp_path: Path) -> None:
    """Written at once or exported, loaded by transformers, streamed, made dense, saved and loaded again as code of a folder."""
    given = settings(source, tokens, tmp_path)
    nas, factored = tmp_path / "nas", tmp_path / "factored"
    plan = streamlap.plan(source, format="nas", **given)
    report = streamlap.compress(source, nas, format="nas", **given)
    streamlap.compress(source, factored, shape="nas", **given)
    streamlap.export(factored, tmp_path / "exported", to="nas")
    shards = sorted(path.name for path in nas.glob("*.safetensors"))
    for name in (*shards, "config.json", "modeling_nas.py", "configuration_nas.py"):
        assert (nas / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name
    assert plan.output_bytes == sum((nas / name).stat().st_size for name in shards)
    assert streamlap.verify(nas)["ok"]

    model = AutoModelForCausalLM.from_pretrained(nas, dtype=torch.float32)
    assert report.parameters.total_after == sum(parameter.numel() for parameter in model.parameters())
    assert torch.equal(logits(nas), logits(factored))
    assert streamlap.evaluate(nas, tokens).nll == streamlap.evaluate(factored, tokens).nll
    kinds = [layer["sites"]["self_attn.q_proj"]["kind"] for layer in streamlap.inspect(nas)["layers"]]
    assert kinds == ["dense", "removed", "dense"]

    streamlap.export(nas, tmp_path / "dense", to="dense")
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(nas))
    model.save_pretrained(tmp_path / "again")
    if "qwen2" in source.name:  # once: it takes seconds to start Python
        subprocess.run([sys.executable, "-c", REMOTE, tmp_path / "again", tmp_path / "logits.pt"], check=True)
        assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(nas))


def test_sizes_are_the_same_wherever_they_are_asked_for(source: Path, tokens: Path, tmp_path: Path) -> None:
    """The norms of attentions that are gone, and the zeros that o gets for a bias, count as what they are: gone, and new."""
    given = settings(source, tokens, tmp_path)
    report = streamlap.compress(source, tmp_path / "nas", format="nas", **given).parameters
    before, written = (streamlap.inspect(folder)["parameters"] for folder in (source, tmp_path / "nas"))
    assert written == report.to_json()
    assert {name: written[name] for name in ("decoder_before", "total_before")} == {
        name: before[name] for name in ("decoder_before", "total_before")
    }
    linears = [name for name in stored_sizes(tmp_path / "nas") if "_proj." in name]
    assert report.decoder_after == sum(stored_sizes(tmp_path / "nas")[name] for name in linears)

    streamlap.compress(source, tmp_path / "factored", shape="nas", **given)
    streamlap.export(tmp_path / "factored", tmp_path / "exported", to="nas")
    for number in (report.decoder_before, report.decoder_after, report.total_before, report.total_after):
        assert f" {number:,} " in (tmp_path / "exported" / "README.md").read_text()


def stored_sizes(folder: Path) -> dict[str, int]:
    return {name: tensor.numel() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_caches_and_names(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source = pico("llama", intermediate_size=96)
    streamlap.compress(source, tmp_path / "out", format="nas", **settings(source, tokens, tmp_path))
    with safe_open(tmp_path / "out" / "model-00003-of-00004.safetensors", "pt") as shard:  # type: ignore[no-untyped-call]
        assert {name.split(".")[3] for name in shard.keys()} == {"mlp", "post_attention_layernorm"}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        begun = model(IDS_BL[:, :6], use_cache=True)
        last = model(IDS_BL[:, 6:], past_key_values=begun.past_key_values).logits
    torch.testing.assert_close(last, logits(tmp_path / "out")[:, 6:], rtol=1e-5, atol=1e-5)
    assert [getattr(layer, "keys", None) is not None for layer in begun.past_key_values.layers][:2] == [True, True]


def test_a_killed_run_gives_the_same_bytes(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pico("llama", intermediate_size=96)
    given = settings(source, tokens, tmp_path) | {"format": "nas"}
    streamlap.compress(source, tmp_path / "whole", **given)
    crash_after(2, monkeypatch, lambda: streamlap.compress(source, tmp_path / "out", **given))
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("biased", [("q",), ("k", "o"), ("o",), ("up",)])
def test_biases_of_some_linears_of_some_layers_stay(tmp_path: Path, biased: tuple[str, ...]) -> None:
    """There is one flag for the attention of all layers."""
    case = make_case(
        tmp_path / "out", CONFIGS_OF["llama"](), {f"model.layers.1.{ROLES[role]}": {"bias": 1} for role in biased}
    )
    streamlap.export(case.folder, tmp_path / "nas", to="nas")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nas")
    assert torch.equal(model_logits(model), model_logits(case.reference))
    assert model.config.attention_bias == (biased != ("up",))
    stored = {name for shard in (tmp_path / "nas").glob("*.safetensors") for name in load_file(shard)}
    assert stored == {name for name, _ in model.named_parameters()}
    assert streamlap.verify(tmp_path / "nas")["ok"]


# --- config.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [64, 576, 2560, 3072, 4096, 8192])
def test_engines_find_the_width_that_is_written(hidden: int) -> None:
    for width in range(256, 4 * hidden, 256):
        forms: dict[str, Form] = {"q": Dense((hidden, hidden)), "down": Dense((hidden, width))}
        ffn = json.loads(json.dumps(block(forms, hidden, 4, exact=False)))["ffn"]
        assert "intermediate_size" not in ffn
        assert ffn_width(ffn, hidden) == width


def test_blocks_are_tables_with_attributes() -> None:
    found = DeciLMConfig(block_configs=[{"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.5}}])
    (first,) = found.block_configs
    assert (first.attention.no_op, first["ffn"].ffn_mult) == (True, 2.5)
    assert not hasattr(first.ffn, "intermediate_size")
    assert json.loads(found.to_json_string())["block_configs"] == [first]
    with pytest.raises(ValueError, match="wanted a list with a table for each layer"):
        DeciLMConfig(block_configs=["no table"])


def layers_of(source: Path, change: Callable[[int, str, Dense], Form]) -> tuple[ModelStream, list[dict[str, Form]]]:
    stream = ModelStream(source)
    rows = [
        {role: change(index, role, native) for role, native in stream.natives(index).items()}
        for index in range(stream.depth)
    ]
    return stream, rows


REFUSED: dict[str, tuple[str, Callable[[int, str, Dense], Form], str]] = {
    "first attention": ("llama", lambda i, r, d: Removed(d.shape) if i == 0 and r in "qkvo" else d, "is removed"),
    "an FFN alone": ("llama", lambda i, r, d: Removed(d.shape) if i == 1 and r not in "qkvo" else d, "is removed"),
    "factors": ("llama", lambda i, r, d: LowRank(d.shape, rank=3) if i == 1 and r == "q" else d, "is low_rank"),
    "other heads": ("llama", lambda i, r, d: Dense((16, 32)) if i == 1 and r == "q" else d, "the same heads"),
    "norms of q and k": ("qwen3", lambda i, r, d: d, "this is a qwen3"),
    "windows": ("mistral", lambda i, r, d: d, "mistral with a sliding window"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_would_get_wrong_is_refused(pico: MakeModel, case: str) -> None:
    family, change, words = REFUSED[case]
    options = {"sliding_window": 8} if family == "mistral" else {}
    with pytest.raises(UnsupportedModel, match=words):
        CONFIGS["nas"](*layers_of(pico(family, **options), change))


def test_tokens_that_config_leaves_out_are_those_of_the_source(pico: MakeModel) -> None:
    """A llama without them would end texts at token 2."""
    stream, rows = layers_of(pico("qwen2"), lambda i, r, d: d)
    stream.raw_config = {k: v for k, v in stream.raw_config.items() if not k.endswith("_token_id")}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(stream.config, key, None)
        assert CONFIGS["nas"](stream, rows)[key] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda blocks: blocks[:2], "wanted a list with one for each of 3"),
        (lambda blocks: [*blocks[:2], {"attention": {}}], "wanted attention and ffn"),
        (lambda blocks: [*blocks[:2], blocks[2] | {"ffn": {"ffn_mult": 1e30}}], "wanted one of ffn_mult"),
        (lambda blocks: [*blocks[:2], blocks[2] | {"ffn": {"no_op": True}}], "wanted an FFN"),
        (lambda blocks: [*blocks[:2], blocks[2] | {"ffn": {"intermediate_size": 96.5}}], "wanted one of ffn_mult"),
        (lambda blocks: [*blocks[:2], blocks[2] | {"attention": {"n_heads_in_group": 1}}], "n_heads_in_group"),
    ],
)
def test_blocks_that_no_layer_can_have_are_refused(
    pico: MakeModel, tmp_path: Path, change: Callable[[list[Any]], list[Any]], words: str
) -> None:
    stream, layers = layers_of(pico("llama", intermediate_size=96), lambda i, r, d: d)
    table = json.loads(json.dumps(CONFIGS["nas"](stream, layers)))
    assert {len(table["block_configs"]), table["block_configs"][0]["ffn"]["intermediate_size"]} == {3, 96}
    for path in stream.folder.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert ModelStream(tmp_path).rows == {}
    (tmp_path / "config.json").write_text(json.dumps(table | {"block_configs": change(table["block_configs"])}))
    with pytest.raises(CheckpointError, match=words) as refused:
        ModelStream(tmp_path)
    assert "config.json" in str(refused.value)
