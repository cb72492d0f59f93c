#!/usr/bin/env python
"""Hold the preset `lorap` against figures of the published LoRAP code on the same model and tokens.

    python scripts/bench_golden.py REFERENCE --out golden.json

REFERENCE holds model/, golden/calibration_tokens.npy, golden/validation_tokens.npy and golden/lorap_{ratio}.{json,npz}.
Asked: ranks equal; kept channels equal (99.5 % a layer, 100 % with the published statistics); perplexity within 0.3 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import streamlap
from streamlap.families.stream import ModelStream
from streamlap.linalg.budget import lorap_removal
from streamlap.linalg.channels import kept_channels, lorap_scores


def scale(golden: np.lib.npyio.NpzFile, key: str) -> torch.Tensor:
    """d_j from the published code's mean of squares; zeros become 1e-4."""
    root = torch.from_numpy(golden[key]).double().sqrt()
    return torch.where(root == 0, torch.full_like(root, 1e-4), root)


def kept_from_golden(stream: ModelStream, golden: np.lib.npyio.NpzFile, index: int, ratio: float) -> list[int]:
    """Channels that this code keeps where the statistics are the published code's."""
    read = {p: stream.source.read(f"model.layers.{index}.mlp.{p}_proj.weight") for p in ("gate", "up", "down")}
    scale_in = scale(golden, f"{index}.scaler_row.mlp.gate_proj")
    scale_mid = scale(golden, f"{index}.scaler_row.mlp.down_proj")
    score_F = lorap_scores([read["gate"], read["up"]], read["down"], scale_in, scale_mid)
    return kept_channels(score_F, lorap_removal(len(score_F), ratio, 0.01)).tolist()


def compare(reference: Path, ratio: float, work: Path) -> dict:
    golden_npz = np.load(reference / "golden" / f"lorap_{ratio}.npz")
    golden = json.loads((reference / "golden" / f"lorap_{ratio}.json").read_text())
    out = work / f"ratio-{ratio}"
    files = (str(reference / "golden" / "calibration_tokens.npy"),)
    report = streamlap.compress(reference / "model", out, ratio=ratio, preset="lorap", dtype="float32", files=files)
    kept = json.loads((out / report.kept_channels).read_text())
    stream = ModelStream(reference / "model")
    ranks_equal, shared, fed = True, [], []
    for row, layer in zip(golden["layers"], report.layers, strict=True):
        ranks = {f"self_attn.{name}": rank for name, rank in row["ranks"].items() if rank != "dense"}
        ranks_equal &= ranks == {e.path: e.row["rank"] for e in layer.edits if "rank" in e.row}
        theirs = set(row["ffn_kept_idx"])
        shared.append(len(theirs & set(kept[f"{layer.index}.mlp.gate_proj"])) / len(theirs))
        fed.append(len(theirs & set(kept_from_golden(stream, golden_npz, layer.index, ratio))) / len(theirs))
    ours = streamlap.evaluate(out, reference / "golden" / "validation_tokens.npy")
    theirs_ppl = golden["validation_perplexity"]
    return {
        "ratio": ratio,
        "ranks_equal": ranks_equal,
        "kept_equal_least": min(shared),
        "kept_equal_with_published_statistics": min(fed),
        "perplexity": ours.perplexity,
        "published_perplexity": theirs_ppl,
        "difference": ours.perplexity / theirs_ppl - 1,
        "removed_of_decoder": report.parameters.ratio_decoder,
        "compress_seconds": report.seconds,
        "evaluate_seconds": ours.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = [compare(args.reference, ratio, Path(work)) for ratio in args.ratios]
    text = json.dumps(rows, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
