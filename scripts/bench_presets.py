#!/usr/bin/env python
"""Seconds of a layer, phase by phase, and peak memory beside what `plan` said, for one preset after another.

    python scripts/bench_presets.py --shape llama-2-7b --tokens 16x512 --work DIR --out presets.json [--table]
    python scripts/bench_presets.py --model DIR --presets lorap best --ratios 0.2 0.5

Every run is a process of its own, with the source's shards dropped from the page cache before it. Layers are compared one by
one, so that the first, which is propagated, and the last, which is not, both speak for themselves.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
from benchmarks import Result

from streamlap.methods import PRESETS

BASE = "lorap"
"""What the others' seconds are divided by."""


def bench(args: argparse.Namespace, folder: Path) -> Result:
    model = args.model or shared.checkpoint(folder, args.shape, args.layers, args.scale_down)
    tokens = shared.tokens_file(folder, model, *args.tokens)
    runs = [
        run(model, tokens, folder, args, preset, ratio)
        for ratio, preset in itertools.product(args.ratios, args.presets)
    ]
    return {"model": model.name, "tokens": args.tokens, "runs": runs}


def run(model: Path, tokens: Path, folder: Path, args: argparse.Namespace, preset: str, ratio: float) -> Result:
    flags = ["--calibration", tokens, *shared.AS_GIVEN, "--device", args.device, "--preset", preset, "--ratio", ratio]
    plan = shared.run_streamlap("plan", model, *flags).required().output
    with shared.new_folder(folder / "out") as out:
        shared.drop_cache(model)
        done = shared.run_streamlap("compress", model, out, *flags, watch=out).required().output
    return {
        "preset": preset, "ratio": ratio, "layers": [layer["seconds"] for layer in done["layers"]],
        "errors": [layer["errors"] for layer in done["layers"]],
        "peak_ram_bytes": done["peak_ram_bytes"], "planned_ram_bytes": plan["peak_ram_bytes"],
    }  # fmt: skip


def table(result: Result) -> str:
    """A line for each layer of each run."""
    base = {row["ratio"]: row["layers"] for row in result["runs"] if row["preset"] == BASE}
    phases = list(dict.fromkeys(name for row in result["runs"] for layer in row["layers"] for name in layer))
    rows = []
    for row in result["runs"]:
        for index, layer in enumerate(row["layers"]):
            total = sum(layer.values())
            against = f"{total / sum(base[row['ratio']][index].values()):.2f}" if row["ratio"] in base else ""
            cells = [f"{layer.get(name, 0.0):.1f}" for name in phases]
            peaks = [shared.size(row["peak_ram_bytes"]), shared.size(row["planned_ram_bytes"])]
            rows.append([row["ratio"], row["preset"], index, *cells, f"{total:.1f}", against, *peaks])
    columns = ["ratio", "preset", "layer", *phases, "all, s", f"over {BASE}", "peak RAM", "planned"]
    return shared.markdown(columns, rows)


def main() -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder; by default one is made")
    parser.add_argument("--shape", default="llama-2-7b", help="of the checkpoint to be made (llama-2-7b)")
    parser.add_argument("--layers", type=int, default=2, help="of the checkpoint to be made (2)")
    parser.add_argument("--tokens", type=shared.windows, default=(16, 512), help="windows x tokens (16x512)")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["lorap", "best"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    args = parser.parse_args()
    shared.conclude(args, partial(bench, args), table)


if __name__ == "__main__":
    main()
