#!/usr/bin/env python
"""All that a CUDA GPU is needed for, in one command of less than ten minutes, from a bare checkout.

    PYTHONPATH=. python scripts/bench_gpu.py --work DIR --out gpu.json
    PYTHONPATH=. python scripts/bench_gpu.py --device cpu --scale-down 16     # the same parts, without a GPU

small: a small float32 model on the CPU and on the GPU, with each of --presets: ranks, kept channels, products of factors,
perplexity; and on the GPU with and without overlap and under the smallest cap, byte for byte (`compare_devices.py`).
runs: some layers of a large shape with each preset under each of --caps, and with the first under the first again without
overlap: peaks, seconds by phase, those that all layers of the published model would take, measured over floor as in
`bench_speed.py`, and the same bytes.

It needs torch, transformers, safetensors, psutil, tqdm, typer, pyyaml, filelock and huggingface_hub, and no network. What does
not fit into --minutes is left out and says so; --out is written after every part. Fewer layers are taken where the disk is
small, and fewer windows where the rates say that the time would not do: what was used stands in the result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import bench_speed as speed
import benchmarks as shared
import make_synthetic_checkpoint as synthetic
import psutil
import torch
from benchmarks import Result
from compare_devices import compare_devices

import streamlap
from streamlap.errors import Interrupted
from streamlap.system.budget import parse_size
from streamlap.system.device import pick_device

SMALL_SECONDS, RATES_SECONDS, START_SECONDS, MAKING_RATE = 60.0, 25.0, 30.0, 250e6
"""What a small model, one measurement of the rates, and the start of a run may take; bytes/s of making a checkpoint."""
SLACK, LEAST_SAMPLES = 1.5, 8
"""Expected seconds of a run over its floor; windows that are never halved."""


class Clock:
    """The seconds that are left, and lines that say how many are gone."""

    def __init__(self, minutes: float, gone: float = 0.0) -> None:
        self._begin, self._seconds = time.monotonic() - gone, 60 * minutes

    @property
    def left(self) -> float:
        return self._begin + self._seconds - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:6.1f} s] {text}", file=sys.stderr, flush=True)


@dataclass(kw_only=True)
class Bench:
    """One call of this script. What came out so far is in `result`."""

    args: argparse.Namespace
    work: Path
    device: str
    clock: Clock
    result: Result = field(default_factory=lambda: {"small": {}, "runs": {}})
    model: Path = Path()
    samples: int = 0
    reports: dict[str, tuple[speed.Workload, Result]] = field(default_factory=dict)
    """Run -> what its floor is made of, and its report."""

    def attempt(self, name: str, seconds: float, call: Callable[[], Result], into: Result | None = None) -> bool:
        """Keep what `call` gives under its name, where the `seconds` it may take are left; whether there is something now."""
        place, left = self.result if into is None else into, self.clock.left
        self.clock.say(f"{name}: may take {seconds:.0f} s, {left:.0f} s are left")
        try:
            place[name] = call() if seconds < left else {"skipped": "time"}
        except Interrupted:
            raise
        except (Exception, SystemExit) as error:  # the parts that follow may do all the same
            place[name] = {"failed": f"{type(error).__name__}: {error}".replace(str(self.work), "WORK")}
        shared.save(self.args.out, {"command": shared.shown_command(), "machine": shared.machine(), **self.result})
        self.clock.say(f"{name}: {place[name].get('failed') or place[name].get('skipped') or 'done'}")
        return not {"failed", "skipped"} & place[name].keys()

    def run(self) -> Result:
        os.environ["XDG_CACHE_HOME"] = str(self.work.absolute())  # rates that the product measures are of today
        for preset in self.args.presets:
            small = partial(compare_devices, self.work / "small", self.device, preset)
            self.attempt(preset, SMALL_SECONDS, small, self.result["small"])
        layers = self.affordable_layers()
        making = START_SECONDS + self.source_bytes(layers) / MAKING_RATE
        if self.attempt("source", making, partial(self.make, layers)):
            if self.attempt("rates", RATES_SECONDS, self.rates):
                self.runs()
            if self.attempt("rates_after", RATES_SECONDS, self.rates):
                rates = speed.better(self.result["rates"], self.result["rates_after"])
                for name, (work, report) in self.reports.items():
                    self.result["runs"][name]["speed"] = speed.judge(work, report, rates)
        return self.result | {"verdict": verdict(self.result)}

    def runs(self) -> None:
        """Every preset under every cap, and the first under the first one without overlap."""
        presets, caps = self.args.presets, self.args.caps
        cases = [*((preset, cap, True) for cap in caps for preset in presets), (presets[0], caps[0], False)]
        self.samples = self.affordable_samples()  # the last one is the first to be left out
        for preset, cap, overlap in cases:
            name = f"{preset}, {cap}" + ("" if overlap else ", no overlap")
            call = partial(self.compress, name, preset, cap, overlap)
            self.attempt(name, self.expected(preset, self.samples), call, self.result["runs"])

    def source_bytes(self, layers: int) -> int:
        config = synthetic.scaled_down(synthetic.SHAPES[self.args.shape], self.args.scale_down)
        return 2 * synthetic.parameters(synthetic.tensor_shapes(config | {"num_hidden_layers": layers}))

    def affordable_layers(self) -> int:
        """As many as asked for, or as the disk holds twice, beside two generations of hidden states."""
        width = synthetic.scaled_down(synthetic.SHAPES[self.args.shape], self.args.scale_down)["hidden_size"]
        states = 4 * self.args.samples * self.args.length * width * (1 if self.device != "cpu" else 2)
        layers, free = self.args.layers, shutil.disk_usage(self.work).free - (1 << 30)
        while layers > 1 and 2 * self.source_bytes(layers) + states > free:
            layers -= 1
        return layers

    def make(self, layers: int) -> Result:
        self.model = shared.checkpoint(self.work, self.args.shape, layers, self.args.scale_down)
        return {"shape": self.args.shape, "scale_down": self.args.scale_down, "layers": layers,
                "bytes": self.source_bytes(layers)}  # fmt: skip

    def rates(self) -> Result:
        """Of all that some preset does."""
        works = [self.workload(preset, LEAST_SAMPLES, self.args.caps[0])[1] for preset in self.args.presets]
        layers = tuple(layer for work in works for layer in work.layers)
        rates = speed.measure_rates(replace(works[0], layers=layers), self.work)
        if self.device != "cpu":
            torch.cuda.empty_cache()
        return rates

    def workload(self, preset: str, samples: int, cap: str, overlap: bool = True) -> tuple[Result, speed.Workload]:
        """The plan of a run, made in this process, so without a word on RAM; and what the floor is made of."""
        tokens = shared.tokens_file(self.work, self.model, samples, self.args.length)
        plan = streamlap.plan(
            self.model,
            preset=preset,
            device=self.device,
            files=(str(tokens),),
            work=self.work,
            max_vram=cap,
            overlap=overlap,
            survey=None,
            redraw=False,
        ).to_json()
        return plan, speed.workload(self.model, self.device, (samples, self.args.length), plan, preset)

    def expected(self, preset: str, samples: int) -> float:
        """Seconds of a run."""
        rates, (plan, work) = self.result["rates"], self.workload(preset, samples, self.args.caps[0])
        outer = plan["read_bytes"] - sum(layer["read_bytes"] for layer in plan["layers"])
        loop = sum(sum(speed.floor(layer, rates).values()) for layer in work.layers)
        return START_SECONDS + outer / rates["read"] + outer / rates["write"] + SLACK * loop

    def affordable_samples(self) -> int:
        """As many as asked for, halved until a run of each preset under each cap should fit into the time that is left."""
        samples, left = self.args.samples, self.clock.left - RATES_SECONDS
        while samples > LEAST_SAMPLES and left < len(self.args.caps) * sum(
            self.expected(preset, samples) for preset in self.args.presets
        ):
            samples //= 2
        self.clock.say(f"{samples} windows of {self.args.length} tokens")
        return samples

    def compress(self, name: str, preset: str, cap: str, overlap: bool) -> Result:
        """One run in a process of its own, killed when the time is over."""
        plan, work = self.workload(preset, self.samples, cap, overlap)
        flags = ["--calibration", shared.tokens_file(self.work, self.model, self.samples, self.args.length),
                 "--device", self.device, "--max-vram", cap, "--max-ram", self.args.max_ram,
                 "--preset", preset, *shared.AS_GIVEN]  # fmt: skip
        flags += [] if overlap else ["--no-overlap"]
        with shared.new_folder(self.work / "out") as out:
            shared.drop_cache(self.model)
            done = shared.run_streamlap("compress", self.model, out, *flags, watch=out, timeout=self.clock.left)
        if done.timed_out:
            return {"skipped": "time, in the middle of the run"}
        report = done.required().output
        self.reports[name] = work, report
        depth = synthetic.SHAPES[self.args.shape]["num_hidden_layers"]
        return {
            "preset": preset, "overlap": overlap, "tokens": [self.samples, self.args.length],
            "forward_tokens": plan["forward_tokens"],
            "hidden_states": plan["hidden_states"], "peak_vram_bytes": report["peak_vram_bytes"],
            "max_vram_bytes": parse_size(cap, "--caps"), "peak_ram_bytes": report["peak_ram_bytes"],
            "max_ram_bytes": parse_size(self.args.max_ram, "--max-ram"), "planned_vram_bytes": plan["peak_vram_bytes"],
            "layers": [{key: layer[key] for key in ("index", "seconds", "ladder")} for layer in report["layers"]],
            "seconds": done.working_seconds, "wall_seconds": done.seconds, "shards": report["shards"],
            "published_layers": depth, "published_seconds": whole_seconds(report["layers"], done.working_seconds, depth),
            "speed": speed.judge(work, report, self.result["rates"]),
        }  # fmt: skip


def whole_seconds(layers: list[Result], seconds: float, depth: int) -> float:
    """Of a model of `depth` such layers: what was measured, and the mean inner layer for each that was not there."""
    each = [sum(layer["seconds"].values()) for layer in layers]
    inner = each[1:-1] or each
    return seconds + (depth - len(each)) * sum(inner) / len(inner)


def verdict(result: Result) -> Result:
    """What holds of all that came to its end; None where nothing did."""
    runs = [run for run in result["runs"].values() if "shards" in run]
    small = [held for row in result["small"].values() for held in row.get("verdict", {}).values()]
    presets, outputs = ({kind(run) for run in runs} for kind in (itemgetter("preset"), _output))
    return {
        "small": all(small) if small else None,
        "same_bytes": len(outputs) == len(presets) if len(runs) > len(presets) else None,
        "inside_vram": all(run["peak_vram_bytes"] <= run["max_vram_bytes"] for run in runs) if runs else None,
        "inside_ram": all(run["peak_ram_bytes"] <= run["max_ram_bytes"] for run in runs) if runs else None,
    }


def _output(run: Result) -> tuple[str, str]:
    """Runs with the same preset must have the same."""
    return run["preset"], str(run["shards"])


def table(result: Result) -> str:
    columns = ["run", "peak VRAM", "peak RAM", *speed.PHASES, "a layer, s", "all layers, h", "measured / floor"]
    lines = [shared.markdown(columns, [run_cells(name, run, columns) for name, run in result["runs"].items()]), ""]
    lines += [
        f"- {key.replace('_', ' ')}: {shared.yes(value) or 'not run'}" for key, value in result["verdict"].items()
    ]
    shown = ("failed", "skipped", "least_kept_equal", "most_product_difference", "perplexity", "verdict")
    lines += [
        f"- small, {preset}, {key.replace('_', ' ')}: {value}"
        for preset, row in result["small"].items()
        for key, value in row.items()
        if key in shown
    ]
    return "\n".join(lines)


def run_cells(name: str, run: Result, columns: list[str]) -> list[str]:
    """The phases as seconds of a layer, over those that count."""
    if "shards" not in run:
        return [name, *[""] * (len(columns) - 2), run.get("skipped") or run["failed"]]
    judged = run["speed"]
    count = len(judged["layers"])
    return [
        name, shared.size(run["peak_vram_bytes"]), shared.size(run["peak_ram_bytes"]),
        *(f"{judged['phases'][phase] / count:.2f}" for phase in speed.PHASES), f"{judged['measured'] / count:.2f}",
        f"{run['published_seconds'] / 3600:.2f}", f"{judged['ratio']['sum']:.2f}",
    ]  # fmt: skip


def main(gone: float = 0.0) -> None:
    """`gone` are the seconds that Python and its imports have taken."""
    parser = shared.argument_parser(__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script (cuda)")
    parser.add_argument("--minutes", type=float, default=9.0, help="what the whole may take (9)")
    parser.add_argument("--shape", default="llama-3-70b", help="of the checkpoint to be made (llama-3-70b)")
    parser.add_argument("--layers", type=int, default=4, help="of the checkpoint to be made (4)")
    parser.add_argument("--presets", nargs="+", default=["lorap", "best"], help="in this order (lorap best)")
    parser.add_argument("--caps", nargs="+", default=["8GiB", "24GiB"], help="of GPU memory (8GiB 24GiB)")
    parser.add_argument("--max-ram", default="16GiB", help="cap of every run (16GiB)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (128)")
    parser.add_argument("--length", type=int, default=2048, help="tokens a window (2048)")
    args = parser.parse_args()
    clock = Clock(args.minutes, gone)
    shared.conclude(
        args, lambda work: Bench(args=args, work=work, device=pick_device(args.device), clock=clock).run(), table
    )


if __name__ == "__main__":
    main(time.time() - psutil.Process().create_time())
