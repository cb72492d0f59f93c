#!/usr/bin/env python
"""Peak memory and seconds of `plan`, `compress` and `eval` on calibration files of every kind, of a size, under a cap.

    python scripts/bench_text.py --work DIR --size 2GB --max-ram 600MiB

Makes a tiny random model and one file of each kind after another in DIR, and removes them again. The size counts the unpacked
text; token ids are two bytes each.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from streamlap.demo import __file__ as demo
from streamlap.system.budget import parse_size

TEXT = (Path(demo).parent / "calibration.txt").read_text(encoding="utf-8")
MODEL = Path(demo).parent / "model"
COMMANDS = {
    "plan": ("plan", MODEL, "--calibration"),
    "compress": ("compress", MODEL, "out", "--preset", "lorap", "--calibration"),
    "eval": ("eval", MODEL, "--limit", "4096", "--text"),
}
SMALL = {"plan": ("--samples", "8", "--length", "64"), "compress": ("--samples", "8", "--length", "64"),
         "eval": ("--length", "64")}  # fmt: skip

RUN = """
import atexit, re, sys
from pathlib import Path
from streamlap.cli import main
atexit.register(lambda: print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1], file=sys.stderr))
main()
"""
"""The command, which says its own peak: what a child is said to have taken counts the process that it came from as well."""


def repeated(piece: bytes, size: int) -> Iterator[bytes]:
    yield from (piece for _ in range(max(1, size // len(piece))))


def rows(between: bytes) -> bytes:
    return between.join(json.dumps({"text": line}).encode() for line in TEXT.split("\n") if line) + between


def write_text(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.writelines(repeated(TEXT.encode(), size))


def write_line(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.writelines(repeated(TEXT.replace("\n", " ").encode(), size))


def write_rows(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.writelines(repeated(rows(b"\n"), size))


def write_list(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.write(b"[")
        file.writelines(repeated(rows(b",\n"), size))
        file.write(b'{"text": "The end."}]')


def write_gzip(path: Path, size: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.writelines(repeated(TEXT.encode(), size))


def write_ids(path: Path, size: int) -> None:
    header = {"descr": "<u2", "fortran_order": False, "shape": (size // (1 << 20) << 19,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(repeated((np.arange(1 << 19) % 256).astype(np.uint16).tobytes(), size))


def write_parquet(path: Path, size: int) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": [line for line in TEXT.split("\n") if line] * 100})
    with parquet.ParquetWriter(path, table.schema, use_dictionary=False) as writer:
        for _ in range(max(1, size // (100 * len(TEXT)))):
            writer.write_table(table)


KINDS: dict[str, Callable[[Path, int], None]] = {
    "a.txt": write_text, "one_line.txt": write_line, "a.jsonl": write_rows, "a.json": write_list, "a.txt.gz": write_gzip,
    "a.parquet": write_parquet, "a.npy": write_ids,
}  # fmt: skip


def measure(command: str, path: Path, cap: str, work: Path) -> tuple[str, float]:
    """Peak resident memory of the command, or what it says, and its seconds."""
    shutil.rmtree(work / "out", ignore_errors=True)
    words = [*map(str, COMMANDS[command]), str(path), *SMALL[command], "--max-ram", cap]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, *words], cwd=work, capture_output=True, text=True)
    seconds, said = time.perf_counter() - start, done.stderr.strip().splitlines()
    return (f"{int(said[-1]) >> 10} MiB" if done.returncode == 0 else " ".join(said[:-1])[-80:]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", default="2GB")
    parser.add_argument("--max-ram", default="600MiB")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    size = parse_size(args.size, "--size")
    assert size is not None, "it has a default"
    print(f"| file | bytes | {' | '.join(f'{name}: peak | seconds' for name in args.commands)} |")
    print("|---|---|" + "---|" * 2 * len(args.commands))
    for kind in args.kinds:
        path = args.work / kind
        KINDS[kind](path, size)
        found = [measure(command, path.resolve(), args.max_ram, args.work) for command in args.commands]
        cells = " | ".join(f"{peak} | {seconds:.1f}" for peak, seconds in found)
        print(f"| {kind} | {path.stat().st_size:,} | {cells} |", flush=True)
        path.unlink()
    shutil.rmtree(args.work / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
