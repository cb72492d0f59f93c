"""GGUF files, read back by gguf's own reader. That llama.cpp computes the same is measured apart, see docs/engines.md."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, make_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModel, AutoModelForCausalLM

import streamlap
from streamlap.errors import BudgetError, RecipeError, StreamlapError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.loader.forms import Dense, Form, Removed
from streamlap.output.gguf import Planned, architecture, in_pairs, rope_factors, write_gguf
from streamlap.output.gguf_vocabulary import (
    SPLITS,
    add_tokens,
    add_vocabulary,
    adds_space,
    check_spaces,
    scores,
    split_of,
)

gguf = pytest.importorskip("gguf")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields, and tensors as float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(reversed(tensor.shape.tolist()))
        )
        for tensor in reader.tensors
    }
    return fields, tensors


def turned(x_LHE: torch.Tensor, pairs: bool) -> torch.Tensor:
    """Rotary positions: of neighbours, as llama.cpp turns a llama; or of halves, as transformers does."""
    length, _, size = x_LHE.shape
    angle_LP = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angle_LP.cos()[:, None], angle_LP.sin()[:, None]
    one, two = (x_LHE[..., 0::2], x_LHE[..., 1::2]) if pairs else x_LHE.chunk(2, -1)
    return torch.stack((one * cos - two * sin, two * cos + one * sin), -1)


def test_rows_in_pairs_turn_as_halves_did() -> None:
    x_LD, w_OD = torch.randn(5, 12), torch.randn(16, 12)
    halves = turned((x_LD @ w_OD.T).view(5, 2, 8), pairs=False)
    neighbours = turned((x_LD @ in_pairs(w_OD, 2).T).view(5, 2, 8), pairs=True)
    torch.testing.assert_close(neighbours, halves)
    assert in_pairs(w_OD, 0) is w_OD


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_plain_model_is_written_as_it_is(pico: MakeModel, tmp_path: Path, family: str) -> None:
    source = pico(family, tokenizer=True, tied=family == "qwen3", num_hidden_layers=2)
    result = streamlap.export(source, tmp_path / "model.gguf", to="gguf", type="f32")
    assert result == {"shards": 1, "bytes": (tmp_path / "model.gguf").stat().st_size}
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == family
    sizes = {"block_count": 2, "embedding_length": 32, "feed_forward_length": 48, "attention.head_count": 4}
    sizes |= {"attention.head_count_kv": 2, "attention.key_length": 8, "rope.dimension_count": 8, "context_length": 64}
    assert {key: fields[f"{family}.{key}"] for key in sizes} == sizes
    model = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert ("output.weight" in tensors) == (family != "qwen3")
    for name, own in (
        ("blk.1.ffn_down.weight", "layers.1.mlp.down_proj.weight"),
        ("token_embd.weight", "embed_tokens.weight"),
    ):
        np.testing.assert_array_equal(tensors[name], model[f"model.{own}"].numpy())
    q_OI = model["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight"], in_pairs(q_OI, 4 if family == "llama" else 0).numpy())
    assert sum(array.size for array in tensors.values()) == sum(
        {t.data_ptr(): t.numel() for t in model.values()}.values()
    )


def test_a_qwen2_of_few_heads_is_a_llama(pico: MakeModel, tmp_path: Path) -> None:
    """llama.cpp takes the q of a qwen2 to have as many rows as the hidden size."""
    source = pico("qwen2", tokenizer=True, head_dim=16)
    streamlap.export(source, tmp_path / "m.gguf", to="gguf", type="f32")
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.attention.head_count"], fields["llama.attention.key_length"]) == (4, 16)
    model = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for part in ("weight", "bias"):
        q_O = model[f"model.layers.0.self_attn.q_proj.{part}"]
        np.testing.assert_array_equal(tensors[f"blk.0.attn_q.{part}"], in_pairs(q_O, 4).numpy())


def test_a_model_is_called_what_it_is(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """Not what it was trained from."""
    source = Path(shutil.copytree(pico("llama", tokenizer=True), tmp_path / "mytune"))
    (source / "README.md").write_text("---\nbase_model: meta/other\n---\n# my tune\n")
    streamlap.compress(source, tmp_path / "out", ratio=0.2, format="stock", files=(str(tokens),))
    for folder in (source, tmp_path / "out"):
        streamlap.export(folder, tmp_path / f"{folder.name}.gguf", to="gguf")
        assert read(tmp_path / f"{folder.name}.gguf")[0]["general.name"] == "mytune"


def test_a_model_without_a_head_is_warned_of(pico: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "bare"
    AutoModel.from_pretrained(pico("llama")).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    streamlap.export(source, tmp_path / "m.gguf", to="gguf")
    assert "has no language-model head, and llama.cpp takes the embedding for one" in caplog.text


def test_layers_that_differ_are_a_deci(pico: MakeModel, tmp_path: Path) -> None:
    """The forms of a folder of which layer 1 has no attention; its numbers are those of the source."""
    stream = ModelStream(pico("qwen2", tokenizer=True))
    layers: list[dict[str, Form]] = [dict(stream.natives(index)) for index in range(3)]
    layers[1] |= {role: Removed(layers[1][role].shape) for role in "qkvo"}
    layers[2] |= {"down": Dense((32, 40)), "gate": Dense((40, 32)), "up": Dense((40, 32))}
    size = write_gguf(stream, layers, tmp_path / "m.gguf", "bf16", "a name")
    fields, arrays = read(tmp_path / "m.gguf")
    assert not [name for name in arrays if name.startswith("blk.1.attn")], "nothing of what is gone, nor its norm"
    assert size == (tmp_path / "m.gguf").stat().st_size
    assert not (tmp_path / "m.gguf.tmp").exists()
    assert (fields["general.architecture"], fields["general.name"]) == ("deci", "a name")
    assert fields["deci.attention.head_count"] == [4, 0, 4]
    assert fields["deci.attention.head_count_kv"] == [2, 0, 2]
    assert fields["deci.feed_forward_length"] == [48, 48, 40]


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 1e-2)])
def test_smaller_types(pico: MakeModel, tmp_path: Path, kind: str, most: float) -> None:
    """Rows of 48 are no whole blocks of q8_0, so down is f16 there."""
    source = pico("llama", tokenizer=True, num_hidden_layers=1)
    for each in ("f32", kind):
        streamlap.export(source, tmp_path / f"{each}.gguf", to="gguf", type=each)
    exact, rounded = (read(tmp_path / f"{each}.gguf")[1] for each in ("f32", kind))
    for name, array in exact.items():
        assert np.abs(rounded[name] - array).max() <= most * np.abs(array).max(), name
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
    assert stored["blk.0.ffn_up.weight"] == kind.upper()
    assert stored["blk.0.attn_norm.weight"] == "F32"
    assert stored["blk.0.ffn_down.weight"] == ("F16" if kind == "q8_0" else kind.upper())


def test_frequencies_that_are_scaled_one_by_one(pico: MakeModel) -> None:
    stream = ModelStream(pico("llama", rope_parameters=LLAMA3))
    factors = rope_factors(stream)
    assert len(factors) == 4
    assert min(factors) == pytest.approx(1.0)
    assert max(factors) == pytest.approx(8.0)
    assert rope_factors(ModelStream(pico("llama"))) == []


def test_what_cannot_be_held_is_refused(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source, file = pico("llama", tokenizer=True), tmp_path / "m.gguf"
    streamlap.compress(source, tmp_path / "out", files=(str(tokens),))
    with pytest.raises(
        UnsupportedModel, match=r"q_proj is pivoted, and GGUF holds dense linears alone; wanted a folder"
    ):
        streamlap.export(tmp_path / "out", file, to="gguf")
    with pytest.raises(UnsupportedModel, match="a seed_oss is not written as GGUF"):
        streamlap.export(pico("seed_oss", tokenizer=True), file, to="gguf")
    with pytest.raises(RecipeError, match=r"does not end in .gguf; wanted a new file"):
        streamlap.export(source, tmp_path / "folder", to="gguf")
    with pytest.raises(RecipeError, match="type is 'q2'; wanted one of f32"):
        streamlap.export(source, file, to="gguf", type="q2")
    with pytest.raises(RecipeError, match="wanted a type with gguf alone"):
        streamlap.export(source, tmp_path / "folder", to="stock", type="f16")
    assert not file.exists()
    file.touch()
    with pytest.raises(RecipeError, match="is there already"):
        streamlap.export(source, file, to="gguf")


NOT_COMPUTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation of a qwen2": ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and llama.cpp computes silu"),
    "activation of a qwen3": ("qwen3", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and llama.cpp computes silu"),
    "activation of a llama": ("llama", {"hidden_act": "gelu"}, r"wanted silu\. Run this model with transformers\.$"),
    "positions": ("qwen3", {"rope_parameters": LLAMA3}, "rope_type is 'llama3'"),
    "biases": ("qwen3", {"attention_bias": True}, r"layers\.0\.self_attn\.\w_proj has a bias, which llama\.cpp"),
    "windows": ("mistral", {"sliding_window": 8}, "a mistral with layers that differ or windows is not written as GGUF"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_COMPUTED)
def test_what_llama_cpp_would_not_compute_is_refused(pico: MakeModel, tmp_path: Path, case: str) -> None:
    family, settings, words = NOT_COMPUTED[case]
    with pytest.raises(UnsupportedModel, match=words):
        streamlap.export(pico(family, tokenizer=True, **settings), tmp_path / "m.gguf", to="gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_bias_that_was_added_is_refused(pico: MakeModel) -> None:
    """Those of q, k and v are a qwen2's own."""
    stream = ModelStream(pico("qwen2", tokenizer=True))
    layers: list[dict[str, Form]] = [dict(stream.natives(index)) for index in range(3)]
    assert architecture(stream, layers) == "qwen2"
    layers[1]["o"] = Dense(layers[1]["o"].shape, bias=True)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.self_attn\.o_proj has a bias"):
        architecture(stream, layers)


