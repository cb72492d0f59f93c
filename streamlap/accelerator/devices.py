"""All that is asked of a device beside arithmetic: copies to it and back, its memory, whether it is there.

`Cpu` computes where hidden states and weights are already, so that nothing moves. `Cuda` has memory of its own. A run takes the
one of its device from `KINDS`; another one in its place, with the same methods, sees everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

Room = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Shape, dtype -> host memory for such a tensor."""


def plain_room(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Host memory like any other."""
    return torch.empty(shape, dtype=dtype)


class Landing(Protocol):
    """A copy that is under way. Its source must stay as it is until the copy is there, and its memory does by itself."""

    def wait(self) -> torch.Tensor:
        """The copy, once all of it is there: computation that is queued from now on may read it. May be asked again."""


class Accelerator(Protocol):
    """A device of a run."""

    label: torch.device
    """As settings and plans call it."""
    device: torch.device
    """Where its tensors are."""
    away: bool
    """Whether that is other memory than the host's, so that copies go there and back."""

    def upload(self, x: torch.Tensor) -> Landing:
        """A copy of host memory on the device, begun at once, beside computation."""

    def download(self, x: torch.Tensor, room: Room) -> Landing:
        """A contiguous copy of `x` in host memory, in a `room` where one is needed, begun at once, beside computation."""

    def move(self, x: torch.Tensor) -> torch.Tensor:
        """`x` from host memory on the device, whole; the source may be overwritten. On the host itself it is `x`."""

    def register(self, memory: torch.Tensor) -> None:
        """Have the device copy from and to these bytes of the host by itself. Raises RuntimeError where it cannot."""

    def unregister(self, memory: torch.Tensor) -> None:
        """Wait for every copy, and take that back."""

    def synchronize(self) -> None:
        """Wait for all that was asked of it."""

    def warm_up(self) -> None:
        """Load the device's libraries, which takes host memory by the hundred MiB."""

    def memory(self) -> tuple[int, int]:
        """(bytes given out, bytes that still can be) of the device's own memory; zeros where it has none."""

    def limit(self, cap: int) -> None:
        """Let an allocation beyond `cap` bytes of that memory fail as if the device were full."""

    def select(self) -> None:
        """Make it torch's current device of its kind."""

    def model(self) -> str:
        """What was bought; empty for the host itself."""


class Landed:
    """A copy that had nothing to wait for."""

    def __init__(self, x: torch.Tensor) -> None:
        self._copy = x

    def wait(self) -> torch.Tensor:
        return self._copy


class Cpu:
    """The host itself."""

    away = False

    def __init__(self, device: torch.device) -> None:
        self.label = self.device = device

    @staticmethod
    def count() -> int:
        """How many there are."""
        return 1

    def upload(self, x: torch.Tensor) -> Landing:
        return Landed(x)

    def download(self, x: torch.Tensor, room: Room) -> Landing:
        return Landed(x.cpu().contiguous())

    def move(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def register(self, memory: torch.Tensor) -> None: ...

    def unregister(self, memory: torch.Tensor) -> None: ...

    def synchronize(self) -> None: ...

    def warm_up(self) -> None: ...

    def memory(self) -> tuple[int, int]:
        return 0, 0

    def limit(self, cap: int) -> None: ...

    def select(self) -> None: ...

    def model(self) -> str:
        return ""


class Cuda:
    """A GPU. Copies beside computation have a stream each way."""

    away = True

    def __init__(self, device: torch.device) -> None:
        self.label = self.device = device

    @staticmethod
    def count() -> int:
        """How many there are."""
        return torch.cuda.device_count()

    def upload(self, x: torch.Tensor) -> Landing:
        stream = _stream(self.device, "upload")
        with torch.cuda.stream(stream):
            return CudaCopy(x, x.to(self.device, non_blocking=True), stream.record_event())

    def download(self, x: torch.Tensor, room: Room) -> Landing:
        stream = _stream(self.device, "download")
        copy = room(tuple(x.shape), x.dtype)
        stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still be computing `x`
        with torch.cuda.stream(stream):
            copy.copy_(x, non_blocking=True)
            x.record_stream(stream)
            return CudaCopy(None, copy, stream.record_event())

    def move(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device)

    def register(self, memory: torch.Tensor) -> None:
        code = _runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        torch.cuda.check_error(int(code))

    def unregister(self, memory: torch.Tensor) -> None:
        self.synchronize()
        torch.cuda.check_error(int(_runtime().cudaHostUnregister(memory.data_ptr())))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def warm_up(self) -> None:
        x = torch.eye(64, device=self.device, dtype=torch.float64)
        torch.linalg.eigh(x @ x)
        self.synchronize()

    def memory(self) -> tuple[int, int]:
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        return allocated, int(torch.cuda.mem_get_info(self.device)[0]) + reserved - allocated

    def limit(self, cap: int) -> None:
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), self.device)

    def select(self) -> None:
        torch.cuda.set_device(self.device)

    def model(self) -> str:
        return torch.cuda.get_device_name(self.device)


class CudaCopy:
    """A copy on a stream of its own. The host waits for it: by the time that it is wanted it has long been there.

    Args: source, host memory that is read until then; torch itself looks after the device's.
    """

    def __init__(self, source: torch.Tensor | None, copy: torch.Tensor, event: torch.cuda.Event) -> None:
        self._source, self._copy, self._event = source, copy, event

    def wait(self) -> torch.Tensor:
        self._event.synchronize()
        self._source = None
        if self._copy.is_cuda:  # its memory is the upload stream's, and not to be given away while it is computed on
            self._copy.record_stream(torch.cuda.current_stream(self._copy.device))
        return self._copy


@functools.cache
def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    """One for each device and direction, for the life of the process: torch caches freed blocks by stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _runtime() -> Any:
    """The CUDA runtime's own functions."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


KINDS: dict[str, Any] = {"cpu": Cpu, "cuda": Cuda}
"""Type of a torch.device -> what serves it: called with the device, an Accelerator; `count()`, how many there are."""


def accelerator_of(device: torch.device | str) -> Accelerator:
    found: Accelerator = KINDS[torch.device(device).type](torch.device(device))
    return found
