"""A disk that fills, fails or denies: one clear error, no model left, and the same bytes once it is mended."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Compress, MakeModel
from crashes import keep_on_disk
from faults import Disk
from outputs import contents

import streamlap
from streamlap.data.datasets import text_files
from streamlap.errors import BudgetError, CheckpointError, RecipeError, StreamlapError
from streamlap.pipeline.old_result import held_bytes
from streamlap.planning.disk import COMPANION_BYTES, DiskNeeds
from streamlap.store.hidden import HiddenBank
from streamlap.store.lock import OutputLock
from streamlap.store.shards import INDEX_NAME
from streamlap.store.sink import ShardFolder
from streamlap.store.source import SafetensorsFolder

Usage = namedtuple("Usage", "total used free")


def assert_unfinished(out: Path) -> None:
    assert not (out / "config.json").exists()
    assert not streamlap.verify(out)["ok"]


# --- full before the run ---------------------------------------------------------------------------------------------


def test_a_full_disk_is_seen_before_anything_is_made(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1234, 1234))
    with pytest.raises(
        BudgetError, match=r"the output folder takes [\d,]+ bytes under .*out, and 1,234 are free.*--work"
    ):
        compress(tmp_path / "out")
    assert BudgetError.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_disk_that_holds_what_the_plan_says_is_enough(
    source: Path, tokens: Path, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than the model itself, where much is removed."""
    plan = streamlap.plan(source, files=(str(tokens),), ratio=0.8)
    assert plan.disk_bytes < sum(path.stat().st_size for path in source.glob("*.safetensors")) + 2 * COMPANION_BYTES
    for free, fits in ((plan.disk_bytes, True), (plan.disk_bytes - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10**12, 0, free))
        with contextlib.nullcontext() if fits else pytest.raises(BudgetError, match="the output folder takes"):
            compress(tmp_path / str(fits), ratio=0.8)


def test_a_full_disk_is_seen_before_the_survey_and_before_the_old_result_goes(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compress(out)
    (out / "notes.txt").write_bytes(b"x" * 999)  # which stays, and so gives nothing back
    old, room = contents(out), held_bytes(out)

    def full_but_for(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, free + room - held_bytes(out)))

    full_but_for(1234)
    with pytest.raises(BudgetError, match=r"takes [\d,]+ bytes under .*out, and 1,234 are free") as found:
        compress(out, overwrite=True, preset="best", survey="auto")
    assert contents(out) == old
    assert os.listdir(tmp_path) == ["out"], "no survey was begun"
    wanted = re.search(r"takes ([\d,]+)", str(found.value))
    assert wanted, "the message says how much"
    full_but_for(int(wanted[1].replace(",", "")))  # and the room of the old result
    compress(out, overwrite=True)
    assert contents(out) == old


def test_a_full_work_disk_is_seen_before_anything_is_made(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("wants a second file system")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(10**9, 0, 0 if shm in [path, *path.parents] else 10**9)
    )
    work = shm / f"streamlap-{os.getpid()}"
    with pytest.raises(BudgetError, match=r"the hidden states takes 235,520 bytes under /dev/shm/.*and 0 are free"):
        compress(tmp_path / "out", work=work)
    assert not (tmp_path / "out").exists()
    assert not work.exists()


# --- full during the run ---------------------------------------------------------------------------------------------


