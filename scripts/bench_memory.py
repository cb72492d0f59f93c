#!/usr/bin/env python
"""Peak memory: it must not grow with depth, and it must stay inside a cap without a change to one byte of the output.

    python scripts/bench_memory.py --depths 4 12 36 --out memory.json
    python scripts/bench_memory.py --shape llama-2-7b --depths 4 8 16 --caps 3GiB 6GiB --tokens 8x512 --work DIR

Without --shape: small random Llamas; the peak resident set above what importing streamlap takes, of compress and eval, and its
spread beside one layer's bytes. With --shape: checkpoints of that shape, uncapped at every depth, then the shallowest (or
--cap-depth) under every cap. A capped run gets the flag --max-ram, and where the machine allows it a control group with the
same limit as well, in which page cache counts too; its shards are compared with those of the uncapped run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import benchmarks as shared
import numpy as np
from benchmarks import Done, Result
from memory_group import limited_group

from streamlap.system.budget import parse_size

MAKE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, depth, hidden = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
config = AutoConfig.for_model("llama", hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=depth,
    num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), vocab_size=1000,
    max_position_embeddings=256, bos_token_id=0, eos_token_id=1)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="64MB")
"""

MEASURE = """
import json, sys
import numpy as np, torch
import streamlap
from streamlap.system.meters import peak_ram_bytes, reset_peaks
import psutil
torch.set_num_threads(int(sys.argv[4]))
model, out, tokens = sys.argv[1:4]
torch.nn.Linear(8, 8)(torch.zeros(1, 8))
base = psutil.Process().memory_info().rss
reset_peaks()
report = streamlap.compress(model, out, ratio=0.2, preset=sys.argv[5], files=(tokens,))
compress_peak = max(report.peak_ram_bytes, peak_ram_bytes())
evaluation = streamlap.evaluate(out, tokens)
print(json.dumps({"compress": compress_peak - base, "evaluate": evaluation.peak_ram_bytes - base, "import": base}))
"""


def measure(depth: int, hidden: int, windows: int, threads: int, preset: str = "best") -> Result:
    """One small random Llama: peaks above those of the process after its imports."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make = [sys.executable, "-c", MAKE, str(folder / "model"), str(depth), str(hidden)]
        subprocess.run(make, check=True, env=shared.environment())
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 1000, (windows, 256)).astype(np.uint16))
        command = [sys.executable, "-c", MEASURE, *(str(folder / name) for name in ("model", "out", "tokens.npy"))]
        done = subprocess.run(
            [*command, str(threads), preset], check=True, stdout=subprocess.PIPE, text=True, env=shared.environment()
        )
        return {"layers": depth} | json.loads(done.stdout.splitlines()[-1])


def layer_bytes(hidden: int) -> int:
    """Bytes of one decoder layer as stored, in bfloat16."""
    ffn, kv = hidden * 11 // 4, max(1, hidden // 256) * 64
    return 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + 2 * hidden)


def bench_small(args: argparse.Namespace, work: Path) -> Result:
    rows = [measure(depth, args.hidden, args.windows, args.threads, args.preset) for depth in args.depths]
    spread = {what: max(r[what] for r in rows) - min(r[what] for r in rows) for what in ("compress", "evaluate")}
    return {"rows": rows, "layer_bytes": layer_bytes(args.hidden), "spread": spread}


def bench_shape(args: argparse.Namespace, work: Path) -> Result:
    """Uncapped at every depth, then under every cap at one of them."""
    depth, rows, whole = args.cap_depth or min(args.depths), [], {}
    models = {layers: shared.checkpoint(work, args.shape, layers, args.scale_down) for layers in {*args.depths, depth}}
    tokens = shared.tokens_file(work, models[depth], *args.tokens)
    for layers, model in sorted(models.items()):
        with shared.new_folder(work / "out") as out:
            shared.drop_cache(model)
            done = shared.run_streamlap(
                "compress", model, out, "--preset", args.preset, *shared.AS_GIVEN, "--calibration", tokens
            ).required()
            rows.append({"layers": layers} | outcome(done, work))
            whole = whole if layers != depth else shared.hashes(out)
    capped = [under_cap(args, work, models[depth], tokens, cap, whole) for cap in args.caps]
    for model in models.values() if args.clean else ():
        shutil.rmtree(model)
    return {
        "shape": args.shape, "scale_down": args.scale_down, "tokens": args.tokens, "depths": rows,
        "spread_percent": shared.spread_percent([row["peak_rss_bytes"] for row in rows]),
        "cap_layers": depth, "caps": capped,
        "verdict": {"within": all(row["within"] for row in capped), "identical": all(row["identical"] for row in capped)},
    }  # fmt: skip


def under_cap(
    args: argparse.Namespace, work: Path, model: Path, tokens: Path, cap: str, whole: dict[str, str]
) -> Result:
    """Compress, and evaluate what came out, inside `cap`; `whole` are the hashes of the uncapped run."""
    with shared.new_folder(work / "out") as out:
        shared.drop_cache(model)
        row = {"cap": cap} | capped_run(
            args, work, cap, "compress", model, out, "--preset", args.preset, *shared.AS_GIVEN, "--calibration", tokens
        )
        row["identical"] = bool(whole) and shared.hashes(out) == whole
        if args.eval_cap and row["completed"]:
            shared.drop_cache(out)
            row["eval"] = capped_run(args, work, cap, "eval", out, "--text", tokens, "--work", work / "hidden")
    return row


def capped_run(args: argparse.Namespace, work: Path, cap: str, *words: object) -> Result:
    """One command with --max-ram and, where that can be, in a group of its own with the same limit."""
    limit = parse_size(cap, "--caps") or 0
    with limited_group(limit) if args.cgroup is not False else contextlib.nullcontext() as group:
        if args.cgroup and group is None:
            raise SystemExit("--cgroup: this machine lets this user make no memory group; try as root")
        done = shared.run_streamlap(*words, "--max-ram", cap, prefix=group.prefix if group else ())
        seen = {"kind": group.kind, **group.figures()} if group else {"kind": "none"}
    row = outcome(done, work) | {"cap_bytes": limit, "group": seen}
    return row | {"within": row["completed"] and row["peak_rss_bytes"] <= limit and not seen.get("oom_kills")}


def outcome(done: Done, work: Path) -> Result:
    """The figures of a run; `seconds` are the report's own, `wall_seconds` those of the process."""
    peak = max(done.peak_rss_bytes, done.output.get("peak_ram_bytes", 0))
    row = {"completed": not done.code, "peak_rss_bytes": peak, "seconds": done.output.get("seconds"),
           "wall_seconds": round(done.seconds, 1)}  # fmt: skip
    if "layers" in done.output:
        row["phases"] = phases(done.output["layers"])
    return row | ({"exit_code": done.code, "error": done.error.replace(str(work), "WORK")} if done.code else {})


