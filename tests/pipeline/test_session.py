"""What every run does around its loop: room on the disk, the lock, the journal, hidden states, and what of it stays."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Compress
from crashes import crash_after
from faults import Crash, Disk
from outputs import STATE, contents

import streamlap
from streamlap.errors import BudgetError, Interrupted, NumericalError, RecipeError, ResumeMismatch
from streamlap.pipeline.session import Run, Session, session
from streamlap.planning.disk import DiskNeeds
from streamlap.settings import RunSettings
from streamlap.store.journal import Journal, saved_tokens
from streamlap.store.lock import OutputLock

compression = importlib.import_module("streamlap.pipeline.compress")  # by attribute the name is the function's
MARKS = {"source": "a checkpoint", "versions": "these"}
TOKENS_NL = torch.arange(12).reshape(3, 4)
WRONG = NumericalError("not finite")
LITTLE, TOO_MUCH = DiskNeeds(output_bytes=1), DiskNeeds(output_bytes=10**18)


@pytest.fixture(params=["in the output", "elsewhere"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """A run that nothing has been done of, with its hidden states in either place."""
    work = tmp_path / "work" if request.param == "elsewhere" else None
    out = tmp_path / "out"
    return Run(
        command="export", out=out, folder=out, model="m", settings=RunSettings(device="cpu", work=work),
        own={"dtype": "auto"},
    )  # fmt: skip


def begin(
    run: Run, needs: DiskNeeds = LITTLE, check: Callable[[], None] = lambda: None, marks: dict[str, Any] = MARKS,
    tokens_NL: torch.Tensor = TOKENS_NL, deadline: float = math.inf,
) -> AbstractContextManager[Session]:  # fmt: skip
    return session(run, marks, needs, deadline, check, tokens_NL)


def work_on(running: Session) -> None:
    """A shard, the hidden states after it, what lies between, and the line in the journal."""
    (running.run.out / "shard").write_bytes(b"weights")
    running.run.hidden.mkdir(parents=True, exist_ok=True)
    (running.run.hidden / "hidden-00001.bin").write_bytes(b"states")
    (running.state / "refine-00001.safetensors").write_bytes(b"masters")
    running.journal.append({"index": running.journal.next_layer})


def files(folder: Path) -> dict[str, bytes]:
    """Those that a run leaves, apart from who holds or held the lock."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "holder"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# --- what stays ----------------------------------------------------------------------------------------------------------


def test_nothing_of_the_state_stays_after_a_good_end(run: Run, tmp_path: Path) -> None:
    with begin(run) as running:
        work_on(running)
        assert running.run.hidden.is_dir()
        assert Journal.exists(run.folder)
    assert [path.relative_to(run.out).name for path in run.out.rglob("*")] == ["shard"]
    assert not list((tmp_path / "work").rglob("*"))


def break_off(run: Run, end: BaseException | None = WRONG) -> None:
    """A run that does some of its work and comes to that end; none stands for two signals."""
    with begin(run) as running:
        work_on(running)
        if end is not None:
            raise end
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)


ENDS: dict[str, tuple[BaseException | None, type[BaseException]]] = {
    "an error": (NumericalError("not finite"), NumericalError),
    "a stop": (Interrupted("stopped at layer 1 of 2"), Interrupted),
    "two signals": (None, Interrupted),
    "a bug": (ZeroDivisionError("a bug"), ZeroDivisionError),
    "a death": (Crash(), Crash),
}


@pytest.mark.parametrize("case", ENDS)
def test_everything_stays_after_an_error_and_the_next_run_goes_on_there(run: Run, tmp_path: Path, case: str) -> None:
    end, raised = ENDS[case]
    for lines in (1, 2):
        with pytest.raises(raised):
            break_off(run, end)
        assert {Path(name).name for name in files(tmp_path)} == {
            "shard", "journal.jsonl", "tokens.npy", "hidden-00001.bin", "refine-00001.safetensors"
        }  # fmt: skip
        assert Journal.load(run.folder).next_layer == lines
        assert torch.equal(saved_tokens(run.folder), TOKENS_NL)
        with OutputLock(run.folder):
            pass  # a run that is over holds none
    left = files(tmp_path)
    with begin(run) as running:
        assert running.journal.next_layer == 2
        assert files(tmp_path) == left, "to go on changes nothing"
    assert set(files(tmp_path)) == {"out/shard"}


def test_hidden_states_go_before_the_journal(run: Run, tmp_path: Path) -> None:
    """It alone knows where they are: a death between leaves nothing that nobody finds."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, at=1, kinds={"unlink"}, name="journal.jsonl")
        with pytest.raises(Crash), begin(run) as running:
            work_on(running)
    assert not running.run.hidden.exists()
    assert not list(tmp_path.rglob("*.bin"))
    assert Journal.load(run.folder).next_layer == 1
    assert (run.folder / STATE / "tokens.npy").exists()
    with begin(run):
        pass
    assert set(files(tmp_path)) == {"out/shard"}


def test_the_journal_goes_before_the_rest_of_the_state(run: Run, tmp_path: Path) -> None:
    """What a death leaves then is a finished output, for whoever looks."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, run.folder, at=1, kinds={"unlink"}, name="tokens.npy")
        with pytest.raises(Crash), begin(run) as running:
            work_on(running)
    assert not Journal.exists(run.folder)
    assert (run.folder / STATE).is_dir()


