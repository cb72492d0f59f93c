"""Files that a stranger made to do harm: each is refused with one short line, before memory is taken for what it claims.

The tables hold, for each hostile file, what makes it, the error's class and exit code, and words of the message.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from conftest import MakeModel, make_tokenizer
from folders import FAMILIES as CONFIGS
from folders import all_kinds, make_case
from safetensors.torch import load_file, save_file
from test_bad_input import INDEX, SINGLE, UP_1, Break, edit_config, edit_header, point_to, replace_header, set_row

import streamlap
from streamlap import cli
from streamlap.errors import CheckpointError, RecipeError, ResumeMismatch, StreamlapError, UnsupportedModel, shown
from streamlap.families.stream import ModelStream
from streamlap.output.card import licence_of
from streamlap.output.folder import card_of, companions
from streamlap.output.gguf_vocabulary import add_vocabulary
from streamlap.output.report import KvCache, Parameters, Report
from streamlap.pipeline.session import versions_mark
from streamlap.planning.survey_file import Survey
from streamlap.recipe import Recipe
from streamlap.settings import KEPT, RunSettings
from streamlap.store.journal import STATE_FOLDER, Journal, saved_tokens
from streamlap.store.source import SafetensorsFolder
from streamlap.system.rate_cache import load

MOST_WORDS = 1000
"""Characters in a message here, with the paths of the test's folder in it."""
Case = tuple[Break, type[StreamlapError], tuple[str, ...]]


@pytest.fixture
def source(pico: MakeModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico("llama"), tmp_path / "source"))


@pytest.fixture
def sharded(pico: MakeModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pico("llama", shard_size="60KB"), tmp_path / "sharded"))


def refused(folder: Path, case: Case, *words: object) -> str:
    """The message that the command line and the API give; the command is `inspect` of the folder unless `words` say."""
    _, kind, fragments = case
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "fail", lambda message, code: (seen.append(message), sys.exit(code)))
        patch.setattr(sys, "argv", ["streamlap", *map(str, words or ("inspect", folder))])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    (message,) = seen
    assert stop.value.code == kind.exit_code, message
    assert len(message) < MOST_WORDS
    assert message.isprintable()
    for fragment in fragments:
        assert fragment in message
    return message


