"""Bad input gives one clear line, its exit code, and never a folder that looks finished."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT, MakeModel
from picos import CONTEXT
from safetensors.torch import load_file, save_file

from streamlap import cli

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
UP_1 = "model.layers.1.mlp.up_proj.weight"

Break = Callable[[Path], object]
Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """run_cli(*words) -> (exit code, stderr), in this process."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["streamlap", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr().err

    return run


@pytest.fixture
def source(pico: MakeModel, tmp_path: Path) -> Path:
    """A copy of the single-file model, to be broken."""
    return Path(shutil.copytree(pico("llama"), tmp_path / "source"))


@pytest.fixture
def sharded(pico: MakeModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico("llama", shard_size="60KB"), tmp_path / "sharded"))


def assert_refused(result: tuple[int, str], code: int, words: tuple[str, ...]) -> None:
    """One line on stderr that holds all of `words`, and the exit code."""
    seen, err = result
    assert err.startswith("streamlap: "), err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err
    assert seen == code, err


def assert_unfinished(out: Path) -> None:
    assert not (out / "config.json").exists()
    assert not (out / INDEX).exists()


# --- what is wrong with the checkpoint -------------------------------------------------------------------------------


def edit_header(change: Callable[[dict[str, Any]], object]) -> Break:
    """Rewrite the JSON header of model.safetensors; the data after it stays."""

    def edit(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8:end])
        change(table)
        replace_header(json.dumps(table).encode())(folder)

    return edit


def replace_header(new: bytes) -> Break:
    def edit(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        (folder / SINGLE).write_bytes(len(new).to_bytes(8, "little") + new + raw[end:])

    return edit


def shift_offsets(step: int) -> Break:
    """Move a tensor in the middle of the file by `step` bytes."""

    def change(table: dict[str, Any]) -> None:
        offsets = table[UP_1]["data_offsets"]
        table[UP_1]["data_offsets"] = [offsets[0] + step, offsets[1] + step]

    return edit_header(change)


def grow_last(table: dict[str, Any]) -> None:
    """The last tensor claims a thousand rows more than the file has."""
    rows = {name: row for name, row in table.items() if name != "__metadata__"}
    last = max(rows.values(), key=lambda row: row["data_offsets"][1])
    begin, _ = last["data_offsets"]
    last.update(shape=[10_000], dtype="F32", data_offsets=[begin, begin + 40_000])


def set_row(**fields: Any) -> Break:
    return edit_header(lambda table: table[UP_1].update(fields))


def edit_bytes(change: Callable[[bytes], bytes], name: str = SINGLE) -> Break:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, {"format": "pt"})

    return edit


def poison(name: str, value: float = float("nan")) -> Break:
    return edit_tensors(lambda tensors: tensors[name].view(-1)[5:7].fill_(value))


def edit_config(**fields: Any) -> Break:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def write_config(data: bytes) -> Break:
    return lambda folder: (folder / "config.json").write_bytes(data)


