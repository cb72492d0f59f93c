"""Files become windows, the same ones every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, MakeModel
from transformers import AutoTokenizer

from streamlap.data.calibration import calibration_tokens
from streamlap.data.windows import ReadSettings, read_windows
from streamlap.recipe import Calibration


@pytest.fixture(scope="module")
def folder(pico: MakeModel) -> Path:
    return pico("llama", tokenizer=True)


def windows(folder: Path, **settings: object) -> torch.Tensor:
    return calibration_tokens(Calibration(**settings), folder, 300, 64)


def all_windows(folder: Path, *paths: Path) -> torch.Tensor:
    return read_windows(paths, ReadSettings(folder=folder, vocabulary=300, context=64), 16)


def test_text_windows_follow_the_seed(folder: Path, text: Path) -> None:
    first = windows(folder, files=(str(text),), samples=5, length=16, seed=1)
    assert first.shape == (5, 16)
    assert torch.equal(first, windows(folder, files=(str(text),), samples=5, length=16, seed=1))
    assert not torch.equal(first, windows(folder, files=(str(text),), samples=5, length=16, seed=2))
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    cut = {tuple(ids[start : start + 16]) for start in range(0, len(ids) - 15, 16)}
    assert {tuple(row) for row in first.tolist()} <= cut


def test_rows_of_token_ids_are_taken_as_they_are(folder: Path, tokens: Path) -> None:
    rows = torch.from_numpy(np.load(tokens).astype(np.int64))
    assert torch.equal(windows(folder, files=(str(tokens),)), rows)
    some = windows(folder, files=(str(tokens),), samples=4, seed=3)
    assert some.shape == (4, 16)
    assert {tuple(row) for row in some.tolist()} < {tuple(row) for row in rows.tolist()}


def test_a_flat_array_is_cut(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "flat.npy"
    np.save(path, np.arange(100))
    assert torch.equal(windows(folder, files=(str(path),), length=30), torch.arange(90).view(3, 30))


def test_the_default_length_is_the_models_context(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "flat.npy"
    np.save(path, np.zeros(200, dtype=np.int64))
    assert windows(folder, files=(str(path),)).shape == (3, 64)


def test_jsonl_and_several_files(folder: Path, text: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps({"text": line}) for line in TEXT.split("\n")))
    plain = all_windows(folder, text)
    assert torch.equal(all_windows(folder, lines), plain)
    assert len(all_windows(folder, lines, text)) == 2 * len(plain)


def test_parquet(folder: Path, text: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": TEXT.split("\n")}), path)
    assert torch.equal(all_windows(folder, path), all_windows(folder, text))


def test_fewer_windows_than_asked_is_said(folder: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = windows(folder, files=(str(text),), samples=100_000, length=16)
    assert f"{len(found)} windows" in caplog.text
    assert "100000" in caplog.text


def test_no_special_tokens_are_added(folder: Path, text: Path) -> None:
    assert not torch.isin(windows(folder, files=(str(text),), length=16), torch.tensor([0, 1])).any()
