"""What people give in the place of a checkpoint is named for what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeModel

import streamlap
from streamlap.errors import CheckpointError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base\n"}))
    return touch(folder, "adapter_model.safetensors")


def repository(folder: Path) -> Path:
    return touch(folder, "models--org--m/snapshots/0123/config.json", "models--org--m/refs/main") / "models--org--m"


GIVEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "adapter": (adapter, r"is a PEFT adapter, and no model; wanted the two in one. Merge it into 'org/base\\n': PeftModel"),
    "diffusers": (lambda f: touch(f, "model_index.json", "unet/config.json"), "is a diffusers pipeline"),
    "gguf folder": (lambda f: touch(f, "README.md", "m-Q4_K_M.gguf"), "holds m-Q4_K_M.gguf, a GGUF container; wanted a"),
    "gguf file": (lambda f: touch(f, "m.GGUF") / "m.GGUF", r"m.GGUF is a GGUF container; .*gguf_file='m.GGUF'"),
    "Meta's": (lambda f: touch(f, "params.json", "consolidated.00.pth"), r"layout of its makers \(params.json"),
    "Mistral's": (lambda f: touch(f, "params.json", "consolidated.safetensors", "tekken.json"), "layout of its makers"),
    "a shard": (lambda f: touch(f, "model.safetensors") / "model.safetensors", "is a file; wanted the folder .* Give "),
    "the folder above": (lambda f: touch(f, "m/config.json"), "holds no config.json, and .*/m does; give that folder"),
    "the cache's folder": (repository, "models--org--m holds no config.json, and .*/snapshots/0123 does"),
    "two models": (lambda f: touch(f, "a/config.json", "b/config.json"), "config.json: No such|holds neither"),
    "nothing": (lambda f: f, "config.json: No such|holds neither"),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVEN)
def test_it_is_named(tmp_path: Path, tokens: Path, case: str) -> None:
    make, words = GIVEN[case]
    given = make(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        streamlap.compress(given, tmp_path / "out", files=(str(tokens),))
    assert "\n" not in str(caught.value)
    assert "etch" not in str(caught.value), "nothing of it is better when it is fetched again"
    with pytest.raises(CheckpointError, match=words):
        streamlap.plan(given, files=(str(tokens),))


def test_a_path_that_is_given_back_can_be_pasted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Give '.*/my models'\.$"):
        streamlap.inspect(touch(tmp_path / "my models", "model.safetensors") / "model.safetensors")


def test_weights_under_another_name(pico: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("llama"), tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(
        CheckpointError, match=r"but weights.safetensors; .* Rename the file, or name it in config.json as"
    ):
        streamlap.inspect(folder)
    touch(folder, "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"Shards need their index, under that name or named in config.json"):
        streamlap.inspect(folder)
    touch(folder, "model.gguf")
    with pytest.raises(CheckpointError, match=r"holds model.gguf, a GGUF container"):
        streamlap.inspect(folder)


def test_other_files_beside_a_checkpoint_do_not_matter(pico: MakeModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico("mistral"), tmp_path / "model"))
    touch(folder, "consolidated.safetensors", "params.json", "model.gguf", "model_index.json")
    assert streamlap.inspect(folder)["model_type"] == "mistral"