def phases(layers: list[Result]) -> dict[str, float]:
    """Seconds of all layers, phase by phase."""
    total: Counter[str] = Counter()
    for layer in layers:
        total.update(layer["seconds"])
    return {name: round(seconds, 1) for name, seconds in total.items()}


def table(result: Result) -> str:
    if "depths" not in result:
        rows = [[row["layers"], shared.size(row["compress"]), shared.size(row["evaluate"])] for row in result["rows"]]
        rows.append(["spread", *(shared.size(result["spread"][what]) for what in ("compress", "evaluate"))])
        rows.append(["one layer", shared.size(result["layer_bytes"]), ""])
        return shared.markdown(["layers", "compress", "evaluate"], rows)
    rows = [[row["layers"], shared.size(row["peak_rss_bytes"]), f"{row['wall_seconds']}"] for row in result["depths"]]
    rows.append(["spread", f"{result['spread_percent']:.1f} %", ""])
    depths = shared.markdown([f"{result['shape']}, layers", "peak RSS, no cap", "seconds"], rows)
    columns = [
        "run",
        "cap",
        "group",
        "peak RSS",
        "peak of the group",
        "out of memory",
        "seconds",
        "same bytes",
        "within",
    ]
    return f"{depths}\n\n{shared.markdown(columns, cap_rows(result))}"


def cap_rows(result: Result) -> Iterator[list[object]]:
    for row in result["caps"]:
        for name, part in (("compress", row), ("eval", row.get("eval"))):
            if part:
                group = part["group"]
                yield [f"{name}, {result['cap_layers']} layers", row["cap"], group["kind"], shared.size(part["peak_rss_bytes"]),
                       shared.size(group.get("peak_bytes")), group.get("oom_kills", ""), part["wall_seconds"],
                       shared.yes(part.get("identical")), shared.yes(part["within"])]  # fmt: skip


def main() -> None:
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--shape", help="a shape of make_synthetic_checkpoint.py; without it small random Llamas")
    shared.preset_option(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 12, 36])
    parser.add_argument("--caps", nargs="*", default=[], help="with --shape: limits such as 3GiB")
    parser.add_argument("--cap-depth", type=int, help="layers under the caps; default the fewest")
    parser.add_argument(
        "--tokens", type=shared.windows, default=(8, 512), help="with --shape: windows x tokens (8x512)"
    )
    parser.add_argument(
        "--cgroup", action=argparse.BooleanOptionalAction, help="limit the kernel's count too; default if it can"
    )
    parser.add_argument("--eval-cap", action="store_true", help="eval every capped output under the same cap")
    parser.add_argument("--clean", action="store_true", help="delete the checkpoints at the end")
    parser.add_argument("--hidden", type=int, default=1024, help="without --shape: hidden size")
    parser.add_argument("--windows", type=int, default=16, help="without --shape: calibration windows of 256 tokens")
    parser.add_argument("--threads", type=int, default=2, help="without --shape")
    args = parser.parse_args()
    shared.conclude(args, partial(bench_shape if args.shape else bench_small, args), table)


if __name__ == "__main__":
    main()