# --- before the first layer ----------------------------------------------------------------------------------------------


def test_disk_is_checked_only_for_a_run_that_begins(run: Run, tmp_path: Path) -> None:
    """One that goes on has written most of what it needs already."""
    with pytest.raises(BudgetError, match=r"the output folder takes 1,000,000,000,000,000,000 bytes under .*out"):
        begin(run, TOO_MUCH).__enter__()
    assert not list(tmp_path.iterdir()), "nothing is made, not even the folder"
    with pytest.raises(NumericalError):
        break_off(run)
    with begin(run, TOO_MUCH):
        pass


def test_disk_is_checked_where_the_hidden_states_will_be(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, Path | None]] = []
    monkeypatch.setattr(DiskNeeds, "require", lambda needs, out, hidden: asked.append((out, hidden)))
    with begin(run) as running:
        assert asked == [(run.folder, running.run.hidden)]


def test_the_output_is_checked_once_nobody_else_can_write_there(run: Run) -> None:
    """And before anything of the run is there."""

    def check() -> None:
        with pytest.raises(ResumeMismatch, match=f"is being written by process {os.getpid()} on"):
            OutputLock(run.folder).__enter__()
        assert not files(run.folder)
        raise RecipeError("no room for two")

    with pytest.raises(RecipeError, match="no room for two"):
        begin(run, check=check).__enter__()
    assert not files(run.folder)
    assert not Journal.exists(run.folder)


def test_two_do_not_write_into_one_output(run: Run, tmp_path: Path) -> None:
    with begin(run) as running:
        work_on(running)
        before = files(tmp_path)
        with pytest.raises(ResumeMismatch, match="is being written by process"):
            begin(run).__enter__()
        assert files(tmp_path) == before


def test_a_stop_says_how_to_go_on(run: Run) -> None:
    for out, name in ((run.out, f"{run.out}"), (run.out / "a b", f"'{run.out / 'a b'}'")):
        with begin(replace(run, out=out), deadline=0.0) as running:
            assert running.stops.due()
            assert str(running.stops.stopped("here")) == f"stopped here; go on with: streamlap resume {name}"


# --- a run that goes on --------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_bound_to_the_words_of_the_one_that_began(run: Run, tmp_path: Path) -> None:
    """Its hidden states are where that one put them, whatever this one was told."""
    with pytest.raises(NumericalError):
        break_off(run)
    other = replace(
        run, settings=RunSettings(device="cpu", work=tmp_path / "other"), own={"dtype": "float32"}, model="x"
    )
    with begin(other, tokens_NL=TOKENS_NL + 1) as running:
        assert running.run == run
        assert running.journal.arguments == run.arguments
        assert torch.equal(saved_tokens(run.folder), TOKENS_NL)
    assert set(files(tmp_path)) == {"out/shard"}


def test_a_run_without_tokens_keeps_none(run: Run) -> None:
    with session(run, MARKS, LITTLE, math.inf, lambda: None) as running:
        assert {path.name for path in running.state.iterdir()} == {"journal.jsonl", "lock", "holder"}


def test_another_run_is_refused_by_name_and_changes_nothing(run: Run, tmp_path: Path) -> None:
    with pytest.raises(NumericalError):
        break_off(run)
    left = files(tmp_path)
    with pytest.raises(ResumeMismatch, match=r"source: the folder has 'a checkpoint', this run has 'another'"):
        begin(run, marks=MARKS | {"source": "another"}).__enter__()
    assert files(tmp_path) == left


def test_what_another_process_finished_meanwhile_is_not_begun_again(
    broken: Path, compress: Compress, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look at the journal and the lock there is time for that."""
    saved_tokens = compression.saved_tokens

    def read_and_lose_the_race(out: Path) -> Any:
        tokens_NL = saved_tokens(out)
        compress(out)
        return tokens_NL

    monkeypatch.setattr(compression, "saved_tokens", read_and_lose_the_race)
    with pytest.raises(RecipeError, match="holds a finished model"):
        streamlap.resume(broken)
    assert streamlap.verify(broken)["ok"]
    assert {name: data for name, data in contents(broken).items() if STATE not in name} == whole


# --- another run, of the whole command ------------------------------------------------------------------------------------

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


def test_hidden_states_that_were_changed_are_refused(broken: Path) -> None:
    hidden = broken / STATE / "hidden" / "hidden-00001.bin"
    hidden.write_bytes(hidden.read_bytes()[:-1])
    with pytest.raises(ResumeMismatch, match=r"hidden-00001.bin has 47103 bytes .* wanted 47104"):
        streamlap.resume(broken)


@pytest.mark.parametrize("again", ["resume", "compress", "compress elsewhere"])
def test_work_is_used_and_left_empty(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    out, work = tmp_path / "out", tmp_path / "a" / "work"
    crash_after(1, monkeypatch, lambda: compress(out, work=work))
    names = {f"{name}-0000{generation}.bin" for name in ("hidden", "dense") for generation in (1, 2)}
    assert {path.name for path in work.rglob("*.bin")} == names
    assert not list(out.rglob("*.bin"))
    if again == "resume":
        streamlap.resume(out)
    else:  # the folder knows where they are
        compress(out, work=work if again == "compress" else None)
    assert contents(out) == whole
    assert not list(work.iterdir())
