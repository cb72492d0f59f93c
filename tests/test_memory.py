"""Memory promised as a number: the peak does not grow with depth."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import psutil
import pytest
import torch

from streamlap.errors import BudgetError
from streamlap.memory import PhaseClock, peak_ram_bytes, require_disk, reset_peak_ram, steady_heap


def test_three_times_the_layers_take_less_than_one_layer_more() -> None:
    """In processes of their own, for compression and for evaluation: 9 layers against 3."""
    path = Path(__file__).parent.parent / "scripts" / "bench_memory.py"
    spec = importlib.util.spec_from_file_location("bench_memory", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rows = [bench.measure(depth, hidden=768, windows=4, threads=1) for depth in (3, 9)]
    for what in ("compress", "evaluate"):
        assert abs(rows[0][what] - rows[1][what]) < bench.layer_bytes(768), rows


def test_the_peak_is_counted_anew_after_a_reset() -> None:
    reset_peak_ram()
    before = peak_ram_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    high = peak_ram_bytes()
    del block
    reset_peak_ram()
    assert high - before > 60 << 20
    assert high - peak_ram_bytes() > 32 << 20


def test_freed_blocks_go_back_to_the_system_between_blocks_that_stay() -> None:
    """Also once a large block has been freed, which is what makes glibc keep such sizes in its heap by default."""
    steady_heap()
    torch.ones(24 << 20, dtype=torch.uint8)
    before = psutil.Process().memory_info().rss
    pairs = [(torch.ones(2 << 20, dtype=torch.uint8), torch.ones(1 << 16, dtype=torch.uint8)) for _ in range(40)]
    kept = [small for _, small in pairs]
    del pairs
    assert len(kept) == 40
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_phases_add_up() -> None:
    clock = PhaseClock()
    for name in ("read", "write", "read"):
        with clock.phase(name):
            pass
    assert set(clock.seconds) == {"read", "write"}


def test_too_little_disk_is_said_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"1,000,000,000,000,000 bytes .* are free"):
        require_disk(tmp_path / "not" / "there", 10**15, "the output")
