"""Death and power cuts at every step of every command: known as unfinished, taken up again, and the same bytes at the end.

In ordinary runs one command goes through every step and the others through some; the nightly ones leave none out.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import power
import pytest
from conftest import Compress, MakeModel
from crashes import keep_on_disk
from faults import CHANGES, STEPS, Disk, dies
from outputs import STATE, contents, is_begun
from picos import VOCABULARY

import streamlap
from streamlap.errors import CheckpointError
from streamlap.store.journal import Journal

ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Command:
    """One command, and what an unbroken run of it gives."""

    run: Callable[..., object]
    whole: Any = None

    def is_finished(self, out: Path) -> bool:
        """Whether nobody would take `out` for anything else; what a last death has left of the state may be there."""
        return (out / "config.json").exists() and not Journal.exists(out)

    def is_whole(self, out: Path) -> bool:
        try:
            return bool(streamlap.verify(out)["ok"])
        except CheckpointError:  # there is no folder
            return False

    def result(self, out: Path) -> Any:
        return {name: data for name, data in contents(out).items() if not name.startswith(STATE)}

    def is_begun(self, out: Path) -> bool:
        return Journal.exists(out)

    def layers_done(self, out: Path) -> int:
        return Journal.load(out).next_layer

    def clear(self, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)


class Survey(Command):
    """Its result is a file, and the state a folder beside it."""

    def is_finished(self, out: Path) -> bool:
        return out.exists() and not self.is_begun(out)

    def is_whole(self, out: Path) -> bool:
        return self.is_finished(out)

    def result(self, out: Path) -> Any:
        return out.read_bytes()

    def is_begun(self, out: Path) -> bool:
        return Journal.exists(out.with_name(out.name + STATE))

    def layers_done(self, out: Path) -> int:
        return Journal.load(out.with_name(out.name + STATE)).next_layer

    def clear(self, out: Path) -> None:
        out.unlink(missing_ok=True)
        shutil.rmtree(out.with_name(out.name + STATE), ignore_errors=True)


@pytest.fixture(scope="module")
def commands(pico: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    source, folder = pico("llama", tokenizer=True, num_hidden_layers=2), tmp_path_factory.mktemp("commands")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, VOCABULARY, (3, 8)).astype(np.uint16))
    files = (str(folder / "ids.npy"),)

    def compress(**recipe: Any) -> Callable[..., object]:
        return lambda out, **options: streamlap.compress(source, out, files=files, **recipe, **options)

    made = {
        "lorap": Command(run=compress(preset="lorap")),
        "best": Command(run=compress()),
        "refined": Command(run=compress(refine=2)),
        "elsewhere": Command(run=lambda out, **options: compress()(out, work=out.parent / "work", **options)),
        "survey": Survey(run=lambda out, **options: streamlap.survey(source, out, files=files, **options)),
        "survey elsewhere": Survey(
            run=lambda out, **options: streamlap.survey(source, out, files=files, work=out.parent / "work", **options)
        ),
        "export": Command(run=lambda out: streamlap.export_dense(folder / "best", out)),
    }
    for name, command in made.items():
        command.run(folder / name)
        command.whole = command.result(folder / name)
    return made


def go_on(command: Command, out: Path, by_resume: bool) -> None:
    """To the end, from whatever a death has left."""
    assert command.is_whole(out) == command.is_finished(out)
    if not command.is_finished(out):
        if by_resume and command.is_begun(out):
            streamlap.resume(out)
        else:
            command.run(out)
    assert command.is_whole(out)
    assert command.result(out) == command.whole
    assert not [path for path in out.parent.rglob("*") if path.suffix in (".bin", ".tmp")]


# --- death ---------------------------------------------------------------------------------------------------------------


def die_at_every(command: Command, out: Path, stride: int = 1, begin: int = 1, **settings: Any) -> tuple[int, int]:
    """Runs of `command` into `out` that die one at each step, every `stride`th from `begin` on, each gone on with. Gives the
    number of steps, and of those after which all was finished but for tidying up."""
    step, ended = begin, 0
    while dies(lambda: command.run(out), out.parent, at=step, **settings):
        ended += command.is_finished(out)
        go_on(command, out, by_resume=step // stride % 2 == 0)
        command.clear(out)
        step += stride
    assert command.result(out) == command.whole
    return step - stride, ended


def read_from_disk(command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The same with nothing beside the loop, and hidden states that are read from the disk."""
    keep_on_disk(monkeypatch)
    return replace(command, run=lambda out: command.run(out, overlap=False))


