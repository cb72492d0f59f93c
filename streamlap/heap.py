"""The heap of the process (glibc): memory goes back when it is freed, or stays for the next tensor where a run has room for it.

On other systems nothing here does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES, _MMAP_BYTES = 1 << 17, 1 << 20
_MOST_BYTES = (1 << 31) - 1


class _Heap(ctypes.Structure):
    """What mallinfo2 gives back."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def _libc() -> ctypes.CDLL | None:
    """The C library, where it can tell what its heap holds."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _Heap
        return libc
    return None


_LIBC = _libc()
CAN_KEEP = _LIBC is not None
"""Whether `kept_heap` keeps anything here."""


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


@contextlib.contextmanager
def kept_heap(limit: int) -> Iterator[None]:
    """While the block lasts, memory that is freed stays for what comes next: a layer goes through many times what it holds,
    and even huge pages take time to come. It stays below `limit` bytes where `trim_heap` is called now and then; 0 keeps
    nothing. Blocks must not nest."""
    if _LIBC is None or not limit:
        yield
        return
    _LIBC.mallopt(_M_MMAP_THRESHOLD, _MOST_BYTES)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, _MOST_BYTES)
    try:
        yield
    finally:
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        _LIBC.malloc_trim(0)


def trim_heap(limit: int) -> None:
    """Give back to the system what was freed, where that is more than `limit` bytes."""
    if _LIBC is not None and freed_bytes() > limit:
        _LIBC.malloc_trim(0)


def freed_bytes() -> int:
    """Memory of this process that nobody uses; what no tensor is made of, as Python's own, counts too."""
    if _LIBC is None:
        return 0
    memory, heap = psutil.Process().memory_info(), _LIBC.mallinfo2()
    return max(0, int(memory.rss - memory.shared - heap.uordblks - heap.hblkhd))
