"""Host memory for a device: rooms of one size, which are free again when nothing is left in them."""

from __future__ import annotations

import gc
import logging
import threading

import pytest
import torch
from pretend import PretendGpu

from streamlap.accelerator import slab as slabs
from streamlap.accelerator.devices import accelerator_of
from streamlap.accelerator.slab import Slab, SlabSizes, open_slab, paged

SIZES = SlabSizes(buffer=paged(5000), room=paged(3 * 4 * 6 * 4), rooms=2)
SHAPE = (3, 4, 6)


def test_every_part_is_whole_pages() -> None:
    assert [paged(count) for count in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert SIZES.total == 8192 + 2 * 4096


def test_it_is_registered_once_to_the_byte_and_given_back() -> None:
    gpu = PretendGpu()
    with open_slab(gpu, SIZES) as slab:
        assert list(gpu.registered.values()) == [SIZES.total]
        assert slab.buffer.nbytes == SIZES.buffer
        assert all(gpu.is_registered(x) for x in (slab.buffer, slab.room(SHAPE, torch.float32)))
    assert not gpu.registered


def test_parts_do_not_overlap() -> None:
    slab = Slab(SIZES)
    slab.buffer.fill_(1)
    rooms = [slab.room(SHAPE, torch.float32).fill_(number) for number in (2, 3)]
    assert [set(x.flatten().tolist()) for x in (slab.buffer, *rooms)] == [{1}, {2.0}, {3.0}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_room_is_free_again_when_no_tensor_of_it_is_left(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "PATIENCE", 0.0)
    slab = Slab(SIZES)
    first, second = slab.room(SHAPE, dtype), slab.room((1, 4, 6), dtype)
    places = {first.data_ptr(), second.data_ptr()}
    part = first[1:, 0]
    del first
    gc.collect()
    assert slab.room(SHAPE, dtype).data_ptr() not in places, "a view is left"
    place = second.data_ptr()
    del second
    again = slab.room(SHAPE, dtype)
    assert (again.data_ptr(), again.dtype) == (place, dtype)
    del part, again
    assert {slab.room(SHAPE, dtype).data_ptr() for _ in range(9)} <= places


def test_one_more_than_there_are_is_a_warning_and_memory_like_any_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slabs, "PATIENCE", 0.0)
    slab = Slab(SIZES)
    rooms = [slab.room(SHAPE, torch.float32).fill_(number) for number in range(3)]
    assert [float(x.mean()) for x in rooms] == [0, 1, 2]
    assert caplog.text.count("more batches are on their way than the schedule counts") == 1


def test_a_room_that_another_thread_still_holds_is_waited_for() -> None:
    slab = Slab(SIZES)
    rooms = [slab.room(SHAPE, torch.float32) for _ in range(2)]
    timer = threading.Timer(0.05, rooms.clear)
    timer.start()
    slab.room(SHAPE, torch.float32)
    timer.join()
    assert not rooms


def test_where_it_cannot_be_registered_a_warning_says_so_and_the_memory_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(gpu: PretendGpu, memory: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS\nmore")

    monkeypatch.setattr(PretendGpu, "register", refuse)
    gpu = PretendGpu()
    with caplog.at_level(logging.WARNING), open_slab(gpu, SIZES) as slab:
        assert slab.room(SHAPE, torch.float32).fill_(1).sum() == 72
    assert len(caplog.records) == 1
    assert "cannot be pinned (CUDA error: OS call failed or operation not supported on this OS)" in caplog.text
    assert gpu.calls["unregister"] == 0


def test_what_cannot_be_mapped_is_memory_that_ran_out() -> None:
    with pytest.raises(MemoryError, match=r"no 1,152,921,504,606,846,976 bytes in one piece: Cannot allocate memory"):
        Slab(SlabSizes(buffer=1 << 60))


def test_a_driver_that_is_gone_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gpu: PretendGpu, memory: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: GPU is lost")

    monkeypatch.setattr(PretendGpu, "unregister", fail)
    with pytest.raises(ValueError, match="what went wrong"), open_slab(PretendGpu(), SIZES):
        raise ValueError("what went wrong")


def test_tensors_may_outlive_it() -> None:
    with open_slab(accelerator_of("cpu"), SIZES) as slab:
        x = slab.room(SHAPE, torch.float32).fill_(7)
    del slab
    gc.collect()
    assert x.unique().tolist() == [7]
