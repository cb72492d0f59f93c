"""What a machine does to a long run: one clear error, its exit code, and the same bytes once it is mended and run again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compress, MakeModel
from crashes import in_layer
from outputs import contents
from safetensors.torch import load_file, save_file

import streamlap
from streamlap import cli
from streamlap.errors import CheckpointError, ResumeMismatch, StreamlapError
from streamlap.store.journal import Journal


@pytest.fixture(scope="module")
def original(pico: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several shards, with the name that its copies have."""
    made = pico("llama", tokenizer=True, num_hidden_layers=3, shard_size="40KB")
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("original") / "source"))


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """One that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture
def whole(unbroken: Callable[[Path], dict[str, Any]], original: Path) -> dict[str, Any]:
    return unbroken(original)


def shard_of(source: Path, tensor: str) -> Path:
    table = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    return source / table[tensor]


# --- the source ----------------------------------------------------------------------------------------------------------


def touch(shard: Path) -> None:
    os.utime(shard, ns=(1, 1))


def retrain(shard: Path) -> None:
    """Other weights under the same header."""
    stat = shard.stat()
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert shard.stat().st_size == stat.st_size
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (Path.unlink, "No such file or directory while reading tensor"),
    "touched": (touch, "was changed while in use, before tensor"),
    "retrained": (retrain, "was changed while in use, before tensor"),
    "cut": (lambda shard: os.truncate(shard, 100), "was changed while in use, before tensor"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_shard_that_changes_during_the_run(
    compress: Compress, source: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    case: str, overlap: bool,
) -> None:  # fmt: skip
    change, words = CHANGES[case]
    shard = shard_of(source, "model.layers.2.mlp.up_proj.weight")
    shutil.copy2(shard, tmp_path / "kept")
    with monkeypatch.context() as patch:
        in_layer(0, patch, lambda: change(shard))
        with pytest.raises(CheckpointError, match=rf"{shard.name}:? {words}") as failure:
            compress(tmp_path / "out", overlap=overlap)
    assert failure.value.exit_code == 3
    assert not streamlap.verify(tmp_path / "out")["ok"]
    shutil.copy2(tmp_path / "kept", shard)
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_other_weights_under_the_same_header_are_not_gone_on_with(broken: Path, source: Path) -> None:
    shard = shard_of(source, "model.layers.2.mlp.up_proj.weight")
    retrain(shard)
    words = (
        rf"{shard.name}: the folder has '\d+ bytes, header (\w+), data \w+', this run has '\d+ bytes, header \1, data"
    )
    with pytest.raises(ResumeMismatch, match=words):
        streamlap.resume(broken)


def test_a_source_that_moved_is_gone_on_with(
    broken: Path, compress: Compress, source: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    """What counts is what is in the shards, not where they lie or when they were written."""
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere" / "source"))
    for shard in moved.glob("*.safetensors"):
        touch(shard)
    shutil.rmtree(source)
    compress(broken, model=moved)
    assert contents(broken) == whole


# --- the device, threads, memory -----------------------------------------------------------------------------------------

LOST = {
    "launch": "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
    "gone": "CUDA error: GPU is lost",
    "library": "cuSOLVER error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling CUDA solver",
}


@pytest.mark.parametrize("case", LOST)
def test_a_gpu_that_is_lost(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def lose() -> None:
        raise getattr(torch, "AcceleratorError", RuntimeError)(LOST[case])

    with monkeypatch.context() as patch:
        in_layer(1, patch, lose)
        with pytest.raises(
            StreamlapError, match=r"the GPU failed \(.*\)\. What is committed is kept: run again"
        ) as failure:
            compress(tmp_path / "out")
    assert failure.value.exit_code == 1
    assert "\n" not in str(failure.value)
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_no_thread_to_be_had(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StreamlapError, match=r"cannot run \(can't start new thread\); .* --no-overlap") as failure:
            compress(tmp_path / "out")
        assert failure.value.exit_code == 1
        compress(tmp_path / "out", overlap=False)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("error", [SystemExit(0), ZeroDivisionError("a bug")])
def test_a_thread_that_dies_ends_the_run(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """In the commit of layer 1: that of layer 0 stands."""
    append = Journal.append

    def die(journal: Journal, line: dict[str, Any]) -> None:
        if line["index"] == 1:
            raise error
        append(journal, line)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", die)
        with pytest.raises(
            (StreamlapError, ZeroDivisionError), match=r"'writer' .* was ended \(SystemExit\(0\)\)|a bug"
        ):
            compress(tmp_path / "out")
    assert Journal.load(tmp_path / "out").next_layer == 1
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   torch.OutOfMemoryError("CUDA out of memory.")])  # fmt: skip
def test_memory_that_runs_out_before_the_first_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(streamlap, "evaluate", fail)
    monkeypatch.setattr(sys, "argv", ["streamlap", "eval", "model"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 4
    assert capsys.readouterr().err.startswith("streamlap: out of memory (")


# --- the system ----------------------------------------------------------------------------------------------------------


def test_a_file_system_without_locks(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: Any, what: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    compress(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_no_shared_memory(source: Path, tokens: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """As in containers that mount no /dev/shm."""
    hide = "mount -t tmpfs -o ro,size=4k tmpfs /dev/shm && ! touch /dev/shm/x 2>/dev/null"
    isolate = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*isolate, hide], capture_output=True).returncode:
        pytest.skip("a mount of one's own is not allowed here")
    run = [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(2); from streamlap import cli; cli.main()",
        "compress",
    ]
    words = [*run, str(source), str(tmp_path / "out"), "--calibration", str(tokens), "--no-survey"]
    done = subprocess.run([*isolate, hide + ' && exec "$0" "$@"', *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == whole
