"""Whole runs on a GPU that is not there: every copy arrives before it is used, no byte of pinned memory is unaccounted for, and
the result is that of the CPU. The model has the shape of a layer of 70 billion parameters, scaled down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from crashes import crash_after
from outputs import REPORT, contents
from picos import VOCABULARY
from pretend import pretend_gpu

import streamlap
from streamlap.errors import BudgetError, RecipeError
from streamlap.families import stream as families_stream
from streamlap.families.layer import StreamLayer
from streamlap.methods.trained.loraprune import LoraPrune
from streamlap.methods.trained.pclora import PcLora
from streamlap.pipeline import layers, runner
from streamlap.planning import schedule as scheduling
from streamlap.planning.figures import layer_traffic
from streamlap.planning.plan import Plan
from streamlap.planning.schedule import Fit, Schedule, make_schedule, peak
from streamlap.system.budget import MemoryBudget

SHAPE_NL = (11, 64)
BATCH = 2
"""Sequences: six batches, the last of one."""
SCALED = {16: (512, 1792, 8, 1), 4: (2048, 7168, 16, 2)}
"""Scale -> hidden size, FFN, heads and key-value heads."""

KINDS: dict[str, dict[str, Any]] = {
    "lorap": {"preset": "lorap"}, "best": {"preset": "best"}, "refined": {"preset": "best", "refine": 1},
    "loraprune": {"methods": (LoraPrune(epochs=1),)}, "pclora": {"methods": (PcLora(epochs=1),)},
    "by gradients": {"methods": (LoraPrune(epochs=1, importance="model"),)},
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
        given = {"dtype": "bfloat16", "redraw": False, **KINDS[kind], **options}
        streamlap.compress(source, out, files=(str(windows),), **given)
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
        self.plans: list[Plan] = []
        add, start, begin = MemoryBudget._add, runner.start_runner, layers.begin

        def noted_add(budget: MemoryBudget, *args: Any) -> None:
            add(budget, *args)
            self.claimed[budget.name] = max(self.claimed.get(budget.name, 0), budget.used - budget.base)
            assert budget.used <= budget.cap

        def noted_start(stream: Any, choice: Fit, *rest: Any, **options: Any) -> Any:
            self.fits.append(choice)
            return start(stream, choice, *rest, **options)

        def noted_begin(job: layers.Job, *rest: Any) -> None:
            self.plans.append(job.plan)
            begin(job, *rest)

        patch.setattr(layers, "begin", noted_begin)
        patch.setattr(MemoryBudget, "_add", noted_add)
        patch.setattr(layers, "start_runner", noted_start)


def planned_bytes(plan: Plan, schedule: Schedule) -> dict[str, int]:
    """What goes to the device and, of hidden states, back: of each layer, and of the generations before the first."""
    work, last = plan.fit.work, plan.layers[-1]
    moved = [layer_traffic(layer, work, schedule, layer is last and not plan.recipe.final) for layer in plan.layers]
    edits = sum(layer.edits_bytes + layer.state_bytes for layer in plan.layers)
    states = {
        "upload": sum(traffic.states_up for traffic in moved),
        "download": sum(traffic.down for traffic in moved) - edits + work.generation * last.generations_written,
    }
    return {
        "move": sum(traffic.weights_up for traffic in moved),
        **{way: count for way, count in states.items() if count},
    }


@pytest.fixture
def check(
    compress: Run, on_the_cpu: Callable[[str, int], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., None]:  # fmt: skip
    """A run by one schedule, beside what a CPU makes of the same."""

    def run(kind: str, scale: int, tier: str, overlap: bool, between: str = "") -> None:
        whole = on_the_cpu(kind, scale)
        gpu, watch = pretend_gpu(monkeypatch), Watch(monkeypatch)
        monkeypatch.setattr(
            scheduling, "schedules", lambda work, overlap: [make_schedule(work, overlap, tier, BATCH, between=between)]
        )
        assert compress(tmp_path / "out", kind, scale, device="cuda", overlap=overlap, max_vram="40GiB") == whole
        (choice,) = watch.fits
        schedule, layers = choice.schedule, choice.schedule.ram["layers"]
        assert (gpu.most_registered, gpu.registered) == (sum(layers.get(part, 0) for part in PINNED), {})
        loops = 4 if kind == "by gradients" else 1  # a sweep forward, the head, a sweep back
        assert gpu.calls["register"] == loops, "nothing is pinned inside the loop"
        assert not gpu.pageable, "every copy beside computation is from pinned memory, or to it"
        assert not gpu.faults
        assert "more batches are on their way" not in caplog.text
        assert watch.claimed == {"RAM": peak(schedule.ram), "VRAM": peak(schedule.vram)}
        assert gpu.cap == 40 << 30
        assert gpu.calls["download"] > 0
        assert (gpu.calls["upload"] > 0) == (tier != "vram")
        if kind in ("lorap", "best"):  # training moves sequences one by one
            (plan,) = watch.plans
            assert gpu.bytes == planned_bytes(plan, schedule), "what is copied is what the plan says"

    return run


TRAINED = [
    ("refined", "ram", True), ("refined", "disk", False), ("loraprune", "disk", False), ("by gradients", "vram", False),
    ("by gradients", "ram", True),
]  # fmt: skip
CASES = [(kind, tier, overlap) for kind in ("lorap", "best") for tier in TIERS for overlap in (True, False)]
SLOW = {
    ("best", "ram", True),
    ("best", "vram", False),
    ("best", "disk", True),
    ("refined", "disk", False),
    *TRAINED[-2:],
}
"""Nightly: each has one beside it that differs in the tier or in what runs beside the loop alone."""


@pytest.mark.parametrize(
    ("kind", "tier", "overlap"),
    [pytest.param(*case, marks=[pytest.mark.nightly] * (case in SLOW)) for case in (*CASES, *TRAINED)],
)
def test_a_run_on_a_gpu_gives_the_bytes_of_the_cpu_and_moves_them_in_time(
    check: Callable[..., None], kind: str, tier: str, overlap: bool
) -> None:
    check(kind, 16, tier, overlap)


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_what_lies_between_sub_layers_may_stay_in_the_slab_while_the_rest_is_on_the_disk(
    check: Callable[..., None], overlap: bool
) -> None:
    check("best", 16, "disk", overlap, between="ram")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "tier", "overlap"),
    [
        ("lorap", "ram", True),
        ("best", "vram", True),
        ("best", "disk", False),
        ("refined", "ram", True),
        ("pclora", "ram", True),
    ],
)
def test_so_does_a_run_of_a_larger_layer(check: Callable[..., None], kind: str, tier: str, overlap: bool) -> None:
    check(kind, 4, tier, overlap)


# --- other ways through --------------------------------------------------------------------------------------------------


@pytest.fixture
def source(pico: MakeModel) -> Path:
    return pico("llama", dtype=torch.bfloat16)


def by(patch: pytest.MonkeyPatch, tier: str, overlap: bool = True) -> None:
    """Every run goes by this schedule."""
    patch.setattr(scheduling, "schedules", lambda work, _: [make_schedule(work, overlap, tier, BATCH)])


@pytest.mark.parametrize("tier", TIERS)
def test_an_evaluation_gives_the_number_of_the_cpu(
    source: Path, windows: Path, tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its head reads hidden states when the loop, and with it the slab, has come to its end."""
    nll = streamlap.evaluate(source, windows, dtype="bfloat16").nll
    gpu = pretend_gpu(monkeypatch)
    by(monkeypatch, tier)
    found = streamlap.evaluate(source, windows, dtype="bfloat16", device="cuda", work=tmp_path)
    assert found.nll == nll
    assert (gpu.faults, gpu.pageable, gpu.registered) == ([], [], {})
    assert bool(gpu.calls["download"]) == (tier != "vram"), "on the device they stay where they are"
    assert not caplog.records


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["lorap", "best"])
def test_a_run_that_died_goes_on_to_the_bytes_of_the_cpu(
    source: Path, windows: Path, tmp_path: Path, tier: str, kind: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {"files": (str(windows),), "dtype": "bfloat16", "preset": kind}
    streamlap.compress(source, tmp_path / "cpu", **settings)
    gpu, out = pretend_gpu(monkeypatch), tmp_path / "out"
    by(monkeypatch, tier)
    with monkeypatch.context() as patch:
        crash_after(1, patch, lambda: streamlap.compress(source, out, device="cuda", **settings))
    streamlap.resume(out)
    cpu, here = ({name: data for name, data in contents(folder).items() if name != REPORT}
                 for folder in (tmp_path / "cpu", out))  # fmt: skip
    assert here == cpu
    assert (gpu.faults, gpu.pageable, gpu.registered) == ([], [], {})
    assert "more batches" not in caplog.text


@pytest.mark.parametrize("tier", TIERS)
def test_a_survey_measures_what_it_does_on_the_cpu(
    source: Path, windows: Path, tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {"files": (str(windows),), "dtype": "bfloat16"}
    streamlap.survey(source, tmp_path / "cpu.json", **settings)
    gpu = pretend_gpu(monkeypatch)
    by(monkeypatch, tier)
    streamlap.survey(source, tmp_path / "gpu.json", device="cuda", **settings)
    tables = [json.loads((tmp_path / name).read_text()) for name in ("cpu.json", "gpu.json")]
    assert tables[0]["layers"] == tables[1]["layers"]
    assert (gpu.faults, gpu.pageable, gpu.registered) == ([], [], {})
    assert "more batches" not in caplog.text


@pytest.mark.parametrize("tier", TIERS)
def test_where_memory_runs_out_in_the_middle_of_a_pass_its_rooms_are_free_again(
    source: Path, windows: Path, tmp_path: Path, tier: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {"files": (str(windows),), "dtype": "bfloat16", "preset": "lorap"}
    streamlap.compress(source, tmp_path / "cpu", **settings)
    pretend_gpu(monkeypatch)
    by(monkeypatch, tier)
    forward, calls = StreamLayer.__call__, Counter[str]()

    def starved(layer: StreamLayer, x_BLD: torch.Tensor) -> torch.Tensor:
        calls[layer.prefix] += 1
        if calls[layer.prefix] == 4:  # in the middle of the capture
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(layer, x_BLD)

    monkeypatch.setattr(StreamLayer, "__call__", starved)
    report = streamlap.compress(source, tmp_path / "out", device="cuda", **settings)
    assert report.to_json()["ladder"]
    shards = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("cpu", "out")
    ]
    assert shards[0] == shards[1]
    assert "more batches" not in caplog.text


def test_a_solve_that_does_not_fit_the_gpu_goes_on_on_the_cpu(
    source: Path, windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"files": (str(windows),), "dtype": "bfloat16", "preset": "lorap"}
    pretend_gpu(monkeypatch)
    eigh, seen = torch.linalg.eigh, Counter[str]()

    def starved(*args: Any, **options: Any) -> Any:
        seen["eigh"] += 1
        if seen["eigh"] <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return eigh(*args, **options)

    monkeypatch.setattr(torch.linalg, "eigh", starved)
    report = streamlap.compress(source, tmp_path / "out", device="cuda", **settings)
    assert report.to_json()["ladder"] == ["layer 0, solve: caches freed", "layer 0, solve: solve on the CPU"]


def test_where_nothing_can_be_pinned_a_run_is_as_right(
    source: Path, windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"files": (str(windows),), "dtype": "bfloat16", "preset": "best"}
    streamlap.compress(source, tmp_path / "cpu", **settings)
    gpu = pretend_gpu(monkeypatch)

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(gpu, "register", refuse)
    by(monkeypatch, "disk")
    streamlap.compress(source, tmp_path / "out", device="cuda", **settings)
    # Once where windows are drawn anew, and once in the loop.
    assert caplog.text.count("cannot be pinned (CUDA error: invalid argument)") == 2
    shards = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("cpu", "out")
    ]
    assert shards[0] == shards[1]
    assert gpu.faults == []


def test_a_gpu_that_is_there_is_taken_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = pretend_gpu(monkeypatch)
    assert streamlap.RunSettings(device="auto").settled().device == "cuda:0"
    assert gpu.calls["select"] == 1
    with pytest.raises(RecipeError, match=r"device is 'cuda:1', and torch sees 1 CUDA devices; use --device cpu"):
        streamlap.RunSettings(device="cuda:1").settled()


def test_the_richest_schedule_inside_both_caps_is_taken_of_what_the_gpu_has(
    source: Path, windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"files": (str(windows),), "dtype": "bfloat16", "preset": "lorap"}
    roomy, watch = pretend_gpu(monkeypatch), Watch(monkeypatch)
    streamlap.compress(source, tmp_path / "roomy", device="cuda", **settings)
    wanted = watch.fits[0].peak_vram
    assert (watch.fits[0].schedule.tier, roomy.cap) == ("vram", 1 << 40)
    pretend_gpu(monkeypatch, wanted - 1)
    streamlap.compress(source, tmp_path / "less", device="cuda", **settings)
    assert watch.fits[1].schedule.tier == "ram"
    with pytest.raises(BudgetError, match=r"--max-vram is 1\.0 MiB; the leanest way through this model takes"):
        streamlap.compress(source, tmp_path / "none", device="cuda", max_vram="1MiB", **settings)
