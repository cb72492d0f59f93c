"""verify sees every fault at once and changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file, save_file

import streamlap
from streamlap.errors import CheckpointError

SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def finished(pico: MakeModel, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "out"
    streamlap.compress(pico("llama"), out, ratio=0.4, preset="lorap", files=(str(tokens),))
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def faults(out: Path) -> str:
    result = streamlap.verify(out)
    assert result["ok"] == (not result["faults"])
    return json.dumps(result["faults"])


def test_a_whole_folder_has_no_fault(out: Path, pico: MakeModel) -> None:
    assert faults(out) == "[]"
    assert faults(pico("qwen2")) == "[]"


def test_one_flipped_bit_is_found(out: Path) -> None:
    raw = bytearray((out / SHARD).read_bytes())
    raw[-3] ^= 1
    (out / SHARD).write_bytes(raw)
    assert "sha256" in faults(out)


def test_a_missing_and_a_truncated_shard_are_found(out: Path) -> None:
    (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-8])
    assert "truncated" in faults(out)
    (out / SHARD).unlink()
    assert "missing" in faults(out)


def test_a_fault_of_all_weights_is_that_of_their_file(out: Path, pico: MakeModel, tmp_path: Path) -> None:
    single = Path(shutil.copytree(pico("llama"), tmp_path / "single"))
    for folder, name in ((single, "model.safetensors"), (out, SHARD)):
        (folder / name).write_bytes(b"not safetensors")
    assert [row["file"] for row in streamlap.verify(single)["faults"]] == ["model.safetensors"]
    assert [row["file"] for row in streamlap.verify(out)["faults"]] == [SHARD, "model.safetensors.index.json"]


def test_numbers_that_are_not_finite_are_named(out: Path) -> None:
    tensors = load_file(out / SHARD)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, out / SHARD, {"format": "pt"})
    named = [row["tensor"] for row in streamlap.verify(out)["faults"]]
    assert named == [None, name]


def test_shapes_are_held_against_the_config(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["out"] += 1
    (out / "config.json").write_text(json.dumps(config))
    assert "model.layers.0.mlp.up_proj.weight" in faults(out)


def test_an_unfinished_folder_is_called_that(out: Path) -> None:
    (out / ".streamlap").mkdir()
    (out / ".streamlap" / "journal.jsonl").touch()
    assert "not finished" in faults(out)
    named = out.rename(out.parent / "my out")
    assert streamlap.verify(named)["faults"][0]["fault"].endswith(f"go on with: streamlap resume '{named}'")


def test_a_folder_without_config_is_no_model(out: Path) -> None:
    (out / "config.json").unlink()
    assert "not a model" in faults(out)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        streamlap.verify(tmp_path / "nowhere")
