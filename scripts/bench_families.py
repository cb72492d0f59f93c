#!/usr/bin/env python
"""What a cut costs in each family: at random, by `lorap` and by `best`, with as many parameters stored.

    python scripts/bench_families.py --text train.txt --out docs/benchmarks/families.json [--only glm4 gpt_neox] [--table]

Each family has the pico model of the tests (tests/picos.py), somewhat larger, and learns to predict the bytes of a text for
--seconds. The mean NLL is taken on windows of another text, which was in neither training nor calibration; loss is what is
above the trained model's own. Chance is the layouts of `lorap` with random subspaces and channels, the mean of a few draws. No
survey, no redrawn windows. Further, for each family: the largest difference between the logits of the stream and those of
transformers, for the model and for a result of `best`; whether that result is whole by `verify`, gives the same logits saved
again, and learns in one step of LoRA.

A family that is in --out already is not run again. The JSON is written after each. Figures by another text, size or number of
windows do not go into the same file.

Shape suffixes: B batch, L length, D hidden, T tokens, N windows, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import benchmarks as shared
import numpy as np
import torch
from benchmarks import Result
from families_table import RATIOS, WAYS, losses
from peft import LoraConfig, get_peft_model
from picos import EVERY_KIND, pico_model
from random_cut import RandomAttention, RandomChannels
from train_demo_model import learning_rate, loss_of

import streamlap
from streamlap.families.stream import ModelStream

DEMO = shared.ROOT / "streamlap" / "demo"
SIZES = {
    "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
"""Of each model; layers, heads and vocabulary are those of the tests."""
FIRST_BYTE = 2
"""Token of the byte 0. Before it are the ends of a text, and behind the byte 255 the ids that stand for images."""
OWN: dict[str, dict[str, Any]] = {"gemma2": {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}}
"""Settings of the tests that keep a model from learning -> those of the published ones."""
LENGTH, BATCH, RATE = 128, 8, 5e-3
TEXT_BYTES = 16_000_000
"""Most that is read of a text to train on."""
CALIBRATION, HELD_OUT, LOGITS = 128, 128, 8
"""Windows: to calibrate on, to measure on, to compare logits on."""
DRAWS = 3

Windows = Mapping[str, torch.Tensor]
"""calibration and held_out -> token ids [windows, LENGTH]."""


def bench(args: argparse.Namespace, work: Path) -> Result:
    settings = {"text": args.text.name, "sizes": SIZES, "windows": [CALIBRATION, HELD_OUT, LENGTH]}
    result = {"command": shared.shown_command(), "machine": shared.machine(), **settings, "families": {}}
    if args.out and args.out.is_file():
        earlier = json.loads(args.out.read_text())
        if any(earlier.get(key) != value for key, value in json.loads(json.dumps(settings)).items()):
            raise SystemExit(f"{args.out} has figures by other settings than {settings}; choose another --out.")
        result = earlier | {"command": result["command"]}
    torch.set_num_threads(1)
    lesson_T, windows = texts(args.text)
    for kind in args.only:
        if kind in result["families"]:
            continue
        with shared.new_folder(work / kind) as folder:
            result["families"][kind] = row = measure(kind, folder, lesson_T, windows, args.seconds)
        result["families"] = {name: result["families"][name] for name in EVERY_KIND if name in result["families"]}
        shared.save(args.out, result)
        print(table({"families": {kind: row}}), file=sys.stderr, flush=True)
    shared.save(args.out, result)
    return result


def texts(path: Path) -> tuple[torch.Tensor, Windows]:
    """Token ids to train on, and the windows. Calibration and measurement have the two halves of the bundled text that the demo
    model is measured on."""
    with path.open("rb") as file:
        lesson_T = as_tokens(file.read(TEXT_BYTES))
    other_T = as_tokens((DEMO / "validation.txt").read_bytes())
    parts = other_T[: len(other_T) // 2], other_T[len(other_T) // 2 :]
    counts = CALIBRATION, HELD_OUT
    calibration_NL, held_out_NL = (
        part_T[: n * LENGTH].view(n, LENGTH) for part_T, n in zip(parts, counts, strict=True)
    )
    return lesson_T, {"calibration": calibration_NL, "held_out": held_out_NL}


def as_tokens(data: bytes) -> torch.Tensor:
    """A byte is a token: so a model of this size soon learns what depends on context."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64)) + FIRST_BYTE


