"""The heap of the process (glibc): memory goes back when it is freed, or stays for the next tensor where a run has room for it.

On other systems nothing here does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES, _MMAP_BYTES = 1 << 17, 1 << 20
_MOST_BYTES = (1 << 31) - 1
_SLACK_BYTES = 32 << 20


class _Heap(ctypes.Structure):
    """What mallinfo2 gives back."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def _libc() -> ctypes.CDLL | None:
    """The C library, where it tells what its heap holds, and lets blocks of any size stay in it."""
    with contextlib.suppress(OSError, AttributeError, TypeError, ValueError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        libc.mallinfo2.restype = _Heap
        if tuple(map(int, libc.gnu_get_libc_version().decode().split(".")[:2])) >= (2, 35):
            return libc
    return None


_LIBC = _libc()
CAN_KEEP = _LIBC is not None
"""Whether `KeptHeap` keeps anything here."""


def steady_heap() -> None:
    """Have every block of a MiB or more mapped on its own, so that freeing it gives its memory back at once.

    By default glibc raises that limit to 32 MiB as blocks are freed; the tensors of one layer after another then come
    from a heap with ever other holes, and the peak of a long run creeps up by whole layers. Memory that is mapped anew comes
    page by page, which can take as long as what is computed in it; so torch shall ask for huge pages. It looks at that wish
    when it first needs that much memory.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    trim_heap()  # of what a run before this one has left


class KeptHeap:
    """While it is entered, memory that is freed stays for what comes next: a layer goes through many times what it holds, and
    even huge pages take time to come. Once the block ends, or where `trim` finds more than `limit` bytes, it goes back.

    With a limit of 0 nothing is kept. Two must not be entered at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit if CAN_KEEP else 0
        self._before = self._other = 0

    def __enter__(self) -> KeptHeap:
        self._before, self._other = private_bytes(), unused_bytes()
        if _LIBC is not None and self.limit:
            _LIBC.mallopt(_M_MMAP_THRESHOLD, _MOST_BYTES)
            _LIBC.mallopt(_M_TRIM_THRESHOLD, _MOST_BYTES)
        return self

    def __exit__(self, *error: object) -> None:
        if _LIBC is not None and self.limit:
            _LIBC.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
            _LIBC.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
            trim_heap()

    @property
    def freed(self) -> int:
        """Bytes that are kept now."""
        return max(0, unused_bytes() - self._other)

    def trim(self) -> None:
        """Also where nothing is kept: new blocks go into holes that an earlier `KeptHeap` has left, and stay there."""
        most = max(self.limit, _SLACK_BYTES)
        # No more is kept than the process has grown by. That is quick to tell; what is free takes a walk through all of it.
        if private_bytes() - self._before > most and self.freed > most:
            trim_heap()


def trim_heap() -> None:
    """Give back to the system what was freed."""
    if _LIBC is not None:
        _LIBC.malloc_trim(0)


def private_bytes() -> int:
    """Memory of this process that it shares with no file, in blocks of the heap or not; 0 where `unused_bytes` is."""
    if _LIBC is None:
        return 0
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def unused_bytes() -> int:
    """Memory of this process that is in no block of the heap: what was freed, and what never was the heap's."""
    if _LIBC is None:
        return 0
    heap = _LIBC.mallinfo2()
    return max(0, private_bytes() - int(heap.uordblks + heap.hblkhd))
