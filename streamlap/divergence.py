"""How far predictions have moved from those of the dense model.

Shape suffixes: B batch, L length, D hidden, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from streamlap.cuts import Cut
from streamlap.errors import Interrupted, NumericalError
from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.stopping import Stops
from streamlap.store.hidden import HiddenBank


@torch.no_grad()
def divergences(
    stream: ModelStream, dense: HiddenBank, copies: Mapping[Cut, HiddenBank], stops: Stops
) -> dict[Cut, float]:
    """KL(dense || copy) of the predictions, nats a token, for every copy; the streams are behind the last layer."""
    head, depth = stream.head(), stream.depth
    sequences, length, _ = dense.shape_NLD
    found = {}
    for cut, bank in copies.items():
        if stops.due():
            raise Interrupted("stopped at the head, with all layers done; give the same command again to resume")
        total = 0.0
        for dense_BLD, copy_BLD in zip(dense.read(depth), bank.read(depth), strict=True):
            pieces = zip(
                *(torch.split(x_BLD.flatten(0, 1), HEAD_TOKENS) for x_BLD in (dense_BLD, copy_BLD)), strict=True
            )
            total += sum(divergence(head(dense_TD), head(copy_TD)) for dense_TD, copy_TD in pieces)
        found[cut] = max(0.0, total / (sequences * length))
        if not found[cut] < float("inf"):
            raise NumericalError(
                f"layer {cut.index} {cut.half}: divergence {found[cut]}; wanted a number. Try dtype float32."
            )
    return found


def divergence(dense_TV: torch.Tensor, copy_TV: torch.Tensor) -> float:
    """Sum over tokens of KL(dense || copy), from logits."""
    p_TV, q_TV = dense_TV.float().log_softmax(dim=-1), copy_TV.float().log_softmax(dim=-1)
    return float((p_TV.exp() * (p_TV - q_TV)).sum(dtype=torch.float64))