def refused_by(act: Callable[[], object], kind: type[StreamlapError], *fragments: str) -> None:
    with pytest.raises(StreamlapError) as caught:
        act()
    assert type(caught.value) is kind
    assert len(str(caught.value)) < MOST_WORDS
    assert str(caught.value).isprintable()
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.fixture(autouse=True)
def memory_is_bounded() -> Iterator[None]:
    """No test here may make the process grow by more than 700 MB, whatever a file claims."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000


# --- the header of a shard -------------------------------------------------------------------------------------------


def in_header(old: bytes, new: bytes) -> Break:
    """Replace bytes in the raw header; its length is set anew."""

    def edit(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
        assert old in header
        replace_header(header.replace(old, new, 1))(folder)

    return edit


def recoded(coding: str) -> Break:
    def edit(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        replace_header(raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode().encode(coding))(folder)

    return edit


def rename(new: str) -> Break:
    return edit_header(lambda table: table.update({new: table.pop(UP_1)}))


def whole_file(raw: bytes, size: int = 0, name: str = SINGLE) -> Break:
    """A file of these bytes, and zeros up to `size`, which take no room on the disk."""

    def edit(folder: Path) -> None:
        (folder / name).write_bytes(raw)
        os.truncate(folder / name, max(size, len(raw)))

    return edit


ROW = f'"{UP_1}":{{'.encode()
WRONG = CheckpointError

HEADERS: dict[str, Case] = {
    "header of 100,000,001 bytes": (
        whole_file((100_000_001).to_bytes(8, "little"), 100_000_100), WRONG, ("header length 100000001", "whole safetensors"),
    ),
    "header of zeros": (whole_file((90_000_000).to_bytes(8, "little"), 90_000_008), WRONG, ("begins with b'\\x00",)),
    "header of millions of values": (
        replace_header(b'{"a":[' + b"[]," * 1_100_000 + b"0]}"), WRONG, ("more than 2,000,000 values",),
    ),
    "file of 7 bytes": (whole_file(b"\x01" * 7), WRONG, ("7 bytes",)),
    "header ends early": (whole_file((50).to_bytes(8, "little") + b'{"a": {'.ljust(50)), WRONG, ("not JSON",)),
    "header in UTF-16": (recoded("utf-16"), WRONG, ("begins with", "JSON object")),
    "header in UTF-16 without a mark": (recoded("utf-16-le"), WRONG, ("not JSON",)),
    "header in UTF-32": (recoded("utf-32-le"), WRONG, ("not JSON",)),
    "byte order mark": (recoded("utf-8-sig"), WRONG, ("begins with b'\\xef\\xbb\\xbf",)),
    "blank before the header": (in_header(b"{", b" {"), WRONG, ("begins with b' {", "JSON object")),
    "tensor name twice": (in_header(ROW, ROW + b'"x":1},' + ROW), WRONG, (UP_1, "stands twice")),
    "key twice in a row": (in_header(ROW, ROW + b'"dtype":"F16",'), WRONG, ("'dtype' stands twice",)),
    "deep row": (in_header(ROW, ROW + b'"x":' + b"[" * 99_999), WRONG, ("nested too deeply",)),
    "NaN": (in_header(ROW, ROW + b'"x":NaN,'), WRONG, ("NaN is no JSON number",)),
    "Infinity": (in_header(ROW, ROW + b'"x":-Infinity,'), WRONG, ("-Infinity is no JSON number",)),
    "number beyond floats": (in_header(ROW, ROW + b'"x":1e999,'), WRONG, ("'1e999' is too large",)),
    "whole number of 5000 digits": (in_header(ROW, ROW + b'"x":' + b"9" * 5000 + b","), WRONG, ("number of 5000 digits",)),
    "size of 39 digits": (set_row(shape=[10**38, 1]), WRONG, ("1000000000", "whole numbers")),
    "size is a fraction": (set_row(shape=[48.0, 32]), WRONG, ("[48.0, 32]", "whole numbers")),
    "offset is true": (set_row(data_offsets=[True, 6144]), WRONG, ("offsets True", "whole numbers")),
    "negative offset": (set_row(data_offsets=[-6144, 0]), WRONG, ("-6144", "whole numbers")),
    "nine dimensions": (set_row(shape=[1] * 7 + [48, 32]), WRONG, ("9 dimensions", "at most 8")),
    "shape of a million": (set_row(shape=[1] * 300_000), WRONG, ("300000 dimensions",)),
    "metadata is a list": (edit_header(lambda t: t.update(__metadata__=[1] * 99)), WRONG, ("__metadata__ is [1, 1", "texts")),
    "metadata of objects": (edit_header(lambda t: t.update(__metadata__={"a": {}})), WRONG, ("{'a': {}}", "texts by name")),
    "row of a megabyte": (edit_header(lambda t: t.update({UP_1: "x" * 10**6})), WRONG, (UP_1, "'xxx", "data_offsets")),
    "dtype of a megabyte": (set_row(dtype="F" * 10**6), WRONG, (UP_1, "'FFF", "one of F64")),
    "name of a megabyte": (rename("x" * 10**6), WRONG, ("called 'xxx", "at most 512")),
    "name with a line end": (rename("a\nstreamlap: all is well"), WRONG, ("'a\\nstreamlap", "printable")),
    "name with NUL and escapes": (rename("a\0\x1b[2Jb"), WRONG, ("'a\\x00\\x1b[2Jb'", "printable")),
    "name with a lone surrogate": (in_header(ROW, b'"\\ud800":{'), WRONG, ("'\\ud800'", "printable")),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header(source: Path, case: str) -> None:
    HEADERS[case][0](source)
    refused(source, HEADERS[case])
    with pytest.raises(CheckpointError):
        SafetensorsFolder(source)


def test_no_header_takes_much_more_memory_than_its_bytes(tmp_path: Path) -> None:
    """A tenth of the values that are allowed, of the kind that takes most."""
    raw = b'{"a":[' + b"{}," * 99_000 + b"0]}"
    (tmp_path / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw)
    tracemalloc.start()
    try:
        refused_by(lambda: SafetensorsFolder(tmp_path), CheckpointError, "data_offsets")
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


# --- the index, and where files may lie ------------------------------------------------------------------------------


def link(name: str, to: str, **content: str) -> Break:
    """`name` becomes a link to `to`, which is relative to the checkpoint; what was there goes beside the checkpoint."""

    def edit(folder: Path) -> None:
        for file, text in content.items():
            (folder.parent / file).write_text(text)
        if (folder / name).exists():
            (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(to)

    return edit


def instead(name: str, make: Callable[[Path], object]) -> Break:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return edit


def only(name: str, data: bytes = b"x") -> Break:
    def edit(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / name).write_bytes(data)

    return edit


def templates_outside(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to("/etc/hostname")


SHARD_2 = "model-00002-of-00003.safetensors"

INDEXES: dict[str, Case] = {
    "parent": (point_to("../x.safetensors"), WRONG, ("'../x.safetensors'", "inside")),
    "absolute": (point_to("/tmp/x.safetensors"), WRONG, ("'/tmp/x.safetensors'", "inside")),
    "backslashes": (point_to("..\\..\\x.safetensors"), WRONG, ("\\\\x.safetensors'", "inside")),
    "shard with a line end": (point_to("a\nb.safetensors"), WRONG, ("'a\\nb.safetensors'", "inside")),
    "tensor with NUL": (point_to(SHARD_2, "a\0b"), WRONG, ("'a\\x00b'", "inside")),
    "pickle as a shard": (point_to("pytorch_model.bin"), WRONG, ("'pytorch_model.bin'", "can run code", ".safetensors")),
    "index of 64 MiB": (whole_file(b"{", (64 << 20) + 1, INDEX), WRONG, (INDEX, "more than 67,108,864 bytes")),
    "index of millions of values": (whole_file(b'{"a":[' + b"0," * 2_000_001 + b"0]}", 0, INDEX), WRONG, ("2,000,000 values",)),
    "tensor twice": (whole_file(b'{"weight_map":{"a":"b","a":"b"}}', 0, INDEX), WRONG, ("'a' stands twice",)),
    "shards are lists": (whole_file(b'{"weight_map":{"a":["b"]}}', 0, INDEX), WRONG, ("{'a': ['b']}", "shard file name")),
    "index is a list": (whole_file(b"[]", 0, INDEX), WRONG, (INDEX, "holds a list")),
    "deep index": (whole_file(b'{"weight_map":' + b"[" * 99_999, 0, INDEX), WRONG, ("nested too deeply",)),
    "index in UTF-16": (whole_file('{"weight_map":{}}'.encode("utf-16"), 0, INDEX), WRONG, ("not UTF-8",)),
    "shard is a link out": (link(SHARD_2, "../" + SHARD_2), WRONG, (SHARD_2, "leads to", "outside the checkpoint", "cp -rL")),
    "shard is a pipe": (instead(SHARD_2, os.mkfifo), WRONG, (SHARD_2, "a pipe", "plain file")),
    "index is a pipe": (instead(INDEX, os.mkfifo), WRONG, (INDEX, "a pipe")),
    "shard is a device": (link(SHARD_2, "/dev/zero"), WRONG, (SHARD_2, "'/dev/zero'", "outside")),
    "shard is a folder": (instead(SHARD_2, Path.mkdir), WRONG, (SHARD_2, "missing")),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXES)
def test_a_hostile_index(sharded: Path, case: str) -> None:
    INDEXES[case][0](sharded)
    refused(sharded, INDEXES[case])


LINKS: dict[str, Case] = {
    "tokenizer.json is a link to a key": (
        link("tokenizer.json", "../id_ed25519", id_ed25519="secret"), WRONG, ("tokenizer.json", "id_ed25519'", "outside"),
    ),
    "LICENSE is a link out": (link("LICENSE", "/etc/hostname"), WRONG, ("LICENSE", "'/etc/hostname'", "remove the link")),
    "README.md is a link out": (link("README.md", "/etc/hostname"), WRONG, ("README.md", "outside")),
    "config.json is a link out": (link("config.json", "../config.json"), WRONG, ("config.json", "outside")),
    "link of a link": (
        lambda f: ((f / "a").symlink_to("../b"), (f / "merges.txt").symlink_to("a"), (f.parent / "b").write_text("x")),
        WRONG, ("leads to", "outside"),
    ),
    "dangling link out": (link("vocab.json", "/nowhere/at/all"), WRONG, ("'/nowhere/at/all'", "outside", "where nothing is;")),
    "links in a circle": (link("vocab.json", "vocab.json"), WRONG, ("vocab.json",)),
    "template is a link out": (templates_outside, WRONG, ("tool.jinja", "'/etc/hostname'")),
    "folder of templates is a link out": (link("additional_chat_templates", "/etc"), WRONG, ("'/etc'", "outside")),
    "config.json is a pipe": (instead("config.json", os.mkfifo), WRONG, ("config.json", "a pipe")),
    "config.json is a folder": (instead("config.json", Path.mkdir), WRONG, ("config.json", "a folder")),
    "tokenizer.json is a pipe": (instead("tokenizer.json", os.mkfifo), WRONG, ("tokenizer.json", "a pipe")),
    "only a pickle index": (only("pytorch_model.bin.index.json"), WRONG, ("pickled", "can run code", "safetensors")),
    "only a .pt file": (only("weights.pt"), WRONG, ("weights.pt", "can run code")),
    "only a .pth file": (only("weights.pth"), WRONG, ("weights.pth", "can run code")),
    "only a .ckpt file": (only("weights.ckpt"), WRONG, ("weights.ckpt", "can run code")),
    "only a .pkl file": (only("weights.pkl"), WRONG, ("weights.pkl", "can run code")),
}  # fmt: skip


@pytest.mark.parametrize("case", LINKS)
def test_a_file_out_of_bounds(source: Path, tokens: Path, tmp_path: Path, case: str) -> None:
    LINKS[case][0](source)
    refused(source, LINKS[case])
    refused(source, LINKS[case], "compress", source, tmp_path / "out", "--calibration", tokens)
    assert not (tmp_path / "out").exists()
    assert streamlap.verify(source)["ok"] is False


def test_a_file_behind_a_folder_that_is_a_link_is_out_of_bounds(source: Path, tmp_path: Path) -> None:
    """The file is none itself."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tool.jinja").write_text("x")
    (source / "additional_chat_templates").symlink_to("../elsewhere")
    refused_by(lambda: companions(source), CheckpointError, "tool.jinja", "elsewhere", "outside")


