#!/usr/bin/env python
"""Seconds of `streamlap compress` over the seconds that no program could do without on this machine.

    python scripts/bench_speed.py --model DIR [--device cuda] [--tokens 16x512] [--repeat 3] --out speed.json
    python scripts/bench_speed.py --shape llama-3-8b --layers 4 --work DIR

The floor of a layer: bytes read and written over the measured rates of the disk, its linears' forward operations over the
rates of products of these very shapes in the compute dtype, the solves' products in float64 and float32 over their rates, and
eigen-decompositions at their very sizes; on a GPU also the upload. Bytes and operations are the product's own forecast; tensors
that stay as they are count as read once. `sum` adds these up, `overlapped` takes the longer of disk and computation, layer by
layer.

Rates are measured before and after every run and the better ones count, so that noise cannot flatter the ratio. Measured are
the report's seconds by phase, of all layers but the first where there are more than two.

Shape suffixes: O rows, I columns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
import torch
from benchmarks import Result

from streamlap.families.stream import BATCH_TOKENS, ModelStream
from streamlap.linalg.gram import LARGE
from streamlap.linalg.moments import held_sequences
from streamlap.linalg.products import product
from streamlap.methods import PRESETS
from streamlap.methods.anchored.costs import SINGLE
from streamlap.planning.decide import decide
from streamlap.planning.forecast import forecast_layers
from streamlap.planning.layouts import layer_entries
from streamlap.recipe import Recipe
from streamlap.system import disk_speed
from streamlap.system import speed as machine
from streamlap.system.device import pick_device

PHASES = ("read", "dense", "capture", "solve", "write", "propagate")
DISK = ("read", "write", "upload")
PRODUCT_SIZE = 4096
"""Rows, columns and tokens of the product whose rate stands for the solves'."""


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What one layer takes, whoever does it."""

    read_bytes: int
    write_bytes: int
    upload_bytes: int
    flops: int
    """Of its forwards."""
    flops64: int
    flops32: int
    decompositions: tuple[tuple[int, str], ...]
    """Size and dtype of each."""
    linears: tuple[tuple[int, int], ...]
    """(O, I) of the products of a forward before and one after it is edited, once for each."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    device: str
    dtype: torch.dtype
    shard: Path
    """The largest of the model, to time reads by."""
    layers: tuple[LayerWork, ...]


def workload(
    model: Path, device: str, shape_NL: tuple[int, int], plan: Result, preset: str = shared.ENGINE
) -> Workload:
    """From headers; `plan` is the product's own, made with the flags of the run: it knows where hidden states lie."""
    stream, recipe = ModelStream(model, device), Recipe(preset=preset, methods=PRESETS[preset])
    held, candidates = len(held_sequences(*shape_NL)), decide(stream, recipe).candidates
    foretold, layers = forecast_layers(stream, recipe, candidates, shape_NL, held), []
    for layer, planned in zip(foretold, plan["layers"], strict=True):
        shapes = products(stream.layer_tensors(layer.index))
        sides = {side for shape in shapes for side in shape}
        if layer.index + 1 < stream.depth:
            shapes += products(layer_entries(stream, layer.index, layer.layout))
        layers.append(LayerWork(
            read_bytes=planned["read_bytes"] - layer.copied_bytes, write_bytes=planned["write_bytes"],
            upload_bytes=layer.source_bytes * (stream.device.type == "cuda"), flops=layer.flops, flops64=layer.flops64,
            flops32=layer.flops32, linears=tuple(shapes),
            decompositions=tuple(
                eigen_problem(size, sides) if layer.flops32 else (size, "float64") for size in layer.decompositions
            ),
        ))  # fmt: skip
    shard = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    return Workload(device=device, dtype=stream.dtype, shard=shard, layers=tuple(layers))