def only_pickles(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def unlink(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


HEADERS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "missing": (unlink(SINGLE), (INDEX, SINGLE, "neither")),
    "empty": (edit_bytes(lambda raw: b""), (SINGLE, "0 bytes", "a whole safetensors file")),
    "truncated": (edit_bytes(lambda raw: raw[:-100]), (SINGLE, "truncated", "wanted")),
    "too long": (edit_bytes(lambda raw: raw + b"more"), (SINGLE, "longer than its header says")),
    "length absurd": (edit_bytes(lambda raw: b"\xff" * 8 + raw[8:]), (SINGLE, str(2**64 - 1), "a whole")),
    "length too large": (edit_bytes(lambda raw: (10**6).to_bytes(8, "little") + raw[8:]), (SINGLE, "1000000", "a whole")),
    "not JSON": (replace_header(b"{{" + b" " * 98), (SINGLE, "not JSON")),
    "not UTF-8": (replace_header(b'{"\xff\xfe": 1}'), (SINGLE, "not JSON", "0xff")),
    "a list": (replace_header(b"[1, 2]"), (SINGLE, "begins with b'[1, 2]", "JSON object")),
    "nested": (replace_header(b'{"a":' + b"[" * 100_000), (SINGLE, "not JSON", "nested too deeply")),
    "row is text": (edit_header(lambda table: table.update({UP_1: "?"})), (SINGLE, UP_1, "'?'", "data_offsets")),
    "unknown dtype": (set_row(dtype="F4"), (SINGLE, UP_1, "'F4'", "one of F64")),
    "dtype is a list": (set_row(dtype=[]), (SINGLE, UP_1, "[]", "one of F64")),
    "wrong dtype": (set_row(dtype="F64"), (SINGLE, UP_1, "F64 [48, 32] in 6144 bytes")),
    "wrong shape": (set_row(shape=[48, 33]), (SINGLE, UP_1, "[48, 33] in 6144 bytes")),
    "shape is a number": (set_row(shape=1536), (SINGLE, UP_1, "1536", "whole numbers")),
    "negative shape": (set_row(shape=[-48, -32]), (SINGLE, UP_1, "[-48, -32]", "whole numbers")),
    "bool in the shape": (set_row(shape=[1536, True]), (SINGLE, UP_1, "True", "whole numbers")),
    "offsets are text": (set_row(data_offsets="ab"), (SINGLE, UP_1, "whole numbers")),
    "offsets backwards": (set_row(data_offsets=[6144, 0]), (SINGLE, UP_1, "-6144 bytes")),
    "offsets beyond the file": (edit_header(grow_last), (SINGLE, "truncated")),
    "overlap": (shift_offsets(-4), (SINGLE, UP_1, "overlaps")),
    "hole": (shift_offsets(4), (SINGLE, UP_1, "hole")),
    "shard is a folder": (lambda f: ((f / SINGLE).unlink(), (f / SINGLE).mkdir()), ("neither", SINGLE)),
    "only pickles": (only_pickles, ("pytorch_model.bin", "pickled", "safetensors")),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_file_that_is_not_whole(source: Path, tokens: Path, tmp_path: Path, run_cli: Cli, case: str) -> None:
    break_it, words = HEADERS[case]
    break_it(source)
    assert_refused(run_cli("compress", source, tmp_path / "out", "--calibration", tokens), 3, words)
    assert not (tmp_path / "out").exists()


SHARD_2 = "model-00002-of-00003.safetensors"


def point_to(shard: Any, name: str = UP_1) -> Break:
    def edit(folder: Path) -> None:
        table = json.loads((folder / INDEX).read_text())
        table["weight_map"][name] = shard
        (folder / INDEX).write_text(json.dumps(table))

    return edit


def write_index(data: bytes) -> Break:
    return lambda folder: (folder / INDEX).write_bytes(data)


def twice(folder: Path) -> None:
    """A tensor of the first shard in the second too, and not in the index."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.zeros(1)}, second, {"format": "pt"})
    table = json.loads((folder / INDEX).read_text())
    del table["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(table))


INDEXES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "missing shard": (unlink(SHARD_2), (SHARD_2, "missing", "Fetch")),
    "truncated shard": (edit_bytes(lambda raw: raw[:-8], SHARD_2), (SHARD_2, "truncated")),
    "parent": (point_to("../x.safetensors"), ("'../x.safetensors'", UP_1, "inside")),
    "absolute": (point_to("/etc/passwd"), ("'/etc/passwd'", UP_1, "inside")),
    "inner folder": (point_to("a/x.safetensors"), ("a/x.safetensors is missing", UP_1, "Fetch")),
    "the folder itself": (point_to("."), ("'.'", UP_1, "a .safetensors file")),
    "name too long for a file": (point_to("x" * 300 + ".safetensors"), ("xxx", UP_1, "missing")),
    "absurd name": (point_to("x" * 5000 + ".safetensors"), ("'xxxxxx", "...", UP_1, "inside")),
    "no shard at all": (point_to("config.json"), ("'config.json'", UP_1, ".safetensors")),
    "tensor twice": (twice, ("stands in model-00001-of", "model-00002-of", "once")),
    "not JSON": (write_index(b"{"), (INDEX, "not JSON")),
    "not UTF-8": (write_index(b"\xff\xff"), (INDEX, "not UTF-8", "0xff")),
    "no weight_map": (write_index(b"{}"), (INDEX, "weight_map")),
    "weight_map is a list": (write_index(b'{"weight_map": [1]}'), (INDEX, "weight_map")),
    "weight_map is empty": (write_index(b'{"weight_map": {}}'), ("num_hidden_layers 3", "no decoder layer")),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_lies(sharded: Path, tokens: Path, tmp_path: Path, run_cli: Cli, case: str) -> None:
    break_it, words = INDEXES[case]
    break_it(sharded)
    assert_refused(run_cli("compress", sharded, tmp_path / "out", "--calibration", tokens), 3, words)
    assert not (tmp_path / "out").exists()


def no_layers(folder: Path) -> None:
    edit_config(num_hidden_layers=0)(folder)
    edit_tensors(lambda t: [t.pop(name) for name in list(t) if ".layers." in name])(folder)


TENSORS: dict[str, tuple[Break, int, tuple[str, ...]]] = {
    "wrong shape": (
        edit_tensors(lambda t: t.update({UP_1: torch.zeros(47, 32)})), 3, (UP_1, "[47, 32]", "[48, 32]"),
    ),
    "missing": (edit_tensors(lambda t: t.pop(UP_1)), 3, (UP_1, "missing")),
    "missing embedding": (edit_tensors(lambda t: t.pop(EMBEDDING)), 3, (EMBEDDING, "missing")),
    "a layer is missing": (
        edit_tensors(lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name]),
        3, ("num_hidden_layers 3", "hold 2 decoder layers, the last numbered 2, but not layer 1"),
    ),
    "layers that differ": (
        edit_config(per_layer_config={"1": {"intermediate_size": 24}}), 3, ("per_layer_config {'1':", "that are all alike"),
    ),
    "weights that are not there": (
        edit_config(transformers_weights="x.safetensors"), 3, ("x.safetensors is missing", "transformers_weights"),
    ),
    "weights elsewhere": (
        edit_config(transformers_weights="../x.safetensors"), 3, ("transformers_weights '../x", "inside the folder"),
    ),
    "whole numbers": (edit_tensors(lambda t: t.update({UP_1: t[UP_1].int()})), 3, (UP_1, "int32", "float32")),
    "float8": (
        edit_tensors(lambda t: t.update({UP_1: t[UP_1].to(torch.float8_e4m3fn)})), 3, (UP_1, "float8", "float32"),
    ),
    "config.json missing": (unlink("config.json"), 3, ("config.json", "No such file")),
    "config.json is not JSON": (write_config(b"{"), 3, ("config.json", "not JSON")),
    "config.json is not UTF-8": (write_config(b'{"a": "\xff"}'), 3, ("config.json", "not JSON")),
    "config.json is a list": (write_config(b"[]"), 3, ("config.json", "list", "JSON object")),
    "hidden_size is text": (edit_config(hidden_size="wide"), 3, ("config.json", "hidden_size")),
    "no heads": (edit_config(num_attention_heads=0), 3, ("config.json", "num_attention_heads 0", "from 1 to")),
    "no layers": (edit_config(num_hidden_layers=0), 3, ("num_hidden_layers",)),
    "more layers": (edit_config(num_hidden_layers=4), 3, ("num_hidden_layers 4", "3 decoder layers", "agree")),
    "layers below zero": (edit_config(num_hidden_layers=-1), 3, ("num_hidden_layers",)),
    "no context": (edit_config(max_position_embeddings=None), 3, ("config.json", "max_position_embeddings")),
    "unknown rotary": (
        edit_config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), 3, ("config.json", "spiral"),
    ),
    "unknown model_type": (edit_config(model_type="gpt9"), 3, ("'gpt9'", "known are llama", "docs/families.md")),
    "no model_type": (edit_config(model_type=None), 3, ("None", "known are llama")),
    "model_type is a list": (edit_config(model_type=["llama"]), 3, ("['llama']", "known are llama")),
    "gptq": (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), 3, ("'gptq'", "plain float")),
    "quantised, not said how": (edit_config(quantization_config="4 bits"), 3, ("'4 bits'", "plain float")),
    "quantised by a word": (edit_config(quantization_config="streamlap"), 3, ("'streamlap'", "plain float")),
    "modules of another model": (
        edit_config(quantization_config={"quant_method": "streamlap", "format_version": 1, "modules": {"x": {"rank": 2}}}),
        3, ("quantization_config.modules", "'x'"),
    ),
    "no layers at all": (no_layers, 3, ("config.json", "num_hidden_layers 0", "from 1 to")),
    "modules is a list": (
        edit_config(quantization_config={"quant_method": "streamlap", "format_version": 1, "modules": [1]}),
        3, ("quantization_config.modules",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_a_model_that_is_not_what_config_says(
    source: Path, tokens: Path, tmp_path: Path, run_cli: Cli, case: str
) -> None:
    break_it, code, words = TENSORS[case]
    break_it(source)
    assert_refused(run_cli("compress", source, tmp_path / "out", "--calibration", tokens), code, words)
    assert not (tmp_path / "out").exists()


NOT_FINITE = {
    "layer": poison(UP_1),
    "layer's norm": poison("model.layers.2.input_layernorm.weight"),
    "embedding": poison(EMBEDDING),
    "infinite": poison("model.layers.0.self_attn.q_proj.weight", float("inf")),
    "final norm": poison("model.norm.weight"),
    "head": poison("lm_head.weight"),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_weights_that_are_not_finite(source: Path, tokens: Path, tmp_path: Path, run_cli: Cli, case: str) -> None:
    """Found when the tensor is read: the folder has been begun by then, and is no model."""
    NOT_FINITE[case](source)
    result = run_cli("compress", source, tmp_path / "out", "--calibration", tokens)
    assert_refused(result, 3, ("tensor", SINGLE, "2 NaN or infinite", "finite"))
    assert_unfinished(tmp_path / "out")


def test_a_compressed_model_is_not_compressed_again(source: Path, tokens: Path, tmp_path: Path, run_cli: Cli) -> None:
    assert run_cli("compress", source, tmp_path / "once", "--calibration", tokens)[0] == 0
    result = run_cli("compress", tmp_path / "once", tmp_path / "twice", "--calibration", tokens)
    assert_refused(result, 3, ("once", "already compressed", "original"))
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("model", ["nowhere", "org/name", "org/name@branch", "/nowhere/at/all", "a/b/c"])
def test_a_model_that_is_not_there(tokens: Path, tmp_path: Path, run_cli: Cli, model: str) -> None:
    assert_refused(run_cli("compress", model, tmp_path / "out", "--calibration", tokens), 3, (model, "hub"))


# --- what is wrong with the words ------------------------------------------------------------------------------------

WORDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "ratio 0": (["--ratio", "0"], ("ratio is '0'", "between 0 and 1")),
    "ratio 1": (["--ratio", "1"], ("ratio is '1'", "between 0 and 1")),
    "ratio -1": (["--ratio", "-1"], ("ratio is '-1'", "between 0 and 1")),
    "ratio 2": (["--ratio", "2"], ("ratio is '2'", "between 0 and 1")),
    "ratio nan": (["--ratio", "nan"], ("ratio is 'nan'", "between 0 and 1")),
    "ratio out of reach": (["--ratio", "0.99"], ("leave q [32, 32] no rank", "lower ratio")),
    "preset": (["--preset", "magic"], ("preset is 'magic'", "one of best, lorap")),
    "device": (["--device", "tpu"], ("device is 'tpu'", "cuda:N")),
    "device number": (["--device", "cuda:x"], ("device is 'cuda:x'", "cuda:N")),
    "device without colon": (["--device", "cuda0"], ("device is 'cuda0'", "cuda:N")),
    "device digits": (["--device", "cuda:²"], ("device is 'cuda:²'", "cuda:N")),
    "absent device": (["--device", "cuda:99"], ("device is 'cuda:99'", "--device cpu")),
    "dtype": (["--dtype", "int4"], ("dtype is 'int4'", "one of auto, float32")),
    "samples": (["--samples", "0"], ("samples is 0", "at least 1")),
    "length": (["--length", "1"], ("length is 1", "at least 2")),
    "length does not divide": (["--length", "15"], ("rows of 16 tokens", "--length 15")),
    "seed": (["--seed", "-1"], ("seed is -1", "at least 0")),
    "recipe missing": (["--recipe", "nowhere.yaml"], ("nowhere.yaml", "cannot be read")),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_word_out_of_range(pico: MakeModel, tokens: Path, tmp_path: Path, run_cli: Cli, case: str) -> None:
    words, fragments = WORDS[case]
    result = run_cli("compress", pico("llama"), tmp_path / "out", "--calibration", tokens, *words)
    assert_refused(result, 2, fragments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--seed", "abc"], ["--samples", "many"], ["--frobnicate"], ["third"]])
def test_words_that_do_not_parse(tmp_path: Path, run_cli: Cli, words: list[str]) -> None:
    code, err = run_cli("compress", "model", tmp_path / "out", *words)
    assert code == 2
    assert "Error: " in err
    assert words[0] in err


RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": ("ratoi: 0.2", ("unknown keys ratoi", "ratio")),
    "unknown calibration key": ("calibration: {sample: 3}", ("calibration", "unknown keys sample", "samples")),
    "unknown knob": ("methods: [{method: ffn_lorap, protekt: 0}]", ("ffn_lorap", "protekt", "protect")),
    "unknown method": ("methods: [{method: magic}]", ("'magic'", "attention_awsvd")),
    "method is a list": ("methods: [{method: []}]", ("[]", "attention_awsvd")),
    "methods is a number": ("methods: 5", ("methods", "5", "attention_awsvd")),
    "methods is text": ("methods: ffn_lorap", ("methods", "ffn_lorap", "attention_awsvd")),
    "two methods for one sub-layer": (
        "methods: [{method: ffn_lorap}, {method: ffn_lorap, protect: 0}]",
        ("one-pass methods ffn_lorap, ffn_lorap all edit ffn", "wanted one. Drop the others"),
    ),
    "knob is text": ("methods: [{method: attention_awsvd, alpha: big}]", ("attention_awsvd", "alpha is 'big'")),
    "knob out of range": ("methods: [{method: attention_awsvd, alpha: 0}]", ("alpha is 0", "1 to 100")),
    "knob is nan": ("methods: [{method: ffn_lorap, protect: .nan}]", ("protect is nan", "0 up to 1")),
    "storage is unknown": (
        "methods: [{method: ffn_anchored, storage: zip}]",
        ("storage is 'zip'", "one of pivoted, factors"),
    ),
    "share out of range": (
        "methods: [{method: ffn_anchored, shares: [0, 1.5]}]",
        ("shares is (0, 1.5)", "from 0 to 1"),
    ),
    "share is text": ("methods: [{method: ffn_anchored, shares: [half]}]", ("shares is ('half',)", "from 0 to 1")),
    "share is true": ("methods: [{method: ffn_anchored, shares: [true]}]", ("shares is (True,)", "from 0 to 1")),
    "share is nan": ("methods: [{method: ffn_anchored, shares: [.nan]}]", ("shares is (nan,)", "from 0 to 1")),
    "share twice": ("methods: [{method: ffn_anchored, shares: [1, 1.0]}]", ("shares is (1, 1.0)", "different numbers")),
    "no share": ("methods: [{method: ffn_anchored, shares: []}]", ("shares is ()", "1 to 16")),
    "17 shares": (
        f"methods: [{{method: ffn_anchored, shares: {[number / 16 for number in range(17)]}}}]",
        ("shares is (0.0, 0.0625", "1 to 16"),
    ),
    "shares is a number": (
        "methods: [{method: ffn_anchored, shares: 0.5}]",
        ("ffn_anchored", "shares is 0.5", "a list of numbers"),
    ),
    "shares is nothing": (
        "methods: [{method: ffn_anchored, shares: }]",
        ("ffn_anchored", "shares is None", "a list of numbers"),
    ),
    "the share of 0.4": ("methods: [{method: ffn_anchored, share: 0.5}]", ("unknown keys share;", "shares")),
    "the bias of 0.4": ("methods: [{method: attention_anchored, bias: true}]", ("unknown keys bias;", "storage")),
    "the heads of 0.4": ("methods: [{method: attention_heads}]", ("'attention_heads'", "attention_anchored")),
    "step out of range": ("methods: [{method: attention_anchored, step: 2}]", ("step is 2", "0 to 1")),
    "a sub-layer is no knob": (
        "methods: [{method: attention_anchored, sublayer: ffn}]",
        ("unknown keys sublayer", "output"),
    ),
    "another output": ("methods: [{method: ffn_anchored, output: sparse}]", ("output is 'sparse'", "dense, low_rank")),
    "input step of a word": (
        "methods: [{method: ffn_anchored, input_step: far}]",
        ("input_step is 'far'", "a number or nothing"),
    ),
    "a sub-layer without a method": (
        "methods: [{method: attention_anchored}]",
        ("methods are attention_anchored", "for every sub-layer: attention, ffn"),
    ),
    "methods of both kinds": (
        "methods: [{method: attention_anchored}, {method: ffn_lorap}]",
        ("methods are attention_anchored, ffn_lorap", "one-pass methods alone"),
    ),
    "training alone": ("methods: [{method: refine}]", ("methods have refine", "wanted anchored methods")),
    "training after one pass": ("{preset: lorap, refine: 2}", ("methods have refine", "preset lorap", "refine 0")),
    "two trainings": (
        "methods: [{method: attention_anchored}, {method: ffn_anchored}, {method: refine}, {method: refine, epochs: 2}]",
        ("methods have 2 that train (refine, refine)", "wanted one"),
    ),
    "epochs is text": ("refine: often", ("refine: epochs is 'often'", "1 to 10000")),
    "rate out of range": (
        "methods: [{method: refine, learning_rate: 2}]",
        ("refine: learning_rate is 2", "above 0 and at most 1"),
    ),
    "unknown preset": ("preset: magic", ("preset is 'magic'", "lorap")),
    "preset is a list": ("preset: [lorap]", ("preset is ['lorap']", "one of best, lorap")),
    "ratio is text": ("ratio: a fifth", ("ratio is 'a fifth'", "between 0 and 1")),
    "ratio is true": ("ratio: true", ("ratio is True", "between 0 and 1")),
    "dtype is a list": ("dtype: []", ("dtype is []", "one of auto")),
    "calibration is a list": ("calibration: [a.txt]", ("calibration is ['a.txt']", "files")),
    "files is a number": ("calibration: {files: 5}", ("files is 5", "list of paths")),
    "files is empty": ("calibration: {files: }", ("files is None", "list of paths")),
    "seed is text": ("calibration: {seed: x}", ("seed is 'x'", "whole number")),
    "a list": ("[1]", ("list", "keys like ratio")),
    "empty": ("", ("is empty", "keys like ratio")),
    "not YAML": ("{", ("cannot be read",)),
    "code": ("!!python/object/apply:os.getcwd []", ("cannot be read",)),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_out_of_range(pico: MakeModel, tmp_path: Path, run_cli: Cli, case: str) -> None:
    text, words = RECIPES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert_refused(run_cli("compress", pico("llama"), tmp_path / "out", "--recipe", recipe), 2, words)
    assert not (tmp_path / "out").exists()


# --- what is wrong with the calibration ------------------------------------------------------------------------------


def write(data: bytes | str) -> Break:
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def save(value: Any, **options: Any) -> Break:
    return lambda path: np.save(path, value, **options)


def save_zip(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), np.zeros(99, int))
    path.with_suffix(".npz").rename(path)


def npy_header(shape: str) -> bytes:
    """A .npy of one number that says it has another shape."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n" + b"\0" * 8


CALIBRATIONS: dict[str, tuple[str, Break, tuple[str, ...]]] = {
    "missing": ("c.txt", lambda path: None, ("c.txt", "not a file")),
    "a folder": ("c.txt", Path.mkdir, ("c.txt", "not a file")),
    "empty": ("c.txt", write(""), ("c.txt", "empty")),
    "blank": ("c.txt", write(" \n"), ("c.txt", "tokens, less than one window of 64")),
    "short": ("c.txt", write("The boat went."), ("c.txt", "tokens, less than one window of 64", "more text")),
    "binary": ("c.txt", write(bytes(range(256)) * 9), ("c.txt", "not UTF-8", "byte 128")),
    "jsonl without text": ("c.jsonl", write('{"words": "a"}\n'), ("c.jsonl", "row 1", "words", "--text-column NAME")),
    "jsonl of lists": ("c.jsonl", write("[1]\n"), ("c.jsonl", "text field")),
    "jsonl of null": ("c.jsonl", write('{"text": null}\n' * 99), ("c.jsonl", "no text", "null")),
    "deep jsonl": ("c.jsonl", write('{"text":' + "[" * 99_999), ("c.jsonl", "text field")),
    "not jsonl": ("c.jsonl", write(TEXT), ("c.jsonl", "text field")),
    "unknown suffix": ("c.pdf", write(TEXT), ("'.pdf'", ".txt")),
    "no suffix": ("corpus", write(TEXT), ("corpus", "''", ".txt")),
    "floats": ("c.npy", save(np.zeros((4, 16))), ("c.npy", "float64 (4, 16)", "whole numbers")),
    "bools": ("c.npy", save(np.zeros((4, 16), bool)), ("c.npy", "bool (4, 16)", "whole numbers")),
    "three axes": ("c.npy", save(np.zeros((2, 2, 16), int)), ("c.npy", "(2, 2, 16)", "[T] or [N, L]")),
    "no rows": ("c.npy", save(np.zeros((0, 16), int)), ("c.npy", "(0, 16)", "[T] or [N, L]")),
    "short ids": ("c.npy", save(np.zeros(15, int)), ("c.npy", "15 tokens", "window of 64")),
    "rows of one": ("c.npy", save(np.zeros((9, 1), int)), ("c.npy", "length is 1", "at least 2 tokens")),
    "rows above the context": ("c.npy", save(np.zeros((2, 65), int)), ("length is 65", "context is 64")),
    "ids above": ("c.npy", save(np.full((2, 16), 300)), ("c.npy", "from 300 to 300", "0 to 299", "tokenizer")),
    "ids below": ("c.npy", save(np.full((2, 16), -1)), ("c.npy", "from -1", "0 to 299")),
    "ids beyond int64": ("c.npy", save(np.full((2, 16), 2**64 - 1, np.uint64)), ("c.npy", str(2**64 - 1))),
    "NUL characters": ("c.txt", write(b"ab\0" * 5000), ("c.txt", "not text", "NUL")),
    "objects": ("c.npy", save(np.array([{}], object), allow_pickle=True), ("c.npy", "pickled", "can run code")),
    "truncated": ("c.npy", write(npy_header("(4, 16)")), ("c.npy", "not a .npy array")),
    "absurd shape": ("c.npy", write(npy_header(f"({10**15}, 16)")), ("c.npy", "not a .npy")),
    "header is no Python": ("c.npy", write(npy_header("(1 2")), ("c.npy", "not a .npy array")),
    "header ends early": ("c.npy", write(npy_header("((")), ("c.npy", "not a .npy array")),
    "not npy": ("c.npy", write(TEXT), ("c.npy", "not a .npy array")),
    "not a zip": ("c.npy", write(b"PK\x03\x04" + b"x" * 99), ("c.npy", "not a .npy array")),
    "npz": ("c.npy", save_zip, ("c.npy", "not a .npy array")),
}  # fmt: skip


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_a_calibration_that_cannot_be_used(pico: MakeModel, tmp_path: Path, run_cli: Cli, case: str) -> None:
    name, make, words = CALIBRATIONS[case]
    make(tmp_path / name)
    result = run_cli("compress", pico("llama", tokenizer=True), tmp_path / "out", "--calibration", tmp_path / name)
    assert_refused(result, 2, words)
    assert not (tmp_path / "out").exists()


def test_a_jsonl_line_ends_at_a_newline_only(pico: MakeModel, tmp_path: Path, run_cli: Cli) -> None:
    """JSON allows other line separators, as they are, inside a string."""
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": TEXT + "\u2028and\u0085on"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert run_cli("compress", pico("llama", tokenizer=True), tmp_path / "out", "--calibration", path)[0] == 0


def test_text_needs_a_tokenizer(pico: MakeModel, text: Path, tmp_path: Path, run_cli: Cli) -> None:
    result = run_cli("compress", pico("llama"), tmp_path / "out", "--calibration", text)
    assert_refused(result, 2, ("no tokenizer that loads", str(text), ".npy"))
    assert not (tmp_path / "out").exists()


def test_a_window_longer_than_the_context(pico: MakeModel, text: Path, tmp_path: Path, run_cli: Cli) -> None:
    model = pico("llama", tokenizer=True)
    result = run_cli("compress", model, tmp_path / "out", "--calibration", text, "--length", CONTEXT + 1)
    assert_refused(result, 2, (f"length is {CONTEXT + 1}", f"context is {CONTEXT}", f"--length {CONTEXT} or less"))
    assert not (tmp_path / "out").exists()


# --- what is wrong with the output folder ----------------------------------------------------------------------------


def foreign(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


OUTPUTS: dict[str, tuple[str, Break, list[str], tuple[str, ...]]] = {
    "not empty": ("out", foreign, [], ("out", "not empty (thesis.tex", "--overwrite")),
    "overwrite what is not ours": ("out", foreign, ["--overwrite"], ("thesis.tex", "holds no result of compress")),
    "a file": ("out", lambda out: out.write_text("x"), [], ("out", "is a file", "folder")),
    "the input": ("source", lambda out: None, [], ("source", "the input")),
    "the input, overwriting": ("source", lambda out: None, ["--overwrite"], ("source", "the input")),
    "in the input": ("source/small", lambda out: None, [], ("source/small", "the input")),
    "around the input": (".", lambda out: None, ["--overwrite"], ("the input",)),
    "a link to the input": ("link", lambda out: out.symlink_to("source"), [], ("link", "the input")),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_is_taken(source: Path, tokens: Path, tmp_path: Path, run_cli: Cli, case: str) -> None:
    name, make, words, fragments = OUTPUTS[case]
    make(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    result = run_cli("compress", source, tmp_path / name, "--calibration", tokens, *words)
    assert_refused(result, 2, fragments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_finished_output_is_replaced_only_on_demand(source: Path, tokens: Path, tmp_path: Path, run_cli: Cli) -> None:
    out, words = tmp_path / "out", ("--calibration", tokens)
    assert run_cli("compress", source, out, *words) == (0, "")
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    assert_refused(run_cli("compress", source, out, *words), 2, ("out", "finished model", "--overwrite"))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert run_cli("compress", source, out, *words, "--overwrite", "--ratio", "0.4") == (0, "")
    assert (out / "config.json").read_bytes() != whole["config.json"]


PLACES: dict[str, tuple[Callable[[Path], list[object]], int, tuple[str, ...]]] = {
    "output under a file": (lambda tmp: [tmp / "file" / "out"], 2, ("file/out", "is a file", "wanted a folder")),
    "work is a file": (
        lambda tmp: [tmp / "out", "--work", tmp / "file"],
        2,
        ("--work", "is a file", "wanted a folder"),
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_cannot_be_written(pico: MakeModel, tokens: Path, tmp_path: Path, run_cli: Cli, case: str) -> None:
    words, code, fragments = PLACES[case]
    (tmp_path / "file").write_text("x")
    result = run_cli("compress", pico("llama"), *words(tmp_path), "--calibration", tokens)
    assert_refused(result, code, fragments)
    assert_unfinished(tmp_path / "out")
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_without_permission(pico: MakeModel, tokens: Path, tmp_path: Path, run_cli: Cli) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    result = run_cli("compress", pico("llama"), tmp_path / "closed" / "out", "--calibration", tokens)
    assert_refused(result, 1, ("closed/out", "Permission denied"))
