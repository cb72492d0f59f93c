"""Batches on their way to a device that takes its time, and back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pretend import PretendGpu

from streamlap.accelerator.devices import Landing, accelerator_of, plain_room
from streamlap.accelerator.slab import Slab, SlabSizes, open_slab, paged
from streamlap.store.hidden import IN_FLIGHT, HiddenBank
from streamlap.store.sink import DurableFile
from streamlap.store.transfer import upload_ahead
from streamlap.store.worker import Worker, ahead

SHAPE = (8, 4, 6)
BATCH = 2


def states() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


# --- the device that is not there ----------------------------------------------------------------------------------------


def test_what_is_used_before_it_is_there_is_no_number() -> None:
    gpu = PretendGpu()
    flight = gpu.upload(torch.ones(3))
    assert flight._target.isnan().all()
    assert flight.wait().tolist() == [1, 1, 1]
    room = torch.zeros(3)
    landing = gpu.download(torch.ones(3), lambda shape, dtype: room)
    assert room.isnan().all()
    landing.wait()
    assert room.tolist() == [1, 1, 1]


@pytest.mark.parametrize("way", ["upload", "download"])
def test_what_is_overwritten_in_flight_is_a_fault(way: str) -> None:
    gpu, x = PretendGpu(), torch.ones(3)
    flight: Landing = gpu.upload(x) if way == "upload" else gpu.download(x, plain_room)
    x[1] = 2
    with pytest.raises(AssertionError, match=rf"{way}: \(3,\) overwritten in flight"):
        flight.wait()


# --- there ---------------------------------------------------------------------------------------------------------------


def test_on_a_cpu_nothing_moves() -> None:
    batches = states().split(BATCH)
    there = list(upload_ahead(batches, accelerator_of("cpu")))
    assert all(x is y for x, y in zip(batches, there, strict=True))


def test_a_batch_is_there_when_it_is_given_and_the_next_is_on_its_way() -> None:
    gpu, begun = PretendGpu(), []
    for place, x_BLD in enumerate(upload_ahead(states().split(BATCH), gpu)):
        assert torch.equal(x_BLD, states()[place * BATCH :][:BATCH])
        begun.append(gpu.calls["upload"])
    assert begun == [2, 3, 4, 4]


@pytest.mark.parametrize(("overlap", "rooms"), [(True, 2), (False, 1)])
def test_reading_from_the_disk_takes_so_many_rooms(tmp_path: Path, overlap: bool, rooms: int) -> None:
    """One that is copied from, and with overlap one that is read into."""
    HiddenBank(SHAPE, torch.float32, BATCH, folder=tmp_path, tier="disk").write(0, states().split(BATCH))
    gpu = PretendGpu()
    with open_slab(gpu, sizes(rooms)) as slab, Worker(overlap) as fetcher:
        bank = on_the_device(gpu, slab, "disk", tmp_path)
        there = [x.clone() for x in upload_ahead(ahead(bank.read(0), fetcher), gpu)]
        assert torch.equal(torch.cat(there), states())
        assert not gpu.pageable
    assert gpu.calls["upload"] == 4


def sizes(rooms: int) -> SlabSizes:
    return SlabSizes(buffer=0, room=paged(BATCH * 4 * 6 * 4), rooms=rooms)


def on_the_device(gpu: PretendGpu, slab: Slab, tier: str, folder: Path | None) -> HiddenBank:
    bank = HiddenBank(SHAPE, torch.float32, BATCH, folder=folder, tier=tier, accelerator=gpu)
    bank.use(slab.room)
    return bank


@pytest.fixture(autouse=True)
def no_room_is_short(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not caplog.records


# --- and back ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_writing_to_the_disk_takes_so_many_rooms(
    tmp_path: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is computed, and those that wait for a disk that is slow."""
    gpu, write = PretendGpu(), DurableFile.write
    monkeypatch.setattr(DurableFile, "write", lambda file, data: (time.sleep(0.01), write(file, data)))
    with open_slab(gpu, sizes(1 + IN_FLIGHT * overlap)) as slab, Worker(overlap) as writer:
        for tier in ("disk", "vram"):
            bank = on_the_device(gpu, slab, tier, tmp_path / tier)
            for generation in (0, 1):
                bank.write(generation, states().split(BATCH), writer)
                bank.settle()
            assert (tmp_path / tier / "hidden-00001.bin").read_bytes() == states().numpy().tobytes()
    assert not gpu.pageable


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_one_generation_in_pinned_memory_takes_one_room_more_than_it_has_batches(
    tmp_path: Path, overlap: bool, durable: bool
) -> None:
    gpu, x_NLD = PretendGpu(), states().round()
    with open_slab(gpu, sizes(4 + 1)) as slab, Worker(overlap) as writer:
        bank = on_the_device(gpu, slab, "ram", tmp_path if durable else None)
        bank.write(0, x_NLD.split(BATCH), writer)
        for generation in (1, 2):
            bank.write(generation, (x + 1 for x in upload_ahead(bank.read(generation - 1), gpu)), writer)
            assert torch.equal(torch.cat(list(bank.read(generation))), x_NLD + generation)
    assert not gpu.pageable


