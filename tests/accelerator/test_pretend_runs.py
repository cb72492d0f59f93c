"""Whole runs on a GPU that is not there: every copy arrives before it is used, no byte of pinned memory is unaccounted for, and
the result is that of the CPU. The model has the shape of a layer of 70 billion parameters, scaled down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, MakeModel
from outputs import REPORT, contents
from pretend import pretend_gpu

import streamlap
from streamlap.families import stream as families_stream
from streamlap.pipeline import layers, runner
from streamlap.planning import schedule as scheduling
from streamlap.planning.schedule import Fit, make_schedule, peak
from streamlap.system.budget import MemoryBudget

SHAPE_NL = (11, 64)
BATCH = 2
"""Sequences: six batches, the last of one."""
SCALED = {16: (512, 1792, 8, 1), 4: (2048, 7168, 16, 2)}
"""Scale -> hidden size, FFN, heads and key-value heads."""

KINDS: dict[str, dict[str, Any]] = {
    "lorap": {"preset": "lorap"}, "best": {"preset": "best"}, "refined": {"preset": "best", "refine": 1},
}  # fmt: skip
TIERS = ("vram", "ram", "disk")
PINNED = ("staging", "hidden states", "hidden batches")

pytestmark = pytest.mark.usefixtures("small_batches")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families_stream, "BATCH_TOKENS", BATCH * SHAPE_NL[1])


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "windows.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY, SHAPE_NL).astype(np.uint16))
    return path


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def compress(pico: MakeModel, windows: Path) -> Run:
    """compress(out, kind, scale, **options) -> all files but the report."""

    def run(out: Path, kind: str, scale: int, **options: Any) -> dict[str, Any]:
        hidden, inner, heads, kv_heads = SCALED[scale]
        source = pico(
            "llama", dtype=torch.bfloat16, num_hidden_layers=2, hidden_size=hidden, intermediate_size=inner,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
        )  # fmt: skip
        streamlap.compress(source, out, files=(str(windows),), dtype="bfloat16", **KINDS[kind], **options)
        return {name: data for name, data in contents(out).items() if name != REPORT}

    return run


@pytest.fixture(scope="session")
def on_the_cpu(compress: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, Any]]:
    """What a CPU makes of it; equal calls share one run."""
    made: dict[tuple[str, int], dict[str, Any]] = {}

    def run(kind: str, scale: int) -> dict[str, Any]:
        if (kind, scale) not in made:
            made[kind, scale] = compress(tmp_path_factory.mktemp("cpu") / "out", kind, scale)
        return made[kind, scale]

    return run


class Watch:
    """What a run claims."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.claimed: dict[str, int] = {}
        """Name of the budget -> the most that was claimed at one time, beside what the process held."""
        self.fits: list[Fit] = []
        add, start = MemoryBudget._add, runner.start_runner

        def noted_add(budget: MemoryBudget, *args: Any) -> None:
            add(budget, *args)
            self.claimed[budget.name] = max(self.claimed.get(budget.name, 0), budget.used - budget.base)
            assert budget.used <= budget.cap

        def noted_start(stream: Any, choice: Fit, *rest: Any, **options: Any) -> Any:
            self.fits.append(choice)
            return start(stream, choice, *rest, **options)

        patch.setattr(MemoryBudget, "_add", noted_add)
        patch.setattr(layers, "start_runner", noted_start)


@pytest.fixture
def check(
    compress: Run, on_the_cpu: Callable[[str, int], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., None]:  # fmt: skip
    """A run by one schedule, beside what a CPU makes of the same."""

    def run(kind: str, scale: int, tier: str, overlap: bool) -> None:
        whole = on_the_cpu(kind, scale)
        gpu, watch = pretend_gpu(monkeypatch), Watch(monkeypatch)
        monkeypatch.setattr(scheduling, "schedules", lambda work, overlap: [make_schedule(work, overlap, tier, BATCH)])
        assert compress(tmp_path / "out", kind, scale, device="cuda", overlap=overlap, max_vram="40GiB") == whole
        (choice,) = watch.fits
        schedule, layers = choice.schedule, choice.schedule.ram["layers"]
        assert (gpu.most_registered, gpu.registered) == (sum(layers.get(part, 0) for part in PINNED), {})
        assert gpu.calls["register"] == 1, "nothing is pinned inside the loop"
        assert not gpu.pageable, "every copy beside computation is from pinned memory, or to it"
        assert not gpu.faults
        assert "more batches are on their way" not in caplog.text
        assert watch.claimed == {"RAM": peak(schedule.ram), "VRAM": peak(schedule.vram)}
        assert gpu.cap == 40 << 30
        assert gpu.calls["download"] > 0
        assert (gpu.calls["upload"] > 0) == (tier != "vram")

    return run


CASES = [(kind, tier, overlap) for kind in ("lorap", "best") for tier in TIERS for overlap in (True, False)]


@pytest.mark.parametrize(("kind", "tier", "overlap"), [*CASES, ("refined", "ram", True), ("refined", "disk", False)])
def test_a_run_on_a_gpu_gives_the_bytes_of_the_cpu_and_moves_them_in_time(
    check: Callable[..., None], kind: str, tier: str, overlap: bool
) -> None:
    check(kind, 16, tier, overlap)


@pytest.mark.nightly
@pytest.mark.parametrize(("tier", "overlap"), [("vram", True), ("ram", True), ("disk", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_so_does_a_run_of_a_larger_layer(check: Callable[..., None], kind: str, tier: str, overlap: bool) -> None:
    check(kind, 4, tier, overlap)
