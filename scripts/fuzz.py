"""Search for bytes that a parser of foreign files does not stand, guided by the code that they reach. Needs the extra `fuzz`.

    python scripts/fuzz.py header --minutes 4
    python scripts/fuzz.py all --minutes 4 --seed 1

The targets and what must not come out of them are those of tests/fuzz_targets.py; the seeds are in tests/corpus. A finding is
written to --to (default: the current folder) and belongs into the corpus once it is mended. The search runs in a process of its
own that may hold 4 GiB of memory and take 20 seconds for one input. Prints a JSON line for each target.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("header", "index", "config", "recipe", "journal")
MEMORY_MB = 4096
SECONDS = 20
"""For one input."""


def search(target: str, minutes: float, seed: int, to: Path) -> dict[str, Any]:
    """One target in a process of its own; what it did, as JSON-ready values."""
    with tempfile.TemporaryDirectory(prefix="streamlap-corpus-") as grown:
        seeds = ROOT / "tests" / "corpus" / target
        words = [
            grown, str(seeds), f"-max_total_time={round(minutes * 60)}", f"-rss_limit_mb={MEMORY_MB}", f"-timeout={SECONDS}",
            f"-artifact_prefix={to}/{target}-", f"-seed={seed}", "-max_len=8192", "-print_final_stats=1", "-verbosity=1",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        before = set(to.glob(f"{target}-*"))
        command = [sys.executable, __file__, target, "--inside", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        findings = sorted(path.name for path in set(to.glob(f"{target}-*")) - before)
        if done.returncode and not findings:
            sys.exit(f"{target}: the search itself failed:\n{done.stderr[-2000:]}")
        if findings:
            print(done.stdout[-2000:], done.stderr[-3000:], file=sys.stderr)
        reached = re.findall(r"cov: (\d+)", done.stderr)
        executions = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        return {
            "target": target, "minutes": minutes, "executions": int(executions[1]) if executions else None,
            "edges": int(reached[-1]) if reached else None, "inputs_kept": len(list(Path(grown).iterdir())),
            "seeds": len(list(seeds.iterdir())), "findings": findings,
        }  # fmt: skip


def fuzz(target: str, words: list[str]) -> None:
    """Inside the process: the search, which does not come back."""
    import atheris

    with atheris.instrument_imports(include=["streamlap", "yaml", "json"]):
        import fuzz_targets
    # Addresses that are only reserved count here too, and torch reserves some.
    resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY_MB << 20, resource.RLIM_INFINITY))
    folder = fuzz_targets.home()
    known = folder / "words"  # libFuzzer wants a word a line, in quotes, with bytes in hexadecimal
    known.write_text("".join(f'"{hexed(json.dumps(word))}"\n' for word in fuzz_targets.WORDS))
    atheris.Setup([sys.argv[0], *words, f"-dict={known}"], lambda raw: void(fuzz_targets.check(target, raw)))
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hexed(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def void(_: str) -> None:
    """A target of libFuzzer gives nothing back."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=4.0, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--to", type=Path, default=Path(), help="folder for findings")
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.exit("scripts/fuzz.py needs atheris, which is not installed: pip install 'streamlap[fuzz]'")
    if args.inside is not None:
        return fuzz(args.target, args.inside)
    args.to.mkdir(parents=True, exist_ok=True)
    results = []
    for target in TARGETS if args.target == "all" else (args.target,):
        results.append(search(target, args.minutes, args.seed, args.to.resolve()))
        print(json.dumps(results[-1]), flush=True)
    return sys.exit(1 if any(result["findings"] for result in results) else 0)


if __name__ == "__main__":
    main()
