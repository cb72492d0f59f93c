#!/usr/bin/env python
"""`streamlap plan` against what `streamlap compress` then takes: output, memory, bytes moved, seconds.

    python scripts/bench_plan.py --work DIR --out plan.json
    python scripts/bench_plan.py --case llama-3-8b:2,3GiB,4x512 --case path/to/model,8GiB,16x512,float32
    python scripts/bench_plan.py --preset best --case llama-3-8b:2,6GiB,4x512

Both commands run in fresh processes with the same flags, the plan first; it measures this machine's rates anew, at most once a
case of a dtype. A case is MODEL,CAP,WINDOWSxTOKENS[,DTYPE]; MODEL is a folder or SHAPE:LAYERS, whose checkpoint is made.

Measured bytes read and written are those of the process, by any file, from the first file in the output folder to its end. As
in the plan, what is outside the layers is among them; in the report's own figures it is not. Seconds are of the same time,
without Python's start; beside them the report's own, which are the loop over layers alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
from benchmarks import Done, Result

from streamlap.errors import BudgetError

CASES = (
    "llama-2-7b:2,2GiB,4x512",
    "llama-3-8b:2,1.5GiB,4x512",
    "llama-2-13b:2,3GiB,4x512",
    "qwen2.5-32b:2,3GiB,4x512",
    "llama-3-70b:2,6GiB,4x512",
)
"""Where a layer is computed in bfloat16, the second and fourth leave no room to read ahead. On other CPUs they do not fit."""
OUTPUT_PERCENT, PEAK_PERCENT = 0.1, 10.0
"""Errors of the plan that are promised."""

SAME = {"output_bytes": "output_bytes", "peak_ram_bytes": "peak_ram_bytes", "read_bytes": "bytes_read",
        "write_bytes": "bytes_written"}  # fmt: skip
"""What plan calls it -> what `measured` calls it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    cap: str
    samples: int
    length: int
    dtype: str = "auto"

    @classmethod
    def parse(cls, text: str) -> Case:
        """MODEL,CAP,WINDOWSxTOKENS[,DTYPE]"""
        model, *rest = text.split(",")
        if not 2 <= len(rest) <= 3:
            raise argparse.ArgumentTypeError(f"{text!r} is not MODEL,CAP,WINDOWSxTOKENS[,DTYPE]")
        samples, length = shared.windows(rest[1])
        return cls(model=model, cap=rest[0], samples=samples, length=length, dtype=(*rest[2:], "auto")[0])

    @property
    def made(self) -> tuple[str, int] | None:
        """Shape and layers of a checkpoint that is to be made."""
        shape, _, layers = self.model.rpartition(":")
        return (shape, int(layers)) if shape and layers.isdigit() else None


def bench(args: argparse.Namespace, work: Path) -> Result:
    rows = []
    with shared.new_folder(work / "scratch") as scratch:
        for case in args.case or [Case.parse(text) for text in CASES]:
            model = shared.checkpoint(work, *case.made, args.scale_down) if case.made else Path(case.model)
            rows.append(run_case(case, model, scratch, args.preset))
            if case.made and args.clean:
                shutil.rmtree(model)
            print(table({"cases": rows[-1:]}), file=sys.stderr, flush=True)
    return {"preset": args.preset, "scale_down": args.scale_down, "cases": rows, "verdict": verdict(rows)}


def run_case(case: Case, model: Path, scratch: Path, preset: str = shared.ENGINE) -> Result:
    """The plan, then the run, under the same flags."""
    scratch.mkdir(exist_ok=True)
    tokens = shared.tokens_file(scratch, model, case.samples, case.length)
    flags = ["--calibration", tokens, *shared.AS_GIVEN, "--max-ram", case.cap, "--dtype", case.dtype, "--work",
             scratch / "hidden", "--preset", preset]  # fmt: skip
    planned = shared.run_streamlap("plan", model, *flags, variables={"XDG_CACHE_HOME": str(scratch.absolute())})
    if planned.code and not planned.output:
        planned.required()
    with shared.new_folder(scratch / "out") as out:
        shared.drop_cache(model)
        done = shared.run_streamlap("compress", model, out, *flags, watch=out)
        if done.code not in (0, BudgetError.exit_code):
            done.required()
        output = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    name = f"{case.made[0]}, {case.made[1]} layers" if case.made else model.name
    row = {"model": name, "cap": case.cap, "tokens": [case.samples, case.length], "dtype": case.dtype}
    return row | compare(planned.output, done, output)


