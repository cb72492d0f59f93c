"""What lies outside the layers, written; the final norm's gain scaled where the recipe says so, see `methods.final.gain`.

Shape suffixes: B batch, L length, D hidden, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.linalg.moments import held_sequences
from streamlap.linalg.rows import any_out
from streamlap.methods.final.gain import CLOSE, STEPS, GainStep
from streamlap.pipeline.layers import Job
from streamlap.pipeline.streams import Streams
from streamlap.store.sink import ShardFolder, TensorEntry, shard_names
from streamlap.system.allocator import trim_heap


def write_outer(job: Job) -> float:
    """Write the shard of what lies outside the layers. Gives the number by which the final norm's gain was scaled."""
    stream, fit = job.stream, job.plan.fit
    tensors: dict[str, TensorEntry] = dict(stream.outer_tensors())
    parts = [name for leaf in ("weight", "bias") if (name := f"{stream.family.norm}.{leaf}") in tensors]
    gain = 1.0
    if job.plan.recipe.final and parts:
        trim_heap()  # of what the layers have left
        with fit.ram.claim(fit.schedule.ram["head"]), fit.vram.claim(fit.schedule.vram.get("head", {})):
            gain = best_gain(stream, job.streams)
        for name in parts:
            tensor = stream.source.read(name)
            tensors[name] = (tensor.float() * gain).to(tensor.dtype)
    ShardFolder(job.out).write(shard_names(stream.depth)[0], tensors)
    return gain


def best_gain(stream: ModelStream, streams: Streams) -> float:
    """On held-out tokens of both streams behind the last layer."""
    head, gain = stream.head(), 1.0
    for _ in range(STEPS):
        step = GainStep(gain=gain)
        for dense_TD, x_TD in held_rows(stream, streams):
            step.update(head(dense_TD), head(x_TD))
        gain, before = step.next, gain
        if abs(gain - before) < CLOSE:
            break
    return gain


def held_rows(stream: ModelStream, streams: Streams) -> Iterator[tuple[torch.Tensor, ...]]:
    """Rows of both streams, dense and compressed, some at a time; without the tokens that are out of either."""
    assert streams.dense is not None, "a run beside the dense model keeps its stream"
    numbers = held_sequences(*streams.tokens_NL.shape)
    batches = (bank.read(stream.depth, numbers) for bank in (streams.dense, streams.compressed))
    for pair in zip(*batches, strict=True):
        here = [x_BLD.to(stream.device) for x_BLD in pair]
        out_BL = any_out(*here)
        rows = (x_BLD.flatten(0, 1) if out_BL is None else x_BLD[~out_BL] for x_BLD in here)
        yield from zip(*(torch.split(x_TD, HEAD_TOKENS) for x_TD in rows), strict=True)
