"""A GPU that is not there: its tensors are in the memory of the host, and it works as late as a real one may.

    gpu = pretend_gpu(patch)
    streamlap.compress(model, out, device="cuda", ...)

A copy beside computation is made when somebody waits for it; until then its target is NaN in every dtype. Where the source was
changed in the meantime the copy is a fault, and the wait fails. What was asked of the device stands in `calls` and `bytes`.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter

import pytest
import torch

from streamlap.accelerator import devices
from streamlap.accelerator.devices import Room


class Flight:
    """A copy under way."""

    def __init__(self, gpu: PretendGpu, way: str, source: torch.Tensor, target: torch.Tensor) -> None:
        self._gpu, self._way, self._target = gpu, way, target
        self._source: torch.Tensor | None = source
        self._before = numbers(source).clone()
        numbers(target).fill_(255)

    def wait(self) -> torch.Tensor:
        with self._gpu.lock:
            if self._source is not None:
                if not torch.equal(numbers(self._source), self._before):
                    self._gpu.faults.append(f"{self._way}: {tuple(self._source.shape)} overwritten in flight")
                    raise AssertionError(self._gpu.faults[-1])
                self._target.copy_(self._source)
                self._source = None
        return self._target


class PretendGpu:
    """An `Accelerator` of `total` bytes."""

    label, device, away = torch.device("cuda", 0), torch.device("cpu"), True

    def __init__(self, total: int = 1 << 40) -> None:
        self.total = total
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.pageable: list[str] = []
        """Copies beside computation whose end on the host is not registered."""
        self.registered: dict[int, int] = {}
        """Address -> bytes."""
        self.most_registered = 0
        self.cap: int | None = None
        self.lock = threading.RLock()
        self._flights: weakref.WeakSet[Flight] = weakref.WeakSet()

    def __call__(self, device: torch.device) -> PretendGpu:
        assert device.type == "cuda"
        return self

    def count(self) -> int:
        return 1

    def upload(self, x: torch.Tensor) -> Flight:
        return self._fly("upload", x, torch.empty_like(x), host=x)

    def download(self, x: torch.Tensor, room: Room) -> Flight:
        target = room(tuple(x.shape), x.dtype)
        return self._fly("download", x, target, host=target)

    def _fly(self, way: str, source: torch.Tensor, target: torch.Tensor, host: torch.Tensor) -> Flight:
        with self.lock:
            self.calls[way] += 1
            self.bytes[way] += host.nbytes
            if not self.is_registered(host):
                self.pageable.append(f"{way}: {tuple(host.shape)}")
            flight = Flight(self, way, source, target)
            self._flights.add(flight)
            return flight

    def move(self, x: torch.Tensor) -> torch.Tensor:
        self.calls["move"] += 1
        self.bytes["move"] += x.nbytes
        return x.clone()

    def is_registered(self, x: torch.Tensor) -> bool:
        begin, end = x.data_ptr(), x.data_ptr() + x.nbytes
        return any(first <= begin and end <= first + count for first, count in self.registered.items())

    def register(self, memory: torch.Tensor) -> None:
        self.calls["register"] += 1
        assert memory.data_ptr() % 4096 == memory.nbytes % 4096 == 0, "drivers register whole pages"
        self.registered[memory.data_ptr()] = memory.nbytes
        self.most_registered = max(self.most_registered, sum(self.registered.values()))

    def unregister(self, memory: torch.Tensor) -> None:
        self.synchronize()
        self.calls["unregister"] += 1
        del self.registered[memory.data_ptr()]

    def synchronize(self) -> None:
        for flight in list(self._flights):
            flight.wait()

    def warm_up(self) -> None:
        self.calls["warm up"] += 1

    def memory(self) -> tuple[int, int]:
        return 0, self.total

    def limit(self, cap: int) -> None:
        self.cap = cap

    def select(self) -> None:
        self.calls["select"] += 1

    def model(self) -> str:
        return "Pretend"


def numbers(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor; of one that is not contiguous, a copy's."""
    return x.detach().contiguous().view(torch.uint8)


def pretend_gpu(patch: pytest.MonkeyPatch, total: int = 1 << 40) -> PretendGpu:
    """The device that is called cuda until `patch` is undone."""
    gpu = PretendGpu(total)
    patch.setitem(devices.KINDS, "cuda", gpu)
    return gpu
