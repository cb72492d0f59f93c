"""A text that is tokenised in pieces gives the tokens of the whole text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXT, make_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from streamlap.data import pieces as pieces_module
from streamlap.data.pieces import resized, tokens_of
from streamlap.data.tokenizer import Encoder

WORDS = [
    *sorted(set(TEXT.split())),
    "étranger",
    "鯨",
    "кит",
    "sea-side",
    "don't",
    "12345",
    "3.14",
    "(see)",
    "\U0001f40b",
]


def words(count: int, seed: int = 0, between: str = " ") -> str:
    return between.join(random.Random(seed).choices(WORDS, k=count))


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator([TEXT, words(3000)], trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    return make_tokenizer().backend_tokenizer


def digits_apart() -> Tokenizer:
    """Split as newer models do: digits by three, ends of lines together."""
    made = byte_level()
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(__import__("tokenizers").Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


def metaspace_bpe() -> Tokenizer:
    """As sentencepiece: a space is a letter, one goes before the text, and no word is apart."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", *alphabet], show_progress=False, limit_alphabet=60
    )
    trained(made, trainer)
    made.pre_tokenizer = None
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(made, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"],
                                                 show_progress=False))  # fmt: skip


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return trained(made, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False))


def whole_words() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(made, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "digits apart": digits_apart,
    "BPE with metaspace": metaspace_bpe,
    "Unigram with metaspace": unigram,
    "WordPiece": wordpiece,
    "whole words": whole_words,
}

TEXTS = {
    "prose": words(9000),
    "lines": words(6000, 1, "\n"),
    "line ends of Windows": words(6000, 2, "\r\n"),
    "runs of newlines": "".join(f"{words(9, seed)}{chr(10) * (seed * 7 % 90)}" for seed in range(300)),
    "runs of spaces": "".join(f"{words(5, seed)}{' ' * (seed * 13 % 90)}" for seed in range(500)),
    "code": "".join(f"{' ' * (seed % 40)}if x[{seed}] == {seed**5}:\n" for seed in range(1500)),
    "not Latin": "".join(random.Random(3).choices("鯨は海を泳ぐ。人々舟で行く、", k=20_000)),
    "Cyrillic": " ".join(random.Random(4).choices(["кит", "море", "лодка", "старик", "и", "в"], k=8000)),
    "digits": " ".join(str(random.Random(seed).randrange(10**9)) for seed in range(4000)),
    "letters beyond the first plane": words(3000, 5).replace("a", "\U0001f40b"),
    "special tokens in it": words(9000, 6).replace(" boat ", "<s></s>"),
}
ONE_LINE = "".join(random.Random(5).choices("abcdefghijkmnoprstuvw", k=40_000))


def encoder(tokenizer: Tokenizer, folder: Path) -> Encoder:
    """The tokenizer as it works for a folder, whose model is not needed here."""
    made = Encoder.__new__(Encoder)
    made.folder, made._tokenizer, made.gives_places = folder, PreTrainedTokenizerFast(tokenizer_object=tokenizer), True
    return made


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return encoder(TOKENIZERS[request.param](), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, and overlaps that are short beside them as they are in earnest."""
    monkeypatch.setattr(pieces_module, "PIECE", 3001)
    monkeypatch.setattr(pieces_module, "OVERLAPS", (300, 2400))


def in_pieces(text: str, encoder: Encoder, size: int = 777) -> list[int]:
    cut = (text[start : start + size] for start in range(0, len(text), size))
    return np.concatenate(list(tokens_of(cut, encoder, Path("text")))).tolist()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", TEXTS)
def test_pieces_give_the_tokens_of_the_whole(any_encoder: Encoder, case: str) -> None:
    assert in_pieces(TEXTS[case], any_encoder) == any_encoder.ids(TEXTS[case], Path("text")).tolist()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", ["byte-level BPE", "BPE with metaspace", "Unigram with metaspace"])
def test_a_line_without_a_space(tmp_path: Path, case: str) -> None:
    made = encoder(TOKENIZERS[case](), tmp_path)
    assert in_pieces(ONE_LINE, made) == made.ids(ONE_LINE, Path("text")).tolist()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("text", ["a" * 20_000, "\n" * 20_000, "7" * 20_000, "xyz" * 9000])
def test_a_run_of_one_character_goes_through(any_encoder: Encoder, text: str) -> None:
    """Where the tokens do not agree the text is cut, and nothing of it is lost or read twice."""
    found, whole = in_pieces(text, any_encoder), any_encoder.ids(text, Path("text")).tolist()
    assert abs(len(found) - len(whole)) <= 2 * (len(text) // 3001 + 1)


def test_a_short_text_is_one_piece(any_encoder: Encoder) -> None:
    assert in_pieces(TEXT, any_encoder) == any_encoder.ids(TEXT, Path("text")).tolist()


@pytest.mark.parametrize("sizes", [[1] * 10, [10], [3, 3, 4], [0, 9, 1]])
def test_pieces_of_another_size(sizes: list[int]) -> None:
    text = iter("abcdefghij")
    parts: Iterator[str] = iter(["".join(next(text) for _ in range(size)) for size in sizes])
    assert list(resized(parts, 4)) == ["abcd", "efgh", "ij"]
    assert list(resized(iter(["abcd"]), 4)) == ["abcd"]


@pytest.mark.usefixtures("small")
def test_a_tokenizer_in_python_gets_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, text, given = encoder(byte_level(), tmp_path), words(6000, 1, "\n"), []
    made.gives_places = False
    ids = made.ids
    monkeypatch.setattr(made, "ids", lambda text, of: given.append(text) or ids(text, of))
    found = in_pieces(text, made)
    assert "".join(given) == text
    assert all(part.endswith("\n") for part in given[:-1])
    assert len(given) > 5
    assert found == ids(text, Path("text")).tolist()
