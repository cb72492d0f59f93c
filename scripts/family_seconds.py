#!/usr/bin/env python
"""Number and seconds of the tests that each family inherits, out of what pytest writes, into the figures of families.

    scripts/test tests/families --numprocesses 0 --junitxml families.xml
    python scripts/family_seconds.py families.xml --figures docs/benchmarks/families.json

A test is a family's where its parameters name it. Seconds are of the test with what it alone had made for it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
from benchmarks import Result
from families_table import KINDS


def seconds_of(paths: Sequence[Path]) -> Result:
    """Family -> tests and seconds. Raises SystemExit where a test has not passed."""
    found: Result = {kind: {"tests": 0, "seconds": 0.0} for kind in KINDS}
    for case in itertools.chain.from_iterable(ElementTree.parse(path).getroot().iter("testcase") for path in paths):
        name = str(case.get("name"))
        if case.find("failure") is not None or case.find("error") is not None:
            raise SystemExit(f"{name} has not passed; seconds of tests that fail say nothing.")
        for kind in set(name.partition("[")[2].rstrip("]").split("-")) & set(KINDS):
            found[kind]["tests"] += 1
            found[kind]["seconds"] += float(case.get("time", 0))
    return {kind: row | {"seconds": round(row["seconds"], 1)} for kind, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("xml", type=Path, nargs="+", help="what --junitxml has written")
    parser.add_argument("--figures", type=Path, required=True, metavar="FILE", help="JSON of bench_families")
    args = parser.parse_args()
    result = json.loads(args.figures.read_text()) if args.figures.is_file() else {}
    tests = {"machine": shared.machine(), "families": seconds_of(args.xml)}
    shared.save(args.figures, result | {"tests": tests})


if __name__ == "__main__":
    main()
