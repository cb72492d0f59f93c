"""The benchmarks run end to end on shapes of a few thousand weights, and judge rightly."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import MakeModel
from picos import VOCABULARY
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import ablate
import bench_gpu
import bench_inference
import bench_memory
import bench_peers
import bench_plan
import bench_presets
import bench_quality
import bench_speed
import bench_trained
import benchmarks as shared
import compare_devices
import memory_group

import streamlap
from streamlap.system import disk_speed
from streamlap.system import speed as machine

ROOT = Path(__file__).parents[2]
SMALL = ["--scale-down", "64"]
MACHINE = {"date", "cpu", "cores", "threads", "ram_bytes", "gpu", "load", "system", "versions"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short measurements in this process; what is measured is another test's. Handlers of signals are put back."""
    monkeypatch.setattr(disk_speed, "DISK_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "PATIENCE", 0.01)
    monkeypatch.setattr(machine, "CPU_MATMUL", {"tokens": 64, "columns": 64, "rows": 64})
    monkeypatch.setattr(bench_speed, "PRODUCT_SIZE", 64)
    monkeypatch.setattr(compare_devices, "SAMPLES", 8)
    monkeypatch.setattr(compare_devices, "LENGTH", 32)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(script: ModuleType, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The JSON that the script writes; what it says of the machine, and that it names no place on it, is looked at here."""
    out = folder / "result.json"
    given = [f"{script.__name__}.py", *words, "--work", str(folder / "work"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    script.main()
    result = json.loads(out.read_text())
    assert result["machine"].keys() == MACHINE
    assert result["command"].startswith(f"python scripts/{script.__name__}.py {words[0]} ")
    assert str(folder) not in out.read_text()
    return dict(result)


def shown(script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The Markdown table of the result that `run` has left."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bench", "--load", str(folder / "result.json"), "--table"])
    script.main()
    return capsys.readouterr().out


@pytest.mark.nightly
def test_quality(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there already is not made again."""
    outputs = tmp_path / "outputs"
    streamlap.compress(pico("llama"), outputs / "stock-0.4", ratio=0.4, shape="stock", files=(str(tokens),))
    words = [
        "--shapes",
        "nas",
        "stock",
        "--ratios",
        0.4,
        "--calibration",
        tokens,
        "--text",
        tokens,
        other_tokens(tmp_path),
    ]
    words += ["--outputs", outputs, "--model", pico("llama"), "--prompt", 8, "--decode", 2, "--repeats", 1]
    quiet = run(bench_quality, [*map(str, words), "--rounds", "0"], tmp_path, monkeypatch)["rows"]
    dense, nas, stock = quiet
    assert [row["name"] for row in quiet] == ["dense", "nas 0.4", "stock 0.4"]
    assert [text["loss"] for text in dense["texts"]] == [0, 0]
    assert nas["seconds"] > 0
    assert stock["seconds"] is None
    for row in (nas, stock):
        assert row["parameters"] <= 0.6 * dense["parameters"]
        assert row["bytes"] < dense["bytes"]
        assert [text["loss"] for text in row["texts"]] == [
            pytest.approx(text["nll"] - before["nll"])
            for text, before in zip(row["texts"], dense["texts"], strict=True)
        ]
    assert "decode" not in shown(bench_quality, tmp_path, monkeypatch, capsys)

    monkeypatch.setattr(bench_quality, "losses", None)  # not measured again
    rows = run(bench_quality, [*map(str, words), "--rounds", "1"], tmp_path, monkeypatch)["rows"]
    assert [{key: row[key] for key in quiet[0]} for row in rows] == quiet
    assert all(row["prefill"]["median"] > 0 < row["decode"]["median"] for row in rows)
    assert "| dense | 0.00% |" in shown(bench_quality, tmp_path, monkeypatch, capsys)


def other_tokens(folder: Path) -> Path:
    """A second text, of [6, 12]."""
    np.save(folder / "other.npy", np.random.default_rng(1).integers(0, VOCABULARY, (6, 12)).astype(np.uint16))
    return folder / "other.npy"


def test_quality_of_a_model_in_memory_is_that_of_eval(pico: MakeModel, tokens: Path) -> None:
    wanted = streamlap.evaluate(pico("llama"), tokens, limit=40)
    found = bench_quality.loss(AutoModelForCausalLM.from_pretrained(pico("llama")), tokens, 40)
    assert found["tokens"] == wanted.tokens == 2 * 15
    assert found["nll"] == pytest.approx(wanted.nll, abs=1e-6)


def test_quality_of_quantised_weights(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao.quantization")
    model = pico("llama", intermediate_size=64, dtype=torch.bfloat16)
    texts = [tokens, other_tokens(tmp_path)]
    monkeypatch.setattr(
        bench_quality, "losses", lambda _, folder: [vars(streamlap.evaluate(folder, text)) for text in texts]
    )
    words = ["--finished", "--calibration", tokens, "--text", *texts, "--model", model, "--rounds", 0]
    words += ["--quantised", "int8", "int4-32"]
    dense, int8, int4 = run(bench_quality, [str(word) for word in words], tmp_path, monkeypatch)["rows"]
    quantised = bench_quality.linears(AutoModelForCausalLM.from_pretrained(model)).values()
    count, rows = sum(linear.weight.numel() for linear in quantised), sum(linear.out_features for linear in quantised)
    assert count == dense["parameters"], "the linears that compressions cut"
    assert dense["bytes"] - int8["bytes"] == 2 * count - (count + 4 * rows)
    assert dense["bytes"] - int4["bytes"] == 2 * count - (count // 2 + count // 32 * 2 + count // 64)
    for text in (0, 1):
        assert 0 < abs(int8["texts"][text]["loss"]) < abs(int4["texts"][text]["loss"]) < 0.1
    assert "perplexity, other | loss, other |" in shown(bench_quality, tmp_path, monkeypatch, capsys)

    words = [*words[:-2], "int4-64"]
    with pytest.raises(SystemExit, match=r"q_proj has 32 inputs, no multiple of 64; leave out int4-64"):
        run(bench_quality, [str(word) for word in words], tmp_path, monkeypatch)


def test_quality_says_how_to_get_torchao(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    words = ["--model", "m", "--calibration", "c.npy", "--text", "t.npy", "--quantised", "int8"]
    monkeypatch.setattr(sys, "argv", ["bench_quality.py", *words])
    with pytest.raises(SystemExit):
        bench_quality.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith("--quantised needs torchao: pip install torchao")


def test_quality_keeps_no_figures_of_other_settings(tmp_path: Path) -> None:
    path, row = tmp_path / "out.json", {"name": "dense", "texts": []}
    path.write_text(json.dumps({"limit": 5, "rows": [row | {"prefill": {}, "decode": {}}]}))
    assert bench_quality.earlier(path, {"limit": 5}) == {"dense": row}
    with pytest.raises(SystemExit, match="has figures by other settings"):
        bench_quality.earlier(path, {"limit": 6})


@pytest.mark.parametrize("script", [bench_quality, bench_trained])
def test_a_limit_below_one_window_is_refused_before_any_work(
    script: ModuleType, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last of the texts, too."""
    monkeypatch.setattr(shared, "run_streamlap", None)
    longest = tmp_path / "longest.npy"
    np.save(longest, np.zeros((2, 64), np.int32))
    texts = [other_tokens(tmp_path), longest] if script is bench_quality else [longest]
    words = ["--model", "m", "--calibration", str(tokens), "--limit", "63", "--text", *map(str, texts)]
    with pytest.raises(SystemExit, match=r"--limit is 63 tokens; .*longest\.npy wants at least 64, one window\."):
        run(script, words, tmp_path, monkeypatch)
    shared.check_limit(64, texts)
    shared.check_limit(None, texts)


@pytest.mark.nightly
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--shape",
        "llama-2-7b",
        *SMALL,
        "--depths",
        "2",
        "--caps",
        "2GiB",
        "--tokens",
        "4x32",
        "--eval-cap",
        "--clean",
    ]
    result = run(bench_memory, words, tmp_path, monkeypatch)
    (row,), (capped,) = result["depths"], result["caps"]
    assert result["verdict"] == {"within": True, "identical": True}
    assert result["spread_percent"] == 0.0
    assert 1 << 27 < row["peak_rss_bytes"] < 2 << 30
    assert capped["cap_bytes"] == 2 << 30
    for part in (capped, capped["eval"]):
        assert part["completed"]
        assert part["wall_seconds"] > part["seconds"] > 0
        assert part["group"]["kind"] in ("none", *memory_group.LIMITS)
    assert not list((tmp_path / "work").glob("llama*"))
    assert "| compress, 2 layers | 2GiB |" in shown(bench_memory, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("preset", ["lorap", pytest.param("best", marks=pytest.mark.nightly)])
def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], preset: str) -> None:
    words = ["--case", "llama-3-8b:2,2GiB,4x32,float32", "--preset", preset, *SMALL]
    result = run(bench_plan, words, tmp_path, monkeypatch)
    (row,) = result["cases"]
    assert row["model"] == "llama-3-8b, 2 layers"
    assert row["dtype"] == "float32"
    assert row["verdict"]["output"]
    assert row["verdict"]["fits"]
    for key in bench_plan.SAME:
        assert row["error_percent"][key] == shared.percent(row["planned"][key], row["measured"][bench_plan.SAME[key]])
    assert result["verdict"]["worst_percent"].keys() == bench_plan.SAME.keys()
    table = shown(bench_plan, tmp_path, monkeypatch, capsys)
    assert "| llama-3-8b, 2 layers | 2GiB | 4x32 | output |" in table
    assert "- output within 0.1 %: yes" in table


@pytest.mark.nightly
@pytest.mark.parametrize("preset", ["lorap", "best"])
def test_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    result = run(bench_speed, ["--tokens", "4x32", "--preset", preset, *SMALL], tmp_path, monkeypatch)
    (row,) = result["runs"]
    assert row["layers"] == [1, 2]
    assert row["phases"].keys() == set(bench_speed.PHASES)
    assert row["measured"] == pytest.approx(sum(row["phases"].values()))
    assert row["floor"]["sum"] == pytest.approx(sum(row["floor_parts"].values()))
    assert row["floor"]["overlapped"] <= row["floor"]["sum"]
    assert result["ratio"]["sum"] == pytest.approx(row["measured"] / row["floor"]["sum"])
    assert row["rates"]["before"].keys() == row["rates"]["after"].keys() == row["rates_spread_percent"].keys()
    assert "| solve |" in shown(bench_speed, tmp_path, monkeypatch, capsys)


def test_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind stores at most the share that it may, orders included, and nearly all of it."""
    words = ["--hidden", "64", "--ffn", "128", "--layers", "1", "--heads", "4", "--kv-heads", "2", "--prompt", "8",
             "--decode", "2", "--repeats", "1"]  # fmt: skip
    result = run(bench_inference, words, tmp_path, monkeypatch)
    norms, linears = 2 * 64, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    kinds = [(ratio, kind) for ratio in (0.2, 0.5) for kind in ("factors", "ordered", "folded", "bare")]
    assert [(row["ratio"], row["kind"]) for row in result["rows"]] == [(0.0, "dense"), *kinds]
    for row in result["rows"]:
        share = (row["parameters"] - norms) / linears
        assert 0.97 * (1 - row["ratio"]) < share <= 1 - row["ratio"]
        assert min(row["prefill"], row["decode"]) > 0
    assert "| bare | 0.5 |" in shown(bench_inference, tmp_path, monkeypatch, capsys)


@pytest.mark.nightly
def test_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokens", "4x32", "--layers", "2", "--scale-down", "32", "--ratios", "0.3"]
    result = run(bench_presets, words, tmp_path, monkeypatch)
    assert [(row["preset"], row["ratio"], len(row["layers"])) for row in result["runs"]] == [
        ("lorap", 0.3, 2),
        ("best", 0.3, 2),
    ]
    lorap, best = result["runs"]
    assert "dense" in best["layers"][0]
    assert "dense" not in lorap["layers"][0]
    assert all(0 < row["peak_ram_bytes"] <= row["planned_ram_bytes"] for row in result["runs"])
    over = sum(best["layers"][1].values()) / sum(lorap["layers"][1].values())
    assert f"| {over:.2f} |" in shown(bench_presets, tmp_path, monkeypatch, capsys)


@pytest.mark.nightly
def test_gpu_script_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_devices, "SAMPLES", 8)
    monkeypatch.setattr(compare_devices, "LAYERS", 2)
    words = ["--device", "cpu", *SMALL, "--layers", "2", "--caps", "1GiB", "--samples", "4", "--length", "32"]
    result = run(bench_gpu, words, tmp_path, monkeypatch)
    checks = ("ranks", "kept", "products", "perplexity", "no overlap", "least memory")
    assert list(result["small"]) == ["lorap", "best"]
    assert all(row["verdict"] == dict.fromkeys(checks, True) for row in result["small"].values())
    assert list(result["runs"]) == ["lorap, 1GiB", "best, 1GiB", "lorap, 1GiB, no overlap"]
    assert result["verdict"] == dict.fromkeys(("small", "same_bytes", "inside_vram", "inside_ram"), True)
    for row in result["runs"].values():
        assert row["tokens"] == [4, 32]
        assert row["published_layers"] == 80
        assert row["published_seconds"] > row["seconds"]
        assert row["speed"]["ratio"]["sum"] > 0
    table = shown(bench_gpu, tmp_path, monkeypatch, capsys)
    assert "| lorap, 1GiB, no overlap | 0.0 MiB |" in table
    assert "- small, best, perplexity: " in table
    assert "- same bytes: yes" in table


def test_gpu_script_leaves_out_what_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(bench_gpu, ["--device", "cpu", "--minutes", "0.01"], tmp_path, monkeypatch)
    assert result["source"] == {"skipped": "time"}
    assert result["small"] == {preset: {"skipped": "time"} for preset in ("lorap", "best")}
    assert result["runs"] == {}
    assert set(result["verdict"].values()) == {None}


def test_a_failing_part_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "compare_devices", lambda work, device, preset: 1 / 0)
    args = SimpleNamespace(out=tmp_path / "gpu.json")
    bench = bench_gpu.Bench(args=args, work=tmp_path, device="cpu", clock=bench_gpu.Clock(1))
    assert not bench.attempt("small", 1, lambda: bench_gpu.compare_devices(tmp_path, "cpu", "best"))
    assert bench.attempt("next", 1, lambda: {"fine": 1})
    saved = json.loads(args.out.read_text())
    assert saved["small"] == {"failed": "ZeroDivisionError: division by zero"}
    assert saved["next"] == {"fine": 1}


def test_fewer_windows_are_taken_until_the_runs_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_gpu.Bench(
        args=SimpleNamespace(samples=128, length=16, presets=["lorap", "best"], caps=["8GiB"]),
        work=tmp_path, device="cpu", clock=bench_gpu.Clock(100 / 60),
    )  # fmt: skip
    costs = {"lorap": 0.5, "best": 1.5}
    monkeypatch.setattr(bench_gpu.Bench, "expected", lambda self, preset, samples: samples * costs[preset])
    assert bench.affordable_samples() == 32  # one of each preset and the last rates go into 100 seconds, with 64 not
    monkeypatch.setattr(bench_gpu.Bench, "expected", lambda self, preset, samples: 1000)
    assert bench.affordable_samples() == bench_gpu.LEAST_SAMPLES


def test_the_whole_model_is_what_was_measured_and_inner_layers() -> None:
    layers = [{"seconds": {"solve": seconds}} for seconds in (9.0, 2.0, 4.0, 1.0)]
    assert bench_gpu.whole_seconds(layers, 20.0, 80) == 20 + 76 * 3
    assert bench_gpu.whole_seconds(layers[1:3], 20.0, 12) == 20 + 10 * 3


def test_runs_on_a_gpu_are_judged_together() -> None:
    row = {"preset": "lorap", "shards": {"a": "1"}, "peak_vram_bytes": 8, "max_vram_bytes": 8, "peak_ram_bytes": 5,
           "max_ram_bytes": 4}  # fmt: skip
    small = {"lorap": {"verdict": {"ranks": True}}, "best": {"skipped": "time"}}
    other = row | {"shards": {"a": "2"}}
    judged = bench_gpu.verdict({"small": small, "runs": {"8": row, "24": other}})
    assert judged == {"small": True, "same_bytes": False, "inside_vram": True, "inside_ram": False}
    apart = bench_gpu.verdict({"small": {}, "runs": {"8": row, "8 again": row, "best": other | {"preset": "best"}}})
    assert (apart["small"], apart["same_bytes"]) == (None, True), "each preset has bytes of its own"


def test_floor_by_hand() -> None:
    layer = bench_speed.LayerWork(
        read_bytes=200, write_bytes=30, upload_bytes=0, flops=600, flops64=14, flops32=12,
        decompositions=((2, "float64"), (4, "float32"), (2, "float64")), linears=((2, 5), (2, 5), (4, 5)),
    )  # fmt: skip
    rates = {"read": 100.0, "write": 10.0, "products": 7.0, "products32": 12.0, "linear 2 x 5": 100.0, "linear 4 x 5": 50.0,
             "eigh 2 float64": 8.0, "eigh 4 float32": 32.0}  # fmt: skip
    parts = bench_speed.floor(layer, rates)
    # Half of the operations go at 100 and half at 50: 3 + 6 seconds.
    assert parts == pytest.approx(
        {"read": 2, "write": 3, "upload": 0, "forward": 9, "products": 2 + 1, "decompositions": 1 + 2 + 1}
    )
    assert bench_speed.overlapped(parts) == pytest.approx(16)
    assert bench_speed.overlapped(parts | {"upload": 20}) == pytest.approx(25)


def test_decompositions_are_measured_as_they_are_done() -> None:
    """A forecast counts one in float32 as a smaller one in float64."""
    sizes = [4096, 2048, 1025, 1024, 576]
    counted = [int(bench_speed.SINGLE * size) if size > bench_speed.LARGE else size for size in sizes]
    kinds = ["float32", "float32", "float32", "float64", "float64"]
    assert [bench_speed.eigen_problem(size, sizes) for size in counted] == list(zip(sizes, kinds, strict=True))


@pytest.mark.parametrize(("depth", "counted"), [(1, [0]), (2, [0, 1]), (3, [1, 2])])
def test_the_first_layer_counts_only_where_there_are_few(depth: int, counted: list[int]) -> None:
    layer = bench_speed.LayerWork(
        read_bytes=1, write_bytes=0, upload_bytes=0, flops=0, flops64=0, flops32=0, decompositions=(), linears=((1, 1),)
    )
    work = SimpleNamespace(layers=(layer,) * depth)
    rates = {"read": 1.0, "write": 1.0, "products": 1.0, "linear 1 x 1": 1.0}
    report = {"layers": [{"index": index, "seconds": {"read": 3.0}} for index in range(depth)]}
    judged = bench_speed.judge(work, report, rates)
    assert judged["layers"] == counted
    assert judged["ratio"] == {"sum": 3.0, "overlapped": 3.0}


def test_the_better_rates_count() -> None:
    assert bench_speed.better({"read": 1.0, "write": 5.0}, {"read": 2.0, "write": 4.0}) == {"read": 2.0, "write": 5.0}


def planned(**changes: Any) -> dict[str, Any]:
    sizes = {"output_bytes": 1001, "peak_ram_bytes": 1100, "read_bytes": 50, "write_bytes": 25}
    ways = {"fits": True, "seconds_low": 4.0, "seconds_high": 8.0, "overlap": True, "hidden_states": "ram"}
    return {**sizes, **ways, **changes}


def done(code: int = 0, seconds: float = 5.0) -> shared.Done:
    layers = [{"bytes_read": 30, "bytes_written": 10}] * 2  # without what is outside them, which the plan counts
    output = {"peak_ram_bytes": 1000, "seconds": 4.5, "layers": layers} if not code else {}
    return shared.Done(
        code=code, output=output, error="", seconds=9.0, working_seconds=seconds, moved_bytes=(80, 50), peak_rss_bytes=1000,
    )  # fmt: skip


def test_a_plan_is_held_against_its_run() -> None:
    row = bench_plan.compare(planned(), done(), 1000)
    assert row["error_percent"] == {
        "output_bytes": 0.1, "peak_ram_bytes": 10.0, "read_bytes": -37.5, "write_bytes": -50.0,
        "seconds_low": -20.0, "seconds_high": 60.0,
    }  # fmt: skip
    assert row["verdict"] == {"fits": True, "output": True, "peak": True, "seconds": True}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [({"output_bytes": 1002}, "output"), ({"peak_ram_bytes": 890}, "peak"), ({"seconds_low": 5.1}, "seconds"),
     ({"seconds_high": 4.9}, "seconds"), ({"fits": False}, "fits")],
)  # fmt: skip
def test_a_plan_that_is_off_is_called_so(changes: dict[str, Any], wrong: str) -> None:
    row = bench_plan.compare(planned(**changes), done(), 1000)
    assert [name for name, good in row["verdict"].items() if not good] == [wrong]
    assert not bench_plan.verdict([row])[wrong]


def test_a_refused_case_is_right_where_the_plan_says_so() -> None:
    right, wrong = (bench_plan.compare(planned(fits=fits), done(code=4), 0) for fits in (False, True))
    assert right["refused"]
    assert bench_plan.verdict([right])["fits"]
    assert not bench_plan.verdict([right, wrong])["fits"]
    assert bench_plan.table({"cases": [right | {"model": "m", "cap": "1GiB", "tokens": [1, 2]}]}).count("yes") == 3


def test_cases_are_words() -> None:
    case = bench_plan.Case.parse("llama-3-8b:2,1.5GiB,4x512")
    assert (case.made, case.cap, case.samples, case.length, case.dtype) == (("llama-3-8b", 2), "1.5GiB", 4, 512, "auto")
    assert bench_plan.Case.parse("some/model,8GiB,16x32,float32").made is None
    for wrong in ("llama-3-8b:2", "llama-3-8b:2,8GiB,16", "llama-3-8b:2,8GiB,16x2,auto,more"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not"):
            bench_plan.Case.parse(wrong)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up tree of control groups, in which a folder goes with the files that a kernel would have put there."""
    monkeypatch.setattr(memory_group, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory_group, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(memory_group, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)
    return tmp_path


def test_a_group_of_version_1(groups: Path) -> None:
    (groups / "own").write_text("5:cpu:/job\n4:cpuset,memory:/job/step\n0::/elsewhere\n")
    above = groups / "memory" / "job"
    above.mkdir(parents=True)  # the innermost folder is not there: a container that shows the host's path
    with memory_group.limited_group(4096) as group:
        assert group is not None
        assert group.kind == "cgroup v1"
        assert group.folder.parent == above
        assert (group.folder / "memory.limit_in_bytes").read_text() == "4096"
        assert (group.folder / "memory.memsw.limit_in_bytes").read_text() == "4096"
        (group.folder / "memory.max_usage_in_bytes").write_text("4000\n")
        (group.folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
        assert group.figures() == {"peak_bytes": 4000, "limit_hits": None, "oom_kills": 2}
    assert not list(above.iterdir())


def test_a_group_of_version_2_is_made_where_memory_is_handed_down(groups: Path) -> None:
    (groups / "own").write_text("0::/user/session\n")
    (groups / "user" / "session").mkdir(parents=True)
    (groups / "user" / "session" / "cgroup.subtree_control").write_text("cpu\n")
    (groups / "user" / "cgroup.subtree_control").write_text("cpu memory\n")
    with memory_group.limited_group(4096) as group:
        assert group is not None
        assert group.kind == "cgroup v2"
        assert group.folder.parent == groups / "user"
        assert (group.folder / "memory.max").read_text() == "4096"
        assert (group.folder / "memory.swap.max").read_text() == "0"
        assert (group.folder / "cgroup.procs").read_text().strip().isdigit()  # that of the trial
        (group.folder / "memory.peak").write_text("4000\n")
        (group.folder / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n")
        assert group.figures() == {"peak_bytes": 4000, "limit_hits": 7, "oom_kills": 1}
    assert not list((groups / "user").glob("streamlap*"))


def test_no_group_where_none_can_be_made(groups: Path) -> None:
    for text in ("", "0::/\n", "4:memory:/gone\n"):
        (groups / "own").write_text(text)
        with memory_group.limited_group(4096) as group:
            assert group is None


def test_a_group_that_cannot_be_entered_is_none(groups: Path) -> None:
    (groups / "own").write_text("4:memory:/\n")
    (groups / "memory").mkdir()
    limit = memory_group.Group.limit

    def refuse(self: memory_group.Group, count: int) -> None:
        (self.folder / "cgroup.procs").mkdir()
        limit(self, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_group.Group, "limit", refuse)
        with memory_group.limited_group(4096) as group:
            assert group is None
    assert not list((groups / "memory").iterdir())


@pytest.mark.parametrize(
    ("row", "within"),
    [({}, True), ({"completed": False}, False), ({"peak_rss_bytes": 11}, False), ({"oom_kills": 1}, False)],
)
def test_a_capped_run_is_within_if_nothing_broke_it(
    row: dict[str, Any], within: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SimpleNamespace(kind="cgroup v1", prefix=(), figures=lambda: {"oom_kills": row.get("oom_kills", 0)})
    code = 0 if row.get("completed", True) else -9
    output = {"seconds": 1.0, "peak_ram_bytes": row.get("peak_rss_bytes", 10)}
    end = shared.Done(code=code, output=output, error="", seconds=2.0, working_seconds=0.0, peak_rss_bytes=3)
    monkeypatch.setattr(bench_memory, "limited_group", lambda count: contextlib.nullcontext(group))
    monkeypatch.setattr(shared, "run_streamlap", lambda *words, prefix: end)
    found = bench_memory.capped_run(argparse.Namespace(cgroup=None), tmp_path, "10B", "compress")
    assert found["within"] is within
    assert found["peak_rss_bytes"] == row.get("peak_rss_bytes", 10)
    assert ("exit_code" in found) is (code != 0)


def test_a_run_that_takes_too_long_is_killed_and_so_is_one_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended = shared.run_streamlap(prefix=("sh", "-c", "echo late >&2; exec sleep 60"), timeout=0.2)
    assert ended.timed_out
    assert ended.code == -signal.SIGKILL
    assert ended.error == "late"
    assert ended.output == {}
    assert 0.2 <= ended.seconds < 20
    with pytest.raises(SystemExit, match="exit code -9: late"):
        ended.required()

    def interrupt(pid: int) -> int:
        assert psutil.Process(pid).is_running()
        pids.append(pid)
        raise KeyboardInterrupt

    pids: list[int] = []
    monkeypatch.setattr(shared, "high_water", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shared.run_streamlap(prefix=("sh", "-c", "exec sleep 60"))
    assert not psutil.pid_exists(pids[0])


def test_small_numbers() -> None:
    assert shared.windows("8x512") == (8, 512)
    assert shared.percent(110, 100) == 10.0
    assert shared.spread_percent([102, 100, 101]) == 2.0
    assert shared.markdown(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"
    assert [shared.size(count) for count in (None, 1 << 20, 3 << 30)] == ["", "1.0 MiB", "3.00 GiB"]
    assert [shared.yes(value) for value in (None, True, False)] == ["", "yes", "**no**"]


def test_a_command_that_is_shown_names_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/scripts/bench_x.py", "--model", "/data/me/llama", "--caps", "1GiB"])
    assert shared.shown_command() == "python scripts/bench_x.py --model llama --caps 1GiB"


def test_the_page_names_every_benchmark_and_its_flags() -> None:
    page = (ROOT / "docs" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for script in (bench_memory, bench_plan, bench_speed, bench_gpu, ablate, bench_peers):
        lines = [line for line in page.splitlines() if f"scripts/{script.__name__}.py" in line]
        assert lines, script.__name__
        source = Path(script.__file__).read_text(encoding="utf-8") + Path(shared.__file__).read_text(encoding="utf-8")
        for flag in {word for line in lines for word in line.split() if word.startswith("--")}:
            assert f'"{flag}"' in source, f"{script.__name__} {flag}"
