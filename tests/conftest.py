"""Pico models on disk: real architectures, a few thousand random weights, made when a test asks for one.

And one small run of which many tests ask: a `source`, `compress` on it, the bytes of the `whole` run, and one that is `broken`.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# On Intel's processors the bits of products may depend on threads and batch; docs/guarantees.md says so.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crashes import crash_after
from outputs import contents
from picos import VOCABULARY, random_pico
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import streamlap
from streamlap import recipe

torch.set_num_threads(2)

TEXT = "\n".join(f"On day {day} the {noun} went to sea, and {noun} {day} came home again." for day in range(60)
                 for noun in ("boat", "captain", "old man", "whale"))  # fmt: skip

MakeModel = Callable[..., Path]
Compress = Callable[..., streamlap.Report]


def make_pico(
    folder: Path,
    model_type: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    shard_size: str = "1GB",
    seed: int = 0,
    tokenizer: bool = False,
    **config: object,
) -> Path:
    """Write a random model of `model_type`, see `picos`."""
    model = random_pico(model_type, tied=tied, seed=seed, **config)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session", autouse=True)
def no_survey() -> Iterator[None]:
    """Unless a test asks for a survey, recipes have none: it takes as long as all else of a small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "DEFAULT_SURVEY", None)
        yield


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """pico(model_type, **settings) -> folder of a source model; equal calls share one folder, so do not change it."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **settings: object) -> Path:
        key = f"{model_type} {sorted(settings.items(), key=str)}"
        if key not in made:
            made[key] = make_pico(tmp_path_factory.mktemp(model_type), model_type, **settings)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids [12, 16] as .npy."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY, (12, 16)).astype(np.uint16))
    return path


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch has, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


# --- a run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def source(pico: MakeModel) -> Path:
    """The checkpoint of two layers that `compress` and `whole` go by; a test file may have another."""
    return pico("llama", tokenizer=True, num_hidden_layers=2)


@pytest.fixture
def compress(source: Path, tokens: Path) -> Compress:
    """compress(out, **options): `source`, unless another `model` is given, on `tokens`."""
    return lambda out, **options: streamlap.compress(options.pop("model", source), out, files=(str(tokens),), **options)


@pytest.fixture(scope="session")
def unbroken(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, Any]]:
    """unbroken(source) -> the bytes of a run that nothing befalls; equal calls share them, so do not change them."""
    made: dict[Path, dict[str, Any]] = {}

    def run(source: Path) -> dict[str, Any]:
        if source not in made:
            out = tmp_path_factory.mktemp("unbroken") / "out"
            streamlap.compress(source, out, files=(str(tokens),))
            made[source] = contents(out)
        return made[source]

    return run


@pytest.fixture
def whole(unbroken: Callable[[Path], dict[str, Any]], source: Path) -> dict[str, Any]:
    """The bytes of an unbroken run of `source`."""
    return unbroken(source)


@pytest.fixture(scope="session")
def cut_short(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """cut_short(source) -> the output folder of a run that died with one layer committed; do not change it."""
    made: dict[Path, Path] = {}

    def run(source: Path) -> Path:
        if source not in made:
            out = made[source] = tmp_path_factory.mktemp("broken") / "out"
            with pytest.MonkeyPatch.context() as patch:
                crash_after(1, patch, lambda: streamlap.compress(source, out, files=(str(tokens),)))
        return made[source]

    return run


@pytest.fixture
def broken(cut_short: Callable[[Path], Path], source: Path, tmp_path: Path) -> Path:
    """An output folder with one layer of `source` committed."""
    return Path(shutil.copytree(cut_short(source), tmp_path / "out"))


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """The test leaves the threads as they were."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before
