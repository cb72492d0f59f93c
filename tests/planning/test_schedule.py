"""Memory by arithmetic: what each schedule holds, which one is taken under a cap, and what is said where none fits."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file

from streamlap.errors import BudgetError
from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.planning import schedule as scheduling
from streamlap.planning.schedule import (
    RUNTIME_BYTES,
    Memory,
    fit,
    least_cap,
    make_schedule,
    peak,
    require_fit,
    schedules,
    slab_sizes,
)
from streamlap.planning.workload import Workload, evaluation_workload, layer_workload
from streamlap.settings import Caps
from streamlap.store.source import CHUNK_BYTES
from streamlap.system.budget import parse_size

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HELD = 200 << 20
BASE = HELD + RUNTIME_BYTES

WORK = Workload(
    device=CPU, staged=1000, computed=2000, converts=False, width=8, inner=24, inner_after=20, heads=8, itemsize=2,
    sequences=100, length=1024, edits=300, solve=700, copied=50,
)  # fmt: skip
"""4 sequences a batch. A batch of hidden states takes 65,536 bytes, all of them 1,638,400; a forward 176 bytes a token, in the
FFN, and 152 after the edits."""

FULL, GENERATION, PAGE = 65536, 1638400, 4096
FORWARD, AFTER = 4096 * 176, 4096 * 152


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds that much."""
    monkeypatch.setattr(scheduling, "ram_bytes", lambda: HELD)
    monkeypatch.setattr(scheduling, "warm_up", lambda device: None)
    monkeypatch.setattr(scheduling, "vram_state", lambda device: (0, 1 << 40))


# --- what is held --------------------------------------------------------------------------------------------------------


def test_the_peak_is_the_largest_moment() -> None:
    phases: dict[str, dict[str, int]] = {
        "layers": {"staging": 10, "bank": 5}, "capture": {"activations": 3}, "solve": {"solve": 7},
        "propagate": {"edits": 2, "activations": 4},
    }  # fmt: skip
    assert peak(phases) == 15 + 7
    assert peak(phases | {"propagate": {"edits": 6, "activations": 4}}) == 15 + 10
    assert peak(phases | {"head": {"head": 21}}) == 22, "the head comes when the layers are gone"
    assert peak(phases | {"head": {"head": 23}}) == 23
    assert peak({"layers": {"staging": 10}}) == 10


