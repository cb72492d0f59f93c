"""Which windows are read and drawn, and how much memory that takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT, MakeModel, make_tokenizer
from transformers import AutoTokenizer

import streamlap
from streamlap.data import calibration, windows
from streamlap.data.calibration import calibration_tokens, draw
from streamlap.data.windows import ReadSettings, read_windows
from streamlap.errors import BudgetError, RecipeError
from streamlap.recipe import Calibration
from streamlap.system.meters import ram_bytes
from streamlap.untrusted.npy import IntegerFile

LONG = "\n".join(f"{TEXT}\nThe captain counted {count} whales." for count in range(30))


@pytest.fixture(scope="module")
def folder(pico: MakeModel) -> Path:
    return pico("llama", tokenizer=True)


def drawn(folder: Path, *paths: Path, **settings: Any) -> torch.Tensor:
    return calibration_tokens(Calibration(files=tuple(map(str, paths)), **settings), folder, 300, 64)


def read(folder: Path, *paths: Path, limits: dict[str, Any] | None = None, **numbers: Any) -> torch.Tensor:
    settings = ReadSettings(folder=folder, vocabulary=300, context=64, **(limits or {}))
    return read_windows(list(paths), settings, **numbers)


def ids_of(folder: Path, text: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def drawn_as_ever(ids_T: torch.Tensor, samples: int, length: int, seed: int) -> torch.Tensor:
    """What the rule says of one text: a permutation of its windows, the first of it, in order."""
    windows_NL = ids_T[: len(ids_T) // length * length].view(-1, length)
    order = torch.randperm(len(windows_NL), generator=torch.Generator().manual_seed(seed))
    return windows_NL[order[:samples].sort().values]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- which windows -------------------------------------------------------------------------------------------------------


def test_a_short_text_gives_what_it_always_gave(folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", LONG)
    wanted = drawn_as_ever(ids_of(folder, LONG), 9, 32, 5)
    assert torch.equal(drawn(folder, path, samples=9, length=32, seed=5), wanted)


def test_of_a_long_text_the_first_tokens_count(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 1000)
    path = written(tmp_path / "a.txt", LONG)
    ids_T = ids_of(folder, LONG)
    assert torch.equal(drawn(folder, path, samples=5, length=32), drawn_as_ever(ids_T[:1000], 5, 32, 0))
    assert torch.equal(drawn(folder, path, samples=40, length=32), drawn_as_ever(ids_T[: 4 * 40 * 32], 40, 32, 0))


def test_texts_share_the_tokens(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short file leaves its share to those behind it; those behind the last share are not read."""
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 900)
    short = written(tmp_path / "a.txt", TEXT[:400])
    long = written(tmp_path / "b.txt", LONG)
    first, whole = ids_of(folder, TEXT[:400]), ids_of(folder, LONG)
    assert len(first) < 300
    second = whole[: (900 - len(first)) // 2]
    third = whole[: 900 - len(first) - len(second)]
    windows_NL = torch.cat([part[: len(part) // 30 * 30].view(-1, 30) for part in (first, second, third)])
    order = torch.randperm(len(windows_NL), generator=torch.Generator().manual_seed(0))
    found = drawn(folder, short, long, long, samples=7, length=30)
    assert torch.equal(found, windows_NL[order[:7].sort().values])
    many = [written(tmp_path / f"{place}.txt", TEXT) for place in range(40)]
    assert len(drawn(folder, *many, samples=7, length=60)) == 7
    assert len(drawn(folder, *many, samples=10_000, length=30)) == len(many) * (len(ids_of(folder, TEXT)) // 30)


def test_all_windows_of_token_ids_are_candidates(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LEAST_TOKENS", 10)
    ids = np.random.default_rng(0).integers(0, 300, 64 * 500).astype(np.uint16)
    np.save(tmp_path / "a.npy", ids)
    wanted = drawn_as_ever(torch.from_numpy(ids.astype(np.int64)), 6, 64, 3)
    assert torch.equal(drawn(folder, tmp_path / "a.npy", samples=6, length=64, seed=3), wanted)


def test_a_flat_file_of_ids_is_drawn_from_and_rows_are_taken(folder: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, (400, 16))
    np.save(tmp_path / "rows.npy", ids)
    np.save(tmp_path / "flat.npy", ids.ravel())
    assert len(drawn(folder, tmp_path / "rows.npy")) == 400
    assert len(drawn(folder, tmp_path / "rows.npy", length=8)) == 800
    assert len(drawn(folder, tmp_path / "flat.npy", length=16)) == 128


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, ">i2"])
@pytest.mark.parametrize("by_columns", [False, True])
def test_rows_of_any_kind_of_number(folder: Path, tmp_path: Path, dtype: Any, by_columns: bool) -> None:
    ids = np.random.default_rng(0).integers(0, 250, (40, 16)).astype(dtype)
    np.save(tmp_path / "a.npy", np.asfortranarray(ids) if by_columns else ids)
    assert torch.equal(read(folder, tmp_path / "a.npy"), torch.from_numpy(ids.astype(np.int64)))
    assert torch.equal(
        read(folder, tmp_path / "a.npy", length=8, limit=50), read(folder, tmp_path / "a.npy", length=8)[:6]
    )


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format(folder: Path, tmp_path: Path, version: tuple[int, int]) -> None:
    ids = np.arange(160).reshape(10, 16)
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, ids, version=version)
    assert torch.equal(read(folder, tmp_path / "a.npy"), torch.from_numpy(ids))


@pytest.mark.parametrize(
    ("row", "advice"),
    [(96, "Choose --length 48, or save the ids flat"), (97, "To have other windows, save the ids flat")],
)
def test_the_length_that_is_advised_is_one_that_does(folder: Path, tmp_path: Path, row: int, advice: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, row), int))
    with pytest.raises(RecipeError, match=f"a.npy: length is {row}, and the model's context is 64. {advice}"):
        read(folder, tmp_path / "a.npy")
    if row == 96:
        assert len(read(folder, tmp_path / "a.npy", length=48)) == 4


def test_ids_that_may_not_be_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 16), int))

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(IntegerFile, "open", refuse)
    with pytest.raises(RecipeError, match=r"a.npy cannot be read: Permission denied\.$"):
        read(folder, tmp_path / "a.npy")


