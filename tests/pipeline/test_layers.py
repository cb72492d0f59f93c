"""A layer is committed when all of it is on the disk, and what goes wrong after that takes nothing from it."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from conftest import Compress
from crashes import crash_after, in_layer
from outputs import STATE, contents

import streamlap
from streamlap.errors import NumericalError
from streamlap.store.journal import Journal


@pytest.mark.parametrize("overlap", [True, False])
def test_a_file_is_on_the_disk_before_it_gets_its_name(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """fsync of all its bytes, rename, fsync of the folder: in this order for every file, in whatever thread."""
    events: dict[int, list[tuple[str, Any]]] = defaultdict(list)
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        fsync(handle)
        stat = os.fstat(handle)
        events[threading.get_ident()].append(("fsync", (stat.st_ino, stat.st_size)))

    def note_replace(old: Any, new: Any) -> None:
        stat, seen = os.stat(old), events[threading.get_ident()]
        seen.append(("replace", (stat.st_ino, stat.st_size)))
        replace(old, new)
        seen.append(("folder", os.stat(Path(new).parent).st_ino))

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    compress(tmp_path / "out", overlap=overlap)
    # Of the draws and of the loop one each, of which the second may have the number of the first, and this one.
    assert len(events) in ((2, 3) if overlap else (1,)), "threads that write"
    renames = [(seen, place) for seen in events.values() for place, (kind, _) in enumerate(seen) if kind == "replace"]
    assert len(renames) > 10
    for seen, place in renames:
        (before, synced), (_, renamed), (_, folder), (after, inode) = seen[place - 1 : place + 3]
        assert (before, after) == ("fsync", "fsync")
        assert synced == renamed
        assert inode[0] == folder


EVENTS = {
    "lorap": [
        "hidden-00000.bin",
        "model-00002-of-00003.safetensors", "hidden-00001.bin", "layer 0", "no hidden-00000.bin",
        "model-00003-of-00003.safetensors", "layer 1", "no hidden-00001.bin",
        "model-00001-of-00003.safetensors",
    ],
    "best": [
        "hidden-00000.bin", "dense-00000.bin", "dense-00001.bin",
        "model-00002-of-00003.safetensors", "hidden-00001.bin", "layer 0", "no hidden-00000.bin", "no dense-00000.bin",
        "dense-00002.bin",
        "model-00003-of-00003.safetensors", "hidden-00002.bin", "layer 1", "no hidden-00001.bin", "no dense-00001.bin",
        "final_gain.json", "model-00001-of-00003.safetensors",
    ],
}  # fmt: skip


@pytest.mark.parametrize("preset", EVENTS)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_layer_is_committed_when_all_of_it_is_on_the_disk(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool, preset: str
) -> None:
    """Its shard, the hidden states that it gave, the journal; only then do those that it was given go."""
    events: list[str] = []
    replace, append, unlink = os.replace, Journal.append, os.unlink

    def note_replace(old: Any, new: Any) -> None:
        replace(old, new)
        events.append(Path(new).name)

    def note_append(journal: Journal, line: dict[str, Any]) -> None:
        append(journal, line)
        events.append(f"layer {line['index']}")

    def note_unlink(path: Any, **rest: Any) -> None:
        unlink(path, **rest)
        events.append(f"no {Path(path).name}")

    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(Journal, "append", note_append)
    monkeypatch.setattr(os, "unlink", note_unlink)
    compress(tmp_path / "out", overlap=overlap, preset=preset)
    first = events.index("hidden-00000.bin")
    assert events[first : first + len(EVENTS[preset])] == EVENTS[preset]


def test_an_error_takes_nothing_from_the_layer_before(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit may still be under way in the thread beside the loop, here because it waits for the error."""
    out, failing, append = tmp_path / "out", threading.Event(), Journal.append

    def fail() -> None:
        failing.set()
        raise NumericalError("layer 1 cannot be done")

    def wait(journal: Journal, line: dict[str, Any]) -> None:
        assert failing.wait(60)
        time.sleep(0.05)
        append(journal, line)

    with monkeypatch.context() as patch:
        in_layer(1, patch, fail)
        patch.setattr(Journal, "append", wait)
        with pytest.raises(NumericalError, match="layer 1 cannot be done"):
            compress(out)
    assert Journal.load(out).next_layer == 1
    assert not list(out.rglob("*.tmp"))
    streamlap.resume(out)
    assert contents(out) == whole


def test_a_stale_generation_goes_at_once(broken: Path, compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    """Death between the commit and the removal must not cost the disk a third generation."""
    stale = broken / STATE / "hidden" / "hidden-00000.bin"
    stale.touch()
    crash_after(0, monkeypatch, lambda: compress(broken))
    assert not stale.exists()