def measure(kind: str, folder: Path, lesson_T: torch.Tensor, windows: Windows, seconds: float) -> Result:
    """Everything about one family."""
    begin, source = time.perf_counter(), folder / "source"
    folder.mkdir()
    for name, tokens_NL in windows.items():
        np.save(folder / f"{name}.npy", tokens_NL.numpy())
    trained = train(kind, source, lesson_T, seconds)
    dense = streamlap.evaluate(source, folder / "held_out.npy").nll
    cuts = {str(ratio): cut(source, folder, ratio, dense) for ratio in RATIOS}
    tokens_NL, out = windows["held_out"][:LOGITS], folder / f"best-{RATIOS[0]}"
    apart = {name: difference(path, tokens_NL) for name, path in (("source", source), ("best", out))}
    return {
        "trained": trained, "dense": dense, "cuts": cuts, "ordered": all(map(ordered, cuts.values())), "logits": apart,
        "whole": streamlap.verify(out)["ok"], "reloads": reloads(out, tokens_NL), "step": step(out, windows["calibration"]),
        "all_seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def train(kind: str, folder: Path, lesson_T: torch.Tensor, seconds: float) -> Result:
    """A model of a kind that has learnt from random windows for so long, in `folder`. It learns without dropout."""
    torch.manual_seed(0)
    model = pico_model(kind, **SIZES, **OWN.get(kind, {})).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    chance, begin, steps, mean = torch.Generator().manual_seed(0), time.perf_counter(), 0, 0.0
    while (done := (time.perf_counter() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(int(1000 * done), 1000, RATE, warmup=100)
        starts_B = torch.randint(len(lesson_T) - LENGTH, (BATCH,), generator=chance)
        loss = loss_of(model, torch.stack([lesson_T[start : start + LENGTH] for start in starts_B]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, mean = steps + 1, 0.95 * mean + 0.05 * loss.item()
    model.save_pretrained(folder)
    count = streamlap.inspect(folder)["parameters"]
    return {"seconds": seconds, "steps": steps, "tokens": steps * BATCH * LENGTH, "loss": mean / (1 - 0.95**steps),
            "parameters": {key: count[f"{key}_before"] for key in ("decoder", "total")}}  # fmt: skip


def cut(source: Path, folder: Path, ratio: float, dense: float) -> Result:
    """What each way of removing so much costs. The result of `best` stays."""
    files = (str(folder / "calibration.npy"),)
    ways: dict[str, dict[str, Any]] = {
        f"random {seed}": {"methods": (RandomAttention(seed=seed), RandomChannels(seed=seed))} for seed in range(DRAWS)
    }
    ways |= {"lorap": {"preset": "lorap"}, "best": {"preset": "best", "survey": None, "redraw": False}}
    found: Result = {}
    for way, options in ways.items():
        out = folder / f"{way}-{ratio}"
        report = streamlap.compress(source, out, ratio=ratio, files=files, **options)
        loss = streamlap.evaluate(out, folder / "held_out.npy").nll - dense
        found[way] = {"loss": loss, "parameters": report.parameters.decoder_after}
    draws = [found.pop(f"random {seed}") for seed in range(DRAWS)]
    losses = [draw["loss"] for draw in draws]
    return {"random": {"loss": sum(losses) / DRAWS, "draws": losses, "parameters": draws[0]["parameters"]}, **found}


def ordered(cut: Result) -> bool:
    """Whether `best` costs less than `lorap`, and that less than chance."""
    return bool(cut["best"]["loss"] < cut["lorap"]["loss"] < cut["random"]["loss"])


@torch.no_grad()
def difference(folder: Path, tokens_NL: torch.Tensor) -> float:
    """Largest difference between the logits of the stream and those of transformers; 0 is bit for bit."""
    stream = ModelStream(folder, dtype="float32")
    kwargs, batches = stream.layer_kwargs(tokens_NL.shape[1]), list(stream.embed(tokens_NL))
    for index in range(stream.depth):
        layer = stream.layer(index, kwargs[index])
        batches = [layer(x_BLD) for x_BLD in batches]
    head = stream.head()
    streamed_NLV = torch.stack([head(x_LD) for x_LD in torch.cat(batches)])
    return float((streamed_NLV - logits(opened(folder), tokens_NL)).abs().max())


def opened(folder: Path) -> Any:
    return streamlap.load(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any, tokens_NL: torch.Tensor) -> torch.Tensor:
    found_NLV: torch.Tensor = model(input_ids=tokens_NL).logits
    return found_NLV


def reloads(folder: Path, tokens_NL: torch.Tensor) -> bool:
    """Whether the model, saved by transformers and opened again, gives the same logits, bit for bit."""
    model, saved = opened(folder), folder.with_name("saved")
    model.save_pretrained(saved)
    return torch.equal(logits(opened(saved), tokens_NL), logits(model, tokens_NL))


def step(folder: Path, tokens_NL: torch.Tensor) -> Result:
    """The loss on a batch before and after one step of LoRA on the linears that write to the hidden states."""
    family, x_BL = ModelStream(folder).family, tokens_NL[:BATCH]
    paths = "|".join(re.escape(family.path(role)) for role in ("o", "down"))
    target = rf"{re.escape(family.layers)}\.\d+\.({paths})"
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=target)
    model = get_peft_model(opened(folder), config).eval()
    optimizer = torch.optim.AdamW((part for part in model.parameters() if part.requires_grad), lr=1e-3)
    before = loss_of(model, x_BL)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = loss_of(model, x_BL)
    return {"before": before.item(), "after": after.item(), "learns": bool(after < before)}


def table(result: Result) -> str:
    names = [f"{way} {ratio:.0%}" for ratio in RATIOS for way in WAYS]
    columns = ["family", "steps", "dense NLL", *names,
               "in order", "stream apart", "result apart", "whole", "reloads", "learns"]  # fmt: skip
    rows = [
        [kind, row["trained"]["steps"], f"{row['dense']:.3f}", *losses(row), shared.yes(row["ordered"]),
         *(f"{row['logits'][name]:.1g}" for name in ("source", "best")), shared.yes(row["whole"]), shared.yes(row["reloads"]),
         shared.yes(row["step"]["learns"])]
        for kind, row in result["families"].items()
    ]  # fmt: skip
    return shared.markdown(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=EVERY_KIND, default=EVERY_KIND, metavar="FAMILY", help="default all"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of training for each family (60)")
    parser.add_argument("--text", type=Path, default=DEMO / "calibration.txt", help="to train on (a bundled one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the JSON")
    parser.add_argument("--table", action="store_true", help="print a Markdown table in place of the JSON")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for models while they are measured (a temporary folder)"
    )
    args = parser.parse_args()
    with shared.work_folder(args.work) as work:
        result = bench(args, work)
    print(table(result) if args.table else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