def test_overlapping_windows_stay_inside_their_row(folder: Path, tmp_path: Path) -> None:
    ids = torch.arange(40).view(2, 20)
    np.save(tmp_path / "a.npy", ids.numpy())
    with pytest.raises(RecipeError, match=r"--length 8 does not divide that\. Choose --length 5, or save"):
        read(folder, tmp_path / "a.npy", length=8, stride=4)
    assert torch.equal(read(folder, tmp_path / "a.npy", length=10, stride=5), ids.unfold(-1, 10, 5).reshape(-1, 10))
    np.save(tmp_path / "b.npy", ids.flatten().numpy())
    assert torch.equal(read(folder, tmp_path / "b.npy", length=9, stride=4), ids.flatten().unfold(-1, 9, 4))
    text = written(tmp_path / "c.txt", TEXT)
    assert torch.equal(read(folder, text, length=9, stride=4), ids_of(folder, TEXT).unfold(-1, 9, 4))


def test_a_limit_counts_the_tokens_of_overlapping_windows_once(folder: Path, tmp_path: Path) -> None:
    """As many windows as fit into so many tokens: they reach the end of the limit, not the first part of it."""
    text = written(tmp_path / "c.txt", TEXT)
    windows_NL = ids_of(folder, TEXT).unfold(-1, 9, 4)
    for limit, count in ((9, 1), (12, 1), (13, 2), (30, 6), (33, 7)):
        assert torch.equal(read(folder, text, length=9, stride=4, limit=limit), windows_NL[:count])
    ids = torch.arange(80).view(4, 20)
    np.save(tmp_path / "rows.npy", ids.numpy())
    rows_NL = ids.unfold(-1, 10, 5).reshape(-1, 10)
    for limit, count in ((20, 3), (29, 3), (30, 4), (45, 6), (50, 7), (1000, 12)):
        assert torch.equal(read(folder, tmp_path / "rows.npy", length=10, stride=5, limit=limit), rows_NL[:count])