def test_a_folder_with_a_link_out_is_not_loaded(source: Path) -> None:
    link("tokenizer.json", "/etc/hostname")(source)
    refused_by(lambda: streamlap.load(source), CheckpointError, "tokenizer.json", "outside")


def test_a_companion_that_is_too_large_is_said_at_the_start(source: Path, tokens: Path, tmp_path: Path) -> None:
    whole_file(b"{}", (256 << 20) + 1, "tokenizer.json")(source)
    words = ("compress", source, tmp_path / "out", "--calibration", tokens)
    refused(source, (lambda folder: None, WRONG, ("tokenizer.json", "268,435,457 bytes", "at most")), *words)
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_are_followed(sharded: Path, tokens: Path, tmp_path: Path) -> None:
    """Its snapshots are links to ../../blobs; what is copied from them are files."""
    snapshot, blobs = (tmp_path / "models--org--pico" / name for name in ("snapshots/0123", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (sharded / "LICENSE").write_text("as is")
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    streamlap.compress(snapshot, tmp_path / "out", files=(str(tokens),))
    assert (tmp_path / "out" / "LICENSE").read_text() == "as is"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models--org--pico").rename(tmp_path / "elsewhere" / "disk")
    (tmp_path / "models--org--pico").symlink_to("elsewhere/disk")
    assert streamlap.verify(snapshot)["ok"], "the repository's folder may be a link itself"
    (snapshot / "tokenizer.json").symlink_to("../../../other--model")
    refused(snapshot, (lambda folder: None, WRONG, ("tokenizer.json", "outside the checkpoint")))


EMPTY_BPE = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
TOKENIZERS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "nothing": ("tokenizer.json", b"", ("tokenizer.json cannot be used", "Expecting value", "put the original there")),
    "a list": ("tokenizer.json", b"[]", ("tokenizer.json cannot be used",)),
    "no model": ("tokenizer.json", b'{"version": "1.0"}', ("tokenizer.json cannot be used",)),
    "deep": ("tokenizer.json", b"[" * 100_000, ("tokenizer.json cannot be used", "nested too deeply")),
    "a model of text": ("tokenizer.json", b'{"version": "1.0", "model": "BPE"}', ("tokenizer.json cannot be used",)),
    "no token": ("tokenizer.json", EMPTY_BPE, ("tokenizer.json has no token",)),
    "settings cut short": ("tokenizer_config.json", b"{", ("tokenizer_config.json is not JSON",)),
    "settings in a list": ("tokenizer_config.json", b"[]", ("tokenizer_config.json holds a list",)),
    "half a letter": ("tokenizer_config.json", rb'{"chat_template": "\ud800"}', ("surrogates not allowed",)),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_not_written_as_gguf(tmp_path: Path, case: str) -> None:
    name, raw, words = TOKENIZERS[case]
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    add_vocabulary(Mock(), tmp_path, 300)
    (tmp_path / name).write_bytes(raw)
    refused_by(lambda: add_vocabulary(Mock(), tmp_path, 300), CheckpointError, *words)


def test_what_can_run_code_is_not_copied(source: Path, tokens: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.py", "tokenizer.pkl", "tokenizer.so", "tokenizer_extra.txt"):
        (source / name).write_text("x")
    (source / "tokenizer").mkdir()
    streamlap.compress(source, tmp_path / "out", files=(str(tokens),))
    assert sorted(path.name for path in (tmp_path / "out").glob("tokenizer*")) == ["tokenizer_extra.txt"]


# --- config.json -----------------------------------------------------------------------------------------------------


def config_is(raw: bytes) -> Break:
    return whole_file(raw, 0, "config.json")


def sized(key: str, value: Any) -> Case:
    return edit_config(**{key: value}), WRONG, ("config.json", f"{key} {shown(value)}", "whole number from 1 to")


def rope(**fields: Any) -> Break:
    return edit_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4} | fields)


CONFIG: dict[str, Case] = {
    "num_hidden_layers of a million": sized("num_hidden_layers", 10**6),
    "num_hidden_layers beyond the shards": (
        edit_config(num_hidden_layers=900), WRONG, ("num_hidden_layers 900", "hold 3 decoder layers", "agree"),
    ),
    "num_hidden_layers is a float": sized("num_hidden_layers", 3.0),
    "num_hidden_layers is true": sized("num_hidden_layers", True),
    "hidden_size of 10^12": sized("hidden_size", 10**12),
    "hidden_size is negative": sized("hidden_size", -32),
    "intermediate_size of 10^12": sized("intermediate_size", 10**12),
    "num_attention_heads of 10^9": sized("num_attention_heads", 10**9),
    "num_key_value_heads is text": sized("num_key_value_heads", "2"),
    "head_dim of 10^9": sized("head_dim", 10**9),
    "head_dim is odd": (edit_config(head_dim=7), WRONG, ("head_dim 7", "even")),
    "vocab_size of 10^15": sized("vocab_size", 10**15),
    "max_position_embeddings of 10^15": sized("max_position_embeddings", 10**15),
    "kv heads that do not divide": (edit_config(num_key_value_heads=3), WRONG, ("num_key_value_heads 3", "divisor")),
    "many layer types": (edit_config(layer_types=["x"] * 10**5), WRONG, ("layer_types", "one word", "layers")),
    "layer types are text": (edit_config(layer_types="xxx"), WRONG, ("layer_types 'xxx'",)),
    "unknown layer types": (edit_config(layer_types=["x"] * 3), WRONG, ("does not describe a model",)),
    "rope_theta of 10^300": (rope(rope_theta=1e300), WRONG, ("rope_parameters.rope_theta 1e+300", "finite")),
    "rope_theta is text": (rope(rope_theta="big"), WRONG, ("rope_parameters.rope_theta 'big'", "finite numbers")),
    "many rope factors": (
        rope(rope_type="longrope", short_factor=[1.0] * 10**5, long_factor=[1.0]), WRONG, ("short_factor [1.0", "short list"),
    ),
    "yarn without a factor": (rope(rope_type="yarn"), WRONG, ("config.json", "factor")),
    "deep rope": (rope(a={"b": {"c": {}}}), WRONG, ("rope_parameters.a.b {'c': {}}",)),
    "unknown activation": (edit_config(hidden_act="os.system"), WRONG, ("does not describe a model", "os.system")),
    "pad_token_id beyond the vocabulary": (edit_config(pad_token_id=10**9), WRONG, ("does not describe a model",)),
    "shadowed method": (edit_config(to_dict="x"), WRONG, ("does not describe a model",)),
    "config.json of 16 MiB": (whole_file(b"{", (16 << 20) + 1, "config.json"), WRONG, ("more than 16,777,216 bytes",)),
    "deep config.json": (config_is(b'{"a":' * 99_999), WRONG, ("not JSON", "nested too deeply")),
    "key twice": (config_is(b'{"model_type":"llama","model_type":"x"}'), WRONG, ("'model_type' stands twice",)),
    "config.json in UTF-16": (config_is('{"model_type":"llama"}'.encode("utf-16")), WRONG, ("not UTF-8",)),
    "config.json with NaN": (config_is(b'{"rms_norm_eps":NaN}'), WRONG, ("NaN is no JSON number",)),
    "model_type is an object": (edit_config(model_type={"a": 1}), UnsupportedModel, ("{'a': 1}", "known are llama")),
    "model_type of a megabyte": (edit_config(model_type="x" * 10**6), UnsupportedModel, ("'xxx", "known are llama")),
    "architectures of a megabyte": (
        edit_config(model_type="x", architectures=["\x1b" * 10**6]), UnsupportedModel, ("'\\x1b", "known are llama"),
    ),
    "quantised by another": (
        edit_config(quantization_config={"quant_method": "awq" * 99_999}), UnsupportedModel, ("'awqawq", "plain float"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG)
def test_a_hostile_config(source: Path, case: str) -> None:
    CONFIG[case][0](source)
    refused(source, CONFIG[case])
    assert streamlap.verify(source)["ok"] is False


def test_a_forward_of_the_shell_that_fails(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("odd\nvalues")

    stream = ModelStream(source)
    monkeypatch.setattr(type(stream.model.get_submodule("model")), "forward", fail)
    refused_by(
        lambda: stream.layer_kwargs(4), CheckpointError, "does not describe a model that runs: ValueError: odd values"
    )


def test_keys_that_would_make_transformers_act_are_not_heeded(source: Path) -> None:
    """A kernel from the hub, another config file, a table of 10^9 labels, a dtype that is none."""
    wanted = streamlap.inspect(source)
    (source / "config.5.0.0.json").write_text('{"model_type": "gpt2"}')
    edit_config(
        attn_implementation="org/kernel", _attn_implementation="org/kernel", configuration_files=["config.5.0.0.json"],
        num_labels=10**9, dtype="nn", _name_or_path="../x",
    )(source)  # fmt: skip
    assert streamlap.inspect(source) == wanted


def rows(**table: Any) -> Break:
    """Change rows of the table of modules, by the last words of their paths in layer 0."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        modules = config["quantization_config"]["modules"]
        for name, row in table.items():
            modules[name if "." in name else f"model.layers.0.self_attn.{name}_proj"] = row
        path.write_text(json.dumps(config))

    return edit


Q = "model.layers.0.self_attn.q_proj"
MODULES: dict[str, Case] = {
    "no such layer": (rows(**{"model.layers.9.mlp.up_proj": {"rank": 2}}), WRONG, ("layers.9", "2 decoder layers")),
    "a path into Python": (rows(**{"model.__class__.__init__": {"rank": 2}}), WRONG, ("__class__", "wanted linears")),
    "the output head": (rows(**{"lm_head.": {"rank": 2}}), WRONG, ("lm_head", "wanted linears")),
    "path of a megabyte": (rows(**{"x." * 10**6: {"rank": 2}}), WRONG, ("'x.x", "wanted linears")),
    "row is a list": (rows(q=[1]), WRONG, (Q, "[1]")),
    "rank of 10^12": (rows(q={"rank": 10**12}), WRONG, (Q, "rank = 1000000000000", "1..31")),
    "rank is true": (rows(q={"rank": True}), WRONG, (Q, "rank = True", "integer")),
    "rank is text": (rows(q={"rank": "7" * 10**6}), WRONG, (Q, "rank = '777", "integer")),
    "rank is negative": (rows(q={"rank": -1}), WRONG, (Q, "rank = -1")),
    "width of 10^12": (rows(q={"out": 10**12}), WRONG, (Q, "out = 1000000000000")),
    "two kinds": (rows(q={"rank": 7, "pivots": 7}), WRONG, (Q, "at most one of")),
    "unknown keys": (rows(q={f"k{number}": 1 for number in range(10**4)}), WRONG, (Q, "at most one of")),
    "cuts of value heads": (rows(v={"out_heads": 2}), WRONG, ("v_proj", "'out_heads': 2", "Version 0.4 alone")),
    "groups of zero": (rows(k={"pivots": 4, "groups": 0}), WRONG, ("k_proj", "groups = 0")),
    "rank that the tensor has not": (rows(o={"rank": 7, "bias": 1}), WRONG, ("o_proj", "has shape")),
}  # fmt: skip


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_case(tmp_path_factory.mktemp("compressed"), CONFIGS["llama"](), all_kinds(8)).folder


@pytest.mark.parametrize("case", MODULES)
def test_hostile_rows(compressed: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "out"))
    MODULES[case][0](folder)
    refused(folder, MODULES[case])
    refused(folder, MODULES[case], "export", folder, tmp_path / "dense", "--to", "dense")
    assert streamlap.verify(folder)["ok"] is False


def test_widths_that_do_not_fit_each_other(compressed: Path, tmp_path: Path) -> None:
    """Tensors and rows agree, and the layer could not run."""
    folder = Path(shutil.copytree(compressed, tmp_path / "out"))
    tensors, path = load_file(folder / SINGLE), "model.layers.1.self_attn.q_proj"
    tensors[f"{path}.weight"] = tensors[f"{path}.weight"][:11].contiguous()
    save_file(tensors, folder / SINGLE)
    rows(**{path: {"out": 11}})(folder)
    refused(folder, (lambda f: None, WRONG, ("model.layers.1", "do not fit together", "q_proj [11, 32]")))


REPORTS = {
    "a list": "[]",
    "no layers": "{}",
    "layers of text": '{"layers": ["x"]}',
    "deep": '{"a":' * 9999,
    "NaN": "[NaN]",
}


@pytest.mark.parametrize("case", REPORTS)
def test_a_hostile_report(compressed: Path, tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "out"))
    (folder / "streamlap_report.json").write_text(REPORTS[case])
    refused(folder, (lambda f: None, WRONG, ("streamlap_report.json",)))
    assert streamlap.verify(folder)["ok"] is False


# --- recipes, surveys, journals, tokens ------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "a billion laughs": (BOMB.encode(), ("anchor or alias 'a' in line 1",)),
    "an alias": (b"ratio: *x", ("anchor or alias 'x'",)),
    "a key twice": (b"ratio: 0.2\nratio: 0.9", ("'ratio' stands twice, again in line 2",)),
    "a key that is a list": (b"? [a]\n: 1", ("is no word",)),
    "256 KiB": (b"#" * ((1 << 18) + 1), ("more than 262,144 bytes",)),
    "not UTF-8": (b"ratio: \xff", ("not UTF-8 at byte 7",)),
    "UTF-16": ("ratio: 0.2".encode("utf-16"), ("not UTF-8",)),
    "nested": (b"[" * 20_000, ("more than 16 levels",)),
    "a date that is none": (b"ratio: 2026-99-99", ("cannot be read",)),
    "a number of 60,000 digits": (b"ratio: 0x" + b"f" * 60_000, ("number of 60002 characters in line 1",)),
    "a key of 60,000 digits": (b"? 0x" + b"f" * 60_000 + b"\n: 1", ("number of 60002 characters",)),
    "an object": (b"!!python/object/apply:os.system [exit]", ("could not determine a constructor",)),
    "a knob of 200 KB": (b"methods: [{method: ffn_anchored, storage: " + b"x" * 200_000 + b"}]", ("storage is 'xxx",)),
    "text of 200 KB": (b"preset: " + b"x" * 200_000, ("preset is 'xxx",)),
    "unknown keys of 200 KB": (b"? " + b"x" * 100_000 + b"\n: 1\n\"\\e[2J\": 2", ("unknown keys xxx",)),
    "ratio is not a number": (b"ratio: .nan", ("ratio is nan",)),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe(pico: MakeModel, tmp_path: Path, case: str) -> None:
    raw, words = RECIPES[case]
    (tmp_path / "r.yaml").write_bytes(raw)
    refused_by(lambda: Recipe.from_yaml(tmp_path / "r.yaml"), RecipeError, *words)
    command = ("compress", pico("llama"), tmp_path / "out", "--recipe", tmp_path / "r.yaml")
    refused(tmp_path, (lambda f: None, RecipeError, words), *command)


def survey_of(**fields: Any) -> bytes:
    point = {"keep": 0.5, "kl": 0.1, "error": 0.1}
    table = {"format_version": 1, "model": "m", "calibration": "c", "compute": "c", "layers": [{"ffn": [point]}]}
    return json.dumps(table | fields).encode()


SURVEYS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "64 MiB": (b"", ("more than 67,108,864 bytes",)),
    "deep": (b'{"a":' * 99_999, ("nested too deeply",)),
    "NaN": (survey_of(x=float("nan")), ("NaN",)),
    "a key twice": (b'{"model":1,"model":1}', ("stands twice",)),
    "UTF-16": ("{}".encode("utf-16"), ("not UTF-8",)),
    "points of text": (survey_of(layers=[{"ffn": [{"keep": "x" * 10**6, "kl": 1, "error": 1}]}]), ("keep 'xxx",)),
    "points of true": (survey_of(layers=[{"ffn": [{"keep": 0.5, "kl": True, "error": 1}]}]), ("kl True",)),
    "points of other names": (survey_of(layers=[{"ffn": [{"x\n" * 10**5: 1}]}]), ("no survey file",)),
    "layers is a number": (survey_of(layers=5), ("no survey file",)),
    "model is a list": (survey_of(model=[]), ("model, calibration, compute and shape",)),
    "shape is a list": (survey_of(shape=[]), ("model, calibration, compute and shape",)),
}


@pytest.mark.parametrize("case", SURVEYS)
def test_a_hostile_survey(tmp_path: Path, case: str) -> None:
    raw, words = SURVEYS[case]
    whole_file(raw, (64 << 20) + 1 if not raw else 0, "s.json")(tmp_path)
    refused_by(lambda: Survey.read(tmp_path / "s.json"), RecipeError, "s.json", *words)


START = {"fingerprint": {}, "arguments": {}}
JOURNALS: dict[str, tuple[list[bytes], tuple[str, ...]]] = {
    "empty": ([], ("damaged",)),
    "a list": ([b"[]"], ("first line is []",)),
    "arguments are a list": ([b'{"fingerprint":{},"arguments":[]}'], ("wanted fingerprint and arguments",)),
    "deep": ([b'{"a":' * 99_999], ("nested too deeply",)),
    "a key twice": ([b'{"fingerprint":{},"fingerprint":{}}'], ("stands twice",)),
    "lines out of order": ([json.dumps(START).encode(), b'{"index":1}'], ("line 2 is not that of layer 0",)),
    "index is false": ([json.dumps(START).encode(), b'{"index":false}'], ("line 2",)),
    "line is a number": ([json.dumps(START).encode(), b"5"], ("line 2",)),
    "seconds are text": ([json.dumps(START).encode(), b'{"index":0,"seconds":{"a":"b"}}'], ("seconds {'a': 'b'}",)),
    "NaN": ([json.dumps(START).encode(), b'{"index":0,"error":NaN}'], ("NaN",)),
    "UTF-16": (["{}".encode("utf-16")], ("not UTF-8",)),
}


@pytest.mark.parametrize("case", JOURNALS)
def test_a_hostile_journal(tmp_path: Path, case: str) -> None:
    lines, words = JOURNALS[case]
    (tmp_path / STATE_FOLDER).mkdir()
    (tmp_path / STATE_FOLDER / "journal.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    refused_by(lambda: Journal.load(tmp_path), ResumeMismatch, "journal.jsonl", *words)
    refused(tmp_path, (lambda f: None, ResumeMismatch, words), "resume", tmp_path)


def test_a_fingerprint_puts_no_line_of_its_own_into_a_message(tmp_path: Path) -> None:
    journal = Journal(
        tmp_path, {"fingerprint": {"a\nstreamlap: all is well\x1b[2J": "b\nc" * 999}, "arguments": {}}, []
    )
    with pytest.raises(ResumeMismatch) as caught:
        journal.check({}, "compress")
    assert len(str(caught.value).splitlines()) == 3
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def begun(**changes: Any) -> dict[str, Any]:
    """Arguments of a journal, some of them changed; those of the settings by name."""
    own = {name: changes.pop(name) for name in KEPT if name in changes}
    settings = RunSettings().to_json() | own
    return {"command": "compress", "model": "m", "settings": settings, "recipe": Recipe().to_dict()} | changes


ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "none": ({}, ("does not say how it was begun (command is None, model None, settings None)",)),
    "command is a list": (begun(command=["compress"]), ("how it was begun", "command is ['compress']")),
    "command of another": (begun(command="a\nb"), ("was begun by 'a\\nb'", "one of compress, survey, recover, export")),
    "command is dunder": (begun(command="__init__"), ("was begun by '__init__'",)),
    "model is a number": (begun(model=5), ("how it was begun", "model 5")),
    "settings are a list": (begun(settings=[1] * 10**5), ("how it was begun", "settings [1, 1")),
    "settings are empty": (begun(settings={}), ("how it was begun", "setting device is absent")),
    "device is a number": (begun(device=5), ("how it was begun", "setting device is 5")),
    "work is a number": (begun(work=5), ("how it was begun", "setting work is 5")),
    "cap is text": (begun(max_ram="x\n" * 10**5), ("how it was begun", "setting max_ram is 'x\\nx")),
    "cap is true": (begun(max_vram=True), ("how it was begun", "setting max_vram is True")),
    "overlap is 1": (begun(overlap=1), ("how it was begun", "setting overlap is 1")),
    "no recipe": ({key: value for key, value in begun().items() if key != "recipe"}, ("no recipe that can be used",)),
    "recipe is a list": (begun(recipe=[]), ("no recipe that can be used",)),
    "recipe of magic": (begun(recipe={"preset": "magic"}), ("no recipe that can be used", "preset is 'magic'")),
    "dtype is a number": (begun(command="survey", dtype=5), ("does not say its dtype",)),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_state_that_does_not_say_how_it_was_begun_is_not_resumed(tmp_path: Path, case: str) -> None:
    arguments, words = ARGUMENTS[case]
    (tmp_path / STATE_FOLDER).mkdir()
    Journal.create(tmp_path, {"versions": versions_mark()}, arguments)
    refused(tmp_path, (lambda f: None, ResumeMismatch, words), "resume", tmp_path)


def test_a_state_of_another_version_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / STATE_FOLDER).mkdir()
    Journal.create(tmp_path, {"versions": "streamlap 0.1\n\x1b[2J" * 99}, begun())
    with pytest.raises(ResumeMismatch, match=r"versions: the folder has 'streamlap 0\.1") as caught:
        streamlap.resume(tmp_path)
    assert versions_mark() in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < MOST_WORDS


def npy(shape: str, descr: str = "<i8", data: bytes = b"\0" * 8) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + (246).to_bytes(2, "little") + text.ljust(245).encode() + b"\n" + data


class Runs:
    """What a pickle runs when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


ARRAYS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "shape of 10^15 rows": (npy(f"({10**15}, 16)"), ("takes 128000000000000000 bytes", "the file has 8")),
    "shape of 400 digits": (npy(f"({'9' * 150},)"), ("999", "the file has 8")),
    "negative shape": (npy("(-4, -16)"), ("the file has 8",)),
    "shape of true": (npy("(True,)", data=b"\0" * 8), ("shape (True,)", "the file has 8")),
    "numbers of no bytes": (npy(f"({10**15},)", "<U0"), ("<U0", "whole numbers")),
    "records": (npy("(1,)", "|V99999999"), ("V99999999", "whole numbers")),
    "more than its header says": (npy("(1,)", data=b"\0" * 80), ("the file has 80",)),
    "deep header": (npy("(" * 200), (".npy",)),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
def test_a_hostile_array(pico: MakeModel, tmp_path: Path, case: str) -> None:
    raw, words = ARRAYS[case]
    (tmp_path / "c.npy").write_bytes(raw)
    command = ("compress", pico("llama"), tmp_path / "out", "--calibration", tmp_path / "c.npy")
    refused(tmp_path, (lambda f: None, RecipeError, words), *command)
    (tmp_path / STATE_FOLDER).mkdir()
    (tmp_path / STATE_FOLDER / "tokens.npy").write_bytes(raw)
    refused_by(lambda: saved_tokens(tmp_path), ResumeMismatch, "tokens.npy", *words)


def test_a_pickle_in_an_array_does_not_run(pico: MakeModel, tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.array([Runs()], object), allow_pickle=True)
    command = ("compress", pico("llama"), tmp_path / "out", "--calibration", tmp_path / "c.npy")
    refused(tmp_path, (lambda f: None, RecipeError, ("pickled", "can run code", "whole numbers")), *command)


@pytest.mark.parametrize(
    "raw", [b"[" * 99_999, b"{}" * 10**6, b'{"a": NaN}', b"\xff", b"[]", b'{"a": {"matmul": 1e999}}']
)
def test_a_hostile_cache_is_as_if_it_were_not_there(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "machine.json").write_bytes(raw)
    assert load(tmp_path / "machine.json") == {}


# --- the model card --------------------------------------------------------------------------------------------------

CARDS: dict[str, tuple[str, dict[str, str]]] = {
    "plain": ("license: mit\nlicense_name: 'My Own (v2)'", {"license": "mit", "license_name": "My Own (v2)"}),
    "quotes": ('license: "mit"', {"license": "mit"}),
    "markup": ("license: <script>x</script>\nlicense_link: '`rm`'", {}),
    "YAML": ("license: {a: b}\nlicense_name: &x |\n  tags", {}),
    "long": ("license: " + "x" * 201, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CARDS)
def test_licence_fields_are_plain_words(tmp_path: Path, case: str) -> None:
    front, wanted = CARDS[case]
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\nlicense: not this\n")
    assert licence_of(tmp_path) == wanted


@pytest.mark.parametrize(
    "base", ["a\n---\ntags: [x]", '"\nx: y', "`x`<script>", "[a](javascript:b)", "# a", "org/name@v1", "é"]
)
def test_a_name_adds_nothing_to_the_card(base: str, tmp_path: Path) -> None:
    counts = Parameters(decoder_before=2, decoder_after=1, total_before=2, total_after=1)
    recipe = {"preset": "best", "ratio": 0.2}
    report = Report(out="o", recipe=recipe, parameters=counts, kv_cache=KvCache(before=1, after=1),
                    layers=(), shards={}, calibration_tokens=(1, 1),
                    calibration_inputs=1, seconds=0.0, kept_channels="k")  # fmt: skip
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    card = card_of(report, base, tmp_path)
    front = yaml.safe_load(card.split("---\n")[1])
    assert set(front) == {"base_model", "base_model_relation", "library_name", "license", "tags"}
    assert front["tags"] == ["streamlap", "low-rank", "pruned"]
    assert front["license"] == "mit"
    (heading,) = [line for line in card.split("\n") if line.startswith("# ")]
    assert heading == f"# {front['base_model']}, compressed by streamlap"
    assert not set('<>`[]"\n') & set(heading)
    if base in ("org/name@v1", "é"):
        assert front["base_model"] == base


def test_messages_have_an_end() -> None:
    assert len(str(StreamlapError("x" * 10**6))) == 4000
    assert shown("a" * 10**6).endswith("'")
    assert len(shown({"a" * 10**6: ["b" * 10**6] * 99})) <= 120
    assert shown("\x1b\n") == "'\\x1b\\n'"
    assert shown(1 << 99_999) == "int of many digits"
