"""What the benchmarks share: the machine in words, checkpoints, runs in processes of their own, tables. No command itself."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_synthetic_checkpoint as synthetic
import numpy as np
import psutil
import torch
import transformers

import streamlap
from streamlap.data.text import is_ids
from streamlap.data.windows import open_ids
from streamlap.methods import PRESETS
from streamlap.store.sink import file_hash
from streamlap.system.meters import bytes_moved

ROOT = Path(__file__).parent.parent
POLL_SECONDS = 0.02

Result = dict[str, Any]


ENGINE = "lorap"
"""The preset by which the engine is measured: its solves are the lightest, so that memory and moving data show."""

AS_GIVEN = ("--no-survey", "--no-redraw")
"""Flags of a compression of just the windows that are given, so that its time and memory are those of its passes over them."""


def machine() -> Result:
    """What the figures were taken on. `load` is the number of busy threads just before."""
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "streamlap": streamlap.__version__}  # fmt: skip
    return {
        "date": datetime.date.today().isoformat(), "cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(), "ram_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2), "system": platform.platform(), "versions": versions,
    }  # fmt: skip


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return platform.machine()


def shown_command() -> str:
    """The command line that was given; of an absolute path only the name."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *words])


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the JSON")
    parser.add_argument("--table", action="store_true", help="print a Markdown table in place of the JSON")
    parser.add_argument("--load", type=Path, metavar="FILE", help="measure nothing; show the JSON of an earlier run")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for checkpoints, which stay, and outputs, which do not; "
                                                                 "default a temporary folder")  # fmt: skip
    parser.add_argument("--scale-down", type=int, default=1, metavar="K", help="divide the widths of a shape by K")
    return parser


def preset_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default=ENGINE, choices=sorted(PRESETS), help=f"what is measured ({ENGINE})")


def conclude(args: argparse.Namespace, measure: Callable[[Path], Result], table: Callable[[Result], str]) -> Result:
    """Measure, or load what was measured; write and print it. `measure` is given the folder to work in."""
    if args.load:
        result = json.loads(args.load.read_text())
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was begun is cleared away then as well
        with work_folder(args.work) as work:
            result = {"command": shown_command(), "machine": machine(), **measure(work)}
        save(args.out, result)
    print(table(result) if args.table else json.dumps(result, indent=1))
    return dict(result)


def save(path: Path | None, result: Result) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


@contextlib.contextmanager
def work_folder(path: Path | None) -> Iterator[Path]:
    """The folder, which stays, or a temporary one."""
    if path:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="streamlap-bench-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A place where nothing is, before the block and after it."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def windows(text: str) -> tuple[int, int]:
    """`8x512` -> (8, 512): windows, and tokens of each."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not WINDOWSxTOKENS, like 8x512")
    return int(found[1]), int(found[2])


def check_limit(limit: int | None, texts: Iterable[Path]) -> None:
    """End where `limit`, in tokens, is less than a window of one of the texts [N, L]; of other texts `streamlap eval` tells."""
    for text in texts:
        shape = open_ids(text).shape if is_ids(text) else ()
        if limit is not None and len(shape) == 2 and limit < shape[1]:
            raise SystemExit(
                f"--limit is {limit} tokens; {text} wants at least {shape[1]}, one window. Give more, or none."
            )


def percent(value: float, of: float) -> float:
    """By how much `value` is above `of`."""
    return round(100 * (value / of - 1), 3) if of else 0.0


def spread_percent(values: Sequence[float]) -> float:
    """By how much the highest is above the lowest."""
    return percent(max(values), min(values))


def markdown(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size(count: float | None) -> str:
    """Bytes in a cell of a table."""
    return "" if count is None else f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "**no**"


def checkpoint(work: Path, shape: str, layers: int, scale_down: int = 1, dtype: str = "bfloat16") -> Path:
    """A checkpoint of made-up weights in `work`, made where it is absent."""
    folder = work / "-".join([shape, str(layers), *([f"by-{scale_down}"] if scale_down > 1 else []), dtype])
    synthetic.make(folder, shape, layers=layers, dtype=dtype, scale_down=scale_down)
    return folder


def tokens_file(work: Path, model: Path, samples: int, length: int) -> Path:
    """Random token ids [samples, length] of the model's vocabulary; the same numbers every time."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    path = work / f"tokens-{vocabulary}-{samples}x{length}.npy"
    np.save(path, np.random.default_rng(0).integers(0, vocabulary, (samples, length)).astype(np.int32))
    return path


def drop_cache(folder: Path) -> None:
    """Have the next reader of the folder's shards find nothing of them in the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def hashes(folder: Path) -> dict[str, str]:
    """Shard -> SHA-256, of the files as they lie there."""
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.safetensors"))}


@dataclass(frozen=True, kw_only=True)
class Done:
    """A run of streamlap's command line that has ended."""

    code: int
    output: Result
    """Its JSON; empty where it gave none."""
    error: str
    """Its last line on stderr."""
    seconds: float
    """Of the process, Python's start included."""
    working_seconds: float
    """From the first file in the output folder to the end; 0 where nothing was watched."""
    moved_bytes: tuple[int, int] = (0, 0)
    """Read and written in that time, by any file of the process; zeros where the system does not count them."""
    peak_rss_bytes: int
    """Highest that was seen from outside. streamlap counts anew after every layer, so its report's peak may be higher."""
    timed_out: bool = False

    def required(self) -> Done:
        """Itself, where it went well."""
        if self.code:
            raise SystemExit(f"streamlap ended with exit code {self.code}: {self.error}")
        return self


def environment() -> dict[str, str]:
    """Of a child that uses this checkout, installed or not, and no network."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def run_streamlap(
    *words: object, prefix: Sequence[str] = (), watch: Path | None = None, timeout: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> Done:  # fmt: skip
    """One command with --json, in a process of its own; it does not outlive this call.

    Args: prefix, words before the command that end by becoming it; watch, the output folder whose first file starts
    `working_seconds`; timeout, seconds after which it is killed; variables, of its environment.
    """
    command = [*prefix, sys.executable, "-m", "streamlap.cli", *map(str, words), "--json"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        start, begun, peak, late = time.perf_counter(), 0.0, 0, False
        before = after = (0, 0)
        process = subprocess.Popen(command, env={**environment(), **(variables or {})}, stdout=out, stderr=errors)
        try:
            while process.poll() is None and not late:
                time.sleep(POLL_SECONDS)
                now, peak = time.perf_counter(), max(peak, high_water(process.pid))
                before = before if begun else after  # as the last look saw it that found no folder yet
                after = max(after, bytes_moved(process.pid))
                begun = begun or (now if watch is not None and watch.exists() else 0.0)
                late = timeout is not None and now - start > timeout
        finally:
            process.kill()  # nothing where it has ended
            process.wait()
        end = time.perf_counter()
        out.seek(0)
        errors.seek(0)
        text, complaint = (file.read().decode(errors="replace").strip() for file in (out, errors))
    return Done(
        code=process.returncode, output=json.loads(text.splitlines()[-1]) if text else {},
        error=(complaint.splitlines() or [""])[-1], seconds=end - start, working_seconds=end - begun if begun else 0.0,
        moved_bytes=(after[0] - before[0], after[1] - before[1]) if begun else (0, 0), peak_rss_bytes=peak, timed_out=late,
    )  # fmt: skip


def high_water(pid: int) -> int:
    """Highest resident set of a process, as the kernel tells; 0 where it does not."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M):
            return int(found[1]) * 1024
    return 0
