"""The sizes of one run, from headers alone: what every schedule of it is reckoned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.store.header import TensorInfo
from streamlap.store.staging import staged_bytes

GRAPH_WIDTHS, GRAPH_HEADS, GRAPH_INNER, GRAPH_SCORES = 8, 4, 6, 4
"""Numbers that a forward leaves for its gradients, a token: so many times the stream, the query heads, the widest linear, and
the attention scores where they are made whole."""
SCORE_BYTES = 12
"""Of such a score in a forward: itself, bent or masked, and its share in float32."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of one run. Bytes, unless said otherwise; of the largest layer."""

    device: torch.device
    staged: int
    """A layer as it is stored."""
    computed: int
    """A layer in the compute dtype."""
    converts: bool
    """Whether some layer is stored in another dtype than it is computed in."""
    width: int
    """Hidden size."""
    inner: int
    """Widest input or output of a linear."""
    inner_after: int
    """The same once the layer is edited."""
    heads: int
    """Numbers a token in the output of the query projection."""
    itemsize: int
    ffn_tensors: int = 3
    """Tensors as wide as the FFN that a forward holds at a time: act(gate), up, their product; gate as well, where it is one
    tensor with up."""
    sequences: int
    length: int
    scores: int = 0
    """Attention scores a token, see `whole_scores`."""
    edits: int = 0
    """The edited linears of a layer, as stored."""
    solve: int = 0
    """Most that a solve holds: the edits so far and the work of one more."""
    head: int = 0
    """The output head and its logits, where it is used."""
    head_stored: int = 0
    """The head as it is stored."""
    streams: int = 1
    """Hidden states kept beside each other: one where layers are edited in one pass; two where they are trained from where
    they are dense, beside the dense model's stream; three where sub-layers are rebuilt, with that between them."""
    partial: int = 0
    """Further streams, of some of the sequences alone."""
    partial_sequences: int = 0
    """Of how many."""
    between: int = 0
    """Of `streams`, those that are nothing any more once a layer is done."""
    capture: int = 0
    """What the sums over tokens hold, with the edits so far, where a solve looks at the streams itself."""
    waiting: int = 0
    """What waits in RAM during a solve on another device."""
    inputs: int = 0
    """What summing the inputs of the next layer takes while its stream is made."""
    trained: int = 0
    """Parameters of a layer that is trained; none where no layer is."""
    trained_bytes: int = 0
    """What training holds for them."""
    trained_state: int = 0
    """What is on the disk between two epochs."""
    trained_token: int = 0
    """What training holds for each token of a window, beside what a forward leaves for its gradients."""
    gradients: int = 0
    """Generations of gradients, each as large as one of hidden states, that wait on the disk in any case."""
    copied: int = 0
    """The piece in which a tensor that stays as it is goes from the source to the shard."""
    disk: bool = True
    """Whether hidden states may lie on the disk: there is a folder for them."""

    @property
    def generation(self) -> int:
        return self.sequences * self.length * self.width * self.itemsize

    @property
    def partial_bytes(self) -> int:
        """One generation of each of the partial streams."""
        return self.partial * self.batch(self.partial_sequences)

    @property
    def disk_generations(self) -> int:
        """Generations on the disk while a layer is done, where the disk keeps them: what was there and what is coming, and the
        gradients. The sweeps that make these have never more of them and of their inputs than one beyond their number."""
        return self.streams + min(self.streams, 2) + self.gradients

    @property
    def disk_bytes(self) -> int:
        """What a run keeps on the disk beside its shards; a refinement's state stands twice while the new replaces the old."""
        return self.disk_generations * self.generation + 2 * self.trained_state

    def batch(self, sequences: int) -> int:
        """Hidden states of so many sequences."""
        return min(sequences, self.sequences) * self.length * self.width * self.itemsize

    @property
    def refinement(self) -> dict[str, int]:
        """What refining a layer holds: masters, gradients and moments; what is stored of the layer, now and of the best; and
        what the forward of one sequence leaves for its gradients."""
        if not self.trained:
            return {}
        graph = 4 * (
            GRAPH_WIDTHS * self.width + GRAPH_HEADS * self.heads + GRAPH_INNER * self.inner + GRAPH_SCORES * self.scores
        )
        return {
            "refinement": self.trained_bytes,
            "edits": 2 * self.edits,
            "activations": self.length * (graph + self.trained_token),
        }

    def activations(self, sequences: int, inner: int) -> int:
        """Most that one forward of a gated layer holds at a time beside its input: the FFN-wide tensors or the rotated queries
        and keys in attention, with the residual, and a normed copy with its float32 work."""
        tokens = min(sequences, self.sequences) * self.length
        ffn = self.ffn_tensors * inner * self.itemsize + 2 * self.width * self.itemsize
        attention = (6 * self.heads + 3 * self.width) * self.itemsize + SCORE_BYTES * self.scores
        norm = 2 * self.width * 4 + 2 * self.width * self.itemsize
        return tokens * max(ffn, attention, norm)


def layer_workload(stream: ModelStream, sequences: int, length: int) -> dict[str, Any]:
    """The sizes that compressing and evaluating share, as keywords of Workload."""
    tables = [stream.layer_tensors(index).values() for index in range(stream.depth)]
    joined = [place for place in stream.family.paths if place.rpartition(".")[0] in stream.family.joined]
    shapes = [stream.form(index, role).shape for index in range(stream.depth) for role in stream.natives(index)]
    return {
        "device": stream.accelerator.label, "itemsize": stream.dtype.itemsize, "sequences": sequences, "length": length,
        "staged": max(map(staged_bytes, tables)), "width": stream.width,
        "computed": max(sum(computed_bytes(info, stream.dtype) for info in table) for table in tables),
        "converts": any(info.dtype.is_floating_point and info.dtype != stream.dtype for table in tables for info in table),
        "inner": max(map(max, shapes)), "ffn_tensors": 3 + any(place.endswith(".gate") for place in joined),
        "heads": max(map(stream.heads_width, range(stream.depth))),
        "scores": whole_scores(stream, length),
    }  # fmt: skip


def whole_scores(stream: ModelStream, length: int) -> int:
    """Attention scores that a token of a window has in all heads, where attention makes those of the window at once, as
    transformers has it for scores that are bent; else none."""
    eager = getattr(stream.config, "_attn_implementation", None) == "eager"
    return eager * length * int(stream.config.num_attention_heads)


def computed_bytes(info: TensorInfo, dtype: torch.dtype) -> int:
    """Size of a stored tensor in the compute dtype; whole numbers stay what they are."""
    return info.numel * dtype.itemsize if info.dtype.is_floating_point else info.nbytes


def evaluation_workload(stream: ModelStream, sequences: int, length: int, disk: bool = True) -> Workload:
    """Sizes of `eval`: layers without edits, then the head on pieces of a sequence."""
    layers = layer_workload(stream, sequences, length)
    return Workload(**layers, **head_bytes(stream, length, 2), inner_after=layers["inner"], disk=disk)


def head_bytes(stream: ModelStream, tokens: int, copies: int) -> dict[str, Any]:
    """The output head, and logits of a piece of so many tokens with `copies` of them in float32, as keywords of Workload."""
    stored = stream.source.info(stream.head_name)
    work = stored.numel * stream.dtype.itemsize * (stored.dtype != stream.dtype) + stored.nbytes
    logits = min(tokens, HEAD_TOKENS) * stream.vocabulary * (stream.dtype.itemsize + 4 * copies)
    return {"head": work + logits, "head_stored": stored.nbytes}
