"""`resume` takes up what was stopped, a compression, an export or a survey, and refuses what does not say how it was begun."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Compress
from crashes import crash_after
from faults import Crash, Disk
from outputs import STATE, contents
from typer.testing import CliRunner

import streamlap
from streamlap.cli import app
from streamlap.errors import BudgetError, CheckpointError, Interrupted, RecipeError, ResumeMismatch
from streamlap.families.stream import ModelStream
from streamlap.methods.trained.recovery import Recovery
from streamlap.pipeline import session
from streamlap.pipeline.resume import COMMANDS
from streamlap.pipeline.survey import state_of
from streamlap.planning.schedule import schedules
from streamlap.planning.workload import evaluation_workload
from streamlap.recipe import Recipe
from streamlap.settings import RunSettings
from streamlap.store.journal import Journal
from streamlap.store.lock import OutputLock
from streamlap.store.sink import ShardFolder


@pytest.fixture(scope="module")
def out(source: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed folder."""
    folder = tmp_path_factory.mktemp("resuming") / "out"
    streamlap.compress(source, folder, files=(str(tokens),))
    return folder


# --- export --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["resume", "export"])
def test_an_export_goes_on_after_its_last_shard(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    whole, dense, written = tmp_path / "whole", tmp_path / "dense", []
    streamlap.export_dense(out, whole)
    crash_after(2, monkeypatch, lambda: streamlap.export_dense(out, dense))
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
    crash_after(1, monkeypatch, lambda: streamlap.export_dense(out, dense))
    with pytest.raises(ResumeMismatch, match=r"source config.json: the folder has '\w+', this run has") as refusal:
        streamlap.export_dense(other, dense)
    assert str(refusal.value).endswith("\nUse the values that the folder has, or choose another folder.")
    with pytest.raises(ResumeMismatch, match=r"command: the folder has 'export', this run has None") as refusal:
        streamlap.compress(source, dense, files=(str(tokens),))
    assert str(refusal.value).endswith("has, start over with --overwrite, or choose another folder.")
    (dense / "notes.txt").write_text("mine")
    streamlap.compress(source, dense, files=(str(tokens),), overwrite=True)
    assert (dense / "notes.txt").read_text() == "mine"


def test_an_export_writes_alone_and_into_a_new_folder(out: Path, tmp_path: Path) -> None:
    with OutputLock(tmp_path / "dense"), pytest.raises(ResumeMismatch, match="is being written by process"):
        streamlap.export_dense(out, tmp_path / "dense")
    streamlap.export_dense(out, tmp_path / "dense")
    with pytest.raises(RecipeError, match=r"dense is not empty \(README.md, ...\); wanted a new folder"):
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
    crash_after(1, monkeypatch, lambda: streamlap.survey(source, file, files=(str(ids),), work=work))
    ids.unlink()
    done = CliRunner().invoke(app, ["resume", str(file), "--max-ram", "100GiB", "--json"])
    assert done.exit_code == 0, done.output
    assert file.read_bytes() == whole.read_bytes()
    assert json.loads(done.stdout) == json.loads(file.read_text())
    assert not list(work.iterdir())
    assert not state_of(file).exists()


def test_a_survey_is_resumed_from_inside_its_state(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "survey.json"
    crash_after(1, monkeypatch, lambda: streamlap.survey(source, file, files=(str(tokens),)))
    monkeypatch.chdir(state_of(file))
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
    crash_after(1, monkeypatch, lambda: streamlap.survey(source, file, files=(str(tokens),)))
    streamlap.resume(state_of(file))
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_resumed_from_inside(broken: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(broken)
    streamlap.resume(".")
    assert contents(broken) == whole


# --- what was moved -------------------------------------------------------------------------------------------------------


@pytest.fixture
def moving(source: Path, tmp_path: Path) -> Path:
    """A copy of the source, to be moved."""
    return Path(shutil.copytree(source, tmp_path / "before"))


def test_a_compression_whose_source_was_moved_goes_on_by_its_first_command(
    moving: Path, compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "out", []
    crash_after(1, monkeypatch, lambda: compress(out, model=moving))
    moved = moving.rename(tmp_path / "after")
    with pytest.raises(CheckpointError) as refusal:
        streamlap.resume(out)
    assert f"{moving}, of which {out} is made, is not there; wanted the same checkpoint." in str(refusal.value)
    assert f"where it is now: streamlap compress MODEL {out}, and the same options." in str(refusal.value)
    write = ShardFolder.write
    monkeypatch.setattr(
        ShardFolder, "write", lambda folder, shard, *rest: written.append(shard) or write(folder, shard, *rest)
    )
    compress(out, model=moved)
    assert written == ["model-00003-of-00003.safetensors", "model-00001-of-00003.safetensors"]
    shards = {name: data for name, data in contents(out).items() if name.endswith(".safetensors")}
    assert shards == {name: data for name, data in whole.items() if name.endswith(".safetensors")}


def test_a_survey_and_an_export_whose_source_was_moved_say_how_they_go_on(
    moving: Path, out: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, dense = tmp_path / "survey.json", tmp_path / "a dense one"
    packed = Path(shutil.copytree(out, tmp_path / "packed"))
    crash_after(1, monkeypatch, lambda: streamlap.survey(moving, file, files=(str(tokens),)))
    crash_after(1, monkeypatch, lambda: streamlap.export_dense(packed, dense))
    moved, opened = moving.rename(tmp_path / "after"), packed.rename(tmp_path / "opened")
    for place, command in (
        (file, f"streamlap survey MODEL {file}"),
        (dense, f"streamlap export MODEL '{dense}' --to dense"),
    ):
        with pytest.raises(CheckpointError, match="is not there; wanted the same checkpoint") as refusal:
            streamlap.resume(place)
        assert command in str(refusal.value)
    streamlap.survey(moved, file, files=(str(tokens),))
    assert not state_of(file).exists()
    assert streamlap.export_dense(opened, dense)["shards"] == 3


def test_an_output_that_was_moved_is_resumed_where_it_is(broken: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    moved = broken.rename(tmp_path / "elsewhere")
    streamlap.resume(moved)
    assert contents(moved) == whole


@pytest.mark.parametrize("step", [4, 13, pytest.param(22, id="at the end")])
def test_an_output_that_was_moved_away_from_its_work_says_so(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before any work, at whatever step it had died; moved back it goes on, and nothing stays under --work."""
    out, work, moved = (tmp_path / name for name in ("out", "work", "moved"))
    said = r"moved was begun at '.*/out' and is now at '.*/moved'; .* under --work '.*/work' are .* Move it back, or start over"
    with monkeypatch.context() as patch:
        Disk(patch, at=step, kinds={"rename"})
        with pytest.raises(Crash):
            compress(out, work=work)
    out.rename(moved)
    before = contents(tmp_path)
    with pytest.raises(ResumeMismatch, match=said):
        streamlap.resume(moved)
    assert contents(tmp_path) == before
    with pytest.raises(ResumeMismatch, match=said):
        compress(moved, work=work)
    moved.rename(out)
    streamlap.resume(out)
    assert not list(work.iterdir())


def test_a_survey_that_was_moved_away_from_its_work_says_so(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    crash_after(1, monkeypatch, lambda: streamlap.survey(source, first, files=(str(tokens),), work=tmp_path / "work"))
    state_of(first).rename(state_of(second))
    with pytest.raises(ResumeMismatch, match=r"was begun at '.*first\.json\.streamlap' and is now at '.*second\.json"):
        streamlap.resume(second)


def test_hidden_states_that_are_gone_are_missed_by_name(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    crash_after(1, monkeypatch, lambda: compress(out, work=work))
    work.rename(tmp_path / "moved")
    with pytest.raises(
        ResumeMismatch, match=r"work/.*bin is not there; .* If the folder of --work was moved, move it back"
    ):
        streamlap.resume(out)
    (tmp_path / "moved").rename(work)
    streamlap.resume(out)
    assert not list(work.iterdir())


@pytest.mark.parametrize("way", ["compress", "survey"])
def test_a_run_that_is_replaced_leaves_no_hidden_states(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Wherever --work had put them."""
    work, run = tmp_path / "work", {"compress": streamlap.compress, "survey": streamlap.survey}[way]
    crash_after(1, monkeypatch, lambda: run(source, tmp_path / "out", files=(str(tokens),), work=work))
    assert list(work.iterdir())
    run(source, tmp_path / "out", files=(str(tokens),), samples=5, overwrite=True)
    assert not list(work.iterdir())


@pytest.mark.parametrize("way", ["compress", "survey"])
def test_a_stopped_run_that_is_told_to_overwrite_goes_on(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """It would delete what it committed itself."""
    run = {"compress": streamlap.compress, "survey": streamlap.survey}[way]
    append, lines = Journal.append, []
    monkeypatch.setattr(Journal, "append", lambda self, line: (lines.append(line["index"]), append(self, line))[1])

    def overwrite(name: str, **changes: Any) -> None:
        run(source, tmp_path / name, files=(str(tokens),), overwrite=True, **changes)

    overwrite("whole")
    for name, changes, wanted in (("out", {}, [1]), ("other", {"samples": 5}, [0, 1])):
        overwrite(name, samples=3)  # an earlier result
        crash_after(1, monkeypatch, lambda name=name: overwrite(name))
        lines.clear()
        overwrite(name, **changes)
        assert lines == wanted
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert contents(out) == contents(whole) if way == "compress" else out.read_bytes() == whole.read_bytes()


# --- what cannot be resumed ----------------------------------------------------------------------------------------------


def test_there_must_be_something_to_resume(compress: Compress, tmp_path: Path) -> None:
    compress(tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "nowhere"):
        with pytest.raises(ResumeMismatch, match=r"nothing to resume\. Run streamlap compress"):
            streamlap.resume(out)
    assert not (tmp_path / "nowhere").exists()


def test_what_is_there_in_place_of_a_run_is_said(source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "survey.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    places = {
        out: "holds a finished result", source: "holds a model, and no unfinished run",
        tmp_path / "nowhere": "is not there", tmp_path / "survey.json": "is a file, with no unfinished run beside it",
        tmp_path / "empty": r"has no \.streamlap/journal\.jsonl",
    }  # fmt: skip
    for place, words in places.items():
        with pytest.raises(ResumeMismatch, match=f"{place.name} {words}, so there is nothing to resume"):
            streamlap.resume(place)


def test_who_reads_an_unfinished_output_hears_how_it_goes_on(broken: Path, tmp_path: Path) -> None:
    for read in (
        streamlap.inspect, streamlap.evaluate, streamlap.load, streamlap.plan,
        lambda folder: streamlap.export(folder, tmp_path / "dense"),
        lambda folder: streamlap.export(folder, tmp_path / "model.gguf", to="gguf"),
        lambda folder: streamlap.recover(folder, tmp_path / "dense", ["a.txt"]),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"not finished.*; go on with: streamlap resume {broken}$"):
            read(broken)


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


# --- a journal that does not say how it was begun ------------------------------------------------------------------------

OWN: dict[str, dict[str, Any]] = {
    "compress": {"recipe": Recipe().to_dict()},
    "survey": {"dtype": "auto", "shape": "free"},
    "recover": {"knobs": asdict(Recovery()), "dtype": "auto", "dense": None},
    "export": {"to": "dense"},
}
"""What each command keeps of its own."""


def begun(folder: Path, kind: str, **changes: Any) -> Path:
    """What a run of that command leaves; its model is not there, so that to open it is an error of another kind. Gives what
    `resume` is to be asked for."""
    table = {"command": kind, "model": str(folder / "gone"), "settings": RunSettings(device="cpu").to_json()}
    arguments = table | OWN[kind] | changes
    arguments = {key: value for key, value in arguments.items() if value is not ...}
    place = folder / "survey.json" if kind == "survey" else folder / "out"
    output = state_of(place) if kind == "survey" else place
    (output / STATE).mkdir(parents=True)
    Journal.create(output, {"versions": session.versions_mark()}, arguments)
    return place


def resume_once(place: Path) -> ResumeMismatch:
    """The one error that comes of it, which has changed nothing."""
    before = contents(place.parent)
    with pytest.raises(ResumeMismatch) as refusal:
        streamlap.resume(place)
    assert contents(place.parent) == before
    assert refusal.value.exit_code == 5
    assert "\n" not in str(refusal.value)
    return refusal.value


def test_every_command_is_known_here() -> None:
    assert set(OWN) == set(COMMANDS)


@pytest.mark.parametrize("command", OWN)
def test_undamaged_the_journal_leads_to_the_model(tmp_path: Path, command: str) -> None:
    with pytest.raises(CheckpointError, match="gone"):
        streamlap.resume(begun(tmp_path, command))


def settings(**changes: Any) -> dict[str, Any]:
    table = RunSettings(device="cpu").to_json() | changes
    return {"settings": {key: value for key, value in table.items() if value is not ...}}


DAMAGED: dict[str, dict[str, Any]] = {
    "no command": {"command": ...},
    "command is a number": {"command": 7},
    "command is a list": {"command": ["compress"]},
    "no model": {"model": ...},
    "model is nothing": {"model": None},
    "model is a list": {"model": ["m"]},
    "no settings": {"settings": ...},
    "settings are nothing": {"settings": None},
    "settings are a list": {"settings": [1]},
    "settings are empty": {"settings": {}},
    "no device": settings(device=...),
    "device is a number": settings(device=0),
    "no work": settings(work=...),
    "work is a number": settings(work=5),
    "work is no path": settings(work="a\0b"),
    "no max_ram": settings(max_ram=...),
    "max_ram is text": settings(max_ram="8GiB"),
    "max_ram is a fraction": settings(max_ram=0.5),
    "max_ram is true": settings(max_ram=True),
    "max_ram is below zero": settings(max_ram=-1),
    "no max_vram": settings(max_vram=...),
    "max_vram is a list": settings(max_vram=[1]),
    "no overlap": settings(overlap=...),
    "overlap is a number": settings(overlap=1),
    "overlap is nothing": settings(overlap=None),
    "nothing at all": dict.fromkeys(("command", "model", "settings", "recipe", "dtype"), ...),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("command", OWN)
def test_damaged_arguments_are_one_refusal(tmp_path: Path, command: str, case: str) -> None:
    place = begun(tmp_path, command, **DAMAGED[case])
    words = str(resume_once(place))
    assert "does not say how it was begun" in words
    assert "Delete it and give the first command again" in words
    assert str(state_of(place) if command == "survey" else place) in words


@pytest.mark.parametrize("command", OWN)
@pytest.mark.parametrize("name", ["rm -rf", "resume", "", "Compress"])
def test_an_unknown_command_is_refused_by_name(tmp_path: Path, command: str, name: str) -> None:
    words = str(resume_once(begun(tmp_path, command, command=name)))
    assert f"was begun by {name!r}; wanted one of compress, survey, recover, export" in words


RECIPES: dict[str, Any] = {
    "none": ...,
    "nothing": None,
    "text": "best",
    "a number": 5,
    "a list": [["ratio", 0.2], "ratio"],
    "unknown keys": {"rate": 0.2},
    "a ratio that is text": {"ratio": "a fifth"},
    "methods that are text": {"methods": "best"},
    "an unknown method": {"methods": [{"method": "magic"}]},
    "a knob that is a list": {"methods": [{"method": "refine", "epochs": [1]}]},
    "a calibration that is a list": {"calibration": [1]},
    "calibration files that are numbers": {"calibration": {"files": [1]}},
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_be_used_is_one_refusal(tmp_path: Path, case: str) -> None:
    words = str(resume_once(begun(tmp_path, "compress", recipe=RECIPES[case])))
    assert "has no recipe that can be used" in words
    assert "Delete it and give the first command again" in words


@pytest.mark.parametrize(
    "damage", [{"dtype": ...}, {"dtype": None}, {"dtype": 16}, {"dtype": ["auto"]}, {"shape": ...}]
)
def test_a_survey_without_its_settings_is_one_refusal(tmp_path: Path, damage: dict[str, Any]) -> None:
    words = str(resume_once(begun(tmp_path, "survey", **damage)))
    assert "does not say its dtype and shape. Delete it and give the first command again" in words


def test_the_first_command_is_refused_as_well_until_the_folder_is_gone(
    broken: Path, compress: Compress, whole: dict[str, Any]
) -> None:
    path = broken / STATE / "journal.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    start = json.loads(first)
    del start["arguments"]["recipe"]
    path.write_text("".join([json.dumps(start) + "\n", *rest]))
    for again in (streamlap.resume, compress):
        with pytest.raises(
            ResumeMismatch, match=r"has no recipe that can be used.* Delete it and give the first command"
        ):
            again(broken)
    shutil.rmtree(broken)
    compress(broken)
    assert contents(broken) == whole


# --- another version -----------------------------------------------------------------------------------------------------

HERE = f"torch {torch.__version__}, transformers {transformers.__version__}"
LIBRARIES: dict[str, str | None] = {
    "an older streamlap": f"streamlap 0.3.0, {HERE}",
    "a newer streamlap": f"streamlap 99.0, {HERE}",
    "another torch": f"streamlap {streamlap.__version__}, torch 1.0, transformers {transformers.__version__}",
    "none that is known": None,
}


@pytest.mark.parametrize("case", LIBRARIES)
@pytest.mark.parametrize("command", OWN)
def test_a_run_begun_by_another_version_names_both_before_the_model_is_opened(
    tmp_path: Path, command: str, case: str
) -> None:
    """Also where that version kept other arguments than this one, which then are not called damaged."""
    for number, changes in enumerate(({}, {"settings": ..., "device": "cpu"}, {"command": "later"})):
        place = begun(tmp_path / str(number), command, **changes)
        path = next(place.parent.rglob("journal.jsonl"))
        start = json.loads(path.read_text())
        start["fingerprint"] = {"versions": LIBRARIES[case]} if LIBRARIES[case] else {}
        path.write_text(json.dumps(start) + "\n")
        with pytest.raises(ResumeMismatch) as refusal:
            streamlap.resume(place)
        row = f"versions: the folder has {LIBRARIES[case]!r}, this run has 'streamlap {streamlap.__version__}, {HERE}'"
        assert row in str(refusal.value)
        assert str(refusal.value).count("the folder has ") == 1, "all else is not this run's to compare"


def test_another_version_is_refused_by_the_first_command_too(
    broken: Path, compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "__version__", "99.0")
    for again in (streamlap.resume, compress):
        with pytest.raises(
            ResumeMismatch, match=r"versions: the folder has 'streamlap .* this run has 'streamlap 99.0"
        ):
            again(broken)


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


def test_draws_of_another_run_that_died_are_not_taken(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its journal went, and then it died, or its output was emptied and the state folder left."""
    wanted, out = tmp_path / "wanted", tmp_path / "out"
    compress(wanted, ratio=0.3, seed=1)
    crash_after(1, monkeypatch, lambda: compress(out, ratio=0.5, seed=0))
    for path in [*out.glob("*.safetensors"), out / STATE / "journal.jsonl"]:
        path.unlink()
    (out / STATE / "final_gain.json").write_text('{"gain": 0.5}')
    assert (out / STATE / "redrawn.npy").is_file()
    compress(out, ratio=0.3, seed=1)
    assert contents(out) == contents(wanted)


@pytest.mark.parametrize("damage", ["gone", "cut short"])
@pytest.mark.parametrize("command", ["compress", "export"])
def test_a_shard_that_is_not_there_any_more_is_missed_at_once(
    compress: Compress, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, damage: str
) -> None:
    """Not behind all layers that are left."""
    folder = tmp_path / "begun"
    begin = {"compress": lambda: compress(folder), "export": lambda: streamlap.export_dense(out, folder)}[command]
    crash_after(1, monkeypatch, begin)
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.unlink() if damage == "gone" else shard.write_bytes(data[:-1])
    monkeypatch.setattr(ShardFolder, "write", lambda *_: pytest.fail("it went on"))
    words = rf"{shard.name}.* This run wrote it.*Delete .*begun and give the first command again\."
    with pytest.raises(ResumeMismatch, match=words):
        streamlap.resume(folder)
