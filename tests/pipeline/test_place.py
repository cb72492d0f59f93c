"""Where a result may go: what is in nobody's way stays, and what is in the way is one clear error before any work."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import outputs
import pytest
from conftest import MakeModel
from crashes import crash_after, dies_at

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


NOTES = ["notes.txt", "plots/", "config.json.old", "model.py", "model-1-of-2.safetensors", ".env"]
"""What somebody may have put beside a result."""


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_files_of_others_outlive_a_result_that_is_replaced(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, state: str
) -> None:  # fmt: skip
    """Everything of the earlier result goes, also of one of more layers and with another tokenizer."""

    def compress(out: Path, **options: Any) -> None:
        streamlap.compress(pico("llama"), out, preset="lorap", files=(str(tokens),), **options)

    out = tmp_path / "out"
    if state == "finished":
        compress(out, ratio=0.4)
    else:
        crash_after(1, monkeypatch, lambda: compress(out, ratio=0.4))
    ours = ["model-00009-of-00009.safetensors", "spiece.model", "additional_chat_templates/", "modeling_nas.py"]
    put(out, ours)
    before = {
        name: data for name, data in put(out, NOTES).items() if name.partition("/")[0] in {n.strip("/") for n in NOTES}
    }
    compress(out, ratio=0.2, overwrite=True)
    assert f"{out} keeps what streamlap did not write: .env, config.json.old, " in caplog.text
    compress(tmp_path / "whole", ratio=0.2)
    assert outputs.contents(out) == outputs.contents(tmp_path / "whole") | before
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()} | {
        name.strip("/") for name in NOTES
    }
    assert streamlap.verify(out)["ok"]


def test_what_lies_behind_a_link_outlives_it(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    before, out = put(tmp_path / "mine", ["tokenizer.json", "plots/"]), tmp_path / "out"
    streamlap.compress(pico("llama"), out, preset="lorap", files=(str(tokens),))
    (out / "tokenizer.json").symlink_to(tmp_path / "mine" / "tokenizer.json")
    (out / "additional_chat_templates").symlink_to(tmp_path / "mine" / "plots")
    streamlap.compress(pico("llama"), out, preset="lorap", files=(str(tokens),), overwrite=True)
    assert put(tmp_path / "mine", []) == before
    assert not (out / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json"])
def test_what_would_be_read_in_place_of_the_result_is_in_the_way(
    pico: MakeModel, tokens: Path, tmp_path: Path, name: str
) -> None:
    """Of somebody's own, so that it is not removed either."""
    out = tmp_path / "out"
    streamlap.compress(pico("llama"), out, preset="lorap", files=(str(tokens),))
    before = put(out, [name])
    with pytest.raises(RecipeError, match=rf"out holds {name}, which streamlap did not write, .* Move it"):
        streamlap.compress(pico("llama"), out, files=(str(tokens),), overwrite=True)
    assert put(out, []) == before


def test_what_came_between_a_stop_and_the_next_run_is_in_the_way_too(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def begin() -> None:
        streamlap.compress(pico("llama"), out, preset="lorap", files=(str(tokens),))

    dies_at(compressing, "write_outer", monkeypatch, begin)
    put(out, ["model.safetensors"])
    with pytest.raises(RecipeError, match=r"out holds model\.safetensors, which streamlap did not write"):
        streamlap.resume(out)
    (out / "model.safetensors").unlink()
    streamlap.resume(out)
    assert streamlap.verify(out)["ok"]


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
