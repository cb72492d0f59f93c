"""The GPU memory of this process, for its meters. A process that has not begun to use a GPU is not made to."""

from __future__ import annotations

import torch


def in_use() -> bool:
    """Whether this process has begun to use a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def allocated() -> int:
    """Bytes that torch has given out."""
    return torch.cuda.memory_allocated() if in_use() else 0


def peak() -> int:
    """Most bytes that torch had given out at one time since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if in_use() else 0


def reset_peak() -> None:
    if in_use():
        torch.cuda.reset_peak_memory_stats()


def release_cached() -> None:
    """Give back to the driver what torch keeps though it was freed."""
    if in_use():
        torch.cuda.empty_cache()
