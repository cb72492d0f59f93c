"""A plan for a machine that is not there goes by that machine's memory and rates, and needs nothing of this one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel

import streamlap
from streamlap.cli.show import describe_plan
from streamlap.errors import RecipeError
from streamlap.planning import machine as machines
from streamlap.planning import preview
from streamlap.planning.figures import Traffic, flops_by_dtype, layer_traffic
from streamlap.planning.forecast import LayerPlan
from streamlap.planning.machine import Rates
from streamlap.planning.plan import SLACK, Plan
from streamlap.planning.schedule import RUNTIME_BYTES, Schedule
from streamlap.planning.sheets import CUDA_CONTEXT_BYTES, CUDA_RAM_BYTES, GPU_EIGEN, SHARE, SYSTEM_BYTES
from streamlap.planning.workload import Workload
from streamlap.system.disk_speed import Disk
from streamlap.system.speed import Speed

GPU = """
ram: 16GiB
disk: {read: 5GB, write: 3GB}
gpu: {memory: 8GiB, pcie: 10GB, bfloat16: 100T, float32: 50T, float64: 2T, eigen: 1T}
"""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is measured, and nothing may touch CUDA."""

    def refuse(*words: Any, **more: Any) -> None:
        raise AssertionError("the plan asks this machine")

    for name in ("known_speed", "known_disk"):
        monkeypatch.setattr(machines, name, refuse)
    for name in ("_lazy_init", "is_available", "device_count", "mem_get_info", "set_device", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, refuse)


@pytest.fixture
def model(pico: MakeModel) -> Path:
    return pico("llama", dtype=torch.bfloat16)


def planned(model: Path, tokens: Path, machine: Any, **options: Any) -> Plan:
    return streamlap.plan(model, files=(str(tokens),), machine=machine, **options)


def written(folder: Path, text: str) -> str:
    path = folder / "machine.yaml"
    path.write_text(text)
    return str(path)


# --- memory --------------------------------------------------------------------------------------------------------------


def test_a_known_gpu_is_planned_for_without_cuda(model: Path, tokens: Path) -> None:
    plan = planned(model, tokens, "rtx-4090")
    assert plan.fits
    assert (plan.dtype, plan.hidden_states) == ("bfloat16", "vram")
    assert plan.machine
    assert (plan.machine.name, plan.machine.device) == ("rtx-4090", "cuda:0")
    assert (plan.fit.ram.cap, plan.fit.vram.cap) == ((64 << 30) - SYSTEM_BYTES, (24 << 30) - CUDA_CONTEXT_BYTES)
    assert plan.fit.ram.base > CUDA_RAM_BYTES + RUNTIME_BYTES, "and this process"
    assert plan.fit.vram.base == RUNTIME_BYTES
    assert RUNTIME_BYTES < plan.peak_vram_bytes < plan.fit.vram.cap


def test_caps_lower_the_memory_of_the_machine_and_raise_none(model: Path, tokens: Path) -> None:
    plan = planned(model, tokens, "rtx-4090", max_ram="8GiB", max_vram="1GiB")
    assert (plan.fit.ram.cap, plan.fit.vram.cap) == (8 << 30, 1 << 30)
    plan = planned(model, tokens, "rtx-4090", max_ram="800GiB", max_vram="800GiB")
    assert (plan.fit.ram.cap, plan.fit.vram.cap) == ((64 << 30) - SYSTEM_BYTES, (24 << 30) - CUDA_CONTEXT_BYTES)


def test_what_fits_turns_with_the_memory_of_the_file(model: Path, tokens: Path, tmp_path: Path) -> None:
    def plan(ram: str) -> Plan:
        return planned(model, tokens, written(tmp_path, GPU.replace("16GiB", ram)))

    assert plan("16GiB").fits
    small = plan("2GiB")
    assert not small.fits, "CUDA alone takes more"
    assert small.advice[0].startswith("1.00 GiB of RAM are there; the leanest way through this model takes 3.")


def test_the_cpu_of_a_gpu_machine_may_be_asked_for(model: Path, tokens: Path) -> None:
    plan = planned(model, tokens, "rtx-4090", device="cpu")
    assert plan.machine
    assert (plan.machine.device, plan.dtype, plan.peak_vram_bytes) == ("cpu", "float32", 0)
    assert plan.fit.ram.base < CUDA_RAM_BYTES
    assert (plan.upload_bytes, plan.download_bytes) == (0, 0)
    assert "pcie" not in plan.machine.to_json()["fastest"]