BY_HAND = {
    "in RAM": ((True, "ram", 4), 2 * 1000 + GENERATION + FORWARD + 300),
    "on the disk": ((True, "disk", 4), 2 * 1000 + (2 + 3) * FULL + FORWARD + 300),
    "one sequence": ((True, "disk", 1), 2 * 1000 + (2 + 3) * FULL + FORWARD // 4 + 300),
    "in turn, in RAM": ((False, "ram", 4), 1000 + GENERATION + FORWARD),
    "in turn, on the disk": ((False, "disk", 4), 1000 + 3 * FULL + FORWARD),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_schedule_on_a_cpu_by_hand(case: str) -> None:
    choices, wanted = BY_HAND[case]
    assert peak(make_schedule(WORK, *choices).ram) == wanted
    assert make_schedule(WORK, *choices).vram == {}


def test_whatever_a_phase_takes_counts_where_it_is_the_most() -> None:
    one = (False, "disk", 1)
    layers = 1000 + 3 * FULL
    assert peak(make_schedule(replace(WORK, solve=500_000), *one).ram) == layers + 500_000
    edited = replace(WORK, edits=40_000)
    assert peak(make_schedule(edited, *one).ram) == layers + 40_000 + AFTER // 4 + 50
    assert peak(make_schedule(replace(edited, copied=9_000), *one).ram) == layers + 40_000 + AFTER // 4 + 9_000
    assert peak(make_schedule(replace(edited, copied=0), *one).ram) == layers + 40_000 + AFTER // 4
    assert peak(make_schedule(replace(WORK, head=10**6), *one).ram) == 10**6 + 3 * FULL
    kept = make_schedule(replace(WORK, head=10**6), True, "ram", 4)
    assert peak(kept.ram) == 2 * 1000 + GENERATION + max(FORWARD + 300, 10**6 - 2 * 1000), (
        "what is kept stays to the end"
    )


def test_a_layer_that_is_converted_is_held_twice_and_needs_one_buffer() -> None:
    ram = make_schedule(replace(WORK, converts=True), True, "disk", 1).ram
    assert ram["layers"] == {"staging": 1000, "layer": 2000, "hidden batches": 5 * FULL}


def test_a_schedule_on_a_gpu_by_hand() -> None:
    work = replace(WORK, device=CUDA)
    in_vram = make_schedule(work, True, "vram", 4)
    assert peak(in_vram.vram) == 2000 + 4 * FULL + GENERATION + FORWARD + 300
    assert peak(in_vram.ram) == PAGE + 3 * FULL + CHUNK_BYTES, "in whole pages"
    in_ram = make_schedule(work, True, "ram", 4)
    assert peak(in_ram.vram) == 2000 + 4 * FULL + FORWARD + 300
    assert peak(in_ram.ram) == PAGE + GENERATION + FULL + CHUNK_BYTES
    on_disk = make_schedule(work, True, "disk", 4)
    assert peak(on_disk.ram) == PAGE + (2 + 1 + 2) * FULL + CHUNK_BYTES
    assert peak(make_schedule(replace(work, streams=4), True, "disk", 4).ram) == peak(on_disk.ram) + 2 * FULL
    converted = make_schedule(replace(work, converts=True), False, "disk", 4)
    assert peak(converted.vram) == 2000 + 1000 + 4 * FULL + FORWARD
    assert peak(converted.ram) == PAGE + 2 * FULL + CHUNK_BYTES


def test_while_the_head_of_an_evaluation_is_in_use_host_memory_for_the_gpu_stays() -> None:
    """It is one piece; and the states that the head reads are where they were."""
    work = replace(WORK, device=CUDA, head=10**8, head_stored=10**9)
    on_disk, in_ram, in_vram = (make_schedule(work, False, tier, 4) for tier in ("disk", "ram", "vram"))
    assert peak(on_disk.ram) == 10**9 + PAGE + 2 * FULL
    assert peak(in_ram.ram) == 10**9 + PAGE + FULL + GENERATION
    assert peak(in_vram.ram) == 10**9 + PAGE + FULL
    assert (peak(on_disk.vram), peak(in_vram.vram)) == (10**8, 10**8 + GENERATION)


@pytest.mark.parametrize("tier", ["vram", "ram", "disk"])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_slab_is_what_the_schedule_claims_for_it_to_the_byte(overlap: bool, tier: str) -> None:
    """With batches that end inside a page."""
    for streams, sequences in ((1, 100), (4, 100), (4, 3)):
        work = replace(WORK, device=CUDA, width=7, streams=streams, sequences=sequences)
        schedule = make_schedule(work, overlap, tier, 4)
        assert slab_sizes(work, schedule).total == sum(schedule.ram["layers"].values())


@pytest.mark.parametrize(("heads", "width", "each"), [(8, 8, 176), (40, 8, 6 * 40 * 2 + 3 * 8 * 2), (8, 64, 64 * 12)])
def test_the_widest_of_ffn_attention_and_norm_decides(heads: int, width: int, each: int) -> None:
    work = replace(WORK, heads=heads, width=width)
    assert work.activations(3, work.inner) == max(3 * 1024 * each, 3 * 1024 * (144 + 4 * width))


def test_fewer_sequences_than_a_batch_take_no_more_than_there_are() -> None:
    few = replace(WORK, sequences=2)
    assert (few.generation, few.batch(4)) == (2 * FULL // 4, 2 * FULL // 4)
    assert few.activations(4, 24) == few.activations(2, 24) == FORWARD // 2


# --- which one is taken --------------------------------------------------------------------------------------------------


def workloads() -> list[Workload]:
    grid = itertools.product((CPU, CUDA), (8, 20, 1000), (1024, 5000), (False, True), (10**3, 10**8))
    return [
        replace(
            WORK, device=device, sequences=count, length=length, converts=converts, staged=layer, computed=2 * layer
        )
        for device, count, length, converts, layer in grid
    ]


@pytest.mark.parametrize("overlap", [True, False])
def test_no_schedule_is_leaner_than_the_last(overlap: bool) -> None:
    """From two batches on; less than that takes less in RAM than on its way to a disk and back."""
    for work in workloads():
        peaks = [peak(choice.vram if work.device == CUDA else choice.ram) for choice in schedules(work, overlap)]
        assert peaks[-1] == min(peaks), work


@pytest.mark.parametrize("overlap", [True, False])
def test_each_schedule_takes_no_more_than_the_one_before(overlap: bool) -> None:
    """Where there is more than a handful of batches, without which there is nothing to keep on a disk."""
    work = replace(WORK, sequences=1000, length=64)
    for device in (CPU, CUDA):
        rows = list(schedules(replace(work, device=device), overlap))
        assert [row.tier for row in rows] == ["vram"] * (device == CUDA) + ["ram"] + ["disk"] * (7 + overlap)
        assert [row.micro for row in rows[-7:]] == [64, 32, 16, 8, 4, 2, 1]
        peaks = [peak(row.vram if device == CUDA else row.ram) for row in rows]
        assert all(one >= other for one, other in itertools.pairwise(peaks))
        assert len(set(peaks)) >= 8


def test_shorter_forwards_are_the_last_resort() -> None:
    rows = list(schedules(WORK, True))
    assert [(row.overlap, row.tier, row.micro) for row in rows] == [
        (True, "ram", 4), (True, "disk", 4), (False, "disk", 4), (False, "disk", 2), (False, "disk", 1),
    ]  # fmt: skip
    assert not any(row.overlap for row in schedules(WORK, False))


def test_freed_memory_stays_where_layers_are_rebuilt_on_a_cpu_and_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduling, "CAN_KEEP", True)
    solve = 10**9
    work = replace(WORK, solve=solve, capture=1, streams=4)
    rows = list(schedules(work, True))
    plain = make_schedule(work, True, "ram", 4)
    assert [row.kept for row in rows[:3]] == [solve * 5 // 4, solve // 2, 0]
    assert rows[2] == plain
    assert [peak(row.ram) - peak(plain.ram) for row in rows[:3]] == [solve * 5 // 4, solve // 2, 0]
    assert make_schedule(replace(work, solve=4096), True, "ram", 4, 0.5).kept == 256 << 20
    for other in (WORK, replace(work, device=CUDA)):
        assert not any(row.kept for row in schedules(other, True))
    monkeypatch.setattr(scheduling, "CAN_KEEP", False)
    assert list(schedules(work, True)) == rows[2:]


@pytest.mark.parametrize("overlap", [True, False])
def test_the_first_schedule_that_fits_is_taken(overlap: bool) -> None:
    rows = list(schedules(WORK, overlap))
    for row in rows:
        cap = BASE + peak(row.ram)
        first = next(other for other in rows if peak(other.ram) <= peak(row.ram))
        choice = fit(WORK, Caps(ram=cap), overlap)
        assert choice.schedule == first
        assert choice.fits
        assert choice.peak_ram == BASE + peak(first.ram)
        require_fit(choice, Caps(ram=cap))
        if first is row:
            less = fit(WORK, Caps(ram=cap - 1), overlap)
            assert less.schedule != row or not less.fits


def test_without_a_cap_all_that_is_free_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    room = RUNTIME_BYTES + peak(make_schedule(WORK, True, "ram", 4).ram)
    for free, tier in ((room, "ram"), (room - 1, "disk")):
        monkeypatch.setattr(scheduling, "free_ram", lambda: free)  # noqa: B023
        choice = fit(WORK, Caps())
        assert (choice.ram.cap, choice.ram.base) == (HELD + free, BASE)
        assert choice.schedule.tier == tier


def test_both_caps_must_hold() -> None:
    work = replace(WORK, device=CUDA)
    rich = make_schedule(work, True, "vram", 4)
    caps = Caps(ram=BASE + peak(rich.ram), vram=RUNTIME_BYTES + peak(rich.vram))
    assert fit(work, caps).schedule == rich
    assert fit(work, replace(caps, vram=caps.vram and caps.vram - 1)).schedule.tier == "disk", "RAM has no room for it"
    assert fit(work, Caps(ram=1 << 40, vram=caps.vram and caps.vram - 1)).schedule.tier == "ram"


def test_the_memory_of_another_machine_is_given_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here is not asked for then."""
    for name in ("warm_up", "ram_bytes", "free_ram", "vram_state"):
        monkeypatch.delattr(scheduling, name)
    work = replace(WORK, device=CUDA)
    rich, lean = make_schedule(work, True, "vram", 4), make_schedule(work, True, "ram", 4)
    there = Memory(
        ram=7 + RUNTIME_BYTES + peak(lean.ram), ram_held=7, vram=5 + RUNTIME_BYTES + peak(rich.vram), vram_held=5
    )
    choice = fit(work, Caps(), memory=there)
    assert (choice.schedule, choice.fits) == (rich, True)
    assert (choice.ram.cap, choice.ram.base) == (there.ram, 7 + RUNTIME_BYTES)
    assert (choice.vram.cap, choice.vram.base) == (there.vram, 5 + RUNTIME_BYTES)
    assert fit(work, Caps(), memory=replace(there, vram=there.vram - 1)).schedule == lean
    assert fit(work, Caps(vram=there.vram - 1), memory=there).schedule == lean
    assert not fit(work, Caps(), memory=replace(there, ram=0)).fits


# --- what is said --------------------------------------------------------------------------------------------------------


def refusal(work: Workload, caps: Caps) -> str:
    with pytest.raises(BudgetError) as failure:
        require_fit(fit(work, caps), caps)
    return str(failure.value)


def test_too_small_a_cap_is_refused_by_its_flag_with_the_least_that_does() -> None:
    work = replace(WORK, staged=700 << 20)
    assert refusal(work, Caps(ram=512 << 20)) == (
        "--max-ram is 512.0 MiB; the leanest way through this model takes 996.4 MiB (staging 700.0 MiB, process 296.0 MiB, "
        "hidden batches 0.2 MiB, activations 0.2 MiB): give --max-ram 0.98GiB. A shorter --length takes less too."
    )
    least = Caps(ram=parse_size("0.98GiB", "max_ram"))
    require_fit(fit(work, least), least)
    less = Caps(ram=int(0.98 * (least.ram or 0)))
    assert "--max-ram is" in refusal(work, less)


def test_too_small_a_machine_is_said_without_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "free_ram", lambda: 1 << 20)
    words = refusal(WORK, Caps())
    assert words.startswith("201.0 MiB of RAM are there; the leanest way through this model takes 296.")
    assert words.endswith(": free some, or take a larger machine. A shorter --length takes less too.")
    assert "--max" not in words


def test_too_small_a_gpu_is_refused_by_its_flag() -> None:
    work = replace(WORK, device=CUDA, computed=3 << 30)
    words = refusal(work, Caps(ram=1 << 40, vram=1 << 30))
    assert words.startswith(
        "--max-vram is 1.00 GiB; the leanest way through this model takes 3.09 GiB (layer 3.00 GiB, "
    )
    assert "give --max-vram 3.10GiB." in words
    assert "RAM is" not in words.replace("VRAM", "")
    both = refusal(work, Caps(ram=1 << 20, vram=1 << 30))
    assert "--max-ram is 1.0 MiB" in both
    assert "--max-vram is 1.00 GiB" in both


def test_the_least_cap_holds_what_it_is_for_and_little_more() -> None:
    hundredth = (1 << 30) / 100
    for wanted in [*range(1, 10**8, 999_983), 590558003, 590558004, 1 << 30, 5 * (1 << 30) + 1, 123_456_789_012]:
        cap = parse_size(least_cap(wanted), "max_ram")
        assert cap is not None
        assert wanted <= cap <= wanted + 1.01 * hundredth


# --- from headers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_of_a_layer_are_those_of_its_tensors(pico: MakeModel, family: str, dtype: str) -> None:
    source = pico(family, dtype=torch.bfloat16)
    stored = load_file(source / "model.safetensors")
    layer = [tensor for name, tensor in stored.items() if name.startswith("model.layers.1.")]
    stream = ModelStream(source, dtype=dtype)
    sizes = layer_workload(stream, 5, 16)
    assert sizes["staged"] == sum(-(-tensor.nbytes // 256) * 256 for tensor in layer)
    assert sizes["computed"] == sum(tensor.numel() for tensor in layer) * stream.dtype.itemsize
    assert sizes["converts"] == (dtype == "float32")
    assert (sizes["width"], sizes["inner"], sizes["heads"], sizes["itemsize"]) == (32, 48, 32, stream.dtype.itemsize)
    assert (sizes["sequences"], sizes["length"], sizes["device"]) == (5, 16, CPU)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_an_evaluation_is_counted(pico: MakeModel, tied: bool) -> None:
    source = pico("llama", dtype=torch.bfloat16, tied=tied)
    matrix, vocabulary = 300 * 32, 300
    narrow = evaluation_workload(ModelStream(source, dtype="bfloat16"), 5, 16)
    wide = evaluation_workload(ModelStream(source, dtype="float32"), 5, 16)
    assert narrow.head == 2 * matrix + 16 * vocabulary * (2 + 8)
    assert wide.head == (2 + 4) * matrix + 16 * vocabulary * (4 + 8)
    assert (narrow.copied, narrow.edits, narrow.solve, narrow.inner_after) == (0, 0, 0, narrow.inner)
    assert narrow.head_stored == wide.head_stored == 2 * matrix
    long = evaluation_workload(ModelStream(source, dtype="bfloat16"), 5, 10 * HEAD_TOKENS)
    assert long.head == 2 * matrix + HEAD_TOKENS * vocabulary * (2 + 8)


# --- against the meter ---------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
import torch
from streamlap.families.stream import ModelStream
from streamlap.linalg.lowrank import awsvd, awsvd_bytes
from streamlap.linalg.moments import Moments
from streamlap.linalg.statistics import Energy
from streamlap.methods.anchored.costs import _sums
from streamlap.system.allocator import steady_heap
from streamlap.system.meters import peak_ram_bytes, ram_bytes, reset_peaks
from streamlap.planning.workload import evaluation_workload
from pathlib import Path

torch.set_num_threads(2)
steady_heap()

def measured(call):
    seen = []
    for _ in range(4):  # the first time libraries set themselves up, which is not the layer's
        reset_peaks()
        before = ram_bytes()
        result = call()
        seen.append(peak_ram_bytes() - before)
        del result
    return min(seen[1:])  # what else the process takes only adds to it

rows = {}
for dtype in ("bfloat16", "float32"):
    stream = ModelStream(Path(sys.argv[1]), dtype=dtype)
    for shape in ((2, 2048), (16, 256))[: 1 if dtype == 'float32' else 2]:
        x_BLD = torch.randn(*shape, stream.width, dtype=stream.dtype)
        layer = stream.layer(0, stream.layer_kwargs(shape[1])[0])
        def forward():
            with layer.observed([(role, Energy()) for role in ("q", "o", "gate", "down")]):
                return layer(x_BLD)
        work = evaluation_workload(stream, *shape)
        rows[f"forward {dtype} {shape}"] = work.activations(shape[0], work.inner), measured(forward)
for shape in ((1024, 1024), (2816, 1024)):
    weight, scale = torch.randn(shape).bfloat16(), torch.rand(shape[1]) + 0.1
    rows[f"solve {shape}"] = awsvd_bytes(*shape, 300), measured(lambda: awsvd(weight, scale, 300))
for dtype in (torch.float32, torch.bfloat16):
    x_TI = torch.randn(4096, 2816).to(dtype)
    def summed():
        moments = Moments()
        for _ in range(2):
            moments.update(x_TI, x_TI[:, :0])
        return moments
    rows[f"sums {dtype}"] = _sums(2816, 0, widened=dtype != torch.float32), measured(summed)
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def measured(pico: MakeModel) -> dict[str, Any]:
    """Counted and measured bytes of real forwards and solves, in a process of its own."""
    medium = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    source = pico(
        "llama", dtype=torch.bfloat16, num_hidden_layers=1, head_dim=64, max_position_embeddings=2048, **medium
    )
    command = [sys.executable, "-c", MEASURE, str(source)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["forward bfloat16", "forward float32", "solve", "sums"])
def test_what_is_counted_is_what_a_medium_layer_takes(measured: dict[str, Any], what: str) -> None:
    rows = {name: row for name, row in measured.items() if name.startswith(what)}
    assert rows
    for name, (counted, seen) in rows.items():
        assert seen > 16 << 20, name
        assert 0.9 * seen <= counted <= 1.5 * seen, (name, counted, seen)
