#!/usr/bin/env python
"""Does a long run gather anything? Memory, open files, threads, temporary files and Python objects after every layer.

    python scripts/bench_hygiene.py --work DIR --out hygiene.json --table

Compresses a synthetic checkpoint of 200 tiny layers with each preset, with everything overlapping. After each layer the
threads beside the loop are awaited, so that what they hold for a moment is not counted, and garbage is collected. The first and
the last layer, which have one generation of hidden states more or less beside them, are left out. Compared are the first and
the last quarter of the others; `per_layer` is the slope of a line through all but the first quarter. Temporary files are all
that is in the output beside shards, in its work folder, and in the system's temporary folder, which is this run's own.

What grows by design: the journal's lines, which stay in memory as text, and a number of seconds a layer for the forecast of
the bar. JSON: fields of a run: `figures`, `journal_bytes_per_layer`, `left` (temporary files at the end).
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import benchmarks as shared
import numpy as np
import psutil
from benchmarks import Result

import streamlap
from streamlap.pipeline.runner import LayerRunner
from streamlap.store.journal import Journal

FIGURES = ("rss_bytes", "open_files", "threads", "temporary_files", "objects")
CONSTANT = ("open_files", "threads", "temporary_files")
"""Figures that must be the same after every layer."""


def temporary_files(places: Sequence[Path]) -> list[str]:
    found = (path for place in places if place.exists() for path in place.rglob("*") if path.is_file())
    return sorted(path.name for path in found if not path.name.startswith("model-") or path.suffix != ".safetensors")


def sample(places: Sequence[Path]) -> dict[str, int]:
    process = psutil.Process()
    gc.collect()
    return {
        "rss_bytes": process.memory_info().rss, "open_files": process.num_fds(), "threads": process.num_threads(),
        "temporary_files": len(temporary_files(places)), "objects": len(gc.get_objects()),
    }  # fmt: skip


def watched(model: Path, tokens: Path, preset: str, work: Path) -> Result:
    """One compression, looked at after each layer."""
    out, hidden, system = (work / f"{preset}-{name}" for name in ("out", "hidden", "tmp"))
    system.mkdir(parents=True)
    samples: list[dict[str, int]] = []
    lines: list[int] = []
    look, append = LayerRunner.require_baseline, Journal.append

    def look_longer(runner: LayerRunner, index: int) -> None:
        for worker in (runner.writer, runner.fetcher, runner.staging._reader):
            worker.submit(lambda: None).result()
        samples.append(sample((out, hidden, system)))
        look(runner, index)

    def count(journal: Journal, line: dict[str, Any]) -> None:
        append(journal, line)
        lines.append(len(journal._lines[-1]))

    with mock.patch.multiple(LayerRunner, require_baseline=look_longer), mock.patch.multiple(Journal, append=count), \
            mock.patch.dict(os.environ, {"TMPDIR": str(system)}), mock.patch.object(tempfile, "tempdir", None):  # fmt: skip
        options = {"survey": None, "redraw": False, "work": hidden}
        streamlap.compress(model, out, preset=preset, ratio=0.2, files=(str(tokens),), **options)
    return {
        "preset": preset, "layers": len(samples), "figures": {name: trend([s[name] for s in samples]) for name in FIGURES},
        "journal_bytes_per_layer": round(sum(lines) / len(lines)),
        "left": temporary_files((hidden, system, out / ".streamlap")),
    }  # fmt: skip


def trend(values: Sequence[int]) -> Result:
    """First quarter against last, and the slope."""
    inner = values[1:-1]
    quarter = max(1, len(inner) // 4)
    slope = np.polyfit(range(quarter, len(inner)), inner[quarter:], 1)[0]
    return {
        "first_quarter": round(float(np.mean(inner[:quarter])), 1),
        "last_quarter": round(float(np.mean(inner[-quarter:])), 1),
        "per_layer": round(float(slope), 3) + 0.0, "different_values": len(set(inner)),
    }  # fmt: skip


def bench(args: argparse.Namespace, work: Path) -> Result:
    model = shared.checkpoint(work, args.shape, args.layers, args.scale_down)
    tokens = shared.tokens_file(work, model, *args.tokens)
    runs = []
    for preset in args.presets:
        with shared.new_folder(work / "run") as folder:
            runs.append(watched(model, tokens, preset, folder))
    steady = all(run["figures"][name]["different_values"] == 1 for run in runs for name in CONSTANT)
    return {"model": model.name, "tokens": list(args.tokens), "runs": runs,
            "verdict": {"constant": steady, "nothing_left": not any(run["left"] for run in runs)}}  # fmt: skip


def table(result: Result) -> str:
    rows = [
        [run["preset"], name, row["first_quarter"], row["last_quarter"], row["per_layer"]]
        for run in result["runs"]
        for name, row in run["figures"].items()
    ]
    return shared.markdown(["preset", "figure", "first quarter", "last quarter", "more per layer"], rows)


def main() -> None:
    parser = shared.argument_parser(__doc__)
    parser.set_defaults(scale_down=64)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--tokens", type=shared.windows, default=(8, 32), metavar="WINDOWSxTOKENS")
    parser.add_argument("--presets", nargs="+", default=["lorap", "best"])
    args = parser.parse_args()
    shared.conclude(args, lambda work: bench(args, work), table)


if __name__ == "__main__":
    main()
