"""What the accelerators ask of torch: a CPU nothing, a GPU what its streams need, in this order."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest
import torch

from streamlap.accelerator import devices
from streamlap.accelerator.devices import Cpu, Cuda, accelerator_of, plain_room

GPU = torch.device("cuda", 1)


class Array:
    """A tensor, as far as a copy is concerned, that says what happens to it."""

    def __init__(self, events: list[str], name: str, is_cuda: bool) -> None:
        self.events, self.name, self.is_cuda, self.device = events, name, is_cuda, GPU
        self.shape, self.dtype = torch.Size((2, 3)), torch.float32

    def to(self, device: torch.device, non_blocking: bool = False) -> Array:
        self.events.append(f"copy {self.name} to {device}{' beside' * non_blocking}")
        return Array(self.events, f"{self.name} there", is_cuda=True)

    def copy_(self, x: Array, non_blocking: bool) -> None:
        self.events.append(f"copy {x.name} to {self.name}{' beside' * non_blocking}")

    def record_stream(self, stream: Stream) -> None:
        self.events.append(f"{self.name} is in use on {stream.name}")


class Stream:
    """Also the context in which it is the current one, and its own event."""

    def __init__(self, events: list[str], name: str) -> None:
        self.events, self.name = events, name

    def __enter__(self) -> None:
        self.events.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.events.append(f"off {self.name}")

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> Stream:
        self.events.append(f"event on {self.name}")
        return self

    def synchronize(self) -> None:
        self.events.append(f"host waits for {self.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of streams and tensors."""
    events: list[str] = []
    monkeypatch.setattr(devices, "_stream", lambda device, direction: Stream(events, direction))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(events, "compute"))
    return events


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.cuda with the signatures that it has, and no GPU behind them."""
    cuda = create_autospec(torch.cuda)
    monkeypatch.setattr(torch, "cuda", cuda)
    return cuda


def test_an_upload_goes_by_a_stream_of_its_own_and_its_memory_is_kept_for_the_computation(events: list[str]) -> None:
    x: Any = Array(events, "x", is_cuda=False)
    landing = Cuda(GPU).upload(x)
    assert events == ["on upload", "copy x to cuda:1 beside", "event on upload", "off upload"]
    assert landing._source is x, "it is read until the copy is there"  # type: ignore[attr-defined]
    events.clear()
    landing.wait()
    assert events == ["host waits for upload", "x there is in use on compute"]
    assert landing._source is None  # type: ignore[attr-defined]


def test_a_download_waits_for_the_computation_and_keeps_the_memory_that_it_reads(events: list[str]) -> None:
    x: Any = Array(events, "x", is_cuda=True)
    room: Any = lambda shape, dtype: Array(events, f"room {shape}", is_cuda=False)  # noqa: E731
    landing = Cuda(GPU).download(x, room)
    assert events == [
        "download waits for compute", "on download", "copy x to room (2, 3) beside", "x is in use on download",
        "event on download", "off download",
    ]  # fmt: skip
    events.clear()
    assert landing.wait().name == "room (2, 3)"  # type: ignore[attr-defined]
    assert events == ["host waits for download"]


def test_what_is_moved_is_there_at_once(events: list[str]) -> None:
    x: Any = Array(events, "x", is_cuda=False)
    Cuda(GPU).move(x)
    assert events == ["copy x to cuda:1"]


def test_memory_is_registered_by_its_address_and_size_and_a_refusal_is_an_error(cuda: Any) -> None:
    memory = torch.empty(8192, dtype=torch.uint8)
    runtime = cuda.cudart.return_value = MagicMock()
    runtime.cudaHostRegister.return_value = 0
    runtime.cudaHostUnregister.return_value = 0
    accelerator = Cuda(GPU)
    accelerator.register(memory)
    runtime.cudaHostRegister.assert_called_once_with(memory.data_ptr(), 8192, 0)
    accelerator.unregister(memory)
    cuda.synchronize.assert_called_once_with(GPU)
    runtime.cudaHostUnregister.assert_called_once_with(memory.data_ptr())
    cuda.check_error.side_effect = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        accelerator.register(memory)


def test_free_memory_is_what_the_driver_has_and_what_torch_keeps(cuda: Any) -> None:
    cuda.memory_allocated.return_value, cuda.memory_reserved.return_value = 10, 30
    cuda.mem_get_info.return_value = (100, 1000)
    assert Cuda(GPU).memory() == (10, 120)


@pytest.mark.parametrize(("cap", "share"), [(250, 0.25), (5000, 1.0)])
def test_a_cap_is_a_share_of_the_whole(cuda: Any, cap: int, share: float) -> None:
    cuda.get_device_properties.return_value.total_memory = 1000
    Cuda(GPU).limit(cap)
    cuda.set_per_process_memory_fraction.assert_called_once_with(share, GPU)


def test_a_gpu_has_a_number_a_model_and_a_turn(cuda: Any) -> None:
    cuda.device_count.return_value, cuda.get_device_name.return_value = 3, "H200"
    accelerator = accelerator_of("cuda:1")
    accelerator.select()
    cuda.set_device.assert_called_once_with(GPU)
    assert (Cuda.count(), accelerator.model(), accelerator.label, accelerator.away) == (3, "H200", GPU, True)


def test_on_the_host_nothing_is_copied_but_what_is_not_contiguous() -> None:
    here, x = accelerator_of("cpu"), torch.arange(6.0).view(2, 3)
    assert isinstance(here, Cpu)
    assert here.upload(x).wait() is here.move(x) is x
    assert here.download(x, plain_room).wait() is x
    turned = here.download(x.T, plain_room).wait()
    assert turned.is_contiguous()
    assert torch.equal(turned, x.T)
    assert (here.memory(), here.model(), here.away) == ((0, 0), "", False)
