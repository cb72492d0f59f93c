#!/usr/bin/env python
"""What every part of a recipe is worth: recipes x ratios x calibration subsets, compressed and measured one by one.

    python scripts/ablate.py MODEL --calibration calibration.txt --validation validation.txt --to DIR
    python scripts/ablate.py MODEL --calibration tokens.npy --held-out --recipes lorap best my.yaml --ratios 0.2 0.3 --to DIR

Every finished cell of the grid is a line of DIR/cells.jsonl. A cell that has its line is not computed again, so a stopped run
goes on when it is given again, and other recipes, ratios and seeds can be added later. At the end of each run DIR/table.md and
DIR/plot.svg show the cells of the grid that was asked for: ln(perplexity / perplexity of the model itself), the mean over the
subsets, and from the lowest to the highest of them.

Subsets are chosen by seed. `draw`, the default for text: so many windows of all; `disjoint`: no window is in two subsets;
`bootstrap`, the default for .npy: as many windows as there are, drawn with replacement.

With --held-out, what is measured on is the last fifth of the calibration windows, and what is calibrated on comes from the
first four fifths. Settings are chosen that way, so that no validation text has a say in them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
import numpy as np
import torch
from benchmarks import Result
from line_chart import Point, line_chart
from named_recipes import NAMED, named_recipe

import streamlap
from streamlap.data.calibration import DEFAULT_SAMPLES, find_files, token_hash
from streamlap.data.windows import ReadSettings, read_windows
from streamlap.errors import NumericalError, RecipeError
from streamlap.families.stream import ModelStream
from streamlap.recipe import Recipe

SUBSETS = ("draw", "disjoint", "bootstrap")
HELD_OUT = 5
"""One window of so many is held out, the last ones."""


def split(windows_NL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(to calibrate on, held out)."""
    first = len(windows_NL) - max(1, len(windows_NL) // HELD_OUT)
    return windows_NL[:first], windows_NL[first:]


def subset(windows_NL: torch.Tensor, way: str, samples: int | None, seed: int, seeds: int) -> torch.Tensor:
    """The calibration windows of a seed below `seeds`, in the order in which they were read."""
    count = len(windows_NL)
    generator = torch.Generator().manual_seed(0 if way == "disjoint" else seed)
    if way == "bootstrap":
        rows = torch.randint(count, (samples or count,), generator=generator)
    else:
        size = samples or (count // seeds if way == "disjoint" else min(DEFAULT_SAMPLES, count))
        first = seed * size if way == "disjoint" else 0
        rows = torch.randperm(count, generator=generator)[first : first + size]
        if not size or len(rows) < size:
            raise SystemExit(f"{count} windows have no {way} subset {seed} of {size}; lower --samples or --seeds.")
    return windows_NL[rows.sort().values]


class Cells:
    """The finished cells, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Result] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                self.rows.append(json.loads(line))
            except ValueError:  # torn where a run was killed while it wrote
                continue

    def find(self, cell: Mapping[str, Any]) -> Result | None:
        return next((row for row in self.rows if row["cell"] == cell), None)

    def add(self, row: Result) -> Result:
        with self.path.open("a+") as file:
            file.seek(0)
            torn = not (text := file.read()).endswith("\n") and bool(text)
            file.write("\n" * torn + json.dumps(row) + "\n")
        self.rows.append(row)
        return row


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What every cell shares."""

    args: Any
    work: Path
    cells: Cells
    validation: Path
    about: Result
    """Of a cell's description, what all have in common."""
    subsets: Mapping[int, torch.Tensor]
    """Seed -> calibration windows."""

    def rows(self) -> list[Result]:
        """Every cell that was asked for, with `dln`, what it adds to the model's own mean NLL."""
        dense = self.row({**self.about, "recipe": "dense", "ratio": 0.0, "seed": None}, None)
        assert dense is not None
        rows = []
        for name, seed, ratio in itertools.product(self.args.recipes, self.args.seeds, self.args.ratios):
            file = save_tokens(self.work / f"calibration-{seed}.npy", self.subsets[seed])
            recipe = named_recipe(name).override(ratio=ratio, files=(str(file),), samples=None, length=None)
            settings = {key: value for key, value in recipe.to_dict().items() if key != "calibration"}
            cell = {**self.about, "recipe": Path(name).stem if name.endswith(".yaml") else name, "ratio": ratio,
                    "seed": seed, "calibration": token_hash(self.subsets[seed])[:16], "settings": settings}  # fmt: skip
            if row := self.row(cell, recipe):
                rows.append({**row, "dln": row["nll"] - dense["nll"]})
        return rows

    def row(self, cell: Result, recipe: Recipe | None) -> Result | None:
        """As it was found, or measured now; None where the methods cannot reach the ratio."""
        if found := self.cells.find(cell):
            return found
        name = f"{cell['recipe']}, ratio {cell['ratio']:g}, seed {cell['seed']}"
        print(name, file=sys.stderr, flush=True)
        try:
            return self.cells.add({"cell": cell, **self.measure(recipe)})
        except (RecipeError, NumericalError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
            return None

    def measure(self, recipe: Recipe | None) -> Result:
        """Compress and evaluate; without a recipe, evaluate the model itself."""
        model, device, row = self.args.model, self.args.device, {}
        with shared.new_folder(self.work / "out") as out:
            if recipe:
                start = time.perf_counter()
                report = streamlap.compress(model, out, recipe, device=device)
                phases = [layer.seconds for layer in report.layers]
                row = {"decoder_parameters": report.parameters.decoder_after,
                       "compress_seconds": time.perf_counter() - start,
                       "phases": {name: sum(phase[name] for phase in phases) for name in phases[0]}}  # fmt: skip
            result = streamlap.evaluate(out if recipe else model, self.validation, device=device, dtype="float32")
        return {**row, "perplexity": result.perplexity, "nll": result.nll, "evaluate_seconds": result.seconds}


def make_grid(args: Any, work: Path) -> Grid:
    stream = ModelStream(args.model)
    reading = ReadSettings(folder=args.model, vocabulary=stream.vocabulary, context=stream.context)
    windows_NL, *other = [
        read_windows(find_files(files), reading, args.length) for files in (args.calibration, args.validation) if files
    ]
    calibration_NL, validation_NL = (windows_NL, *other) if other else split(windows_NL)
    way = args.subsets or ("bootstrap" if args.calibration[0].endswith(".npy") else "draw")
    seeds = max(args.seeds) + 1
    shards = [header.digest[:16] for header in stream.source.headers.values()]
    return Grid(
        args=args, work=work, cells=Cells(args.to / "cells.jsonl"),
        validation=save_tokens(work / "validation.npy", validation_NL),
        about={"model": [args.model.name, *shards], "validation": token_hash(validation_NL)[:16], "device": args.device,
               "version": streamlap.__version__},
        subsets={seed: subset(calibration_NL, way, args.samples, seed, seeds) for seed in args.seeds},
    )  # fmt: skip


def save_tokens(path: Path, tokens_NL: torch.Tensor) -> Path:
    np.save(path, tokens_NL.numpy())
    return path


def grouped(rows: Iterable[Result]) -> dict[tuple[str, float], list[Result]]:
    """(recipe, ratio) -> its rows of every subset, in the order of the grid."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for row in rows:
        groups.setdefault((row["cell"]["recipe"], row["cell"]["ratio"]), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: item[0][1]))


def table(rows: Sequence[Result]) -> str:
    columns = ["ratio", "recipe", "Δln ppl", "lowest to highest", "decoder parameters", "compress s", "most of it in"]
    return shared.markdown(columns, (describe(*key, group) for key, group in grouped(rows).items())) + "\n"


def describe(recipe: str, ratio: float, group: Sequence[Result]) -> list[str]:
    dln = [row["dln"] for row in group]
    phases = {name: statistics.mean(row["phases"][name] for row in group) for name in group[0]["phases"]}
    longest = sorted(phases, key=lambda name: -phases[name])[:2]
    return [
        f"{ratio:g}", recipe, f"{statistics.mean(dln):+.4f}", f"{min(dln):+.4f} to {max(dln):+.4f}",
        f"{statistics.mean(row['decoder_parameters'] for row in group):,.0f}",
        f"{statistics.mean(row['compress_seconds'] for row in group):.1f}",
        ", ".join(f"{name} {phases[name]:.1f}" for name in longest),
    ]  # fmt: skip


def plot(rows: Sequence[Result]) -> str:
    lines: dict[str, list[Point]] = {}
    for (recipe, ratio), group in grouped(rows).items():
        dln = [row["dln"] for row in group if math.isfinite(row["dln"])]
        if dln:
            point = Point(x=ratio, y=statistics.mean(dln), low=min(dln), high=max(dln))
            lines.setdefault(recipe, []).append(point)
    name = rows[0]["cell"]["model"][0]
    return line_chart(f"{name}: loss by ratio", "ratio", "ln(perplexity / dense perplexity)", lines)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("model", type=Path)
    words.add_argument("--calibration", nargs="+", required=True, metavar="FILE")
    words.add_argument("--validation", nargs="+", metavar="FILE")
    words.add_argument("--held-out", action="store_true", help="measure on the last fifth of the calibration windows")
    words.add_argument("--recipes", nargs="+", default=list(NAMED), metavar="NAME", help=f"some of {', '.join(NAMED)}, "
                       "or YAML files; default all of the names")  # fmt: skip
    words.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.4, 0.5])
    words.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    words.add_argument("--subsets", choices=SUBSETS)
    words.add_argument("--samples", type=int, help="windows in a subset")
    words.add_argument("--length", type=int, help="tokens in a window")
    words.add_argument("--device", default="auto")
    words.add_argument("--work", type=Path, help="folder for outputs, which do not stay; default a temporary one")
    words.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder for cells, table and plot")
    return words


def main() -> None:
    args = parser().parse_args()
    if args.held_out == bool(args.validation):
        raise SystemExit("wanted one of --validation and --held-out.")
    if unknown := [name for name in args.recipes if name not in NAMED and not name.endswith(".yaml")]:
        raise SystemExit(f"no recipe is called {', '.join(unknown)}; wanted some of {', '.join(NAMED)}, or YAML files.")
    args.to.mkdir(parents=True, exist_ok=True)
    with shared.work_folder(args.work) as work:
        rows = make_grid(args, work).rows()
    if not rows:
        raise SystemExit("no cell could be measured.")
    (args.to / "table.md").write_text(table(rows))
    (args.to / "plot.svg").write_text(plot(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
