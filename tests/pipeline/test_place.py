"""Where a result may go: what is in nobody's way stays, and what is in the way is one clear error before any work."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import MakeModel

import streamlap
from streamlap.errors import RecipeError, StreamlapError
from streamlap.pipeline import compress as compressing
from streamlap.pipeline.place import check_apart, check_place, contents

BYSTANDERS = [
    "lost+found/", ".git/", ".gitkeep", ".gitignore", ".gitattributes", ".gitmodules", ".keep", ".DS_Store", "._.DS_Store",
    "Thumbs.db", "desktop.ini", ".nfs0000000001", ".cache/", ".Trash-1000/", ".snapshot/",
]  # fmt: skip


def put(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Make these files, and folders with a file in each; gives what there is then."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text(name)
        if name.endswith("/"):
            (folder / name / "kept").write_text(name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", BYSTANDERS)
def test_a_folder_with_nothing_of_its_owners_is_empty(tmp_path: Path, name: str) -> None:
    put(tmp_path / "out", [name])
    assert contents(tmp_path / "out") == set()


@pytest.mark.parametrize("name", ["thesis.tex", ".env", "git", ".github", ".gitconfig", "cache", "lost", ".streamlap"])
def test_anything_else_is_in_the_way(tmp_path: Path, name: str) -> None:
    put(tmp_path / "out", [name, ".gitkeep"])
    assert contents(tmp_path / "out") == {name}
    assert contents(tmp_path / "absent") == set()


def test_what_is_in_nobodys_way_outlives_every_run(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """The first, one that overwrites, and an export; and it is no part of the result."""
    out, dense = tmp_path / "out", tmp_path / "dense"
    before = put(out, BYSTANDERS)
    put(dense, BYSTANDERS)
    streamlap.compress(pico("llama"), out, ratio=0.4, files=(str(tokens),))
    streamlap.compress(pico("llama"), out, ratio=0.2, files=(str(tokens),), overwrite=True)
    streamlap.export_dense(out, dense)
    for folder in (out, dense):
        assert {name: (folder / name).read_bytes() for name in before} == before
        assert streamlap.verify(folder)["ok"]


def test_what_is_not_ours_is_not_overwritten_for_what_lies_beside_it(
    pico: MakeModel, tokens: Path, tmp_path: Path
) -> None:
    before = put(tmp_path / "out", [".gitkeep", "thesis.tex"])
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match=r"thesis\.tex"):
            streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),), overwrite=overwrite)
    assert put(tmp_path / "out", []) == before


# --- places that cannot be a folder --------------------------------------------------------------------------------------


def dangle(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "nowhere")


def loop(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "link")


def file(folder: Path) -> None:
    (folder / "file").write_text("x")


def nothing(folder: Path) -> None:
    pass


PLACES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a link to nothing": (dangle, "link", "link is a link to .*nowhere, where nothing is; wanted a folder"),
    "under a link to nothing": (dangle, "link/a/out", "link is a link to .*nowhere, where nothing is; wanted a folder"),
    "a link to itself": (loop, "link", "link is a link to .*link, where nothing is; wanted a folder"),
    "a file": (file, "file", "file is a file; wanted a folder"),
    "under a file": (file, "file/a/out", "file is a file; wanted a folder"),
    "a name too long": (nothing, "x" * 300, "File name too long"),
    "a path too long": (nothing, "/".join(["x" * 200] * 25), "File name too long"),
    "no room for the names inside": (nothing, "/".join(["x" * 99] * 40)[:4000], "File name too long"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_cannot_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    make, name, said = PLACES[case]
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    with pytest.raises(RecipeError, match=said):
        check_place(Path(name))


def test_a_place_is_looked_at_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have to be fetched first."""
    dangle(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(compressing, "local_folder", lambda name, trust: asked.append(name))
    calls: list[Callable[[], Any]] = [
        lambda: streamlap.compress("org/model", tmp_path / "link"),
        lambda: streamlap.compress("org/model", tmp_path / "out", work=tmp_path / "file"),
        lambda: streamlap.survey("org/model", tmp_path / "link" / "survey.json"),
        lambda: streamlap.evaluate("org/model", work=tmp_path / "file"),
    ]
    file(tmp_path)
    for call in calls:
        with pytest.raises(RecipeError, match="wanted a folder"):
            call()
    assert asked == []


@pytest.mark.parametrize(("flag", "said"), [(0, errno.EACCES), (os.ST_RDONLY, errno.EROFS)])
def test_a_place_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int, said: int) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flag))
    with pytest.raises(StreamlapError) as refusal:
        check_place(tmp_path / "a" / "out")
    assert type(refusal.value) is StreamlapError
    assert str(refusal.value) == (
        f"cannot write {tmp_path}/a/out: {os.strerror(said)} in {tmp_path}. Mend that or choose another folder."
    )


def test_folders_and_links_to_folders_will_do(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for name in ("there", "link", "link/a/b", "new/a/b"):
        check_apart(Path("/proc/self"), tmp_path / name)
