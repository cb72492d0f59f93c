"""Streaming perplexity equals the loss that transformers computes in memory."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from crashes import keep_on_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamlap
from streamlap.errors import BudgetError, RecipeError
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES
from streamlap.pipeline.evaluate import token_losses
from streamlap.planning.schedule import fit
from streamlap.planning.workload import evaluation_workload
from streamlap.settings import RunSettings
from streamlap.store.hidden import HiddenBank


def in_memory_nll(folder: Path, tokens_NL: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.double().item() for row in tokens_NL]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_equals_the_in_memory_loss(pico: MakeModel, tokens: Path, tmp_path: Path, family: str) -> None:
    source, out = pico(family, tied=True, dtype=torch.bfloat16), tmp_path / "out"
    streamlap.compress(source, out, ratio=0.3, files=(str(tokens),))
    tokens_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    for folder in (source, out):
        result = streamlap.evaluate(folder, tokens)
        assert result.nll == pytest.approx(in_memory_nll(folder, tokens_NL), rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(result.nll))
        assert (result.tokens, result.length) == (12 * 15, 16)


def test_a_last_token_is_scored_behind_a_full_context(pico: MakeModel) -> None:
    source, stream = pico("llama"), ModelStream(pico("llama"))
    ids_NL = torch.from_numpy(np.random.default_rng(0).integers(0, stream.vocabulary, (3, stream.context + 1)))
    inputs_NT, target_NT = ids_NL[:, :-1], ids_NL[:, 1:]
    settings = RunSettings().settled()
    choice = fit(evaluation_workload(stream, *inputs_NT.shape, disk=False), settings.caps, settings.overlap)
    found_NT = token_losses(stream, inputs_NT, choice, target_NT=target_NT)
    with torch.no_grad():
        logits_NTV = AutoModelForCausalLM.from_pretrained(source)(inputs_NT).logits
    wanted_NT = torch.nn.functional.cross_entropy(logits_NTV.transpose(1, 2), target_NT, reduction="none")
    assert torch.allclose(found_NT, wanted_NT, atol=1e-5)


def test_text_is_tokenised_without_special_tokens_and_cut_into_windows(pico: MakeModel, text: Path) -> None:
    folder = pico("llama", tokenizer=True)
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    result = streamlap.evaluate(folder, text, length=32)
    assert result.tokens == len(windows) * 31
    assert result.nll == pytest.approx(in_memory_nll(folder, windows), rel=1e-6)


def test_limit_uses_the_first_tokens(pico: MakeModel, tokens: Path) -> None:
    rows = torch.from_numpy(np.load(tokens).astype(np.int64))
    result = streamlap.evaluate(pico("llama"), tokens, limit=40)
    assert result.tokens == 2 * 15
    assert result.nll == pytest.approx(in_memory_nll(pico("llama"), rows[:2]), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": []}, r"text is \[\]; wanted a file, or a list of one or more"),
        ({"text": 7}, "text is 7; wanted a file"),
        ({"length": "64"}, "length is '64'; wanted a whole number of at least 2"),
        ({"length": 64.0}, "length is 64.0; wanted a whole number"),
        ({"limit": "2048"}, "limit is '2048'; wanted a whole number of at least 1"),
        ({"limit": 2048.0}, "limit is 2048.0; wanted a whole number"),
        ({"stride": True}, "stride is True; wanted a whole number"),
        ({"model": None}, "model is None; wanted a path"),
        ({"device_map": "auto"}, "has no options 'device_map'; wanted some of length, stride, .*, device, work, "),
    ],
)
def test_arguments_of_another_kind_are_refused(pico: MakeModel, options: dict[str, Any], message: str) -> None:
    """An empty list is no wish for the bundled text."""
    with pytest.raises(RecipeError, match=message):
        streamlap.evaluate(**{"model": pico("llama", tokenizer=True), **options})


def test_stride_scores_the_last_positions_of_overlapping_windows(pico: MakeModel, tmp_path: Path) -> None:
    folder, path = pico("llama"), tmp_path / "flat.npy"
    flat = np.random.default_rng(1).integers(0, 300, 40)
    np.save(path, flat)
    result = streamlap.evaluate(folder, path, length=16, stride=4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for start in range(0, 40 - 16 + 1, 4):
        window = torch.from_numpy(flat[start : start + 16])[None]
        labels = window.clone()
        labels[:, :-4] = -100
        with torch.no_grad():
            losses.append(model(input_ids=window, labels=labels).loss.item())
    assert result.tokens == 4 * len(losses)
    assert result.nll == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_rows_of_token_ids_may_be_cut_into_shorter_windows(pico: MakeModel, tokens: Path) -> None:
    rows = torch.from_numpy(np.load(tokens).astype(np.int64))
    result = streamlap.evaluate(pico("llama"), tokens, length=8)
    assert result.nll == pytest.approx(in_memory_nll(pico("llama"), rows.view(-1, 8)), rel=1e-6)


def note_writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path | None, int]]:
    """(folder, generation) of everything that a bank takes in from now on."""
    written: list[tuple[Path | None, int]] = []
    write = HiddenBank.write

    def note(bank: HiddenBank, generation: int, *rest: Any) -> None:
        write(bank, generation, *rest)
        written.append((bank.folder and bank.folder.parent, generation))

    monkeypatch.setattr(HiddenBank, "write", note)
    return written


@pytest.mark.parametrize("overlap", [True, False])
def test_hidden_states_on_disk_give_the_same_numbers(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    written = note_writes(monkeypatch)
    in_ram = streamlap.evaluate(pico("llama"), tokens, work=tmp_path, overlap=overlap)
    assert written == [(None, generation) for generation in range(4)]
    written.clear()
    keep_on_disk(monkeypatch)
    from_files = streamlap.evaluate(pico("llama"), tokens, work=tmp_path, overlap=overlap)
    assert written == [(tmp_path, generation) for generation in range(4)]
    assert from_files.nll == in_ram.nll
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_for_the_hidden_states_is_seen_at_once(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_on_disk(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=49151))
    with pytest.raises(BudgetError, match=r"hidden states takes 49,152 bytes under .*, and 49,151 are free"):
        streamlap.evaluate(pico("llama"), tokens, work=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_compute_dtype_can_be_chosen(pico: MakeModel, tokens: Path) -> None:
    half = streamlap.evaluate(pico("llama", dtype=torch.bfloat16), tokens, dtype="bfloat16")
    full = streamlap.evaluate(pico("llama", dtype=torch.bfloat16), tokens)
    assert half.nll != full.nll
    assert half.nll == pytest.approx(full.nll, rel=1e-2)


def test_old_checkpoints_with_rotary_tables_are_read(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = pico("llama")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert streamlap.evaluate(tmp_path, tokens).nll == streamlap.evaluate(source, tokens).nll
    assert ModelStream(tmp_path).depth == 3
