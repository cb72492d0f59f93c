"""A run that is asked to stop ends at its next commit, says how to go on, and ends later in the bytes of the unbroken run."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Compress
from crashes import in_layer
from outputs import contents

import streamlap
from streamlap import cli
from streamlap.errors import Interrupted, RecipeError, ResumeMismatch
from streamlap.families.stream import ModelStream
from streamlap.methods.trained.refine import Refining
from streamlap.store.journal import Journal
from streamlap.store.lock import OutputLock
from streamlap.system.signals import parse_time


def layers_done(out: Path) -> int:
    return Journal.load(out).next_layer


# --- signals -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """The test leaves the signal handlers as they were."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def signal_in_layer(index: int, patch: pytest.MonkeyPatch, *numbers: int) -> None:
    """While the loop is at that layer."""

    def send() -> None:
        for number in numbers:
            with contextlib.suppress(Exception):  # as a library may do where the signal strikes
                os.kill(os.getpid(), number)

    in_layer(index, patch, send)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_commit(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "out"
    signal_in_layer(0, monkeypatch, number)
    with pytest.raises(Interrupted, match=r"stopped at layer 1 of 2; go on with: streamlap resume .*out") as stop:
        compress(out)
    assert stop.value.exit_code == 75
    assert layers_done(out) == 1
    assert not streamlap.verify(out)["ok"]
    streamlap.resume(out)
    assert contents(out) == whole


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_sigint_stops_at_once(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        signal_in_layer(0, patch, first, signal.SIGINT)
        with pytest.raises(Interrupted, match="stopped at once"):
            compress(out)
    assert layers_done(out) == 0
    streamlap.resume(out)
    assert contents(out) == whole


@pytest.mark.usefixtures("handlers")
def test_a_commit_that_is_under_way_is_finished_also_where_all_stops_at_once(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread beside the loop is in the commit of layer 0 when two signals strike the loop in layer 1, and a third while
    that is waited for: it tears nothing away, the lock least of all."""
    out, begun, append = tmp_path / "out", threading.Event(), Journal.append

    def send() -> None:
        assert begun.wait(60)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    def take_time(journal: Journal, line: dict[str, Any]) -> None:
        begun.set()
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        with pytest.raises(ResumeMismatch, match="being written by process"):
            OutputLock(out).__enter__()
        append(journal, line)

    with monkeypatch.context() as patch:
        in_layer(1, patch, send)
        patch.setattr(Journal, "append", take_time)
        with pytest.raises(Interrupted, match="stopped at once"):
            compress(out)
    assert layers_done(out) == 1
    streamlap.resume(out)
    assert contents(out) == whole


WAITING = """
import sys
import torch
from streamlap import cli
from streamlap.pipeline import layers
torch.set_num_threads(2)  # as in the process that this one is held against: products as small as these depend on it
edit_layer = layers.edit_layer
layers.edit_layer = lambda *job: (print("in a layer", flush=True), sys.stdin.readline(), edit_layer(*job))[2]
cli.main()
"""


def start_waiting(*words: object) -> subprocess.Popen[str]:
    """The command in a process of its own, that says when it is in a layer and stays there until it gets a line."""
    command, pipe = [sys.executable, "-c", WAITING, *map(str, words)], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "in a layer\n":
        pytest.fail(process.communicate()[1])
    return process


def test_one_process_a_folder_and_exit_75(source: Path, tokens: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start_waiting("compress", source, out, "--calibration", tokens, "--no-survey") as process:
        with pytest.raises(ResumeMismatch, match=f"out is being written by process {process.pid} on .* wanted it free"):
            streamlap.resume(out)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate("\n")
    assert process.returncode == 75, err
    assert "stopping at the next commit" in err
    assert f"streamlap: stopped at layer 1 of 2; go on with: streamlap resume {out}" in err
    streamlap.resume(out)
    assert contents(out) == whole


def test_two_sigints_leave_a_long_layer(source: Path, tokens: Path, tmp_path: Path) -> None:
    with start_waiting("compress", source, tmp_path / "out", "--calibration", tokens) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "press Ctrl-C to stop at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.wait()  # it got no line
        err = process.stderr.read()
    assert process.returncode == 75, err
    assert err.startswith("streamlap: stopped at once; what was committed is kept, go on with: streamlap resume")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["eval", "plan", "compress"])
def test_a_signal_where_nothing_is_under_way_stops_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, command: str
) -> None:
    def strike(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        pytest.fail("the signal was not heard")

    monkeypatch.setattr(streamlap, {"eval": "evaluate"}.get(command, command), strike)
    monkeypatch.setattr(sys, "argv", ["streamlap", command, "model", *(["out"] if command == "compress" else [])])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == Interrupted.exit_code
    assert capsys.readouterr().err == (
        f"streamlap: stopped ({signal.strsignal(number)}) with nothing under way; give the same command again\n"
    )


# --- time that is up -----------------------------------------------------------------------------------------------------

TIMES: dict[str | float, float] = {
    "3h50m": 13_800, "1d": 86_400, "2d1s": 172_801, "90s": 90, "45m": 2_700, "12": 12, "0.5": 0.5, 1e-9: 1e-9, 7: 7,
}  # fmt: skip


def test_times_are_read() -> None:
    assert {text: parse_time(text, "--stop-after") for text in TIMES} == TIMES
    assert parse_time(None, "--stop-after") == math.inf


@pytest.mark.parametrize(
    "text", ["", "3x", "h", "-5", "50m3h", "1.5h", "0", "0s", "3h 50m", "nan", "inf", "1e3", "9" * 5000 + "d"]
)
def test_what_is_no_time_is_refused_before_anything_is_made(compress: Compress, tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"stop_after is .*; wanted a time like 3h50m, 45m or 90s."):
        compress(tmp_path / "out", stop_after=text)
    assert not (tmp_path / "out").exists()


def test_every_run_moves_on_however_little_time_it_gets(
    compress: Compress, whole: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=r"stopped at layer 1 of 2; go on with: streamlap resume .*out"):
        compress(out, stop_after=1e-9)
    assert layers_done(out) == 1
    streamlap.resume(out, stop_after=1e-9)
    assert contents(out) == whole


def test_time_that_is_left_stops_nothing(compress: Compress, whole: dict[str, Any], tmp_path: Path) -> None:
    compress(tmp_path / "out", stop_after="1h")
    assert contents(tmp_path / "out") == whole


def test_a_refined_layer_stops_after_an_epoch_and_goes_on_there(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, close = tmp_path / "out", Refining.close_epoch
    compress(tmp_path / "whole", refine=3)
    epochs: list[int] = []

    def count(training: Refining, held: float) -> None:
        close(training, held)
        epochs.append(training.epoch)

    monkeypatch.setattr(Refining, "close_epoch", count)
    with pytest.raises(
        Interrupted, match=r"stopped in layer 0 after 1 of 3 epochs; go on with: streamlap resume .*out"
    ):
        compress(out, refine=3, stop_after=1e-9)
    assert layers_done(out) == 0
    assert not streamlap.verify(out)["ok"]
    for _ in itertools.count():
        with contextlib.suppress(Interrupted):
            streamlap.resume(out, stop_after=1e-9)
            break
    assert epochs == [1, 2, 3, 1, 2, 3], "none was done twice"
    assert contents(out) == contents(tmp_path / "whole")


def test_a_survey_stops_too(source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep(name: str, **changes: Any) -> streamlap.Survey:
        return streamlap.survey(source, tmp_path / name, files=(str(tokens),), **changes)

    whole = sweep("whole.json")
    with pytest.raises(Interrupted, match="stopped at layer 1 of 2"):
        sweep("survey.json", stop_after=1e-9)
    with monkeypatch.context() as patch:
        head = ModelStream.head
        patch.setattr(ModelStream, "head", lambda stream: (os.kill(os.getpid(), signal.SIGTERM), head(stream))[1])
        with pytest.raises(
            Interrupted, match="stopped at the head, with 0 of 4 perturbations measured; go on with: streamlap resume"
        ):
            sweep("survey.json")
    for measured in range(1, 4):  # each run measures one at least
        with pytest.raises(Interrupted, match=f"stopped at the head, with {measured} of 4 perturbations measured"):
            streamlap.resume(tmp_path / "survey.json", stop_after=1e-9)
    assert not (tmp_path / "survey.json").exists()
    assert sweep("survey.json") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"whole.json", "survey.json"}


def test_clocks_that_jump(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's time is set back and forth by a year: nothing stops for it, and no phase takes less than no time."""
    jumps = itertools.cycle([0.0, 3.2e7, -3.2e7])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    report = compress(tmp_path / "out", stop_after="1h")
    assert contents(tmp_path / "out") == whole
    assert all(0 <= seconds < 60 for layer in report.layers for seconds in layer.seconds.values())
