#!/usr/bin/env python
r"""What training a layer is worth beside closed forms: loss, seconds and peak memory of each way at each ratio.

    python scripts/bench_trained.py --model DIR --calibration FILE.npy --text FILE.npy --ratios 0.2 0.5 \
        --out trained.json [--table] [--ways lorap best loraprune] [--epochs 10] [--samples 128] \
        [--recover TEXT --recover-samples 64 --recover-epochs 1]

Ways: the presets in one shot; `best` with --refine; LoRAPrune, also by other importance with the same training; PC-LoRA from a
random start, as published, from the closed form, and that closed form as it is. A way that cannot reach a ratio has its reason
in place of numbers. With --recover every result is also recovered on that text beside the dense model. What --out has already,
from the same options, is not made again.

Loss is ln(perplexity / dense perplexity), on windows as the text file has them. Every run is a process of its own. Peak memory
is the highest that the command reports of itself, Python and its libraries with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
from benchmarks import Result

from streamlap.methods.trained.loraprune import LoraPrune
from streamlap.methods.trained.pclora import PcLora
from streamlap.recipe import Recipe

UNMOVED = 1e-12
"""A learning rate at which nothing is learnt."""

WAYS: dict[str, Recipe] = {
    "lorap": Recipe(preset="lorap"),
    "best": Recipe(),
    "best --refine": Recipe().override(refine=25),
    "loraprune": Recipe(preset="loraprune"),
    "loraprune model": Recipe(preset="custom", methods=(LoraPrune(importance="model"),)),
    "loraprune magnitude": Recipe(preset="custom", methods=(LoraPrune(metric="magnitude"),)),
    "loraprune random": Recipe(preset="custom", methods=(LoraPrune(metric="random"),)),
    "pclora random": Recipe(preset="custom", methods=(PcLora(begin="random", learning_rate=0.1),)),
    "pclora warm": Recipe(preset="pclora"),
    "pclora start": Recipe(preset="custom", methods=(PcLora(epochs=1, learning_rate=UNMOVED),)),
}
SAME = ("calibration", "text", "samples", "epochs", "limit", "as_given", "recover", "recover_samples", "recover_epochs")
"""Options of which rows of two runs must have the same to stand in one table."""


def bench(args: argparse.Namespace, work: Path) -> Result:
    shared.check_limit(args.limit, [args.text])
    options = {name: getattr(args, name) for name in SAME}
    options = {name: value.name if isinstance(value, Path) else value for name, value in options.items()}
    result = earlier(args.out, {"model": args.model.name, "options": options})
    if "dense_nll" not in result:
        result |= {"machine": shared.machine(), "dense_nll": loss(args, args.model), "rows": []}
    for ratio, way in itertools.product(args.ratios, args.ways):
        if any((row["way"], row["ratio"]) == (way, ratio) for row in result["rows"]):
            continue
        print(f"{way} at {ratio:g}", file=sys.stderr, flush=True)
        result["rows"].append({"way": way, "ratio": ratio, **run(args, work, way, ratio, result["dense_nll"])})
        shared.save(args.out, result)
    return result


def earlier(file: Path | None, own: Result) -> Result:
    """What an earlier run with the same options wrote, or just these."""
    found: Result = json.loads(file.read_text()) if file and file.exists() else {}
    return found if all(found.get(name) == value for name, value in own.items()) else own


def run(args: argparse.Namespace, work: Path, way: str, ratio: float, dense: float) -> Result:
    """One compression, and what it lost; `failed` where there is none."""
    recipe, file = work / "recipe.yaml", args.calibration
    recipe.write_text(with_epochs(WAYS[way], args.epochs).override(samples=args.samples).to_yaml())
    flags = ["--recipe", recipe, "--ratio", ratio, "--calibration", file, "--device", args.device]
    flags += [*shared.AS_GIVEN] * args.as_given
    with shared.new_folder(work / "out") as out:
        done = shared.run_streamlap("compress", args.model, out, *flags)
        if done.code:
            return {"failed": done.error}
        nll, report = loss(args, out), done.output
        recovered = {"recovered": recovery(args, work, out, dense)} if args.recover else {}
    traces = [layer["refinement"] for layer in report["layers"] if layer["refinement"]]
    return {
        "nll": nll, "loss": nll - dense, "removed": report["parameters"]["ratio_decoder"], "seconds": done.seconds,
        "layer_seconds": report["seconds"], "peak_ram_bytes": report["peak_ram_bytes"],
        "peak_vram_bytes": report["peak_vram_bytes"], "training": traces, **recovered,
    }  # fmt: skip


def recovery(args: argparse.Namespace, work: Path, out: Path, dense: float) -> Result:
    """What LoRA over some text, beside the dense model, takes away of the loss; `failed` where it was not written."""
    flags = ["--text", args.recover, "--dense", args.model, "--device", args.device, "--epochs", args.recover_epochs]
    with shared.new_folder(work / "recovered") as folder:
        done = shared.run_streamlap("recover", out, folder, *flags, "--samples", args.recover_samples)
        if done.code or not folder.is_dir():
            return {"failed": done.error or "nothing was gained", "seconds": done.seconds}
        nll = loss(args, folder)
    return {"nll": nll, "loss": nll - dense, "seconds": done.seconds, "peak_rss_bytes": done.peak_rss_bytes}


def with_epochs(recipe: Recipe, epochs: int | None) -> Recipe:
    """The recipe with so many epochs for what trains; None leaves each its own."""
    if epochs is None:
        return recipe
    trains = [getattr(method, "learning_rate", 0.0) > UNMOVED for method in recipe.methods]
    methods: tuple[Any, ...] = tuple(
        replace(method, epochs=epochs) if moved else method
        for method, moved in zip(recipe.methods, trains, strict=True)
    )
    return replace(recipe, methods=methods, preset="custom")


def loss(args: argparse.Namespace, folder: Path) -> float:
    words = ["eval", folder, "--text", args.text, "--dtype", "float32", "--device", args.device]
    words += ["--limit", args.limit] if args.limit else []
    return math.log(shared.run_streamlap(*words).required().output["perplexity"])


def table(result: Result) -> str:
    columns = ["removed", "way", "reached", "loss", "seconds", "peak RAM", "peak VRAM", "held-out loss of layers"]
    columns += ["loss, recovered", "seconds", "peak RAM"]
    return shared.markdown(columns, map(cells, result["rows"]))


def cells(row: Result) -> list[object]:
    if "failed" in row:
        return [f"{row['ratio']:.0%}", row["way"], "", f"none: {row['failed']}", *[""] * 7]
    ends = [(trace["start"], trace.get("end", trace.get("best"))) for trace in row["training"]]
    means = [sum(column) / len(ends) for column in zip(*ends, strict=True)]
    return [
        f"{row['ratio']:.0%}", row["way"], f"{row['removed']:.2%}", f"{row['loss']:.4f}", f"{row['seconds']:.0f}",
        shared.size(row["peak_ram_bytes"]), shared.size(row["peak_vram_bytes"] or None),
        " to ".join(f"{mean:.3f}" for mean in means), *recovered_cells(row.get("recovered")),
    ]  # fmt: skip


def recovered_cells(found: Result | None) -> list[object]:
    if not found:
        return ["", "", ""]
    seconds = f"{found['seconds']:.0f}"
    if "failed" in found:
        return [f"none: {found['failed']}", seconds, ""]
    return [f"{found['loss']:.4f}", seconds, shared.size(found["peak_rss_bytes"])]


def main() -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder")
    parser.add_argument("--calibration", type=Path, help="token ids [N, L], or text")
    parser.add_argument("--text", type=Path, help="token ids [N, L] to measure on, or text")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="(all)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5], help="(0.2 0.5)")
    parser.add_argument("--epochs", type=int, help="of all that trains (each its own)")
    parser.add_argument("--samples", type=int, help="calibration windows (all of a token file, 128 of a text)")
    parser.add_argument("--limit", type=int, help="tokens of the text (all)")
    parser.add_argument("--recover", type=Path, metavar="TEXT", help="text on which each result is recovered (none is)")
    parser.add_argument("--recover-samples", type=int, default=64, help="windows of it (64)")
    parser.add_argument("--recover-epochs", type=int, default=1, help="over them (1)")
    parser.add_argument("--as-given", action="store_true", help="without a survey and redrawn windows")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    args = parser.parse_args()
    if not args.load and not (args.model and args.calibration and args.text):
        parser.error("wanted --model, --calibration and --text, or --load")
    shared.conclude(args, lambda work: bench(args, work), table)


if __name__ == "__main__":
    main()