def products(tensors: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(O, I) of every weight matrix that a forward multiplies by, of a layer's tensors."""
    return [(tensor.shape[0], tensor.shape[1]) for tensor in tensors.values() if len(tensor.shape) == 2]


def measure_rates(work: Workload, out: Path) -> dict[str, float]:
    """Every rate that the floor divides by, by name. Bytes/s, FLOP/s, n^3/s."""
    linears = {shape for layer in work.layers for shape in layer.linears}
    problems = {problem for layer in work.layers for problem in layer.decompositions}
    size = (PRODUCT_SIZE, PRODUCT_SIZE, PRODUCT_SIZE)
    rates = {
        "read": disk_speed.read_rate(work.shard, disk_speed.DISK_BYTES * 4),
        "write": disk_speed.measure_disk(out).write,
        "products": machine.matmul_rate(work.device, torch.float64, *size, multiply=product),
    }
    if any(layer.flops32 for layer in work.layers):
        rates["products32"] = machine.matmul_rate(work.device, torch.float32, *size, multiply=product)
    if any(layer.upload_bytes for layer in work.layers):
        rates["upload"] = machine.upload_rate(work.device)
    for rows, columns in sorted(linears):
        rates[linear_name(rows, columns)] = machine.matmul_rate(work.device, work.dtype, BATCH_TOKENS, columns, rows)
    for size, kind in sorted(problems):
        rates[eigen_name(size, kind)] = machine.eigh_rate(work.device, size, getattr(torch, kind))
    return rates


def linear_name(rows: int, columns: int) -> str:
    return f"linear {rows} x {columns}"


def eigen_name(size: int, kind: str) -> str:
    return f"eigh {size} {kind}"


def eigen_problem(size: int, sides: Collection[int]) -> tuple[int, str]:
    """Size and dtype of a decomposition, the sides of the layer's matrices being these. The forecast counts one in float32 as a
    smaller one in float64."""
    if size <= LARGE and size in sides:
        return size, "float64"
    return math.ceil(size / SINGLE), "float32"


def better(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: max(rate, other[name]) for name, rate in one.items()}


def floor(layer: LayerWork, rates: dict[str, float]) -> dict[str, float]:
    """Seconds of each part."""
    sizes = Counter(layer.linears)
    weights = sum(rows * columns * count for (rows, columns), count in sizes.items())
    per_weight = sum(
        rows * columns * count / rates[linear_name(rows, columns)] for (rows, columns), count in sizes.items()
    )
    return {
        "read": layer.read_bytes / rates["read"],
        "write": layer.write_bytes / rates["write"],
        "upload": layer.upload_bytes / rates["upload"] if layer.upload_bytes else 0.0,
        "forward": layer.flops * per_weight / weights,
        "products": layer.flops64 / rates["products"] + (layer.flops32 and layer.flops32 / rates["products32"]),
        "decompositions": sum(size**3 / rates[eigen_name(size, kind)] for size, kind in layer.decompositions),
    }


def overlapped(parts: dict[str, float]) -> float:
    """Disk and computation at the same time."""
    disk = sum(parts[name] for name in DISK)
    return max(disk, sum(parts.values()) - disk)


def judge(work: Workload, report: Result, rates: dict[str, float]) -> Result:
    """Measured over floor, for the layers that count."""
    counted = report["layers"][1 if len(report["layers"]) > 2 else 0 :]
    floors = [floor(work.layers[layer["index"]], rates) for layer in counted]
    phases = {name: sum(layer["seconds"].get(name, 0.0) for layer in counted) for name in PHASES}
    parts = {name: sum(layer[name] for layer in floors) for name in floors[0]}
    measured, least = sum(phases.values()), {"sum": sum(parts.values()), "overlapped": sum(map(overlapped, floors))}
    return {
        "layers": [layer["index"] for layer in counted], "phases": phases, "measured": measured, "floor_parts": parts,
        "floor": least, "ratio": {name: measured / seconds for name, seconds in least.items()},
    }  # fmt: skip


def run_once(work: Workload, model: Path, folder: Path, flags: list[Any], before: dict[str, float]) -> Result:
    """One compression, judged by the better of the rates before and after it."""
    with shared.new_folder(folder / "out") as out:
        shared.drop_cache(model)
        done = shared.run_streamlap("compress", model, out, *flags, watch=out).required()
    after = measure_rates(work, folder)
    outside = done.working_seconds - done.output["seconds"]
    return {
        **judge(work, done.output, better(before, after)), "outside_layers": outside, "wall_seconds": done.seconds,
        "peak_ram_bytes": done.output["peak_ram_bytes"], "peak_vram_bytes": done.output["peak_vram_bytes"],
        "rates": {"before": before, "after": after},
        "rates_spread_percent": {name: shared.spread_percent([rate, after[name]]) for name, rate in before.items()},
    }  # fmt: skip


def bench(args: argparse.Namespace, folder: Path) -> Result:
    model = args.model or shared.checkpoint(folder, args.shape, args.layers, args.scale_down)
    device = pick_device(args.device)
    flags = [
        "--calibration",
        shared.tokens_file(folder, model, *args.tokens),
        "--device",
        device,
        "--preset",
        args.preset,
        *shared.AS_GIVEN,
    ]
    for name, value in (("--max-ram", args.max_ram), ("--max-vram", args.max_vram)):
        flags += [name, value] if value else []
    with shared.new_folder(folder / "cache") as cache:
        variables = {"XDG_CACHE_HOME": str(cache.absolute())}
        plan = shared.run_streamlap("plan", model, *flags, variables=variables).required().output
    work = workload(model, device, args.tokens, plan, args.preset)
    rates, runs = measure_rates(work, folder), []
    for _ in range(args.repeat):
        runs.append(run_once(work, model, folder, flags, rates))
        rates = runs[-1]["rates"]["after"]
    middle = {name: statistics.median(run["ratio"][name] for run in runs) for name in ("sum", "overlapped")}
    return {
        "model": model.name, "device": device, "dtype": str(work.dtype), "tokens": args.tokens, "overlap": plan["overlap"],
        "hidden_states": plan["hidden_states"], "work": [asdict(layer) for layer in work.layers], "runs": runs, "ratio": middle,
    }  # fmt: skip


def table(result: Result) -> str:
    """The run in the middle, phase by phase, and the ratios of all."""
    run = sorted(result["runs"], key=lambda run: run["ratio"]["sum"])[(len(result["runs"]) - 1) // 2]
    lines = [phase_table(run)]
    for name in ("sum", "overlapped"):
        ratios = ", ".join(f"{run['ratio'][name]:.2f}" for run in result["runs"])
        lines.append(f"- measured / floor, {name}: {result['ratio'][name]:.2f} (run by run: {ratios})")
    lines.append(f"- rates before and after a run lie apart by up to {max(run['rates_spread_percent'].values()):.0f} %")
    lines.append(
        f"- layers counted: {', '.join(map(str, run['layers']))}; outside of all layers {run['outside_layers']:.1f} s"
    )
    return "\n".join(lines)


def phase_table(run: Result) -> str:
    """Seconds of the counted layers."""
    parts, phases = run["floor_parts"], run["phases"]
    rows = [
        ("read", phases["read"], parts["read"] + parts["upload"]),
        (
            "dense, capture, propagate",
            sum(phases[name] for name in ("dense", "capture", "propagate")),
            parts["forward"],
        ),
        ("solve", phases["solve"], parts["products"] + parts["decompositions"]),
        ("write", phases["write"], parts["write"]),
        ("total", run["measured"], run["floor"]["sum"]),
        ("total, disk beside computation", run["measured"], run["floor"]["overlapped"]),
    ]
    cells = [(name, f"{measured:.2f}", f"{least:.2f}", f"{measured / least:.2f}") for name, measured, least in rows]
    return shared.markdown(["phase", "measured, s", "floor, s", "ratio"], cells) + "\n"


def main() -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder; by default one is made")
    shared.preset_option(parser)
    parser.add_argument("--shape", default="llama-3-8b", help="of the checkpoint to be made (llama-3-8b)")
    parser.add_argument("--layers", type=int, default=3, help="of the checkpoint to be made (3)")
    parser.add_argument("--tokens", type=shared.windows, default=(16, 512), help="windows x tokens (16x512)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    parser.add_argument("--max-ram", help="cap of the run, such as 8GiB")
    parser.add_argument("--max-vram", help="the same for the GPU")
    parser.add_argument("--repeat", type=int, default=1, help="runs (1)")
    args = parser.parse_args()
    shared.conclude(args, partial(bench, args), table)


if __name__ == "__main__":
    main()
