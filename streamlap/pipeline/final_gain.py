"""What lies outside the layers, written; the final norm's gain scaled where the recipe says so, see `methods.final.gain`.

Shape suffixes: D hidden, T tokens.
"""

from __future__ import annotations

import json

from streamlap.families.stream import ModelStream
from streamlap.methods.final.gain import CLOSE, STEPS, GainStep
from streamlap.pipeline.divergence import last_rows
from streamlap.pipeline.layers import Job
from streamlap.pipeline.streams import Streams
from streamlap.store.sink import ShardFolder, TensorEntry, shard_names, write_durably
from streamlap.system.allocator import trim_heap
from streamlap.untrusted.json import parse_json

GAIN_NAME = "final_gain.json"


def write_outer(job: Job) -> tuple[float, str]:
    """Write the shard of what lies outside the layers. Gives the number by which the final norm's gain was scaled, and the
    shard's hash."""
    stream = job.stream
    tensors: dict[str, TensorEntry] = dict(stream.outer_tensors())
    parts = [name for leaf in ("weight", "bias") if (name := f"{stream.family.norm}.{leaf}") in tensors]
    gain = found_gain(job) if job.plan.recipe.final and parts else 1.0
    for name in parts if gain != 1.0 else ():
        tensor = stream.source.read(name)
        offset = stream.family.norm_offset if name.endswith(".weight") else 0.0
        tensors[name] = ((tensor.float() + offset) * gain - offset).to(tensor.dtype)
    return gain, ShardFolder(job.out).write(shard_names(job.plan.depth)[0], tensors)


def found_gain(job: Job) -> float:
    """On the disk once it is found: a run that dies while it tidies up has no hidden states left to find it from again."""
    path, fit = job.session.state / GAIN_NAME, job.plan.fit
    if path.is_file():
        return float(parse_json(path.read_bytes()))
    trim_heap()  # of what the layers have left
    with fit.ram.claim(fit.schedule.ram["head"]), fit.vram.claim(fit.schedule.vram.get("head", {})):
        gain = best_gain(job.stream, job.streams)
    write_durably(path, json.dumps(gain, allow_nan=False).encode())
    return gain


def best_gain(stream: ModelStream, streams: Streams) -> float:
    """On held-out tokens of both streams behind the last layer."""
    assert streams.dense is not None, "a run beside the dense model keeps its stream"
    head, gain, numbers = stream.head(), 1.0, streams.windows.held
    for _ in range(STEPS):
        step = GainStep(gain=gain)
        for dense_TD, x_TD in last_rows(stream, streams.dense, streams.compressed, numbers):
            step.update(head(dense_TD), head(x_TD))
        gain, before = step.next, gain
        if abs(gain - before) < CLOSE:
            break
    return gain
