"""A result tokenizes text as its source does, also where its config.json has another model_type: transformers goes by both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import streamlap
from streamlap.data.tokenizer import load_tokenizer

LINES = [f"On day {37 * day} the boat WE'LL  sail;\n\n  {day}{day}\t(x) we'll go" for day in range(100)]
TEXTS = ("On day 12345 WE'LL sail;\n\n  go", "the boat</s>the boat", " two  spaces")
SPLIT = r"(?i:'s|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def of_bytes() -> Tokenizer:
    """Digits in threes, which no class of transformers splits by itself."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return trained(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def of_words() -> Tokenizer:
    """A space is put before a text and not behind a special token."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return trained(made)


def trained(made: Tokenizer, **options: Any) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False, **options)
    made.train_from_iterator(LINES, trainer)
    return made


@pytest.mark.parametrize(
    ("family", "to", "tokenizer", "named"),
    [
        ("phi3", "stock", of_bytes, "GPT2Tokenizer"),
        ("phi3", "factored", of_words, "LlamaTokenizer"),
        ("mistral", "nas", of_words, "LlamaTokenizerFast"),
        ("qwen2", "nas", of_bytes, "LlamaTokenizerFast"),
        ("qwen2", "nas", of_bytes, None),
        ("llama", "nas", of_words, "LlamaTokenizer"),
    ],
)
def test_a_result_has_the_tokens_of_its_source(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, to: str, tokenizer: Any, named: str | None
) -> None:
    windows = {"sliding_window": None} if family == "mistral" else {}
    source = pico(family, vocab_size=320, **windows)
    tokenizer().save(str(source / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({"tokenizer_class": named} if named else {})
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    out, again = tmp_path / "out", tmp_path / "again"
    steps = {} if to == "factored" else {"multiple": 4}
    streamlap.compress(source, out, ratio=0.3, format=to, files=(str(tokens),), survey=None, **steps)
    if to == "factored":
        streamlap.export(out, again, to="dense")
    wanted = [AutoTokenizer.from_pretrained(source)(text)["input_ids"] for text in TEXTS]
    for folder in (out, again) if again.exists() else (out,):
        assert [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in TEXTS] == wanted
        copied = json.loads((folder / "tokenizer_config.json").read_text())
        assert copied | settings | {"tokenizer_class": copied.get("tokenizer_class")} == copied
    for folder in (source, out):
        assert [load_tokenizer(folder, folder)(text)["input_ids"] for text in TEXTS] == wanted
