"""A run that dies anywhere is known as unfinished, goes on, and ends in the bytes of the unbroken run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeModel
from crashes import crash_after
from faults import STEPS, dies
from outputs import STATE, contents, is_begun

import streamlap
from streamlap.errors import NumericalError, RecipeError, ResumeMismatch
from streamlap.pipeline import compress as pipeline
from streamlap.pipeline import session as preflight
from streamlap.store.journal import Journal
from streamlap.store.lock import OutputLock

ROOT = Path(__file__).parents[2]
JOURNAL = f"{STATE}/journal.jsonl"

Compress = Callable[..., streamlap.Report]


@pytest.fixture
def source(pico: MakeModel) -> Path:
    return pico("llama", tokenizer=True, num_hidden_layers=2)


@pytest.fixture
def compress(source: Path, tokens: Path) -> Compress:
    def run(out: Path, **changes: Any) -> streamlap.Report:
        return streamlap.compress(changes.pop("model", source), out, files=(str(tokens),), **changes)

    return run


@pytest.fixture
def whole(compress: Compress, tmp_path: Path) -> dict[str, Any]:
    """The bytes of an unbroken run."""
    compress(tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.fixture
def broken(compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder with one layer of two committed."""
    crash_after(1, monkeypatch, lambda: compress(tmp_path / "out"))
    return tmp_path / "out"


# --- death at a step -----------------------------------------------------------------------------------------------------


def test_death_twice(compress: Compress, whole: dict[str, Any], tmp_path: Path) -> None:
    """The resumed run dies too, and the next, each five steps later than the one before."""
    out, step = tmp_path / "out", 20
    assert dies(lambda: compress(out), tmp_path, at=step, kinds=STEPS)
    while dies(lambda: streamlap.resume(out), tmp_path, at=step, kinds=STEPS):
        step += 5
        if not is_begun(out):
            break
        assert not streamlap.verify(out)["ok"]
    assert step > 40
    shutil.rmtree(out / STATE, ignore_errors=True)
    assert contents(out) == whole


def test_death_while_an_old_result_is_replaced(compress: Compress, whole: dict[str, Any], tmp_path: Path) -> None:
    """With --overwrite: at no step do the remains of the old result pass for a model or for a run to resume."""
    compress(tmp_path / "old", ratio=0.5)
    begun = 0
    for step in range(1, 45):
        out = Path(shutil.copytree(tmp_path / "old", tmp_path / str(step)))
        assert dies(lambda out=out: compress(out, overwrite=True), out, at=step, kinds=STEPS)
        kept = (out / "config.json").exists()
        assert kept == (step <= 5), "a lock in a folder of its own, and then it is the first to go"
        begun += is_begun(out)
        assert not (kept and is_begun(out))
        compress(out, overwrite=True)
        assert contents(out) == whole
        shutil.rmtree(out)
    assert begun < 10, "only the last steps are those of the new run"


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
    assert len(events) == (2 if overlap else 1), "threads that write"
    renames = [(seen, place) for seen in events.values() for place, (kind, _) in enumerate(seen) if kind == "replace"]
    assert len(renames) > 10
    for seen, place in renames:
        (before, synced), (_, renamed), (_, folder), (after, inode) = seen[place - 1 : place + 3]
        assert (before, after) == ("fsync", "fsync")
        assert synced == renamed
        assert inode[0] == folder


