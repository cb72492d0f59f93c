"""One result, whatever the memory, the threads and the accidents: the same bytes by every way through the model."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Compress, MakeModel
from crashes import crash_after, keep_on_disk
from outputs import REPORT, contents, is_begun
from picos import VOCABULARY
from safetensors.torch import load_file, save_file

import streamlap
from streamlap.errors import BudgetError, RecipeError
from streamlap.families import stream as families_stream
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.pipeline import evaluate as evaluating
from streamlap.pipeline import layers, one_pass, runner, sublayers
from streamlap.pipeline.layer_in_hand import LayerInHand
from streamlap.pipeline.runner import LayerRunner
from streamlap.planning import schedule as scheduling
from streamlap.planning.decide import decide
from streamlap.planning.forecast import compression_workload, forecast_layers
from streamlap.planning.schedule import RUNTIME_BYTES, Fit, Schedule, make_schedule, peak, schedules
from streamlap.planning.workload import evaluation_workload
from streamlap.store import hidden, staging
from streamlap.store.journal import Journal
from streamlap.store.sink import DurableFile, ShardFolder
from streamlap.system.budget import parse_size

ROOT = Path(__file__).parents[2]

SHAPE_NL = (11, 224)
BATCH = 2
"""Sequences in a batch here, so that there are 6 batches, the last of one sequence."""

HELD = 1 << 30
"""What this process holds, as far as these tests are concerned."""
BASE = HELD + RUNTIME_BYTES

pytestmark = pytest.mark.usefixtures("no_thread_stays")


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, and a process whose memory is known."""
    monkeypatch.setattr(families_stream, "BATCH_TOKENS", BATCH * SHAPE_NL[1])
    monkeypatch.setattr(scheduling, "ram_bytes", lambda: HELD)
    monkeypatch.setattr(runner, "ram_bytes", lambda: HELD)


@pytest.fixture(scope="session")
def source(pico: MakeModel) -> Path:
    """Wide enough that products are shared between threads and that a forward of one sequence takes more than a solve; with
    biases, which live in the staging buffers."""
    return pico(
        "qwen2", dtype=torch.bfloat16, hidden_size=128, intermediate_size=1920, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=SHAPE_NL[1],
    )  # fmt: skip


@pytest.fixture(scope="session")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "windows.npy"
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY, SHAPE_NL).astype(np.uint16))
    return path


@pytest.fixture
def compress(source: Path, windows: Path) -> Compress:
    """Into `out`; in bfloat16, so that a layer lives in its staging buffer, unless another dtype is given."""

    def run(out: Path, **changes: Any) -> streamlap.Report:
        settings = {"preset": "lorap", "dtype": "bfloat16", "files": (str(windows),)} | changes
        return streamlap.compress(source, out, **settings)

    return run


@pytest.fixture
def whole(compress: Compress, tmp_path: Path) -> dict[str, Any]:
    """The output of a run with room for everything."""
    return result(compress, tmp_path / "whole")


def result(compress: Compress, out: Path, **changes: Any) -> dict[str, Any]:
    compress(out, **changes)
    return outputs(out)


def outputs(out: Path) -> dict[str, Any]:
    """All files but the report, which says how the result came about."""
    return {name: data for name, data in contents(out).items() if name != REPORT}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """The schedules of all runs, as they begin."""
    seen: list[Schedule] = []
    start = runner.start_runner

    def note(stream: ModelStream, choice: Fit, *rest: Any, **options: Any) -> Any:
        seen.append(choice.schedule)
        return start(stream, choice, *rest, **options)

    monkeypatch.setattr(layers, "start_runner", note)
    monkeypatch.setattr(evaluating, "start_runner", note)
    return seen


def compression_schedules(source: Path, overlap: bool, dtype: str = "bfloat16") -> list[Schedule]:
    """Those that some cap leads to, from the richest to the leanest."""
    stream = ModelStream(source, dtype=dtype)
    decided = decide(stream, streamlap.Recipe().override(preset="lorap"))
    planned = forecast_layers(stream, decided.recipe, decided.candidates, SHAPE_NL, 1)
    return reachable(schedules(compression_workload(stream, planned, SHAPE_NL), overlap))