def test_a_limit_goes_on_in_the_next_file(folder: Path, tmp_path: Path) -> None:
    """What is left at the end of one is not counted."""
    for name in ("a", "b", "c"):
        np.save(tmp_path / f"{name}.npy", np.arange(25))
    paths = [tmp_path / f"{name}.npy" for name in ("a", "b", "c")]
    assert len(read(folder, *paths, length=10, limit=49)) == 4
    assert len(read(folder, *paths, length=10, limit=50)) == 5
    assert len(read(folder, *paths, length=10, stride=5, limit=50)) == 8


def test_files_of_other_lengths_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 16), int))
    text = written(tmp_path / "b.txt", TEXT)
    with pytest.raises(RecipeError, match="windows of different lengths; set --length"):
        read(folder, tmp_path / "a.npy", text)
    assert len(read(folder, tmp_path / "a.npy", text, length=16)) == 4 + len(ids_of(folder, TEXT)) // 16


@pytest.mark.parametrize(("count", "wanted"), [(1 << 30, 1000), ((1 << 22) + 1, 5), (1 << 40, 1)])
def test_of_very_many_windows_some_are_drawn(count: int, wanted: int) -> None:
    rows = draw(count, wanted, 7)
    assert rows == sorted(set(rows)) == draw(count, wanted, 7)
    assert len(rows) == wanted
    assert 0 <= rows[0] <= rows[-1] < count
    assert rows != draw(count, wanted, 8)


# --- what is read --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The characters of each piece of text that is read."""
    found: list[int] = []
    read_text = windows.read_text

    def note(path: Path, column: str | None) -> Iterator[str]:
        for piece in read_text(path, column):
            found.append(len(piece))
            yield piece

    monkeypatch.setattr(windows, "read_text", note)
    return found


def test_reading_stops_where_enough_is_there(folder: Path, tmp_path: Path, pieces_read: list[int]) -> None:
    path = written(tmp_path / "a.txt", LONG * 10)
    read(folder, path, length=32, limit=320)
    assert 0 < sum(pieces_read) < len(LONG * 10) // 10
    broken = tmp_path / "b.txt"
    broken.write_bytes(LONG.encode() + b"\xff")
    assert len(read(folder, path, broken, length=32, limit=320)) == 10
    with pytest.raises(RecipeError, match=r"b.txt is not UTF-8"):
        read(folder, path, broken, length=32)


def test_ids_that_are_drawn_are_read_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "CHECKED_BYTES", 640)
    spans: list[int] = []
    take = IntegerFile.spans

    def note(file: IntegerFile, starts: Any, length: int) -> Iterator[Any]:
        for ids in take(file, starts, length):
            spans.append(ids.nbytes)
            yield ids

    monkeypatch.setattr(IntegerFile, "spans", note)
    np.save(tmp_path / "a.npy", np.zeros((10_000, 32), np.uint16))
    assert drawn(folder, tmp_path / "a.npy", samples=9).shape == (9, 32)
    assert sum(spans) == 640 + 9 * 64


def test_ids_out_of_range_are_found_at_the_start_and_in_windows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.zeros((1000, 32), np.uint16)
    ids[500, 3] = 300
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(RecipeError, match="token ids from 0 to 300; the model's vocabulary has 0 to 299"):
        drawn(folder, tmp_path / "a.npy", samples=1)
    monkeypatch.setattr(windows, "CHECKED_BYTES", 640)
    with pytest.raises(RecipeError, match="token ids from 0 to 300; the model's vocabulary has 0 to 299"):
        drawn(folder, tmp_path / "a.npy", samples=1000)