EVENTS = {
    "lorap": [
        "model-00001-of-00003.safetensors", "hidden-00000.bin",
        "model-00002-of-00003.safetensors", "hidden-00001.bin", "layer 0", "no hidden-00000.bin",
        "model-00003-of-00003.safetensors", "layer 1", "no hidden-00001.bin",
    ],
    "best": [
        "model-00001-of-00003.safetensors", "hidden-00000.bin", "dense-00000.bin", "dense-00001.bin",
        "model-00002-of-00003.safetensors", "hidden-00001.bin", "layer 0", "no hidden-00000.bin", "no dense-00000.bin",
        "dense-00002.bin",
        "model-00003-of-00003.safetensors", "layer 1", "no hidden-00001.bin", "no dense-00001.bin",
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
    first = events.index("model-00001-of-00003.safetensors")
    assert events[first : first + len(EVENTS[preset])] == EVENTS[preset]


def test_an_error_takes_nothing_from_the_layer_before(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit may still be under way in the thread beside the loop, here because it waits for the error."""
    out, failing = tmp_path / "out", threading.Event()
    edit_layer, append = pipeline.edit_layer, Journal.append

    def fail(job: Any, engine: Any, layer: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            failing.set()
            raise NumericalError("layer 1 cannot be done")
        return edit_layer(job, engine, layer, index, *rest)

    def wait(journal: Journal, line: dict[str, Any]) -> None:
        assert failing.wait(60)
        time.sleep(0.05)
        append(journal, line)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "edit_layer", fail)
        patch.setattr(Journal, "append", wait)
        with pytest.raises(NumericalError, match="layer 1 cannot be done"):
            compress(out)
    assert len((out / JOURNAL).read_bytes().splitlines()) == 2
    assert not list(out.rglob("*.tmp"))
    streamlap.resume(out)
    assert contents(out) == whole


# --- the journal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99, -1])
def test_a_torn_last_line_never_happened(
    broken: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    """Nor does it spoil the line that takes its place, which a second death shows."""
    raw = (broken / JOURNAL).read_bytes()
    start = raw.index(b"\n") + 1
    length = len(raw) - start
    (broken / JOURNAL).write_bytes(raw[: start + (length - 1 if kept < 0 else int(kept * length))])
    crash_after(1, monkeypatch, lambda: streamlap.resume(broken))
    streamlap.resume(broken)
    assert contents(broken) == whole


def test_a_refused_resume_does_not_touch_the_journal(broken: Path) -> None:
    """The line that looks torn may be one that the running process is just writing."""
    torn = (broken / JOURNAL).read_bytes()[:-9]
    (broken / JOURNAL).write_bytes(torn)
    with OutputLock(broken), pytest.raises(ResumeMismatch, match="being written by process"):
        streamlap.resume(broken)
    assert (broken / JOURNAL).read_bytes() == torn


def test_what_another_process_finished_meanwhile_is_not_begun_again(
    broken: Path, compress: Compress, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look at the journal and the lock there is time for that."""
    saved_tokens = pipeline.saved_tokens

    def read_and_lose_the_race(out: Path) -> Any:
        tokens_NL = saved_tokens(out)
        compress(out)
        return tokens_NL

    monkeypatch.setattr(pipeline, "saved_tokens", read_and_lose_the_race)
    with pytest.raises(RecipeError, match="holds a finished model"):
        streamlap.resume(broken)
    assert streamlap.verify(broken)["ok"]
    assert {name: data for name, data in contents(broken).items() if STATE not in name} == whole


def edit_line(number: int, change: Callable[[bytes], bytes]) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [change(line) if place == number else line for place, line in enumerate(lines)]


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "first line cut": edit_line(0, lambda line: line[:40] + b"\n"),
    "first line of another kind": edit_line(0, lambda line: b"[1]\n"),
    "middle line cut": edit_line(1, lambda line: line[:40] + b"\n"),
    "middle line not text": edit_line(1, lambda line: b"\xff\xfe\n"),
    "middle line gone": lambda lines: [lines[0], lines[2]],
    "a line twice": lambda lines: [lines[0], lines[1], lines[1]],
    "first line gone": lambda lines: lines[1:],
    "empty": lambda lines: [],
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("again", ["resume", "compress"])
def test_a_damaged_journal_is_refused(broken: Path, compress: Compress, case: str, again: str) -> None:
    lines = (broken / JOURNAL).read_bytes().splitlines(keepends=True)
    second = lines[1].replace(b'"index": 0', b'"index": 1')
    (broken / JOURNAL).write_bytes(b"".join(DAMAGE[case]([*lines, second])))
    with pytest.raises(
        ResumeMismatch, match=r"journal.jsonl is damaged .* Delete .*out and give the first command again"
    ):
        streamlap.resume(broken) if again == "resume" else compress(broken)


@pytest.mark.parametrize("data", [None, b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_damaged_tokens_are_made_anew_by_compress(
    broken: Path, compress: Compress, whole: dict[str, Any], data: bytes | None
) -> None:
    path = broken / STATE / "tokens.npy"
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ResumeMismatch, match=r"tokens.npy cannot be read .* first command again"):
        streamlap.resume(broken)
    compress(broken)
    assert contents(broken) == whole


def test_there_must_be_something_to_resume(compress: Compress, tmp_path: Path) -> None:
    compress(tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "nowhere"):
        with pytest.raises(ResumeMismatch, match=r"nothing to resume\. Run streamlap compress"):
            streamlap.resume(out)
    assert not (tmp_path / "nowhere").exists()


# --- another run ---------------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "ratio": ({"ratio": 0.3}, "recipe ratio: the folder has 0.2, this run has 0.3"),
    "dtype": ({"dtype": "bfloat16"}, "recipe dtype: the folder has 'auto', this run has 'bfloat16'"),
    "samples": ({"samples": 5}, "calibration tokens: the folder has '[12, 16] "),
    "seed": ({"samples": 5, "seed": 1}, "calibration tokens: the folder has '[12, 16] "),
    "methods": ({"methods": ()}, "recipe methods: the folder has [{'method': 'attention_anchored'"),
    "preset": ({"preset": "lorap"}, "recipe preset: the folder has 'best', this run has 'lorap'"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_other_settings_are_refused(broken: Path, compress: Compress, case: str) -> None:
    changes, words = CHANGES[case]
    before = contents(broken)
    with pytest.raises(ResumeMismatch) as refusal:
        compress(broken, **changes)
    assert words in str(refusal.value)
    assert "begun by another run" in str(refusal.value)
    assert "--overwrite" in str(refusal.value)
    assert {name: data for name, data in contents(broken).items() if "holder" not in name} == {
        name: data for name, data in before.items() if "holder" not in name
    }


def change_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'{"format":"pt"}', b'{"format":"PT"}'))


def change_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_shard, r"source model.safetensors: the folder has '\d+ bytes"),
        (change_config, "source config.json: the"),
    ],
)
def test_another_source_is_refused(
    source: Path, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None], words: str,
) -> None:  # fmt: skip
    model, out = Path(shutil.copytree(source, tmp_path / "source")), tmp_path / "out"
    crash_after(1, monkeypatch, lambda: compress(out, model=model))
    change(model)
    with pytest.raises(ResumeMismatch, match=words):
        streamlap.resume(out)
    with pytest.raises(ResumeMismatch, match=words):
        compress(out, model=model)