WRITES: dict[str, Any] = {"kinds": {"write"}, "half": True, "lasting": True}
"""The write of number `at` and the later ones come half through, then fail."""


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=[pytest.mark.nightly, pytest.mark.timeout(1200)])])
def test_a_disk_that_fills_at_any_write(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        disk = Disk(patch, tmp_path, **WRITES)
        compress(out)
    assert contents(out) == whole
    for step in range(1, disk.counted + 1, stride):
        shutil.rmtree(out)
        with monkeypatch.context() as patch:
            Disk(patch, tmp_path, at=step, error=errno.ENOSPC, **WRITES)
            with pytest.raises(BudgetError, match=r"is full while writing .* run the same command again"):
                compress(out)
        assert_unfinished(out)
        compress(out)
        assert contents(out) == whole, step
    assert disk.counted > 40


def test_a_disk_that_gets_space_bit_by_bit(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again and again: each run resumes after the last finished layer and gets a little further."""
    step = 10
    while step:
        with monkeypatch.context() as patch:
            Disk(patch, tmp_path, at=step, error=errno.EDQUOT, **WRITES)
            try:
                compress(tmp_path / "out")
                break
            except BudgetError:
                step += 5
    assert step > 20
    assert contents(tmp_path / "out") == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("place", ["output", "work"])
def test_a_real_disk_that_fills(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, small_disk: Path,
    monkeypatch: pytest.MonkeyPatch, place: str,
) -> None:  # fmt: skip
    """The forecast was right, and then somebody else took the space."""
    monkeypatch.setattr(DiskNeeds, "require", lambda *_, **__: None)
    out, work = (small_disk / "out", None) if place == "output" else (tmp_path / "out", small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(100 << 10 if place == "output" else 210 << 10))
    with pytest.raises(BudgetError, match=r"disk under .* is full while writing .*\([\d,]+ bytes\)"):
        compress(out, work=work)
    assert_unfinished(out)
    assert not list(small_disk.rglob("*.tmp"))
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    compress(out, work=work)
    assert contents(out) == whole
    assert place == "output" or not list(small_disk.iterdir())


# --- a disk that fails -----------------------------------------------------------------------------------------------


FAILS: dict[str, tuple[str, str, type[StreamlapError], str]] = {
    "hidden states": ("read", "hidden-00000.bin", StreamlapError, "hidden-00000.bin cannot be read: Input/output"),
    "fsync of tokens": ("sync", "tokens.npy.tmp", StreamlapError, "cannot write .*tokens.npy: Input/output error"),
    "fsync of the first shard": (
        "sync", "model-00001-of-00003.safetensors.tmp",
        StreamlapError, "cannot write .*model-00001-of-00003.safetensors: Input/output",
    ),
    "fsync of a layer's shard": (
        "sync", "model-00002-of-00003.safetensors.tmp",
        StreamlapError, "cannot write .*model-00002-of-00003.safetensors: Input/output",
    ),
    "fsync of the journal": ("sync", "journal.jsonl", StreamlapError, "cannot write .*journal.jsonl: Input/output"),
    "rename": ("rename", "hidden-00000.bin.tmp", StreamlapError, "cannot write .*hidden-00000.bin: Input/output"),
    "rename beside the loop": (
        "rename", "hidden-00001.bin.tmp", StreamlapError, "cannot write .*hidden-00001.bin: Input/output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILS)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_disk_that_fails(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    case: str, overlap: bool,
) -> None:  # fmt: skip
    operation, file, kind, words = FAILS[case]
    keep_on_disk(monkeypatch)
    with monkeypatch.context() as patch:
        Disk(patch, at=1, kinds={operation}, name=file, error=errno.EIO)
        with pytest.raises(StreamlapError, match=words) as failure:
            compress(tmp_path / "out", overlap=overlap)
    assert type(failure.value) is kind
    assert_unfinished(tmp_path / "out")
    assert not list(tmp_path.rglob("*.tmp"))
    compress(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(("stride", "least"), [(17, 8), pytest.param(7, 20, marks=pytest.mark.nightly)])
def test_any_operation_that_fails_is_one_clear_error(
    compress: Compress,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stride: int,
    least: int,
) -> None:
    """Or none, where it only tidied up; never one of the system's own."""
    out = tmp_path / "disk" / "out"
    out.parent.mkdir()
    step, failed, disk = 2, 0, None
    while disk is None or disk.counted >= step - stride:
        with monkeypatch.context() as patch:
            disk = Disk(patch, out.parent, at=step, error=errno.EIO)
            try:
                compress(out)
            except StreamlapError as error:
                assert "Input/output error" in str(error)  # noqa: PT017
                failed += 1
        if not streamlap.verify(out)["ok"]:
            compress(out)
        shutil.rmtree(out / ".streamlap", ignore_errors=True)
        assert contents(out) == whole, step
        shutil.rmtree(out)
        step += stride
    assert failed > least


UNREADABLE = {
    "copied first": ("lm_head.weight", 1),
    "embedding": ("model.embed_tokens.weight", 1),
    "looked at before anything is made": ("model.layers.0.mlp.up_proj.weight", 1),
    "a layer": ("model.layers.0.mlp.up_proj.weight", 2),
    "a layer that is read ahead": ("model.layers.1.mlp.up_proj.weight", 1),
    "copied with its layer": ("model.layers.1.input_layernorm.weight", 4),
}
"""Tensor, and which reading of it fails: a layer's is read to draw windows anew, to compute with it, and to be copied; the
first's once before, to see whether the family is understood; a norm's once more, to sum the inputs of its layer, where a
failure does no harm."""


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_source_that_fails(
    source: Path, compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    case: str, overlap: bool,
) -> None:  # fmt: skip
    tensor, step = UNREADABLE[case]
    info = SafetensorsFolder(source).info(tensor)
    with monkeypatch.context() as patch:
        Disk(patch, at=step, kinds={"read"}, name=info.path.name, offset=info.begin, error=errno.EIO)
        with pytest.raises(
            CheckpointError, match=f"model.safetensors: .*/output error while reading tensor '{tensor}'"
        ):
            compress(tmp_path / "out", overlap=overlap)
    if case == "looked at before anything is made":
        assert not list(tmp_path.iterdir())
    else:
        assert_unfinished(tmp_path / "out")
    assert not list(tmp_path.rglob("*.tmp"))
    compress(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_an_embedding_row_that_cannot_be_read(pico: MakeModel, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pico("llama")
    info = SafetensorsFolder(source).info("model.embed_tokens.weight")
    lowest = int(np.load(tokens).min()) * info.nbytes // info.shape[0]
    Disk(monkeypatch, at=1, kinds={"read"}, name=info.path.name, offset=info.begin + lowest, error=errno.EIO)
    with pytest.raises(CheckpointError, match=r"Input/output error while reading tensor 'model.embed_tokens.weight'"):
        streamlap.evaluate(source, tokens)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_opened(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    Disk(monkeypatch, at=1, kinds={"open"}, name="model.safetensors", error=number, lasting=True)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: cannot be read \({os.strerror(number)}\)"):
        compress(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("denied", [("mkdir", "out"), ("create", "lock"), ("create", "holder")])
def test_an_output_without_permission(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, denied: tuple[str, str]
) -> None:
    kind, name = denied
    with monkeypatch.context() as patch:
        Disk(patch, tmp_path, at=1, kinds={kind}, name=name, error=errno.EACCES, lasting=True)
        with pytest.raises(StreamlapError, match=r"cannot write .*out.*: Permission denied") as failure:
            compress(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    with OutputLock(tmp_path / "out"):
        assert failure.value.exit_code == 1  # a failed run holds no lock


@pytest.mark.parametrize(
    ("look", "kind"),
    [
        (streamlap.verify, CheckpointError), (streamlap.plan, CheckpointError), (streamlap.resume, CheckpointError),
        (text_files, RecipeError),
    ],
)  # fmt: skip
def test_a_place_that_may_not_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[str], Any], kind: type[StreamlapError]
) -> None:
    def denied(path: Path, **_: Any) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "secret").mkdir()
    for names in (["is_file", "exists"], ["is_dir"]):  # what is in it may not be looked at, or the place itself
        for name in names:
            monkeypatch.setattr(Path, name, denied)
        with pytest.raises(
            kind, match=r"secret.* cannot be looked at: Permission denied; wanted a place that can be read"
        ):
            look(str(tmp_path / "secret"))


@pytest.mark.parametrize("at", [-1, -2])
def test_a_sync_that_fails_at_the_very_end(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The last but one makes the folder a finished one; without the last all is done."""
    root, syncs = tmp_path / "disk", {"kinds": {"sync folder"}, "error": errno.EIO}
    root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(patch, root, **syncs)
        compress(root / "out")
    shutil.rmtree(root / "out")
    with monkeypatch.context() as patch:
        Disk(patch, root, at=disk.counted + 1 + at, **syncs)
        with contextlib.nullcontext() if at == -1 else pytest.raises(StreamlapError, match=r"cannot write .*streamlap"):
            compress(root / "out")
    assert streamlap.verify(root / "out")["ok"]
    shutil.rmtree(root / "out" / ".streamlap", ignore_errors=True)
    assert contents(root / "out") == whole


# --- files that change under the reader ------------------------------------------------------------------------------


def test_a_shard_that_is_cut_while_in_use(pico: MakeModel, tmp_path: Path) -> None:
    shutil.copytree(pico("llama"), tmp_path / "source")
    source = SafetensorsFolder(tmp_path / "source")
    name = "model.layers.2.mlp.up_proj.weight"
    os.truncate(tmp_path / "source" / "model.safetensors", source.info(name).end - 1)
    with pytest.raises(CheckpointError, match=rf"model.safetensors was changed while in use, before tensor '{name}'"):
        source.read(name)


def test_hidden_states_that_are_cut_while_in_use(tmp_path: Path) -> None:
    bank = HiddenBank((4, 8, 16), torch.float32, 1, folder=tmp_path, tier="disk")
    bank.write(0, torch.zeros(4, 8, 16).split(1))
    batches = bank.read(0)
    next(batches)
    os.truncate(tmp_path / "hidden-00000.bin", 600)
    with pytest.raises(StreamlapError, match=r"hidden-00000.bin ended at byte 600"):
        next(batches)


def test_a_shard_of_the_output_that_is_gone(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = ShardFolder.seal
    lost = tmp_path / "out" / "model-00002-of-00003.safetensors"

    def lose(folder: ShardFolder, shards: Any) -> None:
        lost.unlink()
        seal(folder, shards)

    monkeypatch.setattr(ShardFolder, "seal", lose)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: cannot be read"):
        compress(tmp_path / "out")
    assert_unfinished(tmp_path / "out")
    assert not (tmp_path / "out" / INDEX_NAME).exists()
