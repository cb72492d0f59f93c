"""Names of files that are no text: the bytes of a path come in and go out as they are, whatever the locale."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import MakeModel

import streamlap
from streamlap.cli import spell_all_names
from streamlap.errors import RecipeError

RAW = os.fsdecode(b"raw \xff")
"""A name that is not UTF-8, as Python has it."""


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [("ascii", b"raw \xff \xc3\xb6"), ("utf-8", b"raw \xff \xc3\xb6"), ("latin-1", b"raw \\udcff \xf6")],
)
def test_every_name_can_be_printed(monkeypatch: pytest.MonkeyPatch, encoding: str, wanted: bytes) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    spell_all_names()
    for stream in (sys.stdout, sys.stderr):
        stream.write(f"{RAW} ö")
        stream.flush()
        assert stream.buffer.getvalue() == wanted  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_streams_of_other_kinds_are_left_alone(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None) -> None:
    """None is one that was closed before the program began."""
    monkeypatch.setattr(sys, "stdout", stream)
    spell_all_names()
    assert sys.stdout is stream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / RAW
    try:
        made.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    return made


def test_source_and_output_may_have_such_names(pico: MakeModel, tokens: Path, folder: Path) -> None:
    source, out = folder / "source", folder / "out"
    shutil.copytree(pico("llama"), source)
    report = streamlap.compress(source, out, files=(str(tokens),), work=folder / "work")
    assert report.shards == streamlap.compress(pico("llama"), folder / "again", files=(str(tokens),)).shards
    assert streamlap.verify(out)["ok"]
    assert streamlap.inspect(out)["parameters"]


def test_a_tokenizer_behind_such_a_name_is_said(pico: MakeModel, folder: Path, text: Path) -> None:
    source = folder / "source"
    shutil.copytree(pico("llama", tokenizer=True), source)
    with pytest.raises(
        RecipeError, match=r"no UTF-8 text in this locale.*LC_ALL=C\.UTF-8, rename it, or give token ids"
    ):
        streamlap.compress(source, folder / "out", files=(str(text),))
