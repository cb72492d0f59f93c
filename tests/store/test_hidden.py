"""Hidden states in files, in memory or in both: what goes in comes out, and what fails leaves nothing."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streamlap.errors import BudgetError, ResumeMismatch
from streamlap.store import hidden
from streamlap.store.hidden import IN_FLIGHT, HiddenBank, remove_hidden
from streamlap.store.sink import DurableFile
from streamlap.store.worker import Worker

SHAPE = (8, 4, 6)
TIERS = ("disk", "ram", "ram and disk")


def make_bank(tier: str, folder: Path, batch: int = 3, dtype: torch.dtype = torch.float32) -> HiddenBank:
    return HiddenBank(
        SHAPE, dtype, batch, folder=folder if "disk" in tier else None, tier="ram" if "ram" in tier else "disk"
    )


def states(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture(params=[True, False], ids=["overlap", "in turn"])
def writer(request: pytest.FixtureRequest) -> Iterator[Worker]:
    with Worker(request.param) as worker:
        yield worker


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_bank_gives_back_what_it_was_given(tmp_path: Path, writer: Worker, tier: str, batch: int) -> None:
    x_NLD = states().bfloat16()
    bank = make_bank(tier, tmp_path, batch, torch.bfloat16)
    bank.write(2, x_NLD.split(batch), writer)
    for _ in range(2):
        batches = list(bank.read(2))
        assert [len(x_BLD) for x_BLD in batches] == [len(x_BLD) for x_BLD in x_NLD.split(batch)]
        assert torch.equal(torch.cat(batches), x_NLD)
    bank.settle()
    assert files(tmp_path) == (["hidden-00002.bin"] if "disk" in tier else [])
    del batches
    first = weakref.ref(next(bank.read(2)))
    bank.drop(2)
    assert files(tmp_path) == []
    gc.collect()
    assert first() is None, "what is dropped is not in memory either"


def test_a_file_holds_the_numbers_and_nothing_else(tmp_path: Path) -> None:
    make_bank("disk", tmp_path).write(0, states().split(3))
    assert (tmp_path / "hidden-00000.bin").read_bytes() == states().numpy().tobytes()


def test_batches_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    bank = make_bank("disk", tmp_path)
    bank.write(0, (x_BLD.mT.contiguous().mT for x_BLD in states().split(3)))
    assert torch.equal(torch.cat(list(bank.read(0))), states())


def test_a_generation_that_is_not_there_is_refused(tmp_path: Path) -> None:
    bank = make_bank("disk", tmp_path)
    bank.write(0, states().split(3))
    with pytest.raises(ResumeMismatch, match=r"hidden-00001\.bin is not there; wanted hidden states of this run"):
        next(bank.read(1))


# --- one generation in place of the one before ---------------------------------------------------------------------------


def layer(x_BLD: torch.Tensor) -> torch.Tensor:
    return (x_BLD * 1.5 + 1).tanh()


def after(layers: int) -> torch.Tensor:
    """The states after so many layers, without any bank."""
    x_NLD = states()
    for _ in range(layers):
        x_NLD = torch.cat([layer(x_BLD) for x_BLD in x_NLD.split(3)])
    return x_NLD


@pytest.mark.parametrize("tier", TIERS)
def test_in_place_is_as_out_of_place(tmp_path: Path, writer: Worker, tier: str) -> None:
    bank = make_bank(tier, tmp_path)
    bank.write(0, states().split(3), writer)
    for index in range(3):
        bank.write(index + 1, (layer(x_BLD) for x_BLD in bank.read(index)), writer)
        assert torch.equal(torch.cat(list(bank.read(index + 1))), after(index + 1))
        bank.settle()
        bank.drop(index)
    assert files(tmp_path) == (["hidden-00003.bin"] if "disk" in tier else [])


@pytest.mark.parametrize("tier", ["disk", "ram and disk"])
@pytest.mark.parametrize("looked_at", [True, False])
def test_a_new_process_goes_on_from_the_files(tmp_path: Path, writer: Worker, tier: str, looked_at: bool) -> None:
    """Also where nothing looks at the inputs of the first layer before they go through it."""
    make_bank("disk", tmp_path).write(0, states().split(3))
    bank = make_bank(tier, tmp_path)
    if looked_at:
        assert torch.equal(torch.cat(list(bank.read(0))), states())
    for index in range(3):
        bank.write(index + 1, (layer(x_BLD) for x_BLD in bank.read(index)), writer)
        assert torch.equal(torch.cat(list(bank.read(index + 1))), after(index + 1)), index
    bank.settle()
    assert (tmp_path / "hidden-00003.bin").read_bytes() == after(3).numpy().tobytes()


@pytest.mark.parametrize("tier", TIERS)
def test_sequences_are_picked_by_number(tmp_path: Path, writer: Worker, tier: str) -> None:
    x_NLD, bank = states(), make_bank(tier, tmp_path)
    bank.write(2, x_NLD.split(3), writer)
    assert torch.equal(bank.pick(2, [7, 0, 4]), x_NLD[[7, 0, 4]])
    bank.settle()
    if "disk" in tier:
        again = make_bank(tier, tmp_path)
        assert torch.equal(again.pick(2, [6]), x_NLD[6:7])
    with pytest.raises((ResumeMismatch, AssertionError)):
        bank.pick(3, [0])


def test_what_was_read_from_a_file_is_read_from_memory_from_then_on(tmp_path: Path) -> None:
    make_bank("disk", tmp_path).write(0, states().split(3))
    bank = make_bank("ram and disk", tmp_path)
    assert torch.equal(torch.cat(list(bank.read(0))), states())
    (tmp_path / "hidden-00000.bin").unlink()
    assert torch.equal(torch.cat(list(bank.read(0))), states())


def test_a_pass_that_is_left_in_the_middle_is_begun_anew(tmp_path: Path) -> None:
    """As where memory ran out: what was kept of the first pass does not mix into the second."""
    make_bank("disk", tmp_path).write(0, states().split(3))
    bank = make_bank("ram and disk", tmp_path)
    next(bank.read(0))
    for _ in range(2):
        assert torch.equal(torch.cat(list(bank.read(0))), states())


@pytest.mark.parametrize("kept", [0, 1])
def test_two_generations_of_a_bank_are_not_read_side_by_side(tmp_path: Path, kept: int) -> None:
    """Whichever is in memory."""
    bank = make_bank("ram and disk", tmp_path)
    for generation in (1 - kept, kept):
        bank.write(generation, states(generation).split(3))
    with pytest.raises(AssertionError, match="two generations"):
        list(zip(bank.read(0), bank.read(1), strict=True))


@pytest.mark.parametrize("resumed", [True, False])
def test_one_generation_is_in_memory_and_not_two(tmp_path: Path, resumed: bool) -> None:
    make_bank("disk", tmp_path).write(0, states().split(1))
    bank = make_bank("ram and disk", tmp_path, batch=1)
    if not resumed:
        bank.write(0, (x_BLD.clone() for x_BLD in states().split(1)))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def step(x_BLD: torch.Tensor) -> torch.Tensor:
        nonlocal most
        alive.append(weakref.ref(x_BLD))
        gc.collect()
        most = max(most, sum(reference() is not None for reference in alive))
        return layer(x_BLD)

    bank.write(1, (step(x_BLD) for x_BLD in bank.read(0)))
    gc.collect()
    assert most <= 2, "of the old generation only what is in use"
    assert sum(reference() is not None for reference in alive) == 0


# --- what fails ----------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


@pytest.mark.parametrize("tier", ["disk", "ram and disk"])
@pytest.mark.parametrize("kind", [RuntimeError, Stop])
def test_a_generation_that_fails_in_the_middle_leaves_nothing(
    tmp_path: Path, tier: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor while the disk is slow, so that batches wait when the error comes, and whoever owns the thread leaves at once."""
    write = DurableFile.write
    monkeypatch.setattr(DurableFile, "write", lambda file, data: (time.sleep(0.02), write(file, data)))

    def batches() -> Iterator[torch.Tensor]:
        yield from torch.zeros(SHAPE).split(2)[:3]
        raise kind("layer died")

    for overlap in (True, False):
        bank = make_bank(tier, tmp_path, batch=2)
        with pytest.raises(kind, match="layer died"), Worker(overlap) as writer:
            bank.write(0, batches(), writer)
        assert files(tmp_path) == [], overlap