def test_a_generation_that_stays_on_the_device_and_need_not_last_is_never_copied() -> None:
    gpu = PretendGpu()
    with open_slab(gpu, sizes(1)) as slab:
        bank = on_the_device(gpu, slab, "vram", None)
        bank.write(0, states().split(BATCH))
        assert torch.equal(torch.cat(list(bank.read(0))), states())
    assert not gpu.calls["upload"] + gpu.calls["download"] + gpu.calls["move"]


@pytest.mark.parametrize("tier", ["vram", "ram"])
def test_a_resumed_run_reads_a_generation_into_its_place_and_goes_on_from_there(tmp_path: Path, tier: str) -> None:
    HiddenBank(SHAPE, torch.float32, BATCH, folder=tmp_path, tier="disk").write(0, states().split(BATCH))
    gpu = PretendGpu()
    with open_slab(gpu, sizes(4 + 1 if tier == "ram" else 1)) as slab:
        bank = on_the_device(gpu, slab, tier, tmp_path)
        there = (x.clone() for x in (bank.read(0) if tier == "vram" else upload_ahead(bank.read(0), gpu)))
        bank.write(1, (x + 1 for x in there))
        assert torch.equal(torch.cat(list(bank.read(1))), states() + 1)
    assert (gpu.calls["move"], gpu.calls["upload"]) == ((4, 0) if tier == "vram" else (0, 4))


@pytest.mark.parametrize("tier", ["vram", "ram", "disk"])
def test_sequences_are_picked_from_wherever_they_are(tmp_path: Path, tier: str) -> None:
    gpu = PretendGpu()
    with open_slab(gpu, sizes(5)) as slab:
        bank = on_the_device(gpu, slab, tier, tmp_path)
        bank.write(0, states().split(BATCH))
        bank.settle()
        for numbers in ([3], [7, 0, 4]):
            assert torch.equal(bank.pick(0, numbers), states()[numbers])


@pytest.mark.parametrize("tier", ["vram", "ram", "disk"])
def test_what_is_picked_of_two_streams_side_by_side_takes_a_room_each(tmp_path: Path, tier: str) -> None:
    gpu, numbers = PretendGpu(), [7, 0, 4, 5, 1]
    with open_slab(gpu, sizes(2 * 4 + 2 if tier == "ram" else 2)) as slab:
        banks = [on_the_device(gpu, slab, tier, tmp_path / name) for name in ("dense", "compressed")]
        for bank in banks:
            bank.write(0, states().split(BATCH))
            bank.settle()
        read = (bank.read(0, numbers) for bank in banks)
        pairs = list(zip(*(x if tier == "vram" else upload_ahead(x, gpu) for x in read), strict=True))
    assert [len(x_BLD) for x_BLD, _ in pairs] == [2, 2, 1]
    assert all(torch.equal(torch.cat(batches), states()[numbers]) for batches in zip(*pairs, strict=True))
    assert not gpu.pageable
