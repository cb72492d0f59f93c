#!/usr/bin/env python
r"""What a model loses and what is gained by it: perplexity, bytes, keys and values, tokens a second, seconds to make.

    python scripts/bench_quality.py --model DIR --calibration FILE.npy --text FILE.npy OTHER.npy --shapes free nas stock \
        --ratios 0.2 0.3 --quantised int8 int4-32 --outputs DIR --out docs/benchmarks/quality.json [--table]

Compressions are run by the command line with default settings. Those that are finished in --outputs are taken as they are. Loss
is ln(perplexity / dense perplexity), on windows as the text files have them, in float32.

Rows of --quantised are the dense model with the decoder's linears in integers by torchao, rounded to nearest without
calibration; embeddings, head and norms stay. Their bytes are those of packed integers, scales and zero points. They have no
speed: without a compiler torchao makes floats of all integers for every product.

Speed is that of transformers on the device: in each of --rounds all models one after another, and of the rounds the median.
Prefill is one forward over the prompt, decode one token after another with the cache. With --rounds 0 there is none; rows that
--out has by the same settings keep their losses, so that it can be measured later.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import bench_inference
import benchmarks as shared
import numpy as np
import torch
from benchmarks import Result
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.methods import SHAPES
from streamlap.store.sink import file_hash

CONTEXT = 4096
"""Tokens for which keys and values are counted."""
SCHEMES = {"int8": None, "int4-32": 32, "int4-64": 64, "int4-128": 128}
"""Weights that share a scale; None is a row. int8 has float32 scales, int4 has bfloat16 scales and zero points."""


def bench(args: argparse.Namespace, work: Path) -> Result:
    shared.check_limit(args.limit, args.text)
    settings = {
        "model": args.model.name, "calibration": args.calibration.name, "texts": [text.name for text in args.text],
        "hashes": [file_hash(text) for text in args.text], "samples": args.samples, "limit": args.limit,
    }  # fmt: skip
    result = {
        "command": shared.shown_command(), "machine": shared.machine(), **settings, "prompt": args.prompt,
        "decode": args.decode, "dtype": args.dtype,
    }  # fmt: skip
    kinds = [("dense", "", 0.0), *((scheme, scheme, 0.0) for scheme in args.quantised)]
    rows, folders = earlier(args.out, settings), {"dense": args.model}
    for ratio, shape in itertools.product(args.ratios, args.shapes):
        folder = (args.outputs or work) / f"{shape}-{ratio:g}"
        if finished(folder) or not args.finished:
            kinds.append((f"{shape} {ratio:g}", shape, ratio))
            folders[kinds[-1][0]] = folder
    for name, shape, ratio in kinds:
        seconds = compress(args, folders[name], shape, ratio) if ratio else None
        if name in rows and seconds is None:
            continue
        if shape in SCHEMES:
            row = weigh_quantised(args, shape)
        else:
            row = {"seconds": seconds if ratio else 0.0, "texts": losses(args, folders[name]), **sizes(folders[name])}
        rows[name] = {"name": name, "shape": shape, "ratio": ratio, **row}
        for text, dense in zip(row["texts"], rows["dense"]["texts"], strict=True):
            text["loss"] = text["nll"] - dense["nll"]
        shared.save(args.out, {**result, "rows": list(rows.values())})
    speeds = speed(folders, args) if args.rounds else {}
    return {**result, "rows": [row | speeds.get(name, {}) for name, row in rows.items()]}


def earlier(path: Path | None, settings: Result) -> dict[str, Result]:
    """Rows of the file by name, without their speeds: those are only compared with others of the same run."""
    if path is None or not path.is_file():
        return {}
    found = json.loads(path.read_text())
    if any(found.get(key) != value for key, value in settings.items()):
        raise SystemExit(f"{path} has figures by other settings than {settings}; choose another --out.")
    return {
        row["name"]: {key: value for key, value in row.items() if key not in ("prefill", "decode")}
        for row in found["rows"]
    }


def finished(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def compress(args: argparse.Namespace, out: Path, shape: str, ratio: float) -> float | None:
    """Seconds of the whole command; None where the output was there."""
    if finished(out):
        return None
    flags = ["--shape", shape, "--ratio", ratio, "--calibration", args.calibration]
    flags += ["--samples", args.samples] if args.samples else []
    return shared.run_streamlap("compress", args.model, out, *flags).required().seconds


def losses(args: argparse.Namespace, folder: Path) -> list[Result]:
    """Of a folder: its mean NLL on each text."""
    limit = ["--limit", args.limit] if args.limit else []
    runs = (
        shared.run_streamlap("eval", folder, "--text", text, "--dtype", "float32", *limit).required()
        for text in args.text
    )
    return [{key: run.output[key] for key in ("nll", "perplexity", "tokens")} for run in runs]


def sizes(folder: Path) -> Result:
    inside = streamlap.inspect(folder)
    return {
        "parameters": inside["parameters"]["decoder_after"], "cache_per_token": inside["kv_cache_bytes_per_token"]["after"],
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }  # fmt: skip


def weigh_quantised(args: argparse.Namespace, scheme: str) -> Result:
    """Losses and bytes of the dense model quantised after loading."""
    begin, dense = time.perf_counter(), sizes(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    bytes_before = sum(linear.weight.nbytes for linear in linears(model).values())
    quantise(model.float(), scheme)
    seconds = time.perf_counter() - begin
    bytes_after = sum(packed_bytes(linear.weight, scheme) for linear in linears(model).values())
    return {
        "seconds": seconds, "texts": [loss(model, text, args.limit) for text in args.text], **dense,
        "bytes": dense["bytes"] - bytes_before + bytes_after,
    }  # fmt: skip


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder's: all but the head."""
    head = model.get_output_embeddings()
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}


