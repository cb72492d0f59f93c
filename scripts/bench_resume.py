#!/usr/bin/env python
"""Kills real compressions with SIGKILL, resumes them, and compares every byte with a run that nobody killed.

    python scripts/bench_resume.py [--kills 10] [--layers 12] [--seed 0] [--out result.json]

What it proves: whenever the process dies, be it at a random moment of its work or right after any layer's commit, the folder
is known as unfinished, `streamlap resume` finishes it, and the result is that of the unbroken run to the last byte. Only
the report's seconds and memory peaks may differ. It does not prove what a power cut does: the kernel lives on here.

The checkpoint is made here, with random weights. Rows go to stderr, one JSON object to stdout or to --out:
kills, unfinished (kills that came in time), differing_bytes, seconds, rows. Exit 1 when a byte differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import streamlap

REPORT = "streamlap_report.json"
MEASURED = ("seconds", "peak_ram_bytes", "peak_vram_bytes")
POLL_SECONDS = 0.0005


def make_source(folder: Path, layers: int) -> None:
    """A random llama and token ids to calibrate on."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=1000, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "source", max_shard_size="10MB")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 1000, (64, 128)).astype(np.uint16))


def start(*words: object) -> subprocess.Popen[bytes]:
    """The command line in a process of its own, offline."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "streamlap.cli", *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def start_compress(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    return start("compress", folder / "source", out, "--calibration", folder / "ids.npy")


def layers_done(out: Path) -> int:
    """Committed layers; -1 before there is a journal and after it is gone."""
    journal = out / ".streamlap" / "journal.jsonl"
    try:
        return journal.read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return -1


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not condition():
        time.sleep(POLL_SECONDS)


def working_seconds(folder: Path, out: Path) -> float:
    """The unbroken run; gives back how long it worked, from its first file until its state is gone."""
    process = start_compress(folder, out)
    wait_for(out.exists, process)
    begin = time.perf_counter()
    wait_for(lambda: not (out / ".streamlap").exists(), process)
    seconds = time.perf_counter() - begin
    if process.wait():
        raise SystemExit(f"the unbroken run failed with exit code {process.returncode}")
    return seconds


def contents(out: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if REPORT in files:
        report = json.loads(files[REPORT], object_hook=lambda t: {k: v for k, v in t.items() if k not in MEASURED})
        files[REPORT] = json.dumps(report).encode()
    return files


def differing_bytes(left: dict[str, bytes], right: dict[str, bytes]) -> int:
    pairs = [(left.get(name, b""), right.get(name, b"")) for name in left.keys() | right.keys()]
    missing = len(left.keys() ^ right.keys())
    return missing + sum(
        abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False)) for a, b in pairs if a != b
    )


def kill_and_resume(folder: Path, whole: dict[str, bytes], name: str, wait: Callable[[Path], bool]) -> dict[str, Any]:
    """One run that is killed as soon as `wait(out)` holds, then resumed."""
    out = folder / name
    process = start_compress(folder, out)
    wait_for(lambda: wait(out), process)
    process.kill()
    process.wait()
    done, unfinished = layers_done(out), not streamlap.verify(out)["ok"]
    if unfinished:
        again = start("resume", out) if done >= 0 else start_compress(folder, out)
        if again.wait():
            raise SystemExit(f"{name}: exit code {again.returncode} after a kill with {done} layers done")
    row = {"kill": name, "layers_done": done, "unfinished": unfinished,
           "differing_bytes": differing_bytes(whole, contents(out))}  # fmt: skip
    print(f"{name:<28}{done:>4} layers done{row['differing_bytes']:>12} bytes differ", file=sys.stderr, flush=True)
    return row


def at_moment(seconds: float) -> Callable[[Path], bool]:
    """Holds `seconds` after the run's first file."""
    begun: list[float] = []

    def reached(out: Path) -> bool:
        if not begun and out.exists():
            begun.append(time.perf_counter())
        return bool(begun) and time.perf_counter() - begun[0] >= seconds

    return reached


def bench(folder: Path, kills: int, layers: int, seed: int) -> dict[str, Any]:
    make_source(folder, layers)
    duration, chance = working_seconds(folder, folder / "whole"), random.Random(seed)
    whole = contents(folder / "whole")
    moments = sorted(chance.uniform(0, duration) for _ in range(kills))
    rows = [kill_and_resume(folder, whole, f"after {moment:.3f} s", at_moment(moment)) for moment in moments]
    for count in range(1, layers + 1):
        rows.append(kill_and_resume(folder, whole, f"at commit {count}", lambda out, n=count: layers_done(out) >= n))
    return {
        "kills": len(rows), "unfinished": sum(row["unfinished"] for row in rows),
        "differing_bytes": sum(row["differing_bytes"] for row in rows), "bytes": sum(map(len, whole.values())),
        "layers": layers, "unbroken_seconds": round(duration, 3), "seed": seed, "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="kills at random moments")
    parser.add_argument("--layers", type=int, default=12, help="layers of the checkpoint; one more kill after each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the JSON; default stdout")
    options = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-resume-") as folder:
        result = bench(Path(folder), options.kills, options.layers, options.seed)
    text = json.dumps(result | {"seconds": round(time.perf_counter() - begin, 1)}, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)
    sys.exit(bool(result["differing_bytes"]))


if __name__ == "__main__":
    main()