def reachable(rows: Iterator[Schedule]) -> list[Schedule]:
    """Each that takes less than all before it."""
    kept: list[Schedule] = []
    for row in rows:
        if all(peak(row.ram) < peak(other.ram) for other in kept):
            kept.append(row)
    return kept


def cap_of(schedule: Schedule) -> int:
    return BASE + peak(schedule.ram)


def names(rows: list[Schedule]) -> list[tuple[bool, str, int]]:
    return [(row.overlap, row.tier, row.micro) for row in rows]


# --- every way through the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("overlap", [True, False])
def test_every_cap_gives_the_same_bytes(
    compress: Compress, source: Path, tmp_path: Path, taken: list[Schedule], overlap: bool, dtype: str
) -> None:
    whole = result(compress, tmp_path / "whole", dtype=dtype)
    assert names(taken) == [(True, "ram", BATCH)]
    taken.clear()
    rows = compression_schedules(source, overlap, dtype)
    assert {(overlap, "ram", 2), (overlap, "disk", 2), (False, "disk", 1)} <= set(names(rows))
    assert rows[-1].overlap is False
    for row in rows:
        out = tmp_path / f"{row.overlap} {row.tier} {row.micro}"
        assert result(compress, out, dtype=dtype, overlap=overlap, max_ram=cap_of(row)) == whole, row
        assert taken[-1] == row
    assert len(taken) == len(rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("overlap", [True, False])
def test_every_cap_gives_the_same_perplexity(
    source: Path, windows: Path, tmp_path: Path, taken: list[Schedule], overlap: bool, dtype: str
) -> None:
    nll = streamlap.evaluate(source, windows, dtype=dtype).nll
    rows = reachable(schedules(evaluation_workload(ModelStream(source, dtype=dtype), *SHAPE_NL), overlap))
    assert {(overlap, "ram", 2), (overlap, "disk", 2), (False, "disk", 1)} <= set(names(rows))
    for row in rows:
        again = streamlap.evaluate(
            source, windows, dtype=dtype, overlap=overlap, max_ram=cap_of(row), work=tmp_path / "work"
        )
        assert again.nll == nll, row
        assert taken[-1] == row
        assert not list((tmp_path / "work").glob("*"))


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_threads_gives_the_same_bytes(
    compress: Compress, source: Path, windows: Path, whole: dict[str, Any], tmp_path: Path,
    threads: Callable[[int], None], count: int,
) -> None:  # fmt: skip
    """In bfloat16. In float32 torch's SiLU differs in a last bit where the threads' shares end, unless these are even."""
    nll = streamlap.evaluate(source, windows, dtype="bfloat16").nll
    threads(count)
    assert result(compress, tmp_path / "out") == whole
    assert streamlap.evaluate(source, windows, dtype="bfloat16").nll == nll
    assert torch.get_num_threads() == count


def test_one_thread_gives_the_bytes_of_two_also_in_float32(
    compress: Compress, source: Path, windows: Path, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    whole = result(compress, tmp_path / "whole", dtype="float32")
    nll = streamlap.evaluate(source, windows, dtype="float32").nll
    threads(1)
    assert result(compress, tmp_path / "out", dtype="float32") == whole
    assert streamlap.evaluate(source, windows, dtype="float32").nll == nll


@pytest.mark.parametrize("lean_first", [True, False])
def test_a_run_may_go_on_with_another_cap_and_without_overlap(
    compress: Compress, source: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    taken: list[Schedule], lean_first: bool,
) -> None:  # fmt: skip
    """Killed in each layer but the last: the hidden states of another schedule are there to go on from."""
    rich: dict[str, Any] = {"overlap": True, "max_ram": "100GiB"}
    lean: dict[str, Any] = {"overlap": False, "max_ram": cap_of(compression_schedules(source, False)[-1])}
    first, second = (lean, rich) if lean_first else (rich, lean)
    for done in (0, 1, 2):
        out = tmp_path / str(done)
        crash_after(done, monkeypatch, lambda: compress(out, **first))  # noqa: B023
        assert result(compress, out, **second) == whole, done
    assert {row[1:] for row in names(taken)} == {("ram", BATCH), ("disk", 1)}


def test_resume_keeps_the_caps_unless_it_is_given_others(
    compress: Compress, source: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    taken: list[Schedule],
) -> None:  # fmt: skip
    lean = cap_of(compression_schedules(source, False)[-1])
    crash_after(0, monkeypatch, lambda: compress(tmp_path / "out", overlap=False, max_ram=lean))
    crash_after(1, monkeypatch, lambda: streamlap.resume(tmp_path / "out"))
    streamlap.resume(tmp_path / "out", max_ram="100GiB")
    assert names(taken) == [(False, "disk", 1), (False, "disk", 1), (False, "ram", BATCH)]
    assert outputs(tmp_path / "out") == whole


# --- sub-layers rebuilt beside the dense model -------------------------------------------------------------------------

WAYS: dict[str, tuple[bool, str, int]] = {
    "in memory, nothing beside the loop": (False, "ram", BATCH),
    "on the disk": (True, "disk", BATCH),
    "on the disk, nothing beside the loop": (False, "disk", BATCH),
    "a sequence at a time": (False, "disk", 1),
}


@pytest.fixture(scope="session")
def narrow(pico: MakeModel) -> Path:
    return pico(
        "qwen2", dtype=torch.bfloat16, num_hidden_layers=2, hidden_size=64, intermediate_size=160, head_dim=16,
        max_position_embeddings=SHAPE_NL[1],
    )  # fmt: skip


@pytest.fixture
def rebuild(narrow: Path, windows: Path) -> Compress:
    """The same by the preset `best`, on a model that is not as wide."""

    def run(out: Path, **changes: Any) -> streamlap.Report:
        settings = {"preset": "best", "ratio": 0.4, "dtype": "bfloat16", "files": (str(windows),)} | changes
        return streamlap.compress(narrow, out, **settings)

    return run


@pytest.fixture
def rebuilt(rebuild: Compress, tmp_path: Path) -> dict[str, Any]:
    return result(rebuild, tmp_path / "rebuilt")


@pytest.mark.parametrize("way", WAYS)
def test_sub_layers_are_the_same_bytes_by_every_way(
    rebuild: Compress, rebuilt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    overlap, tier, micro = WAYS[way]
    monkeypatch.setattr(scheduling, "schedules", lambda work, _: [make_schedule(work, overlap, tier, micro)])
    assert result(rebuild, tmp_path / "out", overlap=overlap) == rebuilt


@pytest.mark.parametrize("count", [1, 3])
def test_sub_layers_are_the_same_bytes_on_any_number_of_threads_and_in_other_batches(
    rebuild: Compress, rebuilt: dict[str, Any], tmp_path: Path, threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch, count: int,
) -> None:  # fmt: skip
    threads(count)
    monkeypatch.setattr(families_stream, "BATCH_TOKENS", (count + 1) * SHAPE_NL[1])
    assert result(rebuild, tmp_path / "out") == rebuilt


@pytest.mark.parametrize("done", [0, 1])
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_sub_layers_go_on_where_they_were_cut_short_and_leave_nothing(
    rebuild: Compress, rebuilt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str, done: int
) -> None:
    """The dense stream is as durable as the compressed one; what lies between the sub-layers is made anew."""
    out, work = tmp_path / "out", tmp_path / "work"
    monkeypatch.setattr(scheduling, "schedules", lambda work, overlap: [make_schedule(work, overlap, tier, BATCH)])
    crash_after(done, monkeypatch, lambda: rebuild(out, work=work))
    left = {path.name for path in work.rglob("*.bin")}
    assert {f"hidden-{done:05d}.bin", f"dense-{done:05d}.bin"} <= left
    streamlap.resume(out)
    assert outputs(out) == rebuilt
    assert not list(work.iterdir())
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".bin")]


def test_sub_layers_claim_what_they_hold(
    rebuild: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[Schedule]
) -> None:
    """Three streams around a layer, and inside a solve the sums over tokens with the work of one more method."""
    claimed: list[dict[str, int]] = []
    rebuild_layer = sublayers.rebuild_layer

    def note(hand: LayerInHand, *rest: Any) -> Any:
        with hand.runner.claim("solve"):
            claimed.append(dict(hand.runner.fit.ram.held))
        return rebuild_layer(hand, *rest)

    monkeypatch.setattr(sublayers, "rebuild_layer", note)
    rebuild(tmp_path / "out")
    generation = SHAPE_NL[0] * SHAPE_NL[1] * 64 * 2
    assert taken[0].tier == "ram"
    for held in claimed:
        assert held["hidden states"] >= 3 * generation
        assert held["solve"] >= 8 * (2 * 64 * 64 + 160 * 160)


# --- what runs beside the loop -----------------------------------------------------------------------------------------


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Which threads read layers, read hidden states, write hidden states and write shards."""
    seen: dict[str, set[str]] = {}

    def note(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any) -> Any:
            seen.setdefault(what, set()).add(threading.current_thread().name.split("_")[0])
            return real(*args)

        monkeypatch.setattr(owner, name, call)

    note(staging, "read_into", "read layers")
    note(hidden, "_read_some", "read states")
    note(hidden, "_write_batch", "write states")
    note(ShardFolder, "write", "write shards")
    return seen


def test_with_overlap_each_kind_of_work_has_its_thread(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: dict[str, set[str]]
) -> None:
    keep_on_disk(monkeypatch)
    monkeypatch.setattr(
        "streamlap.pipeline.compress.check_sublayers", lambda *_, **__: None
    )  # which reads in this thread
    compress(tmp_path / "out")
    assert workers == {
        "read layers": {"reader"}, "read states": {"fetcher"}, "write states": {"writer"},
        "write shards": {"MainThread", "writer"},  # the first, which no layer waits for, in the loop's own
    }  # fmt: skip


def test_without_overlap_the_loop_does_it_all(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: dict[str, set[str]]
) -> None:
    keep_on_disk(monkeypatch)
    before, beside = set(threading.enumerate()), set()
    edit_layer = layers.edit_layer
    monkeypatch.setattr(
        layers, "edit_layer", lambda *args: (beside.update(threading.enumerate()), edit_layer(*args))[1]
    )
    compress(tmp_path / "out", overlap=False)
    kinds = ("read layers", "read states", "write states", "write shards")
    assert workers == {kind: {"MainThread"} for kind in kinds}
    assert beside == before


def test_the_next_layer_is_read_while_this_one_is_computed(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The solve of each layer but the last waits until all of the next layer is in memory; nobody else would read it."""
    read: dict[str, int] = {}
    read_into, edit_layer = staging.read_into, layers.edit_layer

    def note(info: Any, view: memoryview) -> None:
        read_into(info, view)
        layer = info.name.split(".")[2]
        read[layer] = read.get(layer, 0) + 1

    def wait(hand: LayerInHand, *rest: Any) -> Any:
        deadline, coming = time.monotonic() + 30, hand.index + 1
        while coming < 3 and read.get(str(coming), 0) < 12:
            assert time.monotonic() < deadline, f"layer {coming} is not read ahead: {read}"
            time.sleep(0.001)
        return edit_layer(hand, *rest)

    monkeypatch.setattr(staging, "read_into", note)
    monkeypatch.setattr(layers, "edit_layer", wait)
    assert result(compress, tmp_path / "out") == whole
    assert read == {"0": 12, "1": 12, "2": 12}


@pytest.mark.parametrize("preset", ["lorap", "best"])
@pytest.mark.parametrize("done", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_before_its_first_solve_the_layer_before_is_committed(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, done: int
) -> None:
    """However late that is, and also in a run that goes on."""
    out, append, committed = tmp_path / "out", Journal.append, dict[int, int]()

    def run() -> object:
        return compress(out, preset=preset)

    def append_late(journal: Journal, line: dict[str, Any]) -> None:
        time.sleep(0.3)
        append(journal, line)

    def noted(solve: Callable[..., Any]) -> Callable[..., Any]:
        def call(hand: LayerInHand, *rest: Any) -> Any:
            committed[hand.index] = Journal.load(out).next_layer
            return solve(hand, *rest)

        return call

    if done:
        crash_after(done, monkeypatch, run)
    monkeypatch.setattr(Journal, "append", append_late)
    monkeypatch.setattr(one_pass, "solve_layer", noted(one_pass.solve_layer))
    monkeypatch.setattr(sublayers, "rebuild_layer", noted(sublayers.rebuild_layer))
    run()
    assert committed == {index: index for index in range(done, 3)}


@pytest.mark.parametrize("slow", ["shards", "states", "reads"])
def test_a_slow_disk_changes_nothing(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """Biases that stay as they are lie in a staging buffer, which must not be filled anew before they are written."""
    write, read_into = DurableFile.write, staging.read_into

    def write_slowly(file: DurableFile, data: Any) -> None:
        kind = "shards" if file.path.suffix == ".safetensors" else "states"
        time.sleep(0.01 if kind == slow else 0)
        write(file, data)

    def read_slowly(*args: Any) -> None:
        time.sleep(0.01 if slow == "reads" else 0)
        read_into(*args)

    monkeypatch.setattr(DurableFile, "write", write_slowly)
    monkeypatch.setattr(staging, "read_into", read_slowly)
    assert result(compress, tmp_path / "out") == whole


# --- memory that runs out all the same -----------------------------------------------------------------------------------


def starve(
    owner: Any, name: str, patch: pytest.MonkeyPatch, fails: Callable[..., bool] = lambda *_: True, most: int = 10**6
) -> None:
    """Calls of `owner.name` get no memory where `fails` says so, but no more than `most` times."""
    real, left = getattr(owner, name), [None] * most

    def call(*args: Any, **kwargs: Any) -> Any:
        if left and fails(*args):
            left.pop()
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 20.00 MiB")
        return real(*args, **kwargs)

    patch.setattr(owner, name, call)


FORWARD, SOLVE = (StreamLayer, "__call__"), (torch.linalg, "eigh")


def forward_of(*indices: int, edited: bool, more_than: int = 0) -> Callable[[StreamLayer, torch.Tensor], bool]:
    """Forwards of these layers, in propagate where `edited`, else in capture, of more than so many sequences."""
    prefixes = tuple(f".{index}" for index in indices)
    return lambda layer, x_BLD: (
        layer.prefix.endswith(prefixes) and bool(layer._edited) == edited and len(x_BLD) > more_than
    )


STARVED: dict[str, tuple[tuple[Any, str], Callable[..., bool], int, list[str]]] = {
    "capture, once": (
        FORWARD, forward_of(0, edited=False, more_than=1), 1,  # the look at the sub-layers before it takes one
        ["layer 0, capture: 2 sequences a forward"],
    ),
    "capture, once, in the last batch of the second layer": (
        FORWARD, lambda layer, x_BLD: forward_of(1, edited=False)(layer, x_BLD) and len(x_BLD) == 3, 1,
        ["layer 1, capture: 2 sequences a forward"],
    ),
    "capture, more than one sequence": (
        FORWARD, forward_of(0, 1, 2, edited=False, more_than=1), 99,
        ["layer 0, capture: 2 sequences a forward", "layer 0, capture: 1 sequences a forward"],
    ),
    "propagate, once": (
        FORWARD, forward_of(0, edited=True), 1,
        ["layer 0, propagate: 2 sequences a forward"],
    ),
    "propagate, more than one sequence": (
        FORWARD, forward_of(0, 1, 2, edited=True, more_than=1), 99,
        ["layer 0, propagate: 2 sequences a forward", "layer 0, propagate: 1 sequences a forward"],
    ),
    "propagate, down to the end of the ladder": (
        FORWARD, forward_of(1, edited=True), 3,
        [f"layer 1, propagate: {step}" for step in ("2 sequences a forward", "1 sequences a forward", "caches freed")],
    ),
    "solve, once": (
        SOLVE, lambda *_: True, 1,
        ["layer 0, solve: caches freed"],
    ),
}  # fmt: skip


@pytest.fixture
def batches_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is something to give way."""
    monkeypatch.setattr(families_stream, "BATCH_TOKENS", 4 * SHAPE_NL[1])


@pytest.mark.usefixtures("batches_of_four")
@pytest.mark.parametrize("case", STARVED)
@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_where_memory_runs_out_something_gives_way_and_the_bytes_are_the_same(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, tier: str
) -> None:
    target, fails, most, steps = STARVED[case]
    monkeypatch.setattr(scheduling, "schedules", lambda work, overlap: [make_schedule(work, overlap, tier, 4)])
    starve(*target, monkeypatch, fails, most)
    report = compress(tmp_path / "out")
    assert report.to_json()["ladder"] == steps
    assert json.loads((tmp_path / "out" / REPORT).read_text())["ladder"] == steps
    assert outputs(tmp_path / "out") == whole


@pytest.mark.usefixtures("batches_of_four")
def test_what_gave_way_is_still_known_after_a_resume(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        starve(*FORWARD, patch, forward_of(0, edited=True), 1)
        crash_after(1, patch, lambda: compress(tmp_path / "out"))
    with monkeypatch.context() as patch:
        starve(*SOLVE, patch, most=1)
        report = streamlap.resume(tmp_path / "out")
    assert report.to_json()["ladder"] == ["layer 0, propagate: 2 sequences a forward", "layer 1, solve: caches freed"]
    assert [layer.ladder for layer in report.layers] == [
        ("layer 0, propagate: 2 sequences a forward",), ("layer 1, solve: caches freed",), (),
    ]  # fmt: skip
    assert outputs(tmp_path / "out") == whole


@pytest.mark.usefixtures("batches_of_four")
@pytest.mark.parametrize("phase", ["capture", "propagate", "solve"])
@pytest.mark.parametrize("overlap", [True, False])
def test_at_the_end_of_the_ladder_the_run_stops_and_can_be_resumed(
    compress: Compress,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    overlap: bool,
) -> None:
    """From the second layer on; the first is committed."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if phase == "solve":
            starve(*SOLVE, patch, lambda _: any(out.glob("model-*.safetensors")))
        else:
            starve(*FORWARD, patch, forward_of(1, edited=phase == "propagate"))
        with pytest.raises(
            BudgetError, match=rf"out of memory in {phase} after every fallback \(out of memory\. Tried"
        ):
            compress(out, overlap=overlap)
    assert BudgetError.exit_code == 4
    assert is_begun(out)
    assert len((out / ".streamlap" / "journal.jsonl").read_text().splitlines()) == 2
    assert not list(out.rglob("*.tmp"))
    streamlap.resume(out)
    assert outputs(out) == whole


@pytest.mark.usefixtures("batches_of_four")
def test_an_evaluation_gives_way_too(source: Path, windows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nll = streamlap.evaluate(source, windows, dtype="bfloat16").nll
    with monkeypatch.context() as patch:
        starve(*FORWARD, patch, forward_of(0, 1, 2, edited=False, more_than=1))
        assert streamlap.evaluate(source, windows, dtype="bfloat16").nll == nll
    starve(*FORWARD, monkeypatch, forward_of(2, edited=False))
    with pytest.raises(BudgetError, match="out of memory in propagate after every fallback"):
        streamlap.evaluate(source, windows, dtype="bfloat16")


# --- caps that are too small -----------------------------------------------------------------------------------------------


def least(error: BaseException) -> str:
    """The cap that the message names."""
    match = re.search(r"give --max-ram (\S+GiB)\.", str(error))
    assert match, error
    return match[1]


@pytest.mark.parametrize("overlap", [True, False])
def test_too_small_a_cap_is_refused_before_anything_is_written_and_the_cap_that_is_named_does(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, taken: list[Schedule], overlap: bool
) -> None:
    with pytest.raises(BudgetError, match=r"--max-ram is 1\.0 MiB; the leanest way through this model") as refusal:
        compress(tmp_path / "out", overlap=overlap, max_ram="1MiB")
    named = least(refusal.value)
    less = int(0.98 * (parse_size(named, "max_ram") or 0))
    with pytest.raises(BudgetError, match=rf"give --max-ram {named}"):
        compress(tmp_path / "out", overlap=overlap, max_ram=less)
    assert not (tmp_path / "out").exists()
    assert result(compress, tmp_path / "out", overlap=overlap, max_ram=named) == whole
    assert len(taken) == 1


def test_too_small_a_cap_is_refused_by_an_evaluation(source: Path, windows: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"--max-ram is 500\.0 KiB|--max-ram is 0\.5 MiB") as refusal:
        streamlap.evaluate(source, windows, dtype="bfloat16", max_ram=500_000, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    named = least(refusal.value)
    nll = streamlap.evaluate(source, windows, dtype="bfloat16", max_ram=named, work=tmp_path / "work").nll
    assert nll == streamlap.evaluate(source, windows, dtype="bfloat16").nll


@pytest.mark.parametrize(("cap", "error"), [("1MiB", BudgetError), ("lots", RecipeError)])
def test_a_refused_cap_does_not_cost_an_earlier_result(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, cap: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        compress(tmp_path / "whole", overwrite=True, max_ram=cap)
    assert outputs(tmp_path / "whole") == whole


def test_a_resume_under_too_small_a_cap_changes_nothing(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    crash_after(1, monkeypatch, lambda: compress(out))
    before = contents(out)
    with pytest.raises(BudgetError, match="--max-ram is"):
        streamlap.resume(out, max_ram="1MiB")
    assert contents(out) == before
    streamlap.resume(out)
    assert outputs(out) == whole


# --- memory that is not where it was claimed -------------------------------------------------------------------------------


def after_layer(index: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[LayerRunner], object]) -> None:
    """At the end of that layer, before its memory is looked at, something is done to the runner."""
    compress_layer = layers.compress_layer

    def then_act(job: Any, running: LayerRunner, here: int, *rest: Any, **options: Any) -> Any:
        committed = compress_layer(job, running, here, *rest, **options)
        if here == index:
            act(running)
        return committed

    monkeypatch.setattr(layers, "compress_layer", then_act)


@pytest.mark.parametrize("overlap", [True, False])
def test_memory_that_creeps_up_stops_the_run_where_the_next_layer_would_break_the_cap(
    compress: Compress, source: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    overlap: bool,
) -> None:  # fmt: skip
    """The layer that is done is not lost by it."""
    out, cap = tmp_path / "out", cap_of(compression_schedules(source, overlap)[0])
    with monkeypatch.context() as patch:
        after_layer(1, patch, lambda _: patch.setattr(runner, "ram_bytes", lambda: cap))
        with pytest.raises(
            BudgetError, match=r"after layer 1 this process holds 1\.\d\d GiB of RAM, .* Run again to resume"
        ):
            compress(out, overlap=overlap, max_ram=cap)
    assert len((out / ".streamlap" / "journal.jsonl").read_text().splitlines()) == 1 + 2
    streamlap.resume(out)
    assert outputs(out) == whole


def test_memory_that_creeps_up_inside_the_cap_is_a_warning(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    crept = HELD + RUNTIME_BYTES + runner.CREEP_BYTES + (100 << 20)
    after_layer(1, monkeypatch, lambda _: monkeypatch.setattr(runner, "ram_bytes", lambda: crept))
    with caplog.at_level(logging.WARNING):
        assert result(compress, tmp_path / "out", max_ram="100GiB") == whole
    assert len(re.findall(r"RAM: 2\d\d\.\d MiB more than its claims after layer [12]", caplog.text)) == 2


def test_a_claim_that_outlives_its_layer_is_found(
    compress: Compress, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, forgotten = tmp_path / "out", contextlib.ExitStack()
    with monkeypatch.context() as patch, forgotten:
        after_layer(0, patch, lambda running: forgotten.enter_context(running.fit.ram.claim({"scores": 1})))
        with pytest.raises(AssertionError, match=r"claims that outlive layer 0: .*'scores': 1"):
            compress(out)
    assert is_begun(out)
    streamlap.resume(out)
    assert outputs(out) == whole


def test_between_layers_nothing_but_what_stays_is_claimed(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[dict[str, int]] = []
    fits: list[Fit] = []
    for index in range(3):
        after_layer(index, monkeypatch, lambda running: held.append(dict(running.fit.ram.held)))
        after_layer(index, monkeypatch, lambda running: fits.append(running.fit))
    compress(tmp_path / "out")
    stays = {purpose: count for purpose, count in fits[0].schedule.ram["layers"].items() if count}
    assert stays.keys() == {"staging", "hidden states"}
    assert held == [stays] * 3
    assert fits[0].ram.held == {}, "at the end all is given back"


# --- the real thing --------------------------------------------------------------------------------------------------------

CAPPED = """
import json, re, sys
import torch
import streamlap
from streamlap.errors import BudgetError, RecipeError
from streamlap.system.meters import peak_ram_bytes

torch.set_num_threads(2)
model, windows, out, preset = sys.argv[1:]

def under_the_least_cap(run):
    cap = "1MiB"
    for attempt in range(3):  # what the process holds grows a little by the attempt
        try:
            return run(cap), cap
        except BudgetError as error:
            cap = re.search(r"give --max-ram (\\S+GiB)[.]", str(error))[1]
    raise SystemExit("no cap that was named did")

report, cap = under_the_least_cap(
    lambda cap: streamlap.compress(model, out, files=(windows,), preset=preset, survey=None, max_ram=cap)
)
rows = {"compress": [cap, max(report.peak_ram_bytes, peak_ram_bytes())]}
result, cap = under_the_least_cap(lambda cap: streamlap.evaluate(model, windows, max_ram=cap))
rows["evaluate"] = [cap, result.peak_ram_bytes]
print(json.dumps(rows))
"""


@pytest.mark.parametrize(("preset", "hidden"), [pytest.param("lorap", 1280, marks=pytest.mark.nightly), ("best", 640)])
def test_a_real_process_stays_under_the_least_cap_that_is_named(
    pico: MakeModel, tmp_path: Path, preset: str, hidden: int
) -> None:
    """A layer of 34 MiB, or of 8, compressed in its own dtype, evaluated in float32."""
    medium = {
        "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 320,
    }  # fmt: skip
    source = pico(
        "llama", dtype=torch.bfloat16, num_hidden_layers=2, head_dim=64, max_position_embeddings=256, **medium
    )
    np.save(tmp_path / "windows.npy", np.random.default_rng(0).integers(0, VOCABULARY, (4, 256)))
    command = [sys.executable, "-c", CAPPED, str(source), str(tmp_path / "windows.npy"), str(tmp_path / "out"), preset]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (cap, seen) in json.loads(done.stdout).items():
        assert seen <= (parse_size(cap, "max_ram") or 0), (name, cap, seen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_stored_in_the_compute_dtype_beside_others_outlive_the_reading_ahead(
    pico: MakeModel, tokens: Path, tmp_path: Path, dtype: str
) -> None:
    """Norms in float32 beside bfloat16 weights: what needs no conversion must leave the one staging buffer all the same."""
    source = tmp_path / "mixed"
    shutil.copytree(pico("llama", dtype=torch.bfloat16), source)
    tensors = load_file(source / "model.safetensors")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    for overlap in (True, False):
        streamlap.compress(source, tmp_path / str(overlap), files=(str(tokens),), dtype=dtype, overlap=overlap)
    with_it, without = (contents(tmp_path / str(overlap)) for overlap in (True, False))
    assert with_it == without
    assert streamlap.evaluate(source, tokens).nll == streamlap.evaluate(source, tokens, overlap=False).nll
