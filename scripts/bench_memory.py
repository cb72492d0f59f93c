#!/usr/bin/env python
"""Peak memory must not grow with depth: compress and evaluate the same shape at several depths, each in a process of its own.

    python scripts/bench_memory.py --depths 4 12 36 --out memory.json

Prints, for each depth, the peak resident set above what importing streamlap takes, and the spread beside one layer's bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

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
from streamlap.memory import peak_ram_bytes, reset_peak_ram
import psutil
torch.set_num_threads(int(sys.argv[4]))
model, out, tokens = sys.argv[1:4]
torch.nn.Linear(8, 8)(torch.zeros(1, 8))
base = psutil.Process().memory_info().rss
reset_peak_ram()
report = streamlap.compress(model, out, ratio=0.2, files=(tokens,))
compress_peak = max(report.peak_ram_bytes, peak_ram_bytes())
evaluation = streamlap.evaluate(out, tokens)
print(json.dumps({"compress": compress_peak - base, "evaluate": evaluation.peak_ram_bytes - base, "import": base}))
"""


def measure(depth: int, hidden: int, windows: int, threads: int) -> dict:
    import numpy as np

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make = [sys.executable, "-c", MAKE, str(folder / "model"), str(depth), str(hidden)]
        subprocess.run(make, check=True)
        np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 1000, (windows, 256)).astype(np.uint16))
        command = [sys.executable, "-c", MEASURE, *(str(folder / name) for name in ("model", "out", "tokens.npy"))]
        done = subprocess.run([*command, str(threads)], check=True, stdout=subprocess.PIPE, text=True)
        return {"layers": depth} | json.loads(done.stdout.splitlines()[-1])


def layer_bytes(hidden: int) -> int:
    """Bytes of one decoder layer as stored, in bfloat16."""
    ffn, kv = hidden * 11 // 4, max(1, hidden // 256) * 64
    return 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + 2 * hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 12, 36])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 256 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [measure(depth, args.hidden, args.windows, args.threads) for depth in args.depths]
    spread = {what: max(r[what] for r in rows) - min(r[what] for r in rows) for what in ("compress", "evaluate")}
    result = {"rows": rows, "layer_bytes": layer_bytes(args.hidden), "spread": spread}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