@pytest.mark.parametrize("tier", ["disk", "ram and disk"])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_full_disk_stops_the_loop_and_leaves_nothing(
    tmp_path: Path, tier: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the loop a batch fails a few batches before the loop knows."""
    for overlap in (True, False):
        made: list[int] = []
        with monkeypatch.context() as patch:
            fill_disk_at(place, patch)
            with pytest.raises(BudgetError, match=r"full while writing hidden-00000\.bin"):
                write_generation(make_bank(tier, tmp_path, batch=1), overlap, made)
        assert place < len(made) <= (place + 1 + IN_FLIGHT + 1 if overlap else place + 1)
        assert files(tmp_path) == []


def fill_disk_at(place: int, patch: pytest.MonkeyPatch) -> None:
    """Batches from that one on do not fit on the disk any more."""
    write, seen = os.write, []

    class FullFile:
        def __init__(self, path: Path) -> None:
            self.handle = os.open(path, os.O_WRONLY | os.O_CREAT)

        def write(self, data: memoryview) -> None:
            if len(seen) >= place:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            seen.append(write(self.handle, data))

        def flush(self) -> None: ...

        def fileno(self) -> int:
            return self.handle

        def close(self) -> None:
            if self.handle >= 0:
                os.close(self.handle)
            self.handle = -1

    patch.setattr(Path, "open", lambda path, mode: FullFile(path))


def write_generation(bank: HiddenBank, overlap: bool, made: list[int]) -> None:
    def batches() -> Iterator[torch.Tensor]:
        for number, x_BLD in enumerate(states().split(1)):
            made.append(number)
            yield x_BLD

    with Worker(overlap) as writer:
        bank.write(0, batches(), writer)
        bank.settle()


def test_a_file_that_cannot_get_its_name_is_an_error_of_the_next_reader(
    tmp_path: Path, writer: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    bank = make_bank("disk", tmp_path)
    with pytest.raises(BudgetError, match=r"full while writing hidden-00000\.bin"):
        write_and_read(bank, writer)
    assert files(tmp_path) == []


def write_and_read(bank: HiddenBank, writer: Worker) -> None:
    bank.write(0, states().split(3), writer)
    list(bank.read(0))


def test_a_reader_waits_for_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = DurableFile.seal
    monkeypatch.setattr(DurableFile, "seal", lambda file: (time.sleep(0.05), seal(file)))
    with Worker(True) as writer:
        bank = make_bank("disk", tmp_path)
        bank.write(0, states().split(3), writer)
        assert files(tmp_path) == ["hidden-00000.bin.tmp"]
        assert torch.equal(torch.cat(list(bank.read(0))), states())
    assert files(tmp_path) == ["hidden-00000.bin"]


def test_few_batches_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[None] = []
    write_batch = hidden._write_batch
    waiting: list[int] = []

    def slow(*args: object) -> None:
        time.sleep(0.01)
        write_batch(*args)  # type: ignore[arg-type]
        written.append(None)

    def batches() -> Iterator[torch.Tensor]:
        for number, x_BLD in enumerate(states().split(1)):
            waiting.append(number - len(written))
            yield x_BLD

    monkeypatch.setattr(hidden, "_write_batch", slow)
    with Worker(True) as writer:
        make_bank("disk", tmp_path, batch=1).write(0, batches(), writer)
    assert max(waiting) <= IN_FLIGHT + 1
    assert len(written) == SHAPE[0]


def test_close_takes_away_what_was_never_finished(tmp_path: Path) -> None:
    """Where the loop is stopped while the file waits for its name."""
    bank = make_bank("disk", tmp_path)
    with pytest.raises(Stop):
        stop_before_the_name(bank)
    assert files(tmp_path) == ["hidden-00000.bin.tmp"]
    bank.close()
    assert files(tmp_path) == []


def stop_before_the_name(bank: HiddenBank) -> None:
    """The writer is held up when it has all batches, until the sealing that waits behind is cancelled."""
    cancelled = threading.Event()

    def batches(writer: Worker) -> Iterator[torch.Tensor]:
        yield from states().split(3)
        writer.submit(cancelled.wait, 30)

    with Worker(True) as writer:
        bank.write(0, batches(writer), writer)
        assert bank._sealed is not None
        bank._sealed.add_done_callback(lambda _: cancelled.set())
        raise Stop


def test_close_leaves_what_is_finished(tmp_path: Path) -> None:
    bank = make_bank("disk", tmp_path)
    bank.write(0, states().split(3))
    bank.close()
    assert files(tmp_path) == ["hidden-00000.bin"]
    make_bank("ram", tmp_path).close()


def test_all_banks_of_a_folder_go_with_it_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on the disk, so that no power cut brings back what no journal leads to any more."""
    folder, synced = tmp_path / "hidden", []
    for name in ("hidden", "dense"):
        HiddenBank(SHAPE, torch.float32, 3, folder=folder, name=name).write(0, states().split(3))
    (tmp_path / "hidden-00000.bin").write_bytes(b"another run")
    monkeypatch.setattr(hidden, "fsync_folder", synced.append)
    for _ in range(2):  # where there is none, nothing is to be done
        remove_hidden(folder)
        assert files(tmp_path) == ["hidden-00000.bin"]
    assert synced == [tmp_path, tmp_path]
