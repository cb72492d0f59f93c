#!/usr/bin/env python
r"""What a model loses and what is gained by it: perplexity, bytes, keys and values, tokens a second, seconds to make.

    python scripts/bench_quality.py --model DIR --calibration FILE.npy --text FILE.npy --shapes free nas stock \
        --ratios 0.2 0.3 --outputs DIR --out docs/benchmarks/quality.json [--table]

Compressions are run by the command line with default settings. Those that are finished in --outputs are taken as they are. Loss
is ln(perplexity / dense perplexity), on windows as the text file has them. Speed is that of transformers on the device: in each
of --rounds all models one after another, and of the rounds the median. Prefill is one forward over the prompt, decode one token
after another with the cache.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import bench_inference
import benchmarks as shared
import torch
from benchmarks import Result
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.methods import SHAPES

CONTEXT = 4096
"""Tokens for which keys and values are counted."""


def bench(args: argparse.Namespace, work: Path) -> Result:
    folders = {"dense": args.model}
    made: dict[str, Result] = {"dense": {"shape": "", "ratio": 0.0, "seconds": 0.0}}
    for ratio in args.ratios:
        for shape in args.shapes:
            name = f"{shape} {ratio:g}"
            folders[name] = (args.outputs or work) / f"{shape}-{ratio:g}"
            made[name] = {"shape": shape, "ratio": ratio, "seconds": compress(args, folders[name], shape, ratio)}
    for name, folder in folders.items():
        made[name] |= weigh(args, folder)
    dense = made["dense"]["nll"]
    speeds = speed(folders, args)
    rows = [{"name": name, **row, "loss": row["nll"] - dense, **speeds[name]} for name, row in made.items()]
    return {
        "model": args.model.name, "calibration": args.calibration.name, "text": args.text.name, "prompt": args.prompt,
        "decode": args.decode, "dtype": args.dtype, "rows": rows,
    }  # fmt: skip


def compress(args: argparse.Namespace, out: Path, shape: str, ratio: float) -> float | None:
    """Seconds of the whole command; None where the output was there."""
    if (out / "config.json").is_file():
        return None
    flags = ["--shape", shape, "--ratio", ratio, "--calibration", args.calibration]
    flags += ["--samples", args.samples] if args.samples else []
    return shared.run_streamlap("compress", args.model, out, *flags).required().seconds


def weigh(args: argparse.Namespace, folder: Path) -> Result:
    """Of a folder: its mean loss on the text, its bytes and parameters."""
    words = ["eval", folder, "--text", args.text, "--dtype", "float32"]
    words += ["--limit", args.limit] if args.limit else []
    found, inside = shared.run_streamlap(*words).required().output, streamlap.inspect(folder)
    return {
        "nll": math.log(found["perplexity"]), "perplexity": found["perplexity"], "tokens": found["tokens"],
        "parameters": inside["parameters"]["decoder_after"], "cache_per_token": inside["kv_cache_bytes_per_token"]["after"],
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }  # fmt: skip


def speed(folders: Mapping[str, Path], args: argparse.Namespace) -> dict[str, Result]:
    """Tokens a second of each, and the highest and lowest of the rounds. One model is in memory at a time."""
    rounds: dict[str, list[Result]] = {name: [] for name in folders}
    for _ in range(args.rounds):
        for name, folder in folders.items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device)
            rounds[name].append(bench_inference.speed(model.eval(), args))
            del model
    return {
        name: {
            phase: {
                "median": statistics.median(row[phase] for row in rows),
                "spread_percent": shared.spread_percent([row[phase] for row in rows]),
            }
            for phase in ("prefill", "decode")
        }
        for name, rows in rounds.items()
    }


def table(result: Result) -> str:
    dense = result["rows"][0]
    columns = [
        "shape", "removed", "perplexity", "loss", "bytes", f"cache at {CONTEXT:,} tokens", "prefill", "of dense", "decode",
        "of dense", "seconds to make",
    ]  # fmt: skip
    return shared.markdown(columns, (cells(row, dense) for row in result["rows"]))


def cells(row: Result, dense: Result) -> list[object]:
    speeds = [
        cell
        for phase in ("prefill", "decode")
        for cell in (
            f"{row[phase]['median']:.1f}",
            f"{row[phase]['median'] / dense[phase]['median']:.2f}",
        )
    ]
    return [
        row["shape"] or "dense", f"{1 - row['parameters'] / dense['parameters']:.2%}", f"{row['perplexity']:.2f}",
        f"{row['loss']:.4f}", shared.size(row["bytes"]), shared.size(CONTEXT * row["cache_per_token"]), *speeds,
        "" if row["seconds"] is None else f"{row['seconds']:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder")
    parser.add_argument("--calibration", type=Path, help="token ids [N, L]")
    parser.add_argument("--text", type=Path, help="token ids [N, L] to measure on")
    parser.add_argument("--outputs", type=Path, help="folder for compressed models, which stay")
    parser.add_argument("--shapes", nargs="+", default=["free"], choices=list(SHAPES), help="(free)")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2], help="(0.2)")
    parser.add_argument("--samples", type=int, help="calibration windows (all)")
    parser.add_argument("--limit", type=int, help="tokens of the text (all)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--decode", type=int, default=64, help="tokens that follow (64)")
    parser.add_argument("--repeats", type=int, default=3, help="of each model in a round (3)")
    parser.add_argument("--rounds", type=int, default=3, help="over all models (3)")
    parser.add_argument("--dtype", default="float32", help="of the speed (float32)")
    parser.add_argument("--device", default="cpu", help="(cpu)")
    args = parser.parse_args()
    if not args.load and not (args.model and args.calibration and args.text):
        parser.error("wanted --model, --calibration and --text, or --load")
    shared.conclude(args, lambda work: bench(args, work), table)


if __name__ == "__main__":
    main()
