#!/usr/bin/env python
"""The preset `best` against figures of other compressors on the same model and tokens. Exit code 1 where any is better.

    python scripts/bench_peers.py MODEL --calibration calibration.npy --validation validation.npy --peers peers.json

peers.json holds `rows` with method, variant, asked_ratio, stored_decoder_parameters and perplexity. For every ratio that was
asked of them, `best` may store at most what the smallest of them stores in the decoder's linears; rows named dense are left
out.
Perplexity is that of float32, in windows of 256 tokens that do not overlap.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
from benchmarks import Result

import streamlap
from streamlap.families.stream import ModelStream
from streamlap.output.inspect import count_parameters


def peers_by_ratio(path: Path) -> dict[float, list[Result]]:
    """Ratio asked for -> the rows of all methods but the model itself."""
    ratios: dict[float, list[Result]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["method"] != "dense":
            ratios.setdefault(row["asked_ratio"], []).append(row)
    return dict(sorted(ratios.items()))


def outside_decoder(model: Path) -> int:
    """Parameters that no ratio touches: of the whole model, without the decoder's linears."""
    counted = count_parameters(ModelStream(model), {})
    return counted.total_before - counted.decoder_before


def contest(args: Any, work: Path, ratio: float, peers: Sequence[Result]) -> Result:
    """`best` at the size of the smallest peer, and who wins against each."""
    most = min(row["stored_decoder_parameters"] for row in peers)
    with shared.new_folder(work / f"best-{ratio}") as out:
        report = streamlap.compress(
            args.model, out, preset="best", files=(str(args.calibration),), device=args.device,
            target_params=most + outside_decoder(args.model),
        )  # fmt: skip
        result = streamlap.evaluate(out, args.validation, length=args.length, device=args.device, dtype="float32")
    stored = report.parameters.decoder_after
    assert stored <= most, f"{stored} parameters are stored, {most} were allowed"
    return {
        "asked_ratio": ratio, "ratio": report.recipe["ratio"], "stored_decoder_parameters": stored, "allowed": most,
        "perplexity": result.perplexity, "seconds": report.seconds,
        "peers": [{**row, "win": result.perplexity < row["perplexity"]} for row in peers],
    }  # fmt: skip


def table(result: Result) -> str:
    columns = ["ratio", "method", "stored decoder parameters", "perplexity", "best"]
    rows = []
    for part in result["ratios"]:
        head = f"{part['asked_ratio']:g}"
        rows.append([head, "**best**", f"{part['stored_decoder_parameters']:,}", f"{part['perplexity']:.3f}", ""])
        for row in sorted(part["peers"], key=lambda row: row["perplexity"]):
            name = " ".join(filter(None, [row["method"], row["variant"]]))
            count, verdict = f"{row['stored_decoder_parameters']:,}", "wins" if row["win"] else "**loses**"
            rows.append([head, name, count, f"{row['perplexity']:.3f}", verdict])
    return shared.markdown(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--validation", type=Path, required=True, metavar="FILE")
    parser.add_argument("--peers", type=Path, required=True, metavar="FILE")
    parser.add_argument("--ratios", type=float, nargs="+", help="some of those in the file; default all")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window of the validation")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for outputs, which do not stay; default a temporary folder"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args()
    ratios = {ratio: rows for ratio, rows in peers_by_ratio(args.peers).items() if ratio in (args.ratios or [ratio])}
    if not ratios:
        raise SystemExit(f"{args.peers.name} has no rows of these ratios.")
    with shared.work_folder(args.work) as work:
        contests = [contest(args, work, ratio, rows) for ratio, rows in ratios.items()]
    won = all(row["win"] for part in contests for row in part["peers"])
    result = {"command": shared.shown_command(), "machine": shared.machine(), "ratios": contests, "won": won}
    print(json.dumps(result, indent=1) if args.json else table(result))
    if not won:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