@pytest.mark.parametrize(
    ("machine", "device", "words"),
    [
        ("epyc-9654", "cuda", "device is 'cuda', and machine epyc-9654 has figures of cpu; use"),
        ("rtx-4090", "cuda:1", "device is 'cuda:1', and machine rtx-4090 has figures of cuda:0 and cpu; use"),
        ("rtx-4090", "tpu", "device is 'tpu'; wanted auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_the_machine_has_not_is_refused(
    model: Path, tokens: Path, machine: str, device: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        planned(model, tokens, machine, device=device)
    assert planned(model, tokens, "rtx-4090", device="cuda").machine


# --- dtypes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", [True, False])
def test_the_machine_says_in_what_its_cpu_computes_and_not_this_one(
    model: Path, tokens: Path, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamlap.families.stream.cpu_has_bfloat16", lambda: here)
    assert planned(model, tokens, "epyc-9654").dtype == "bfloat16"
    assert planned(model, tokens, "rtx-4090", device="cpu").dtype == "float32"


def test_a_dtype_without_a_rate_is_refused_with_those_that_have_one(model: Path, tokens: Path) -> None:
    with pytest.raises(
        RecipeError, match="machine t4 has no rate for bfloat16 on cuda:0; give --dtype float16 or float32"
    ):
        planned(model, tokens, "t4")
    assert planned(model, tokens, "t4", dtype="fp16").dtype == "float16"


# --- seconds -------------------------------------------------------------------------------------------------------------


def test_rates_scale_the_range(model: Path, tokens: Path, tmp_path: Path) -> None:
    """Twice the rates, half the seconds; the upper end is at a share of them, and above that by SLACK."""
    once = planned(model, tokens, written(tmp_path, GPU))
    faster = GPU.replace("5GB", "10GB").replace("3GB", "6GB").replace("pcie: 10GB", "pcie: 20GB")
    for slow, fast in (("100T", "200T"), ("50T", "100T"), ("2T,", "4T,"), ("1T}", "2T}")):
        faster = faster.replace(slow, fast) if slow != "50T" else faster.replace("float32: 50T", "float32: 100T")
    twice = planned(model, tokens, written(tmp_path, faster))
    assert twice.seconds_low == pytest.approx(once.seconds_low / 2)
    assert twice.seconds_high == pytest.approx(once.seconds_high / 2)
    assert once.seconds_high == pytest.approx(SLACK * once.seconds_low / SHARE)
    measured = planned(model, tokens, written(tmp_path, GPU + "share: 1\n"))
    assert measured.seconds_low == once.seconds_low
    assert measured.seconds_high == pytest.approx(SLACK * once.seconds_low)


def test_a_gpu_decomposes_far_below_its_peak(model: Path, tokens: Path) -> None:
    machine = planned(model, tokens, "rtx-4090").machine
    assert machine
    assert machine.fastest.speed.eigh == pytest.approx(GPU_EIGEN[0] * 82.6e12 / 9)
    assert machine.slowest.speed.eigh == pytest.approx(SHARE * 1.29e12 / 9), "less than 2 % of float32"
    a100 = planned(model, tokens, "a100-80gb").machine
    assert a100
    assert a100.slowest.speed.eigh == pytest.approx(GPU_EIGEN[1] * 19.5e12 / 9)


LAYER = LayerPlan(
    index=0, candidates={}, layout={}, place=0, output_bytes=70, copied_bytes=10, edits_bytes=60, source_bytes=100,
    largest_bytes=50, solve_bytes=0, widest=0, flops=1000, flops64=40, flops32=300, decompositions=(2, 3), generations_read=4,
    between_read=1, generations_written=2, generations_spilled=1,
)  # fmt: skip
WORK = Workload(
    device=torch.device("cuda"), staged=0, computed=0, converts=False, width=10, inner=0, inner_after=0, heads=0, itemsize=1,
    sequences=10, length=10,
)  # fmt: skip
"""A generation is 1000 bytes."""


@pytest.mark.parametrize(
    ("tier", "between", "last", "wanted"),
    [
        ("vram", "", False, Traffic(read=110, written=2070, weights_up=100, states_up=0, down=2060)),
        ("ram", "", False, Traffic(read=110, written=2070, weights_up=100, states_up=5000, down=3060)),
        ("disk", "", False, Traffic(read=5110, written=3070, weights_up=100, states_up=5000, down=3060)),
        ("disk", "ram", False, Traffic(read=4110, written=2070, weights_up=100, states_up=5000, down=3060)),
        ("vram", "", True, Traffic(read=110, written=1070, weights_up=100, states_up=0, down=1060)),
        ("disk", "", True, Traffic(read=5110, written=2070, weights_up=100, states_up=5000, down=2060)),
    ],
)
def test_what_goes_over_each_link_depends_on_where_hidden_states_stay(
    tier: str, between: str, last: bool, wanted: Traffic
) -> None:
    schedule = Schedule(overlap=True, tier=tier, micro=1, ram={}, vram={}, between=between)
    assert layer_traffic(LAYER, WORK, schedule, last) == wanted
    here = layer_traffic(LAYER, replace(WORK, device=torch.device("cpu")), schedule, last)
    assert here == Traffic(read=wanted.read, written=wanted.written)


def test_links_count_beside_the_computation_and_alone_where_nothing_overlaps() -> None:
    speed = Speed(matmul=100.0, matmul64=40.0, matmul32=30.0, eigh=7.0, upload=50.0)
    rates = Rates(speed=speed, disk=Disk(read=10.0, write=5.0))
    compute = 1000 / 100 + 40 / 40 + 300 / 30 + (2**3 + 3**3) / 7
    traffic = Traffic(read=10, written=5, weights_up=100, states_up=5000, down=50)
    assert rates.layer_seconds(LAYER, traffic, overlap=True) == 2 + 100
    assert rates.layer_seconds(LAYER, traffic, overlap=False) == 2 + compute + 2 + 100 + 1
    assert rates.layer_seconds(LAYER, replace(traffic, states_up=0), overlap=True) == 2 + compute


def test_operations_go_by_their_dtype() -> None:
    assert flops_by_dtype([LAYER, LAYER], "bfloat16") == {"bfloat16": 2000, "float32": 600, "float64": 80}
    assert flops_by_dtype([LAYER], "float32") == {"float32": 1300, "float64": 40}


# --- what is shown -------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_machine_are_shown(model: Path, tokens: Path) -> None:
    plan = planned(model, tokens, "rtx-4090", ratio=0.4)
    table = json.loads(json.dumps(plan.to_json()))
    machine = table["machine"]
    assert (machine["name"], machine["device"]) == ("rtx-4090", "cuda:0")
    assert machine["source"].startswith("data sheet: ")
    assert (machine["ram_bytes"], machine["vram_bytes"]) == (plan.fit.ram.cap, plan.fit.vram.cap)
    assert machine["fastest"]["compute"] == 165.2e12
    assert machine["slowest"]["disk_read"] == SHARE * 5e9
    assert sum(table["flops_by_dtype"].values()) == table["flops"]
    assert sum(row["count"] for row in table["eigen_problems"]) == sum(
        len(layer.decompositions) for layer in plan.layers
    )
    assert table["upload_bytes"] == plan.first.up + sum(row["upload_bytes"] for row in table["layers"])
    assert table["download_bytes"] == plan.first.down + sum(row["download_bytes"] for row in table["layers"])
    assert table["generation_bytes"] == 32 * 2 * tokens_in(plan)
    assert table["generations_written"] == plan.layers[0].generations_written
    text = "\n".join(describe_plan(plan))
    assert "machine        rtx-4090 (data sheet: " in text
    assert "over PCIe" in text
    rows = ", ".join(f"{row['count']} of size {row['size']}" for row in table["eigen_problems"])
    assert f"eigen-problems {rows}, as in float64" in text
    assert "bfloat16" in text


def tokens_in(plan: Plan) -> int:
    return plan.fit.work.sequences * plan.fit.work.length


def test_this_machine_is_shown_in_the_same_way(model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(
        speed=Speed(matmul=1e9, matmul64=1e9, matmul32=1e9, eigh=1e6, upload=1e9), disk=Disk(read=1e8, write=1e8)
    )
    here = machines.Machine(name="this machine", source="measured", device="cpu", fastest=rates, slowest=rates)
    monkeypatch.setattr(preview, "this_machine", lambda settings, dtype: here)
    table = planned(model, tokens, None, device="cpu").to_json()
    assert (table["machine"]["name"], table["machine"]["source"]) == ("this machine", "measured")
    assert table["machine"].keys() == planned(model, tokens, "epyc-9654").to_json()["machine"].keys()
    assert table["seconds_high"] == pytest.approx(SLACK * table["seconds_low"])
