"""`resume` takes up whatever was stopped: a compression, an export, a survey."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeModel
from faults import Crash, Disk
from outputs import STATE, contents
from typer.testing import CliRunner

import streamlap
from streamlap.cli import app
from streamlap.errors import BudgetError, Interrupted, RecipeError, ResumeMismatch
from streamlap.families.stream import ModelStream
from streamlap.planning.schedule import schedules
from streamlap.planning.workload import evaluation_workload
from streamlap.store.journal import Journal
from streamlap.store.lock import OutputLock
from streamlap.store.sink import ShardFolder


@pytest.fixture(scope="module")
def source(pico: MakeModel) -> Path:
    return pico("llama", tokenizer=True, num_hidden_layers=2)


@pytest.fixture(scope="module")
def out(source: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed folder."""
    folder = tmp_path_factory.mktemp("resuming") / "out"
    streamlap.compress(source, folder, files=(str(tokens),))
    return folder


def cut_short(lines: int, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` dies where it would write the line after so many into its journal."""
    with monkeypatch.context() as patch:
        Disk(patch, at=lines + 1, kinds={"write"}, name="journal.jsonl")
        with pytest.raises(Crash):
            run()


def edit_arguments(state: Path, **changes: Any) -> None:
    path = state / STATE / "journal.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    start = json.loads(first)
    start["arguments"] = {k: v for k, v in (start["arguments"] | changes).items() if v is not ...}
    path.write_text("".join([json.dumps(start) + "\n", *rest]))


# --- export --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["resume", "export"])
def test_an_export_goes_on_after_its_last_shard(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    whole, dense, written = tmp_path / "whole", tmp_path / "dense", []
    streamlap.export_dense(out, whole)
    cut_short(2, lambda: streamlap.export_dense(out, dense), monkeypatch)
    fault = streamlap.verify(dense)["faults"][0]["fault"]
    assert fault == f"the run is not finished; go on with: streamlap resume {dense}"
    write = ShardFolder.write
    monkeypatch.setattr(
        ShardFolder, "write", lambda folder, shard, *rest: written.append(shard) or write(folder, shard, *rest)
    )
    result = streamlap.resume(dense) if again == "resume" else streamlap.export_dense(out, dense)
    assert written == ["model-00003-of-00003.safetensors"]
    assert isinstance(result, dict)
    assert result["shards"] == 3
    assert contents(dense) == contents(whole)
    assert not (dense / STATE).exists()


def test_an_export_stops_on_request(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Journal.append

    def append_and_stop(journal: Journal, line: dict[str, Any]) -> None:
        append(journal, line)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Journal, "append", append_and_stop)
    with pytest.raises(Interrupted, match=r"stopped at shard 1 of 3; go on with: streamlap resume .*dense"):
        streamlap.export_dense(out, tmp_path / "dense")


def test_an_export_of_another_source_is_refused(
    out: Path, source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, dense = tmp_path / "other", tmp_path / "dense"
    streamlap.compress(source, other, ratio=0.5, files=(str(tokens),))
    cut_short(1, lambda: streamlap.export_dense(out, dense), monkeypatch)
    with pytest.raises(ResumeMismatch, match=r"source config.json: the folder has '\w+', this run has"):
        streamlap.export_dense(other, dense)
    with pytest.raises(ResumeMismatch, match=r"command: the folder has 'export', this run has None"):
        streamlap.compress(source, dense, files=(str(tokens),))


def test_an_export_writes_alone_and_into_a_new_folder(out: Path, tmp_path: Path) -> None:
    with OutputLock(tmp_path / "dense"), pytest.raises(ResumeMismatch, match="is being written by process"):
        streamlap.export_dense(out, tmp_path / "dense")
    streamlap.export_dense(out, tmp_path / "dense")
    with pytest.raises(RecipeError, match=r"dense is not empty \(config.json, ...\); wanted a new folder"):
        streamlap.export_dense(out, tmp_path / "dense")


# --- survey --------------------------------------------------------------------------------------------------------------


def test_a_survey_is_resumed_by_its_file(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the text that it was to measure on is gone."""
    ids, file, whole = tmp_path / "ids.npy", tmp_path / "survey.json", tmp_path / "whole.json"
    ids.write_bytes(tokens.read_bytes())
    streamlap.survey(source, whole, files=(str(ids),))
    work = tmp_path / "work"
    cut_short(1, lambda: streamlap.survey(source, file, files=(str(ids),), work=work), monkeypatch)
    ids.unlink()
    done = CliRunner().invoke(app, ["resume", str(file), "--max-ram", "100GiB", "--json"])
    assert done.exit_code == 0, done.output
    assert file.read_bytes() == whole.read_bytes()
    assert json.loads(done.stdout) == json.loads(file.read_text())
    assert not list(work.iterdir())
    assert not file.with_name(file.name + STATE).exists()


def test_a_survey_is_resumed_from_inside_its_state(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "survey.json"
    cut_short(1, lambda: streamlap.survey(source, file, files=(str(tokens),)), monkeypatch)
    monkeypatch.chdir(file.with_name(file.name + STATE))
    streamlap.resume(".")
    assert file.exists()


def test_a_survey_that_died_while_it_tidied_up_is_not_measured_again(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "survey.json"
    with monkeypatch.context() as patch:
        Disk(patch, at=1, kinds={"unlink"}, name="journal.jsonl")
        with pytest.raises(Crash):
            streamlap.survey(source, file, files=(str(tokens),))
    assert not list(tmp_path.rglob("*.bin")), "what only the journal leads to goes before it"
    first = file.read_bytes()
    streamlap.resume(file)
    assert file.read_bytes() == first
    assert list(tmp_path.iterdir()) == [file]


def test_the_state_of_a_survey_leads_to_it_too(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "survey.json"
    cut_short(1, lambda: streamlap.survey(source, file, files=(str(tokens),)), monkeypatch)
    streamlap.resume(file.with_name(file.name + STATE))
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_resumed_from_inside(
    source: Path, out: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    cut_short(1, lambda: streamlap.compress(source, here, files=(str(tokens),)), monkeypatch)
    monkeypatch.chdir(here)
    streamlap.resume(".")
    assert contents(here) == contents(out)


# --- what cannot be resumed ----------------------------------------------------------------------------------------------


def test_an_older_folder_is_a_compression(
    source: Path, out: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "out"
    cut_short(1, lambda: streamlap.compress(source, old, files=(str(tokens),)), monkeypatch)
    edit_arguments(old, command=...)
    streamlap.resume(old)
    assert contents(old) == contents(out)


def test_an_older_survey_asks_for_its_command(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "survey.json"
    cut_short(1, lambda: streamlap.survey(source, file, files=(str(tokens),)), monkeypatch)
    names = ("command", "model", "dtype", "device", "work", "max_ram", "max_vram", "overlap")
    edit_arguments(file.with_name(file.name + STATE), **dict.fromkeys(names, ...))
    with pytest.raises(ResumeMismatch, match=r"does not say how it was begun\. Give the first command again"):
        streamlap.resume(file)
    streamlap.survey(source, file, files=(str(tokens),))
    assert file.is_file()


def test_what_the_last_death_leaves_is_a_finished_folder(
    source: Path, out: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is gone, the lock and the tokens are still there."""
    late, dense = tmp_path / "late", tmp_path / "dense"
    for name, run in (
        (late, lambda: streamlap.compress(source, late, files=(str(tokens),))),
        (dense, lambda: streamlap.export_dense(out, dense)),
    ):
        with monkeypatch.context() as patch:
            Disk(patch, name, at=1, kinds={"unlink"}, name="lock")
            with pytest.raises(Crash):
                run()
        assert (name / STATE / "lock").exists()
        assert streamlap.verify(name)["ok"]
        with pytest.raises(ResumeMismatch, match="nothing to resume"):
            streamlap.resume(name)
    with pytest.raises(RecipeError, match="holds a finished model"):
        streamlap.compress(source, late, files=(str(tokens),))
    assert streamlap.evaluate(late, tokens).nll == streamlap.evaluate(out, tokens).nll


# --- where temporary files are -------------------------------------------------------------------------------------------


def test_an_evaluation_without_work_keeps_to_memory(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one file is made; where memory is too short the error says what would help, before a layer is read."""
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        streamlap.evaluate(source, tokens)
    assert not [done for done in disk.operations if done.kind not in ("open", "read") and "proc" not in done.path.parts]
    work = evaluation_workload(ModelStream(source), 12, 16, disk=False)
    assert {row.tier for overlap in (True, False) for row in schedules(work, overlap)} == {"ram"}
    assert [row.micro for row in schedules(work, False)][-1] == 1, "a forward may still be shorter"
    many = tmp_path / "many.npy"
    np.save(many, np.zeros((2000, 32), np.uint16))
    with pytest.raises(
        BudgetError, match=r"With --work FOLDER hidden states go to the disk there, and 0\.\d\dGiB of RAM"
    ):
        streamlap.evaluate(source, many, max_ram="1MiB")
    with pytest.raises(BudgetError) as refusal:
        streamlap.evaluate(source, many, max_ram="1MiB", work=tmp_path / "work")
    assert "--work" not in str(refusal.value)
