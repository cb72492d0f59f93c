"""Linears that share a matrix: apart in memory and in the factored format, one matrix in a plain checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import MakeModel
from crashes import crash_after
from folders import edit_config
from outputs import contents
from safetensors.torch import load_file, save_file
from test_stream import load_tokens, run_stream
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import streamlap
from streamlap.errors import CheckpointError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES
from streamlap.loader.linears import JoinedLinear
from streamlap.loader.modules import Skipped, swap_modules

JOINED = [name for name, family in FAMILIES.items() if family.joined]
KNOBS: dict[str, Any] = {"epochs": 1, "rank": 3, "learning_rate": 0.02, "batch": 4, "distil": 0.0}


@pytest.fixture(params=JOINED)
def source(request: pytest.FixtureRequest, pico: MakeModel) -> Path:
    return pico(request.param, num_hidden_layers=2)


@torch.no_grad()
def logits(model: Any, tokens: Path) -> torch.Tensor:
    model = model if isinstance(model, torch.nn.Module) else AutoModelForCausalLM.from_pretrained(model)
    found: torch.Tensor = model(load_tokens(tokens)).logits
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_taken_apart_and_put_together_it_is_the_same_checkpoint(source: Path, tokens: Path, tmp_path: Path) -> None:
    streamlap.compress(source, tmp_path / "out", methods=(), files=(str(tokens),))
    streamlap.export(tmp_path / "out", tmp_path / "dense")
    before, after = tensors(source), tensors(tmp_path / "dense")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    whole, apart = (streamlap.inspect(folder)["parameters"] for folder in (source, tmp_path / "out"))
    assert apart == whole
    assert whole["total_after"] == sum(tensor.numel() for tensor in before.values())
    edit_config(tmp_path / "out", quantization_config=None)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("preset", ["best", "loraprune"])
def test_a_compressed_one_is_saved_made_plain_and_recovered(
    source: Path, tokens: Path, tmp_path: Path, preset: str
) -> None:
    out = tmp_path / "out"
    streamlap.compress(source, out, ratio=0.5, preset=preset, files=(str(tokens),))
    model = streamlap.load(out)
    wanted_NLV = logits(model, tokens)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved", tokens), wanted_NLV)
    path = next(iter(ModelStream(source).joined))
    model.config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(ValueError, match=rf"'{path}': seen linears that are joined under .* 'colwise"):
        model.hf_quantizer.update_parallel_plan(model, {path.replace(".0.", ".*."): "colwise"})
    streamlap.export(out, tmp_path / "dense")
    model.dequantize()
    assert not any(isinstance(module, JoinedLinear) for module in model.modules())
    for plain in (model, tmp_path / "dense"):
        torch.testing.assert_close(logits(plain, tokens), wanted_NLV, rtol=1e-5, atol=1e-5)
    assert tensors(tmp_path / "dense").keys() == tensors(source).keys()
    np.save(tmp_path / "lesson.npy", np.tile(np.arange(16, dtype=np.uint16), (16, 1)))
    assert streamlap.recover(out, tmp_path / "again", tmp_path / "lesson.npy", **KNOBS).kept
    assert streamlap.verify(tmp_path / "again")["ok"]
    recovered = tensors(tmp_path / "again")
    assert {name: tensor.shape for name, tensor in tensors(out).items()} == {n: t.shape for n, t in recovered.items()}
    assert not torch.equal(logits(tmp_path / "again", tokens), wanted_NLV)
    with pytest.raises(UnsupportedModel, match=rf"linears that share a matrix, {path}; wanted them apart"):
        streamlap.recover(tmp_path / "dense", tmp_path / "never", tmp_path / "lesson.npy", **KNOBS)
    whole = get_peft_model_of(out, path.rpartition(".")[2])
    with pytest.raises(ValueError, match="seen it whole; wanted its parts, "):
        whole()


def get_peft_model_of(folder: Path, name: str) -> Callable[[], object]:
    """What gives the model LoRA on the modules of that name."""
    return lambda: peft.get_peft_model(streamlap.load(folder), peft.LoraConfig(target_modules=[name]))


def test_a_plain_result_is_the_same_however_it_was_made(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, through the factored format, or by a run that died and went on under a cap."""
    settings: dict[str, Any] = {"ratio": 0.2, "files": (str(tokens),), "multiple": 8}
    streamlap.compress(source, tmp_path / "stock", format="stock", **settings)
    streamlap.compress(source, tmp_path / "factored", shape="stock", **settings)
    streamlap.export(tmp_path / "factored", tmp_path / "exported", to="stock")

    def run() -> object:
        return streamlap.compress(source, tmp_path / "again", format="stock", max_ram="2GiB", **settings)

    crash_after(1, monkeypatch, run)
    run()
    made, exported = contents(tmp_path / "stock"), contents(tmp_path / "exported")
    assert contents(tmp_path / "again") == made
    assert all(exported[name] == made[name] for name in made if name.endswith(".safetensors") or name == "config.json")
    assert torch.equal(logits(tmp_path / "stock", tokens), logits(tmp_path / "factored", tokens))
    plan = streamlap.plan(source, format="stock", **settings)
    assert sum(len(data) for name, data in made.items() if name.endswith(".safetensors")) == plan.output_bytes