@pytest.mark.parametrize("begin", [1, *(pytest.param(begin, marks=pytest.mark.nightly) for begin in range(2, 6))])
def test_death_at_every_step(commands: dict[str, Command], tmp_path: Path, begin: int) -> None:
    """A fifth of the steps each, which can run side by side. Most are in a thread beside the loop, and a death there is the
    death of the run."""
    steps, ended = die_at_every(commands["best"], tmp_path / "out", kinds=STEPS, stride=5, begin=begin)
    assert steps > 100, "the steps were not seen"
    assert 0 < ended < 4, "only tidying up comes after the journal is gone"


@pytest.mark.nightly
def test_death_at_steps_that_are_all_in_the_loop(
    commands: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = read_from_disk(commands["best"], monkeypatch)
    assert die_at_every(command, tmp_path / "out", kinds=STEPS, stride=5)[0] > 100


@pytest.mark.parametrize("name", ["lorap", pytest.param("refined", marks=pytest.mark.nightly), "survey", "export"])
def test_death_at_some_steps(commands: dict[str, Command], tmp_path: Path, name: str) -> None:
    """Writes among them, of which half is done."""
    steps, _ = die_at_every(commands[name], tmp_path / "out", stride=11, begin=3, kinds=CHANGES, half=True)
    assert steps > 50


EVERY = [("export", True)] + [
    (name, overlap)
    for name in ("lorap", "best", "refined", "elsewhere", "survey", "survey elsewhere")
    for overlap in (True, False)
]


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "overlap"), EVERY)
def test_death_at_every_write_too(
    commands: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overlap: bool
) -> None:
    command = commands[name] if overlap else read_from_disk(commands[name], monkeypatch)
    steps, ended = die_at_every(command, tmp_path / "out", kinds=CHANGES, half=True)
    print(json.dumps({"command": name, "overlap": overlap, "boundaries": steps, "after the end": ended}))
    assert steps > 50


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


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.nightly)])
def test_death_while_an_old_result_is_replaced(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, stride: int
) -> None:
    """With --overwrite: at no step do the remains of the old result pass for a model or for a run to resume, nor
    does somebody's own file among them go, or keep them from being replaced."""
    compress(tmp_path / "old", ratio=0.5)
    (tmp_path / "old" / "notes.txt").write_bytes(b"mine")
    begun = 0
    for step in (*range(1, 9), *range(9, 45, stride)):
        out = Path(shutil.copytree(tmp_path / "old", tmp_path / str(step)))
        assert dies(lambda out=out: compress(out, overwrite=True), out, at=step, kinds=STEPS)
        kept = (out / "config.json").exists()
        assert kept == (step <= 5), "a lock in a folder of its own, and then it is the first to go"
        begun += is_begun(out)
        assert not (kept and is_begun(out))
        compress(out, overwrite=True)
        assert contents(out) == whole | {"notes.txt": b"mine"}
        shutil.rmtree(out)
    assert begun < 10, "only the last steps are those of the new run"


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


# --- power cuts ----------------------------------------------------------------------------------------------------------


def recorded(run: Callable[[], object], root: Path, **settings: Any) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, root, **settings)
        run()
    return disk.operations


def survive(command: Command, root: Path, states: Iterator[tuple[int, power.Tree]], stride: int = 1) -> int:
    """Every `stride`th of these states on the disk, gone on with; also those at which a line of the journal became safe, and
    the last. Gives the number of all."""
    found = list(states)
    assert found, "no state to go on from"
    for number, (lines, tree) in enumerate(found):
        safe = number and lines != found[number - 1][0]
        if number % stride == 0 or safe or number >= len(found) - 3:
            shutil.rmtree(root, ignore_errors=True)
            power.write(tree, root)
            if lines and not command.is_finished(root / "out"):
                assert command.is_begun(root / "out"), f"state {number}: a journal of {lines} lines is lost"
                assert command.layers_done(root / "out") >= lines - 1, f"state {number}: a commit is lost"
            go_on(command, root / "out", by_resume=number % 2 == 0)
    return len(found)


