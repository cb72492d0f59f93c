"""Which files are read where a folder holds several: those that transformers reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, make_pico
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import CheckpointError
from streamlap.store import source as source_room
from streamlap.store.header import read_header
from streamlap.store.shards import INDEX_NAME, SINGLE_NAME, files_in, find_shards
from streamlap.store.source import SafetensorsFolder, equal_numbers

UP_1 = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(pico: MakeModel, tmp_path: Path) -> Path:
    """A whole file, beside the index and the shards of other weights."""
    shutil.copytree(pico("llama", seed=1), tmp_path / "source")
    for path in pico("llama", seed=2, shard_size="60KB").glob("model*safetensors*"):
        shutil.copy(path, tmp_path / "source")
    return tmp_path / "source"


def configure(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def save_index(folder: Path, name: str, **weight_map: str) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def loss(folder: Path, tokens: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    with torch.no_grad():
        return float(model(ids_NL, labels=ids_NL).loss)


def check_loss(folder: Path, tokens: Path, out: Path) -> None:
    """Of the source, and of a result from which nothing was removed, by streamlap and by transformers."""
    wanted = loss(folder, tokens)
    assert streamlap.evaluate(folder, tokens).nll == pytest.approx(wanted, abs=1e-5)
    streamlap.compress(folder, out, ratio=0.2, files=(str(tokens),))
    assert streamlap.evaluate(out, tokens).nll == pytest.approx(loss(out, tokens), abs=1e-5)
    assert streamlap.verify(out)["ok"]


def test_the_whole_file_comes_before_an_index(
    folder: Path, tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_loss(folder, tokens, tmp_path / "out")
    caplog.clear()
    assert list(SafetensorsFolder(folder).headers) == [SINGLE_NAME]
    (record,) = caplog.records
    assert (
        "are those of model.safetensors, as transformers reads them; unused beside it: model-00001-of-00003"
        in record.getMessage()
    )
    assert "and 1 more" in record.getMessage()


def test_an_index_that_is_not_read_may_be_of_another_model(folder: Path, tokens: Path, tmp_path: Path) -> None:
    save_index(folder, INDEX_NAME, **{"model.layers.0.x": "model-00001-of-00099.safetensors"})
    check_loss(folder, tokens, tmp_path / "out")


@pytest.mark.parametrize("name", ["tuned.safetensors", "model.fp16.safetensors", "sub/tuned.safetensors"])
def test_config_may_name_the_file(
    pico: MakeModel, folder: Path, tokens: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(pico("llama", seed=3) / SINGLE_NAME, folder / name)
    configure(folder, transformers_weights=name)
    assert loss(folder, tokens) == pytest.approx(loss(pico("llama", seed=3), tokens))
    check_loss(folder, tokens, tmp_path / "out")
    assert f"are those of {name}" in caplog.text
    streamlap.export_dense(tmp_path / "out", tmp_path / "dense")
    for made in ("out", "dense"):
        assert "transformers_weights" not in json.loads((tmp_path / made / "config.json").read_text())
    assert loss(tmp_path / "dense", tokens) == pytest.approx(loss(tmp_path / "out", tokens), abs=1e-4)


def test_config_may_name_the_index(folder: Path, tokens: Path, tmp_path: Path) -> None:
    (folder / INDEX_NAME).rename(folder / "old.safetensors.index.json")
    configure(folder, transformers_weights="old.safetensors.index.json")
    assert len(SafetensorsFolder(folder).headers) == 3
    check_loss(folder, tokens, tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("gone.safetensors", "gone.safetensors is missing; config.json names it as transformers_weights"),
        ("../other.safetensors", "inside the folder"),
        ("/etc/x.safetensors", "inside the folder"),
        ("a\\b.safetensors", "inside the folder"),
        ("a\nb.safetensors", "inside the folder"),
        ("pytorch_model.bin", "the name of a .safetensors file"),
        ("", "the name of a .safetensors file"),
        (5, "transformers_weights 5"),
        ([], r"transformers_weights \[\]"),
    ],
)  # fmt: skip
def test_a_name_in_config_that_cannot_be_read(folder: Path, value: object, words: str) -> None:
    configure(folder, transformers_weights=value)
    for act in (lambda: SafetensorsFolder(folder), lambda: streamlap.inspect(folder)):
        with pytest.raises(CheckpointError, match=words):
            act()
    assert not streamlap.verify(folder)["ok"]


def test_a_link_that_config_names_stays_inside(folder: Path, tmp_path: Path) -> None:
    (folder / "sub").mkdir()
    (folder / SINGLE_NAME).rename(tmp_path / "outside.safetensors")
    (folder / "sub" / "x.safetensors").symlink_to("../../outside.safetensors")
    configure(folder, transformers_weights="sub/x.safetensors")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        streamlap.inspect(folder)


def test_a_variant_alone_is_not_read(folder: Path) -> None:
    for path in folder.glob("model-*"):
        path.unlink()
    (folder / INDEX_NAME).unlink()
    (folder / SINGLE_NAME).rename(folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"neither .* but model.fp16.safetensors; .* as transformers_weights"):
        SafetensorsFolder(folder)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(folder)


# --- a tensor in two shards ------------------------------------------------------------------------------------------


def overlaid(folder: Path, overlay: str, listed: str | None) -> None:
    """Other numbers for one tensor in a shard of their own, which the index of the folder has as `listed`."""
    (folder / SINGLE_NAME).unlink()
    save_file({UP_1: torch.full((48, 32), 0.02), "other": torch.ones(1)}, folder / overlay, {"format": "pt"})
    table = json.loads((folder / INDEX_NAME).read_text())["weight_map"] | {"other": overlay}
    if listed is None:
        del table[UP_1]
    elif listed:
        table[UP_1] = listed
    save_index(folder, INDEX_NAME, **table)


@pytest.mark.parametrize("overlay", ["z-overlay.safetensors", "a-overlay.safetensors"])
@pytest.mark.parametrize("listed", [True, False])
def test_the_last_shard_counts_as_in_transformers(
    folder: Path, tokens: Path, tmp_path: Path, overlay: str, listed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    overlaid(folder, overlay, overlay if listed else "")
    source = SafetensorsFolder(folder)
    assert (source.info(UP_1).path.name == overlay) is (overlay > "model")
    overruled = (overlay > "model") is not listed
    assert ("are read from another shard than model.safetensors.index.json says" in caplog.text) is overruled
    check_loss(folder, tokens, tmp_path / "out")


def test_a_tensor_twice_without_an_index_that_lists_it_is_refused(folder: Path) -> None:
    overlaid(folder, "z-overlay.safetensors", None)
    with pytest.raises(
        CheckpointError, match=f"'{UP_1}' stands in model-0000.* and in z-overlay.safetensors, and .* lists none"
    ):
        SafetensorsFolder(folder)


# --- an index that is not quite that of its shards -------------------------------------------------------------------


def indexed(pico: MakeModel, folder: Path, **entries: str | None) -> dict[str, str]:
    """A folder of shards whose index has other entries; None takes one out."""
    shutil.copytree(pico("llama", shard_size="60KB"), folder)
    table = json.loads((folder / INDEX_NAME).read_text())["weight_map"] | entries
    save_index(folder, INDEX_NAME, **{name: shard for name, shard in table.items() if shard is not None})
    return table


@pytest.mark.parametrize("name", ["lm_head.bias", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_an_index_may_list_what_no_shard_holds_and_no_model_reads(
    pico: MakeModel, tokens: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    indexed(pico, tmp_path / "m", **{name: "model-00001-of-00003.safetensors"})
    check_loss(tmp_path / "m", tokens, tmp_path / "out")
    assert f"lists tensors that are not where it says, nor elsewhere (1 in all): {name}" in caplog.text


def test_an_index_may_lack_the_head_of_a_tied_model(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    shutil.copytree(pico("llama", tied=True, shard_size="60KB"), tmp_path / "m")
    table = json.loads((tmp_path / "m" / INDEX_NAME).read_text())["weight_map"]
    save_index(tmp_path / "m", INDEX_NAME, **table, **{"lm_head.weight": table["model.embed_tokens.weight"]})
    check_loss(tmp_path / "m", tokens, tmp_path / "out")


def test_an_index_may_have_a_tensor_in_another_shard(
    pico: MakeModel, tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = indexed(pico, tmp_path / "m")
    (other,) = {shard for shard in table.values() if shard != table[UP_1]} - {max(table.values())} or {
        min(table.values())
    }
    save_index(tmp_path / "m", INDEX_NAME, **table | {UP_1: other})
    check_loss(tmp_path / "m", tokens, tmp_path / "out")
    assert f"read from another shard than {INDEX_NAME} says" in caplog.text


def test_what_the_index_lists_and_the_model_needs_must_be_there(pico: MakeModel, tmp_path: Path) -> None:
    indexed(pico, tmp_path / "m")
    for path in (tmp_path / "m").glob("model-*"):
        tensors = load_file(path)
        if tensors.pop(UP_1, None) is not None:
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"says that tensor '{UP_1}' is in model-.*, and it is not there"):
        streamlap.inspect(tmp_path / "m")


@pytest.mark.parametrize("prefix", ["./", "weights/"])
def test_an_index_may_name_shards_by_path(pico: MakeModel, tokens: Path, tmp_path: Path, prefix: str) -> None:
    folder, table = tmp_path / "m", indexed(pico, tmp_path / "m")
    (folder / prefix).mkdir(exist_ok=True)
    for shard in set(table.values()):
        (folder / shard).rename(folder / prefix / shard)
    save_index(folder, INDEX_NAME, **{name: prefix + shard for name, shard in table.items()})
    check_loss(folder, tokens, tmp_path / "out")


# --- files that are no weights ---------------------------------------------------------------------------------------


def test_a_pointer_of_git_lfs_is_named(folder: Path) -> None:
    (folder / SINGLE_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(CheckpointError, match=r"model.safetensors: the file is a pointer of Git LFS.*Run git lfs pull"):
        SafetensorsFolder(folder)


# --- headers and numbers ---------------------------------------------------------------------------------------------


def test_metadata_may_be_null(tmp_path: Path) -> None:
    header = b'{"__metadata__":null,"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / SINGLE_NAME).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")
    assert load_file(tmp_path / SINGLE_NAME)["w"].item() == 0
    assert list(read_header(tmp_path / SINGLE_NAME).tensors) == ["w"]


def test_equal_numbers_are_found_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_room, "CHUNK_BYTES", 64)
    x = torch.arange(70.0).to(torch.bfloat16)
    late = x.clone()
    late[-1] += 1
    tensors = {"x": x, "same": x.clone(), "wide": x.double(), "late": late, "shape": x.view(7, 10).clone()}
    save_file(tensors, tmp_path / SINGLE_NAME)
    infos = read_header(tmp_path / SINGLE_NAME).tensors
    assert {name for name, info in infos.items() if equal_numbers(infos["x"], info)} == {"x", "same", "wide"}


def test_what_was_chosen_is_a_value(tmp_path: Path) -> None:
    make_pico(tmp_path, shard_size="60KB", num_hidden_layers=1)
    found = find_shards(tmp_path, files_in(tmp_path), "here")
    assert (found.chosen, found.unused) == (INDEX_NAME, ())
    assert found.files == tuple(sorted(path.name for path in tmp_path.glob("*.safetensors")))
    assert set(found.index.values()) == set(found.files)