def quantise(model: nn.Module, scheme: str) -> None:
    """In place, by the configurations of torchao that a CPU can run: those of `Int4WeightOnlyConfig` need a GPU."""
    torchao, group, chosen = importlib.import_module("torchao.quantization"), SCHEMES[scheme], linears(model)
    if group is None:
        config = torchao.Int8WeightOnlyConfig()
    else:
        for name, linear in chosen.items():
            if linear.in_features % group:
                raise SystemExit(f"{name} has {linear.in_features} inputs, no multiple of {group}; leave out {scheme}.")
        config = torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=torchao.PerGroup(group), scale_dtype=torch.bfloat16,
            mapping_type=torchao.MappingType.ASYMMETRIC,
        )  # fmt: skip
    torchao.quantize_(model, config, filter_fn=lambda part, name: name in chosen)


def packed_bytes(weight: torch.Tensor, scheme: str) -> int:
    """Of a quantised weight. torchao holds an int4 in a byte; packed, two share one. int8 is symmetric: no zero points."""
    if SCHEMES[scheme] is None:
        return weight.qdata.numel() + weight.scale.nbytes
    return (weight.qdata.numel() + weight.zero_point.numel()) // 2 + weight.scale.nbytes


@torch.inference_mode()
def loss(model: nn.Module, text: Path, limit: int | None) -> Result:
    """As `streamlap eval` has it, of a model in memory."""
    tokens_NL = torch.from_numpy(np.load(text).astype(np.int64))
    tokens_NL = tokens_NL[: limit // tokens_NL.shape[1] if limit else None]
    sums = [
        float(cross_entropy(model(input_ids=ids_L[None]).logits[0, :-1], ids_L[1:], reduction="none").double().sum())
        for ids_L in tokens_NL
    ]
    count = tokens_NL[:, 1:].numel()
    nll = math.fsum(sums) / count
    return {"nll": nll, "perplexity": math.exp(nll), "tokens": count}


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
    dense, names = result["rows"][0], [f", {Path(name).stem}" for name in result["texts"]]
    names = names if len(names) > 1 else [""]
    columns = ["shape", "removed", *(f"{figure}{name}" for name in names for figure in ("perplexity", "loss"))]
    columns += ["bytes", f"cache at {CONTEXT:,} tokens"]
    columns += ["prefill", "of dense", "decode", "of dense"] if "prefill" in dense else []
    return shared.markdown([*columns, "seconds to make"], (cells(row, dense) for row in result["rows"]))


def cells(row: Result, dense: Result) -> list[object]:
    losses = [cell for text in row["texts"] for cell in (f"{text['perplexity']:.2f}", f"{text['loss']:.4f}")]
    speeds = [
        cell
        for phase in ("prefill", "decode")
        if phase in dense
        for cell in (
            (f"{row[phase]['median']:.1f}", f"{row[phase]['median'] / dense[phase]['median']:.2f}")
            if phase in row
            else ("", "")
        )
    ]
    return [
        row["shape"] or "dense", f"{1 - row['parameters'] / dense['parameters']:.2%}", *losses, shared.size(row["bytes"]),
        shared.size(CONTEXT * row["cache_per_token"]), *speeds, "" if row["seconds"] is None else f"{row['seconds']:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder")
    parser.add_argument("--calibration", type=Path, help="token ids [N, L]")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="token ids [N, L] to measure on")
    parser.add_argument("--outputs", type=Path, help="folder for compressed models, which stay")
    parser.add_argument("--finished", action="store_true", help="only compressed models that are there, make none")
    parser.add_argument("--shapes", nargs="+", default=["free"], choices=list(SHAPES), help="(free)")
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.2], help="(0.2)")
    parser.add_argument(
        "--quantised", nargs="+", default=[], choices=list(SCHEMES), help="by torchao; int4 by its group"
    )
    parser.add_argument("--samples", type=int, help="calibration windows (all)")
    parser.add_argument("--limit", type=int, help="tokens of each text (all)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--decode", type=int, default=64, help="tokens that follow (64)")
    parser.add_argument("--repeats", type=int, default=3, help="of each model in a round (3)")
    parser.add_argument("--rounds", type=int, default=3, help="over all models (3); 0 for no speed")
    parser.add_argument("--dtype", default="float32", help="of the speed (float32)")
    parser.add_argument("--device", default="cpu", help="(cpu)")
    args = parser.parse_args()
    if not args.load and not (args.model and args.calibration and args.text):
        parser.error("wanted --model, --calibration and --text, or --load")
    if args.quantised and not args.load:
        try:
            importlib.import_module("torchao.quantization")
        except ImportError:
            parser.error("--quantised needs torchao: pip install torchao")
    shared.conclude(args, lambda work: bench(args, work), table)


if __name__ == "__main__":
    main()
