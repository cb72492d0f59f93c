"""Linears that a checkpoint stores together, as rows of one matrix. They are read apart.

A phi3 is a llama, or where it has a window a mistral, whose q, k, v are the rows of one matrix and whose gate, up are those of
another. It is read as what it is: config.json says llama, and each part of a matrix is a tensor of its own, at its place in the
file. So a result has no fused matrix, and opens wherever a llama does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamlap.errors import CheckpointError, UnsupportedModel, shown
from streamlap.store.header import TensorInfo
from streamlap.store.source import TensorSource, read_tensor

PHI3 = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
"""What config.json of a phi3 may leave out, where a llama has another default."""
LEFT_BEHIND = ("auto_map", "architectures", "original_max_position_embeddings", "partial_rotary_factor", "rope_scaling")
PHI3_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""A matrix in a layer -> the linears whose rows it holds, in order."""


def as_stored_apart(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json of a phi3 as that of the llama or mistral that it is; any other as it stands.

    Raises UnsupportedModel where its heads are turned in another way than theirs.
    """
    if raw.get("model_type") != "phi3":
        return raw
    rope = raw.get("rope_parameters")
    turned = {"rope_scaling": raw.get("rope_scaling"), "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0)}
    if isinstance(rope, Mapping):
        kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
        turned |= {"rope_scaling": kind if kind != "default" else turned["rope_scaling"]}
        turned |= {"partial_rotary_factor": part if part != 1.0 else turned["partial_rotary_factor"]}
    for key, plain in (("rope_scaling", None), ("partial_rotary_factor", 1.0)):
        if turned[key] != plain:
            raise UnsupportedModel(
                f"a phi3 with {key} {shown(turned[key])}; wanted {plain}, as in a llama. Take a model of another family."
            )
    kind = "llama" if raw.get("sliding_window") is None else "mistral"
    kept = {key: value for key, value in raw.items() if key not in LEFT_BEHIND}
    named = raw.get("architectures") or ["Phi3ForCausalLM"]
    classes = [str(name).replace("Phi3", kind.capitalize()) for name in named]
    return PHI3 | kept | {"model_type": kind, "architectures": classes}


@dataclass(frozen=True, kw_only=True)
class Together:
    """A matrix on the disk that holds several linears."""

    path: str
    """In the layer."""
    parts: Mapping[str, int]
    """Path of each linear -> its rows, in their order."""
    head_dim: int | None = None
    """In turns of so many rows; None where one linear follows the other."""
    marked: bool = False
    """Whether its own name stays, for a mark of one number, see `loader.linears.JoinedLinear`."""


class StoredApart:
    """A source in which linears that are stored together are tensors of their own, at their places in the file.

    Raises CheckpointError where a matrix has not as many rows.
    """

    def __init__(self, source: TensorSource, matrices: Sequence[Together]) -> None:
        self._source, self.headers = source, source.headers
        self._parts: dict[str, TensorInfo] = {}
        self._names: list[str] = []
        for name in source.names():
            matrix = next((matrix for matrix in matrices if f"{matrix.path}." in name), None)
            if matrix is None:
                self._names.append(name)
            else:
                self._split(name, matrix)

    def _split(self, name: str, matrix: Together) -> None:
        info, counts = self._source.info(name), matrix.parts.values()
        if not info.shape or info.shape[0] != sum(counts):
            raise CheckpointError(
                f"tensor {name!r} in {info.path.name} has shape {list(info.shape)}; config.json wants "
                f"{' + '.join(map(str, counts))} rows."
            )
        width, begin = info.nbytes // info.shape[0], info.begin
        for part, count in matrix.parts.items():
            run = (matrix.head_dim or count) * width
            step = 0 if matrix.head_dim is None else len(matrix.parts) * run
            end = begin + (count * width // run - 1) * step + run
            shape = count, *info.shape[1:]
            apart = name.replace(matrix.path, part)
            self._add(replace(info, name=apart, shape=shape, begin=begin, end=end, run=run, step=step))
            begin += run
        if matrix.marked and name.endswith(".weight"):
            self._add(replace(info, shape=(1, 1), end=info.begin + info.dtype.itemsize))

    def _add(self, part: TensorInfo) -> None:
        self._parts[part.name] = part
        self._names.append(part.name)

    def names(self) -> Iterable[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        return self._parts[name] if name in self._parts else self._source.info(name)

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self._parts[name]) if name in self._parts else self._source.read(name)