def test_other_tokens_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, out = tmp_path / "ids.npy", tmp_path / "out"
    np.save(ids, np.zeros((3, 16), int))
    crash_after(1, monkeypatch, lambda: streamlap.compress(source, out, files=(str(ids),)))
    np.save(ids, np.ones((3, 16), int))
    with pytest.raises(ResumeMismatch, match=r"calibration tokens: the folder has '\[3, 16\] \w+', this run has"):
        streamlap.compress(source, out, files=(str(ids),))


def test_another_version_is_refused(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "__version__", "99.0")
    with pytest.raises(ResumeMismatch, match=r"versions: the folder has 'streamlap .* this run has 'streamlap 99.0"):
        streamlap.resume(broken)


def test_hidden_states_that_were_changed_are_refused(broken: Path) -> None:
    hidden = broken / STATE / "hidden" / "hidden-00001.bin"
    hidden.write_bytes(hidden.read_bytes()[:-1])
    with pytest.raises(ResumeMismatch, match=r"hidden-00001.bin has 24575 bytes .* wanted 24576"):
        streamlap.resume(broken)


# --- where the hidden states are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["resume", "compress", "compress elsewhere"])
def test_work_is_used_and_left_empty(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    out, work = tmp_path / "out", tmp_path / "a" / "work"
    crash_after(1, monkeypatch, lambda: compress(out, work=work))
    assert {path.name for path in work.rglob("*.bin")} == {"hidden-00001.bin", "dense-00001.bin", "dense-00002.bin"}
    assert not list(out.rglob("*.bin"))
    if again == "resume":
        streamlap.resume(out)
    else:  # the folder knows where they are
        compress(out, work=work if again == "compress" else None)
    assert contents(out) == whole
    assert not list(work.iterdir())


def test_a_stale_generation_goes_at_once(broken: Path, compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    """Death between the commit and the removal must not cost the disk a third generation."""
    stale = broken / STATE / "hidden" / "hidden-00000.bin"
    stale.touch()
    crash_after(0, monkeypatch, lambda: compress(broken))
    assert not stale.exists()


# --- death at random moments ---------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """One family and every command; the script without --only has the others."""
    only = ["llama-tied", "lorap", "best", "best --refine 2", "survey", "export"]
    command = [sys.executable, ROOT / "scripts" / "bench_resume.py", "--kills", "30", "--only", *only]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["differing_bytes"] == 0
    assert len(result["cases"]) == 5
    assert result["kills"] >= 30
    assert result["unfinished"] > 20
