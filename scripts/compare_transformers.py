#!/usr/bin/env python
"""Whether results give the same logits in two releases of transformers.

    python scripts/compare_transformers.py OTHER/bin/python [--only glm4 gpt_neox] [--ratio 0.3] [--out FILE]

OTHER is an environment with streamlap's dependencies, the same torch and another transformers. Of each family the random
pico model of the tests (tests/picos.py) is compressed here, by `lorap` and by `best`, and exported to plain linears. These
and the model itself are opened in both environments, in float32, and their logits compared. The JSON has the largest
difference of each; 0 is bit for bit. Exit 1 where a result differs by more than the model itself does, or does not open where
that opens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import benchmarks as shared
import numpy as np
from benchmarks import Result
from picos import EVERY_KIND, random_pico

import streamlap

ROWS, LENGTH, TEXT_IDS = 12, 32, 290
ROUNDING, TIMES = 1e-6, 3.0
"""A result may differ by so much, and by so many times what the model itself differs by."""
READ = """
import json, sys
import numpy as np, torch, transformers, streamlap

torch.set_num_threads(1)
name, *folders = sys.argv[1:]
tokens_NL, refused = torch.from_numpy(np.load("tokens.npy")), {}
for folder in folders:
    try:
        model = streamlap.load(folder, dtype=torch.float32).eval()
    except Exception as error:
        refused[folder] = f"{type(error).__name__}: {error}"
        continue
    with torch.no_grad():
        np.save(f"{folder}.{name}.npy", model(input_ids=tokens_NL).logits.numpy())
print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "refused": refused}))
"""
"""What each environment runs: the logits of every folder that opens, in a file beside it."""


def compare(args: argparse.Namespace, work: Path) -> Result:
    tokens_NL = np.random.default_rng(0).integers(2, TEXT_IDS, (ROWS, LENGTH))
    np.save(work / "tokens.npy", tokens_NL)
    folders = [folder for kind in args.only for folder in results(kind, work, args.ratio)]
    here, other = (
        read(python, name, folders, work) for python, name in ((sys.executable, "here"), (args.python, "other"))
    )
    opened = [folder for folder in folders if folder not in here["refused"] | other["refused"]]
    found = {folder: difference(work, folder) for folder in opened}
    return {"here": here, "other": other, "differences": found}


def passes(result: Result) -> bool:
    """Whether all that is made of a model differs as little as the model itself, and opens where that does."""
    refused, differences = result["here"]["refused"] | result["other"]["refused"], result["differences"]
    opens = all(own(folder) in refused for folder in refused)
    return opens and all(found <= ROUNDING + TIMES * differences[own(folder)] for folder, found in differences.items())


def own(folder: str) -> str:
    """The folder of the model of which another was made."""
    return f"{folder.rpartition('-')[0]}-source"


def results(kind: str, work: Path, ratio: float) -> list[str]:
    """Names of the folders that are made of one family."""
    source, files = work / f"{kind}-source", (str(work / "tokens.npy"),)
    random_pico(kind).save_pretrained(source)
    for preset in ("lorap", "best"):
        survey = {"survey": None} if preset == "best" else {}
        streamlap.compress(source, work / f"{kind}-{preset}", ratio=ratio, preset=preset, files=files, **survey)
    streamlap.export(work / f"{kind}-best", work / f"{kind}-dense")
    return [f"{kind}-{way}" for way in ("source", "lorap", "best", "dense")]


def read(python: str, name: str, folders: list[str], work: Path) -> Result:
    """Versions of an environment, which has written its logits of all folders."""
    done = subprocess.run(
        [python, "-c", READ, name, *folders], cwd=work, env=shared.environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{python} ended with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def difference(work: Path, folder: str) -> float:
    here_NLV, other_NLV = (np.load(work / f"{folder}.{name}.npy") for name in ("here", "other"))
    return float(np.abs(here_NLV - other_NLV).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", metavar="PYTHON", help="of the environment with the other transformers")
    parser.add_argument(
        "--only", nargs="+", choices=EVERY_KIND, default=EVERY_KIND, metavar="FAMILY", help="default all"
    )
    parser.add_argument("--ratio", type=float, default=0.3, help="of what is removed (0.3)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the JSON")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for models (a temporary folder)")
    args = parser.parse_args()
    with shared.work_folder(args.work) as work:
        result = {"machine": shared.machine(), **compare(args, work)}
    shared.save(args.out, result)
    print(json.dumps(result, indent=1))
    return int(not passes(result))


if __name__ == "__main__":
    sys.exit(main())
