"""How much every half of every layer may store."""

from __future__ import annotations

from streamlap.families.stream import ModelStream
from streamlap.methods.base import Budget


def half_budgets(stream: ModelStream, ratio: float, index: int) -> dict[str, Budget]:
    """Half -> its budget in a layer: the same share of its parameters everywhere."""
    family = stream.family
    return {
        half: Budget(
            parameters=int((1.0 - ratio) * dense_parameters(stream, index, half)),
            itemsize=stream.storage_itemsize(index),
            head_dim=stream.head_dim,
        )
        for half in family.halves
    }


def dense_parameters(stream: ModelStream, index: int, half: str) -> int:
    """Parameters of the linears of a half before any edit, biases included."""
    total = 0
    for path in stream.family.half_linears(half):
        out, inner = stream.dense_shape(index, path)
        total += out * (inner + stream.has_bias(index, path))
    return total