def compare(plan: Result, done: Done, output_bytes: int) -> Result:
    """Planned and measured figures side by side, with errors and verdicts; of a case that was refused only that."""
    planned = {key: plan[key] for key in ("fits", "output_bytes", "peak_ram_bytes", "read_bytes", "write_bytes",
                                          "seconds_low", "seconds_high", "overlap", "hidden_states")}  # fmt: skip
    if done.code:
        return {"planned": planned, "refused": True, "verdict": {"fits": not plan["fits"]}}
    read, written = done.moved_bytes
    measured = {
        "output_bytes": output_bytes, "peak_ram_bytes": done.output["peak_ram_bytes"],
        "bytes_read": read, "bytes_written": written,
        "seconds": round(done.working_seconds, 2), "report_seconds": round(done.output["seconds"], 2),
        "wall_seconds": round(done.seconds, 2), "peak_rss_bytes": done.peak_rss_bytes,
    }  # fmt: skip
    errors = {key: shared.percent(planned[key], measured[name]) for key, name in SAME.items()}
    errors |= {key: shared.percent(planned[key], measured["seconds"]) for key in ("seconds_low", "seconds_high")}
    verdicts = {
        "fits": plan["fits"],
        "output": abs(errors["output_bytes"]) <= OUTPUT_PERCENT,
        "peak": abs(errors["peak_ram_bytes"]) <= PEAK_PERCENT,
        "seconds": planned["seconds_low"] <= measured["seconds"] <= planned["seconds_high"],
    }
    return {"planned": planned, "measured": measured, "error_percent": errors, "refused": False, "verdict": verdicts}


def verdict(rows: list[Result]) -> Result:
    """What holds in every case; `worst` is the largest error without its sign."""
    ran = [row for row in rows if not row["refused"]]
    held = {key: all(row["verdict"][key] for row in ran) for key in ("output", "peak", "seconds")}
    worst = {key: max((abs(row["error_percent"][key]) for row in ran), default=None) for key in SAME}
    return {"fits": all(row["verdict"]["fits"] for row in rows), **held, "worst_percent": worst}


def table(result: Result) -> str:
    columns = ["model", "cap", "tokens", "figure", "planned", "measured", "error", "as asked"]
    rows = [line for row in result["cases"] for line in case_lines(row)]
    text = shared.markdown(columns, rows)
    if "verdict" not in result:
        return text
    kinds = (("output", f"output within {OUTPUT_PERCENT} %"), ("peak", f"peak within {PEAK_PERCENT:g} %"),
             ("seconds", "seconds inside the range"))  # fmt: skip
    return text + "\n\n" + "\n".join(f"- {words}: {shared.yes(result['verdict'][key])}" for key, words in kinds)


def case_lines(row: Result) -> Iterator[list[object]]:
    name = [row["model"], row["cap"], "x".join(map(str, row["tokens"]))]
    if row["refused"]:
        yield [*name, "refused", shared.yes(not row["planned"]["fits"]), "yes", "", shared.yes(row["verdict"]["fits"])]
        return
    planned, measured, errors, verdicts = (row[key] for key in ("planned", "measured", "error_percent", "verdict"))
    for key, words, judged in (("output_bytes", "output", "output"), ("peak_ram_bytes", "peak RAM", "peak"),
                               ("read_bytes", "read", None), ("write_bytes", "written", None)):  # fmt: skip
        yield [*name, words, shared.size(planned[key]), shared.size(measured[SAME[key]]), f"{errors[key]:+.2f} %",
               shared.yes(verdicts[judged]) if judged else ""]  # fmt: skip
        name = ["", "", ""]
    yield [*name, "seconds", f"{planned['seconds_low']:.1f} to {planned['seconds_high']:.1f}", f"{measured['seconds']:.1f}",
           f"{errors['seconds_low']:+.0f} % to {errors['seconds_high']:+.0f} %", shared.yes(verdicts["seconds"])]  # fmt: skip


def main() -> None:
    parser = shared.argument_parser(__doc__)
    shared.preset_option(parser)
    parser.add_argument(
        "--case", type=Case.parse, action="append", metavar="CASE", help="may be repeated; default five shapes"
    )
    parser.add_argument("--clean", action="store_true", help="delete each checkpoint that was made once it is done")
    args = parser.parse_args()
    shared.conclude(args, partial(bench, args), table)


if __name__ == "__main__":
    main()
