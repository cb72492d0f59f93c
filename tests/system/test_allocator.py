"""The heap of the process: what is freed goes back, or stays where it may."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from streamlap.system import allocator
from streamlap.system.allocator import CAN_KEEP, KeptHeap

STEADY = """
import psutil, torch
from streamlap.system.allocator import steady_heap

steady_heap()
torch.ones(24 << 20, dtype=torch.uint8)
before = psutil.Process().memory_info().rss
pairs = [(torch.ones(2 << 20, dtype=torch.uint8), torch.ones(1 << 16, dtype=torch.uint8)) for _ in range(40)]
kept = [small for _, small in pairs]
del pairs
print(psutil.Process().memory_info().rss - before >> 20)
"""


def test_freed_blocks_go_back_to_the_system_between_blocks_that_stay() -> None:
    """Also once a large block has been freed, which is what makes glibc keep such sizes in its heap by default."""
    found = subprocess.run([sys.executable, "-c", STEADY], capture_output=True, text=True, check=True, timeout=120)
    assert int(found.stdout) < 16


def test_nobody_walks_through_a_heap_that_has_not_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk through one with many holes takes milliseconds, and a run asks before every step."""
    walks: list[int] = []
    with KeptHeap(0) as heap:
        monkeypatch.setattr(allocator, "unused_bytes", lambda: walks.append(1) or 0)
        heap.trim()
        assert not walks
        grown = allocator.private_bytes() + (1 << 30)
        monkeypatch.setattr(allocator, "private_bytes", lambda: grown)
        heap.trim()
        assert walks == ([1] if CAN_KEEP else [])


KEEPING = """
import psutil, torch
from streamlap.system.allocator import CAN_KEEP, KeptHeap, steady_heap

def make():
    for _ in range(3):
        torch.ones(64 << 20, dtype=torch.uint8)

rss = lambda: psutil.Process().memory_info().rss
steady_heap()
make()
steady_heap()  # what the imports have freed has gone by now
before = rss()
rows = {}
with KeptHeap(0) as heap:
    make()
    rows["nothing kept"] = rss() - before
with KeptHeap(32 << 20) as heap:
    held = torch.ones(40 << 20, dtype=torch.uint8)
    heap.trim()
    rows["held"] = rss() - before
    rows["held is not freed"] = heap.freed
    del held
    make()
    rows["kept"] = rss() - before
    rows["freed"] = heap.freed
    heap.limit = 256 << 20  # more than all that was made, wherever in the heap the second tensor came to lie
    heap.trim()
    rows["below the limit"] = rss() - before
    heap.limit = 32 << 20
    heap.trim()
    rows["above it"] = rss() - before
    make()
    rows["again"] = rss() - before
rows["after"] = rss() - before
make()
rows["steady again"] = rss() - before
with KeptHeap(32 << 20):
    large = torch.ones(128 << 20, dtype=torch.uint8)
    small = [torch.ones(1 << 19, dtype=torch.uint8) for _ in range(16)]  # above it, so that its place stays in the heap
    del large
before = rss()
with KeptHeap(0) as heap:
    make()
    rows["in a hole"] = rss() - before
    heap.trim()
    rows["in a hole, trimmed"] = rss() - before
print({name: count >> 20 for name, count in rows.items()})
"""


def test_freed_memory_stays_where_it_may_and_goes_when_it_is_too_much() -> None:
    if not CAN_KEEP:
        pytest.skip("the C library here keeps nothing")
    found = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True, timeout=120)
    rows = ast.literal_eval(found.stdout)
    for name in ("kept", "freed", "below the limit", "again", "in a hole"):
        assert rows[name] >= 60, (name, rows)
    assert 36 <= rows["held"] < 60, rows
    for name in ("nothing kept", "held is not freed", "above it", "after", "steady again", "in a hole, trimmed"):
        assert rows[name] < 24, (name, rows)


SHAPES = """
import psutil, streamlap, torch

rss = lambda: psutil.Process().memory_info().rss
x = torch.ones(256, 512)

def products(widths):
    for width in widths:
        torch.nn.functional.linear(x, torch.ones(width, 512))
        torch.nn.functional.linear(x.bfloat16(), torch.ones(width, 512, dtype=torch.bfloat16))

products(range(64, 128))
before = rss()
products(range(128, 384))
print(rss() - before >> 20)
"""


def test_products_of_ever_other_shapes_leave_little_behind() -> None:
    """As where a survey gives every layer its own widths. By default it can be 200 MiB."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    command = [sys.executable, "-c", SHAPES]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert int(found.stdout) < 64
