"""Windows that are drawn anew: which tokens, from what, and how a run that dies goes on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Compress, MakeModel
from crashes import dies_at, stopped_at
from outputs import contents
from transformers import AutoModel, AutoModelForCausalLM

import streamlap
from streamlap.errors import RecipeError, ResumeMismatch
from streamlap.linalg.moments import fitted_sequences, held_sequences
from streamlap.pipeline import compress as compressing
from streamlap.pipeline import redraw
from streamlap.pipeline.streams import Windows
from streamlap.planning import sample
from streamlap.recipe import Calibration
from streamlap.store.journal import REDRAWN_NAME, STATE_FOLDER

WINDOWS, LENGTH = 12, 16
"""Of the fixture `tokens`."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The windows of every run."""
    found: list[torch.Tensor] = []
    real = redraw.with_redrawn

    def watched(*args: Any) -> Windows:
        windows = real(*args)
        found.append(windows.tokens_NL)
        return windows

    monkeypatch.setattr(compressing, "with_redrawn", watched)
    return found


def test_each_window_that_is_fitted_to_is_seen_again_with_half_of_it_drawn(
    source: Path, tokens: Path, tmp_path: Path, seen: list[torch.Tensor]
) -> None:
    report = streamlap.compress(source, tmp_path / "out", files=(str(tokens),))
    given_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    (all_NL,) = seen
    fitted = fitted_sequences(WINDOWS, LENGTH)
    assert all_NL.shape == (WINDOWS + len(fitted), LENGTH)
    assert torch.equal(all_NL[:WINDOWS], given_NL)
    kept = float((all_NL[WINDOWS:] == given_NL[fitted]).double().mean())
    assert 0.4 < kept < 0.65
    assert torch.equal(all_NL[WINDOWS:, 0], given_NL[fitted, 0]), "nothing predicts the first token"
    assert (report.redrawn, report.calibration_tokens) == (len(fitted), (WINDOWS, LENGTH))


def test_what_is_held_out_is_seen_once_and_fitted_to_never(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the window that is held out fitted to as it was redrawn, half of its tokens would judge what was made for them."""
    found: list[tuple[list[int], list[int], int]] = []
    real = compressing.compress_layers

    def watched(job: Any) -> None:
        windows = job.streams.windows
        found.append((list(windows.held), list(windows.fitted), len(windows.tokens_NL)))
        real(job)

    monkeypatch.setattr(compressing, "compress_layers", watched)
    streamlap.compress(source, tmp_path / "out", files=(str(tokens),))
    ((held, fitted, total),) = found
    assert held == list(held_sequences(WINDOWS, LENGTH))
    assert sorted([*held, *fitted]) == list(range(total))
    assert total == WINDOWS + len(fitted_sequences(WINDOWS, LENGTH))


def test_draws_are_from_the_predictions_of_the_dense_model(
    pico: MakeModel, tokens: Path, tmp_path: Path, seen: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logits a thousand times as large, of a model that is that sure, a draw is the likeliest token."""
    model = AutoModelForCausalLM.from_pretrained(pico("llama"), dtype=torch.float32)
    model.model.norm.weight.data *= 1e4
    model.save_pretrained(tmp_path / "source")
    monkeypatch.setattr(redraw, "SHARE", 1.0)
    streamlap.compress(tmp_path / "source", tmp_path / "out", files=(str(tokens),), dtype="float32")
    given_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    with torch.no_grad():
        likely_NL = model(given_NL).logits[:, :-1].argmax(dim=-1)
    likely_NL = likely_NL[fitted_sequences(WINDOWS, LENGTH)]
    assert (seen[0][WINDOWS:, 1:] == likely_NL).double().mean() > 0.99


def test_words_that_were_seen_less_are_drawn_rather(
    source: Path, tokens: Path, tmp_path: Path, seen: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, rarity in (("rare", 3.0), ("any", 0.0)):
        monkeypatch.setattr(redraw, "RARITY", rarity)
        streamlap.compress(source, tmp_path / name, files=(str(tokens),))
    rare, any_word = (len(all_NL.unique()) for all_NL in seen)
    assert rare > any_word > len(seen[0][:WINDOWS].unique())


def test_the_draws_depend_on_the_seed_alone(
    source: Path, tokens: Path, tmp_path: Path, seen: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, options in (("one", {}), ("two", {"overlap": False}), ("three", {"seed": 1})):
        streamlap.compress(source, tmp_path / name, files=(str(tokens),), **options)
    one, two, three = seen
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_many_tokens_need_no_more(
    source: Path, tokens: Path, tmp_path: Path, seen: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "FEW_TOKENS", WINDOWS * LENGTH)
    assert streamlap.plan(source, files=(str(tokens),)).redrawn == 0
    assert streamlap.compress(source, tmp_path / "out", files=(str(tokens),)).redrawn == 0
    assert len(seen[0]) == WINDOWS


@pytest.mark.parametrize("options", [{"preset": "lorap"}, {"redraw": False}])
def test_who_wants_none_gets_none(source: Path, tokens: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    assert streamlap.plan(source, files=(str(tokens),), **options).redrawn == 0
    assert streamlap.compress(source, tmp_path / "out", files=(str(tokens),), **options).redrawn == 0


def test_a_decoder_without_a_head_draws_none(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(pico("mistral")).save_pretrained(tmp_path / "source")
    assert streamlap.compress(tmp_path / "source", tmp_path / "out", files=(str(tokens),)).redrawn == 0


def test_the_plan_counts_them(source: Path, tokens: Path) -> None:
    without, with_them = (streamlap.plan(source, files=(str(tokens),), redraw=redraw) for redraw in (False, True))
    assert with_them.redrawn == len(fitted_sequences(WINDOWS, LENGTH)) == 11
    assert with_them.calibration_tokens == without.calibration_tokens == (WINDOWS, LENGTH)
    assert with_them.flops > 1.5 * without.flops
    assert with_them.read_bytes > without.read_bytes
    assert with_them.generation_bytes * WINDOWS == without.generation_bytes * (WINDOWS + with_them.redrawn)


def test_a_run_that_dies_after_them_draws_no_more(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    dies_at(compressing, "compress_layers", monkeypatch, lambda: compress(out))
    monkeypatch.setattr(redraw, "redrawn", lambda *_: 1 / 0)
    streamlap.resume(out)
    assert contents(out) == whole


def test_a_run_that_dies_while_it_draws_begins_that_again(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    dies_at(redraw, "draw", monkeypatch, lambda: compress(out))
    streamlap.resume(out)
    assert contents(out) == whole
    assert not (out / STATE_FOLDER).exists()


def test_it_stops_where_it_is_asked_to(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"at layer 0 of .*, before the first one is compressed; go on with"
    stopped_at(redraw, "open_bank", monkeypatch, lambda: compress(tmp_path / "out"), message)
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_windows_that_cannot_be_read_are_no_windows(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies_at(compressing, "compress_layers", monkeypatch, lambda: compress(tmp_path / "out"))
    (tmp_path / "out" / STATE_FOLDER / REDRAWN_NAME).write_bytes(b"nothing")
    with pytest.raises(ResumeMismatch, match=REDRAWN_NAME):
        streamlap.resume(tmp_path / "out")


def test_it_is_a_yes_or_no() -> None:
    with pytest.raises(RecipeError, match="redraw is 'yes'; wanted true or false"):
        Calibration(redraw="yes")  # type: ignore[arg-type]
