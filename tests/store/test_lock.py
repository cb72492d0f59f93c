"""One writer a folder: a second is told who has it, and a dead process holds nothing, whatever the file system can do."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamlap.errors import ResumeMismatch, StreamlapError
from streamlap.store.lock import OutputLock

HOLDING = """
import errno, fcntl, os, sys, time
from pathlib import Path

def fail(handle, what):
    raise OSError(int(sys.argv[2]), "")

if sys.argv[2] != "0":
    fcntl.flock = fail
from streamlap.store.lock import OutputLock
with OutputLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
NO_FLOCK = {"nfs without a lock daemon": errno.ENOLCK, "not supported": errno.ENOTSUP, "unknown call": errno.ENOSYS}


def hold(out: Path, number: int = 0) -> subprocess.Popen[str]:
    """Another process that has the lock of `out`, on a file system that answers `number` to a request for one."""
    command = [sys.executable, "-W", "ignore", "-c", HOLDING, str(out), str(number)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def break_flock(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: Any, what: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


def test_a_second_process_is_told_who_holds_it_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        words = rf"is being written by process {process.pid} on {os.uname().nodename}; wanted it free. Wait .* or stop it\.$"
        with pytest.raises(ResumeMismatch, match=words), OutputLock(tmp_path):
            pytest.fail("two have it")
        process.send_signal(signal.SIGKILL)
    with OutputLock(tmp_path), pytest.raises(ResumeMismatch, match=rf"written by process {os.getpid()} on"):
        OutputLock(tmp_path).__enter__()


@pytest.mark.parametrize("case", NO_FLOCK)
def test_without_kernel_locks_a_file_takes_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    break_flock(NO_FLOCK[case], monkeypatch)
    with OutputLock(tmp_path):
        words = rf"written by process {os.getpid()} on .*, or, if it is gone, delete .*{tmp_path.name}/.streamlap/lock"
        with pytest.raises(ResumeMismatch, match=words):
            OutputLock(tmp_path).__enter__()
    assert not list(tmp_path.rglob("*.soft"))
    with OutputLock(tmp_path):
        pass


def test_a_file_that_a_dead_process_left_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold(tmp_path, errno.ENOLCK) as process:
        break_flock(errno.ENOLCK, monkeypatch)
        with pytest.raises(ResumeMismatch, match=rf"process {process.pid} on"):
            OutputLock(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.rglob("lock.soft")), "the dead process could not take it away"
    with OutputLock(tmp_path):
        pass


def test_a_file_of_another_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody here can tell whether its process lives."""
    break_flock(errno.ENOLCK, monkeypatch)
    (tmp_path / ".streamlap").mkdir()
    (tmp_path / ".streamlap" / "lock.soft").write_text("4194304\nanother-machine\n")
    (tmp_path / ".streamlap" / "holder").write_text("4194304 on another-machine")
    with pytest.raises(
        ResumeMismatch, match=r"by process 4194304 on another-machine; .* if it is gone, delete .*lock.soft"
    ):
        OutputLock(tmp_path).__enter__()


def test_any_other_fault_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_flock(errno.EIO, monkeypatch)
    with pytest.raises(StreamlapError, match=r"cannot write .*: Input/output error"):
        OutputLock(tmp_path).__enter__()
