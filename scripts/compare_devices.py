"""One small model compressed on two devices and in several ways: how far apart the results are. No command itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmarks as shared
import torch
from benchmarks import Result
from safetensors import safe_open

import streamlap

SHAPE, LAYERS, SCALE_DOWN = "llama-3-70b", 4, 32
SAMPLES, LENGTH = 24, 512
"""Several batches."""

LEAST_KEPT = 0.995
"""Share of the kept channels that must be equal: scores closer together than float32 can tell may change places."""
MOST_DIFFERENCE = {"lorap": 1e-3, "best": 1e-2}
"""Preset -> relative, of the product of two factors; float32 on two devices. A fit moves by more than a truncation: what two
devices see of the activations differs, and a channel that changes places changes the fit of the others."""
MOST_PERPLEXITY = 0.1
"""Percent."""


def compare_devices(work: Path, device: str, preset: str) -> Result:
    """The CPU against `device`, and `device` against itself with other schedules. `work` is a new folder."""
    with shared.new_folder(work):
        work.mkdir(parents=True)
        model = shared.checkpoint(work, SHAPE, LAYERS, SCALE_DOWN, "float32")
        tokens = shared.tokens_file(work, model, SAMPLES, LENGTH)
        settings: dict[str, Any] = {"files": (str(tokens),), "dtype": "float32", "preset": preset}
        streamlap.compress(model, work / "cpu", device="cpu", **settings)
        settings["device"] = device
        streamlap.compress(model, work / "device", **settings)
        streamlap.compress(model, work / "no overlap", overlap=False, **settings)
        streamlap.compress(model, work / "least memory", **settings, **least_memory(model, settings))
        whole = shared.hashes(work / "device")
        found = {
            "device": device, "preset": preset, "model": f"{SHAPE}, {LAYERS} layers, widths by {SCALE_DOWN}, float32",
            **compare(work / "cpu", work / "device"),
            "perplexity": {"cpu": perplexity(work / "cpu", tokens, "cpu"),
                           "device": perplexity(work / "device", tokens, device)},
            "schedules": {name: shared.hashes(work / name) == whole for name in ("no overlap", "least memory")},
        }  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)  # which a run under a cap has set for this process
    return found | {"verdict": verdict(found)}


def least_memory(model: Path, settings: dict[str, Any]) -> dict[str, int]:
    """A cap that hardly any but the leanest schedule keeps; the room is for what this process may take meanwhile."""
    name, wanted = ("max_ram", "peak_ram_bytes") if settings["device"] == "cpu" else ("max_vram", "peak_vram_bytes")
    room = 1 << 25 if name == "max_ram" else 0
    return {name: getattr(streamlap.plan(model, **settings, **{name: 1 << 20}), wanted) + room}


def perplexity(folder: Path, tokens: Path, device: str) -> float:
    return streamlap.evaluate(folder, tokens, device=device, dtype="float32").perplexity


def compare(one: Path, other: Path) -> Result:
    """Two output folders of the same model."""
    rows, kept = [], []
    for folder in (one, other):
        rows.append(json.loads((folder / "config.json").read_text())["quantization_config"]["modules"])
        kept.append(json.loads((folder / "streamlap_kept_channels.json").read_text()))
        streamlap.export_dense(folder, dense(folder))
    same = [len({*channels} & {*kept[1].get(path, ())}) / len(channels) for path, channels in kept[0].items()]
    products = [difference(dense(one), dense(other), path) for path, row in rows[0].items() if "rank" in row]
    return {
        "ranks_equal": rows[0] == rows[1],
        "least_kept_equal": min(same),
        "most_product_difference": max(products, default=0.0),
    }


def dense(folder: Path) -> Path:
    return folder.with_name(f"{folder.name} dense")


def difference(one: Path, other: Path, path: str) -> float:
    """||A - B|| / ||A|| of a weight in two dense checkpoints."""
    a, b = (weight(folder, f"{path}.weight").double() for folder in (one, other))
    return float((a - b).norm() / a.norm())


def weight(folder: Path, name: str) -> torch.Tensor:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[name], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def verdict(found: Result) -> dict[str, bool]:
    before, after = found["perplexity"]["cpu"], found["perplexity"]["device"]
    return {
        "ranks": found["ranks_equal"],
        "kept": found["least_kept_equal"] >= LEAST_KEPT,
        "products": found["most_product_difference"] <= MOST_DIFFERENCE[found["preset"]],
        "perplexity": abs(shared.percent(after, before)) <= MOST_PERPLEXITY,
        **found["schedules"],
    }