def test_shapes_that_no_engine_knows_have_a_way_out(pico: MakeModel) -> None:
    stream = ModelStream(pico("llama", tokenizer=True))
    layers: list[dict[str, Form]] = [dict(stream.natives(index)) for index in range(3)]
    layers[0] |= {role: Removed(layers[0][role].shape) for role in "qkvo"}
    with pytest.raises(
        UnsupportedModel, match=r"GGUF holds dense linears, .* Export to dense, and that folder to GGUF"
    ):
        architecture(stream, layers)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, BudgetError), (errno.EIO, StreamlapError)])
def test_a_file_that_cannot_be_written_is_begun_anew(
    pico: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StreamlapError]
) -> None:
    def fail(_: Planned) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Planned, "data", fail)
    with pytest.raises(kind, match=r"run the same command again\.$"):
        streamlap.export(pico("llama", tokenizer=True), tmp_path / "m.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


# --- tokenizers --------------------------------------------------------------------------------------------------------


class Written(dict[str, Any]):
    """What a writer is told."""

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.update({name: value})


def vocabulary(folder: Path, size: int) -> Written:
    written = Written()
    add_vocabulary(written, folder, size)
    return written


def test_merges_of_bytes(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found, table = vocabulary(tmp_path, 302), json.loads((tmp_path / "tokenizer.json").read_text())
    assert (found["add_tokenizer_model"], found["add_tokenizer_pre"]) == ("gpt2", "gpt-2")
    assert found["add_token_merges"] == [" ".join(pair) for pair in table["model"]["merges"]]
    assert found["add_token_list"][:2] == ["<s>", "</s>"]
    assert found["add_token_list"][300:] == ["[UNUSED300]", "[UNUSED301]"]
    assert [found["add_token_types"][number] for number in (0, 1, 2, 300)] == [3, 3, 1, 5]
    assert (found["add_bos_token_id"], found["add_add_bos_token"]) == (0, False)
    assert found["add_chat_template"] == "{{ messages }}"


def test_ways_to_split_have_names() -> None:
    def split(pattern: str, whole_words: bool = False) -> dict[str, Any]:
        parts = [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "use_regex": False}]
        before = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
        return before | {"model": {"ignore_merges": whole_words}}

    names = {name: pattern for pattern, name in SPLITS.items()}
    assert split_of(split(names["llama-bpe"], whole_words=True)) == "llama-bpe"
    assert split_of(split(names["qwen2"])) == "qwen2"
    for pattern, whole_words in ((names["llama-bpe"], False), (names["qwen2"], True)):
        with pytest.raises(UnsupportedModel, match="which has no name in GGUF that is known here"):
            split_of(split(pattern, whole_words))
    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]
    assert split_of({"pre_tokenizer": {"type": "Sequence", "pretokenizers": digits}}) == "smollm"
    with pytest.raises(UnsupportedModel, match="which has no name in GGUF that is known here"):
        split_of(split(r"\w+"))


