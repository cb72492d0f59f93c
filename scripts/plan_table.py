#!/usr/bin/env python
"""What `streamlap compress` would take on GPUs of several sizes, as a markdown table, from headers alone.

    python scripts/plan_table.py [--preset best] [--ratio 0.3] [--tokens 128x2048] [--shapes llama-3-70b] [--work DIR]

A row is a model on a machine of so much VRAM and RAM. It says whether that fits, or the least machine that would do; where
hidden states stay, and how many generations a layer reads from the disk and writes to it. The ranges of time are those of three
public GPUs as if each had the row's memory. No weights are made: make_synthetic_checkpoint.py writes headers and holes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
import make_synthetic_checkpoint as synthetic
from tqdm import tqdm

from streamlap.families.stream import ModelStream
from streamlap.planning.decide import decide
from streamlap.planning.machine_file import find_sheet
from streamlap.planning.plan import Plan, make_plan
from streamlap.planning.schedule import least_cap
from streamlap.planning.sheets import CUDA_CONTEXT_BYTES, SYSTEM_BYTES, Sheet
from streamlap.recipe import Recipe
from streamlap.settings import RunSettings

SHAPES = ("llama-3-8b", "qwen2.5-32b", "llama-3-70b", "llama-3-405b")
VRAM, RAM = (8, 24, 80), (16, 64)
"""GiB."""
GPUS = ("rtx-4060-8gb", "rtx-4090", "h100-sxm")
COLUMNS = ("model", "VRAM", "RAM", "fits", "peak VRAM", "peak RAM", "hidden states", "read, written a layer", *GPUS)


def sized(sheet: Sheet, vram: int, ram: int) -> Sheet:
    """The machine with that much memory, in GiB."""
    assert sheet.gpu, "a GPU of the table"
    return replace(sheet, ram=ram << 30, gpu=replace(sheet.gpu, memory=vram << 30))


def rows(work: Path, shape: str, recipe: Recipe, shape_NL: tuple[int, int]) -> Iterator[list[str]]:
    """Of one model."""
    synthetic.make_headers(work / shape, shape)
    sheets = [find_sheet(name) for name in GPUS]
    settings = sheets[0].settled(RunSettings())
    stream = ModelStream(work / shape, settings.device, recipe.dtype)
    decided = decide(stream, recipe)
    for vram in VRAM:
        for ram in RAM:
            memory = sized(sheets[0], vram, ram).memory(settings.device)
            plan = make_plan(stream, decided, shape_NL, settings, memory)
            plans = [replace(plan, machine=sheet.machine(settings.device, stream.dtype)) for sheet in sheets]
            yield [shape, f"{vram} GiB", f"{ram} GiB", *described(plan), *map(seconds, plans)]


def described(plan: Plan) -> list[str]:
    """What of the machine its system and CUDA keep counts as needed too."""
    needs = [
        f"{least_cap(wanted + kept)} of {budget.name}"
        for budget, wanted, kept in (
            (plan.fit.vram, plan.peak_vram_bytes, CUDA_CONTEXT_BYTES),
            (plan.fit.ram, plan.peak_ram_bytes, SYSTEM_BYTES),
        )
        if wanted > budget.cap
    ]
    moved = f"{plan.generations_read}, {plan.generations_written} of {shared.size(plan.generation_bytes)}"
    peaks = [shared.size(plan.peak_vram_bytes), shared.size(plan.peak_ram_bytes)]
    return ["yes" if plan.fits else f"no: {' and '.join(needs)}", *peaks, plan.hidden_states, moved]


def seconds(plan: Plan) -> str:
    """The range, where it fits."""
    ends = (plan.seconds_low, plan.seconds_high)
    return " to ".join(map(tqdm.format_interval, ends)) if plan.fits else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="best")
    parser.add_argument("--ratio", default="0.3")
    parser.add_argument("--tokens", type=shared.windows, default="128x2048", metavar="WINDOWSxTOKENS")
    parser.add_argument("--shapes", nargs="+", choices=synthetic.SHAPES, default=SHAPES)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints; a temporary one by default")
    args = parser.parse_args()
    recipe = Recipe().override(preset=args.preset, ratio=args.ratio)
    with shared.work_folder(args.work) as work:
        found = [row for shape in args.shapes for row in rows(work, shape, recipe, args.tokens)]
    print(shared.markdown(COLUMNS, found))


if __name__ == "__main__":
    main()