@pytest.mark.parametrize("cut", power.CUTS)
@pytest.mark.parametrize("name", ["best", "survey elsewhere", "export"])
def test_power_cuts_at_some_steps(commands: dict[str, Command], tmp_path: Path, name: str, cut: str) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    operations = recorded(lambda: commands[name].run(root / "out"), root)
    states = power.trees(root, operations, power.CUTS[cut])
    assert survive(commands[name], root, states, stride=9) > 15


UNSYNCED: dict[str, dict[str, Any]] = {
    "output folder": {"kinds": {"sync folder"}, "name": "disk"},
    "state folder": {"kinds": {"sync folder"}, "name": "out"},
    "journal": {"kinds": {"sync folder"}, "name": STATE, "at": 2},
    "hidden folder": {"kinds": {"sync folder"}, "name": "work"},
    "line of a layer": {"kinds": {"sync"}, "name": "journal.jsonl"},
    "line of the last layer": {"kinds": {"sync"}, "name": "journal.jsonl", "at": 2},
}
"""Syncs before which the first process dies."""


@pytest.mark.parametrize("what", UNSYNCED)
def test_a_power_cut_after_a_death(commands: dict[str, Command], tmp_path: Path, what: str) -> None:
    """What the first process made and did not come to sync, the second builds upon."""
    death_then_cut(commands["elsewhere"], tmp_path / "disk", stride=20, **({"at": 1} | UNSYNCED[what]))


def death_then_cut(command: Command, root: Path, stride: int, **death: Any) -> int:
    root.mkdir()
    before = recorded(lambda: dies(lambda: command.run(root / "out"), root, **death), root)
    after = recorded(lambda: go_on(command, root / "out", by_resume=True), root)
    survivors = power.trees(root, [*before, *after], power.CUTS["nothing but what was synced"], len(before))
    return survive(command, root, survivors, stride)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_a_power_cut_after_a_death_at_any_step(commands: dict[str, Command], tmp_path: Path) -> None:
    for step in range(1, 120):
        death_then_cut(commands["elsewhere"], tmp_path / str(step), stride=3, at=step, kinds=STEPS)


@pytest.mark.parametrize("cut", ["nothing but what was synced", "mixed"])
def test_power_cuts_while_an_old_result_is_replaced(commands: dict[str, Command], tmp_path: Path, cut: str) -> None:
    """It is the old one, whole, or nothing, or the new one."""
    command, root = commands["best"], tmp_path / "disk"
    root.mkdir()
    before = recorded(lambda: command.run(root / "out", ratio=0.5), root)
    old = command.result(root / "out")
    after = recorded(lambda: command.run(root / "out", overwrite=True), root)
    marks = [(done.kind, done.path.name) for done in after if done.kind in ("unlink", "sync folder")]
    assert marks[marks.index(("unlink", "config.json")) + 1] == ("sync folder", "out"), "before anything else goes"
    how = power.mixed(0) if cut == "mixed" else power.CUTS[cut]
    for number, (_, tree) in enumerate(power.trees(root, [*before, *after], how, len(before))):
        if number % 15 == 0 or number < 12:
            shutil.rmtree(root)
            power.write(tree, root)
            assert command.is_whole(root / "out") == command.is_finished(root / "out"), number
            if not command.is_finished(root / "out") or command.result(root / "out") == old:
                command.run(root / "out", overwrite=True)
            assert command.result(root / "out") == command.whole, number


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cut", [*power.CUTS, "mixed"])
@pytest.mark.parametrize("name", sorted({name for name, _ in EVERY}))
def test_power_cuts_at_every_step(commands: dict[str, Command], tmp_path: Path, name: str, cut: str) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    operations = recorded(lambda: commands[name].run(root / "out"), root)
    how = power.mixed(0) if cut == "mixed" else power.CUTS[cut]
    count = survive(commands[name], root, power.trees(root, operations, how))
    print(json.dumps({"command": name, "cut": cut, "states": count}))
    assert count > 15