def test_a_token_that_the_model_has_not_is_named(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|whale|>"])
    tokenizer.save_pretrained(own)
    path = written(tmp_path / "a.txt", f"{TEXT} <|whale|> {TEXT}")
    with pytest.raises(RecipeError) as caught:
        drawn(own, path, length=16)
    for words in ("a.txt", "'<|whale|>' (id 300)", f"tokenizer in {own}", "0 to 299", "take the token out of the text"):
        assert words in str(caught.value)
    assert len(drawn(own, written(tmp_path / "b.txt", TEXT), length=16))


def test_the_tokenizer_is_loaded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
    paths = [written(tmp_path / f"{place}.txt", LONG) for place in range(3)]
    drawn(folder, *paths, samples=4, length=16)
    assert len(loaded) == 1
    np.save(tmp_path / "a.npy", np.zeros((4, 16), int))
    drawn(folder, tmp_path / "a.npy")
    assert len(loaded) == 1


# --- memory --------------------------------------------------------------------------------------------------------------


def test_a_cap_below_the_process_is_left_to_the_plan(folder: Path, text: Path) -> None:
    result = streamlap.plan(folder, files=(str(text),), samples=4, length=16, max_ram="1MiB")
    assert not result.fits
    assert "give --max-ram" in result.advice[0]


def test_what_does_not_fit_is_said_early(
    folder: Path, tmp_path: Path, pieces_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.txt", LONG * 100)
    monkeypatch.setattr(windows, "LEAST_ROOM", 4 << 20)
    limits = {"max_ram": ram_bytes()}
    with pytest.raises(
        BudgetError, match=r"--max-ram is .* more than the 4.0 MiB that are left. Use --limit TOKENS, or"
    ):
        read(folder, path, length=32, limits=limits)
    assert sum(pieces_read) < len(LONG * 100) // 2
    assert len(read(folder, path, length=32, limit=3200, limits=limits)) == 100
    np.save(tmp_path / "a.npy", np.zeros(4 << 20, np.uint16))
    with pytest.raises(BudgetError, match="--limit TOKENS"):
        read(folder, tmp_path / "a.npy", length=32, limits=limits)
    with pytest.raises(BudgetError, match="fewer --samples or a shorter --length"):
        calibration_tokens(
            Calibration(files=(str(tmp_path / "a.npy"),), samples=100_000, length=32), folder, 300, 64, max_ram=1 << 20
        )


MEASURE = """
import sys
from pathlib import Path
from streamlap.data.calibration import calibration_tokens
from streamlap.recipe import Calibration
from streamlap.system.allocator import steady_heap
from streamlap.system.meters import peak_ram_bytes, ram_bytes, reset_peaks

folder, small, *paths = sys.argv[1:]
steady_heap()
read = lambda path: calibration_tokens(Calibration(files=(path,), samples=8, length=32), Path(folder), 300, 64)
read(small)  # what libraries take once
before = ram_bytes()
reset_peaks()
for path in paths:
    read(path)
print((peak_ram_bytes() - before) >> 20)
"""


def test_a_large_text_takes_little_memory(folder: Path, tmp_path: Path) -> None:
    """64 MB of text, of rows and of ids: some tens of MiB."""
    small, text, rows, ids = (tmp_path / name for name in ("small.txt", "a.txt", "a.json", "a.npy"))
    small.write_text(TEXT)
    text.write_text(LONG * (64_000_000 // len(LONG)))
    rows.write_text("[" + ", ".join([f'{{"text": "{TEXT[:50]}"}}'] * 800_000) + "]")
    np.save(ids, np.zeros(32_000_000, np.uint16))
    command = [sys.executable, "-c", MEASURE, *map(str, (folder, small, text, rows, ids))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60


def test_a_column_is_named_for_each_use(folder: Path, tmp_path: Path) -> None:
    rows = [{"body": line, "id": place} for place, line in enumerate(TEXT.split("\n"))]
    path = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    plain = drawn(folder, written(tmp_path / "a.txt", TEXT), samples=4, length=16)
    assert torch.equal(drawn(folder, path, samples=4, length=16, text_column="body"), plain)
    named = streamlap.evaluate(folder, path, length=16, text_column="body", limit=64)
    assert named.nll == streamlap.evaluate(folder, tmp_path / "a.txt", length=16, limit=64).nll