def test_sub_layers_that_are_gone_are_skipped(source: Path, tokens: Path) -> None:
    model, family = AutoModelForCausalLM.from_pretrained(source), ModelStream(source).family
    stream, name = ModelStream(source), f"{family.layers}.1"
    with torch.no_grad():
        for role in ("o", "down"):
            linear: Any = model.get_submodule(stream.linear_name(1, role))
            linear.weight.zero_()
            linear.bias = None
    wanted_NLV = logits(model, tokens)
    matrices = {path: row for path, row in stream.joined.items() if path.startswith(name)}
    swap_modules(model, matrices | {f"{name}.{path}": {"removed": 1} for path in family.paths})
    for part in family.sublayers.values():
        assert isinstance(model.get_submodule(f"{name}.{part.module}").__dict__["forward"], Skipped)
    torch.testing.assert_close(logits(model, tokens), wanted_NLV)


def test_layers_that_are_not_parallel(pico: MakeModel, tokens: Path) -> None:
    folder = pico("gpt_neox", use_parallel_residual=False)
    assert not ModelStream(folder).parallel(0)
    torch.testing.assert_close(run_stream(folder, load_tokens(tokens))[1], logits(folder, tokens))


def test_a_matrix_of_other_rows_is_refused(source: Path, tmp_path: Path) -> None:
    folder, path = Path(shutil.copytree(source, tmp_path / "source")), next(iter(ModelStream(source).joined))
    found = load_file(folder / "model.safetensors")
    save_file(found | {f"{path}.weight": found[f"{path}.weight"][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weight' .* has shape \[95, 32\]; config.json wants \d+ \+ \d+.* rows"):
        ModelStream(folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda rows, path: rows.pop(path), "has no row for .*; wanted {.*'parts': "),
        (
            lambda rows, path: rows.update({f"{path.rpartition('.')[0]}.no": {"parts": 2}}),
            "has .*no': {'parts': 2}; wanted",
        ),
        (
            lambda rows, path: rows.update({f"{path}.{'q' if 'key' in path else 'up'}": {"parts": 2}}),
            "'parts': 2}; wanted",
        ),
        (lambda rows, path: rows.update({path: {"parts": 4}}), "has .*: {'parts': 4}; wanted linears of"),
        (lambda rows, path: rows.update({path: {"parts": 2, "head_dim": 5}}), "has .*'head_dim': 5.*; wanted"),
    ],
)
def test_a_table_that_tells_otherwise_is_refused(
    source: Path, tokens: Path, tmp_path: Path, edit: Any, words: str
) -> None:
    streamlap.compress(source, tmp_path / "out", methods=(), files=(str(tokens),))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    edit(config["quantization_config"]["modules"], next(iter(ModelStream(source).joined)))
    edit_config(tmp_path / "out", quantization_config=config["quantization_config"])
    with pytest.raises(CheckpointError, match=words):
        ModelStream(tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"parts": 5}, r"seen {'parts': 5}; wanted 'parts', one of 2, 3 that divides the 96 rows"),
        ({"parts": 3, "rank": 2}, r"seen .*'rank': 2.*; wanted 'parts'"),
        ({"parts": 3, "head_dim": 5}, "seen head_dim = 5; wanted a divisor of 32"),
        ({"parts": 3, "head_dim": None}, "seen head_dim = None; wanted an integer 1..32"),
    ],
)
def test_a_row_that_does_not_fit_replaces_nothing(pico: MakeModel, row: dict[str, Any], words: str) -> None:
    model, path = AutoModelForCausalLM.from_pretrained(pico("gpt_neox")), "gpt_neox.layers.1.attention.query_key_value"
    with pytest.raises(ValueError, match=words):
        swap_modules(model, {path: row})
    assert isinstance(model.get_submodule(path), torch.nn.Linear)


def test_heads_that_a_plain_one_cannot_lose(tokens: Path, pico: MakeModel, tmp_path: Path) -> None:
    source = pico("gpt_neox", num_hidden_layers=1)
    streamlap.compress(source, tmp_path / "out", ratio=0.5, preset="loraprune", files=(str(tokens),))
    with pytest.raises(UnsupportedModel, match="wanted the format"):
        streamlap.export(tmp_path / "out", tmp_path / "stock", to="stock")