def test_pieces_of_text_are_merged_in_the_order_of_their_scores(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<0x41>": 1, "a": 2, "b": 3, "ab": 4, "aba": 5}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = vocabulary(tmp_path, 6)
    assert found["add_tokenizer_model"] == "llama"
    assert found["add_token_types"] == [2, 6, 1, 1, 1, 1]
    by_score = scores(["a b", "ab a"], {number: token for token, number in vocab.items()}, 6)
    assert by_score == found["add_token_scores"]
    assert by_score[4] > by_score[5] > by_score[2] == by_score[0]


SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("normalizer", "before"),
    [
        (None, METASPACE),
        (None, METASPACE | {"prepend_scheme": "never"}),
        (None, {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}),
        (None, {"type": "Metaspace", "replacement": "\u2581"}),
        (None, {"type": "Sequence", "pretokenizers": [{"type": "Metaspace", "replacement": "\u2581"}]}),
        ({"type": "Prepend", "prepend": "\u2581"}, None),
        (None, None),
    ],
)
def test_a_space_goes_before_the_text_where_the_tokenizer_puts_one(normalizer: Any, before: Any) -> None:
    """A Metaspace that says nothing of it does, in files of older releases."""
    model = {"type": "BPE", "vocab": {"\u2581": 0, "a": 1, "\u2581a": 2}, "merges": [["\u2581", "a"]]}
    table = {"version": "1.0", "normalizer": normalizer, "pre_tokenizer": before, "model": model}
    whole = Tokenizer.from_str(json.dumps(table | {"added_tokens": [], "post_processor": None, "decoder": None}))
    assert adds_space(table) == (whole.encode("a").tokens != ["a"])


def test_pieces_of_text_are_split_at_spaces_alone() -> None:
    for before in (None, SPACES, METASPACE, {"type": "Sequence", "pretokenizers": [SPACES, METASPACE]}):
        check_spaces({"pre_tokenizer": before})
    bytes_too = {"type": "Sequence", "pretokenizers": [SPACES, {"type": "ByteLevel"}]}
    digits = {"type": "Digits", "individual_digits": True}
    others = (digits, bytes_too, SPACES | {"pattern": {"Regex": " "}}, SPACES | {"behavior": "Removed"},
              METASPACE | {"replacement": "_"})  # fmt: skip
    for before in others:
        with pytest.raises(UnsupportedModel, match="wanted none, Metaspace, or a split at spaces"):
            check_spaces({"pre_tokenizer": before})
    pieces = {"type": "BPE", "byte_fallback": True, "merges": []}
    with pytest.raises(UnsupportedModel, match=r"splits text by .*Digits"):
        add_tokens(Written(), {"model": pieces, "pre_tokenizer": digits}, Tokenizer(models.BPE({"a": 0}, [])), 6)
