"""What a process has taken and for how long; and that its peak does not grow with the depth of the model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from streamlap.system.meters import PhaseClock, peak_ram_bytes, reset_peaks


@pytest.mark.nightly
def test_three_times_the_layers_take_less_than_one_layer_more() -> None:
    """In processes of their own, for compression and for evaluation: 9 layers against 3."""
    path = Path(__file__).parents[2] / "scripts" / "bench_memory.py"
    spec = importlib.util.spec_from_file_location("bench_memory", path)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rows = [bench.measure(depth, hidden=768, windows=4, threads=1, preset="lorap") for depth in (3, 9)]
    for what in ("compress", "evaluate"):
        assert abs(rows[0][what] - rows[1][what]) < bench.layer_bytes(768), rows


def test_the_peak_is_counted_anew_after_a_reset() -> None:
    reset_peaks()
    before = peak_ram_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    high = peak_ram_bytes()
    del block
    reset_peaks()
    assert high - before > 60 << 20
    assert high - peak_ram_bytes() > 32 << 20


def test_phases_add_up() -> None:
    clock = PhaseClock()
    for name in ("read", "write", "read"):
        with clock.phase(name):
            pass
    assert set(clock.seconds) == {"read", "write"}
