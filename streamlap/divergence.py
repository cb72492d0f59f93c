"""How far predictions have moved from those of the dense model.

Shape suffixes: B batch, L length, D hidden, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from streamlap.cuts import Cut
from streamlap.errors import NumericalError
from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.linalg.rows import any_out
from streamlap.stopping import Stops
from streamlap.store.hidden import HiddenBank


@torch.no_grad()
def divergences(
    stream: ModelStream, dense: HiddenBank, copies: Mapping[Cut, HiddenBank], stops: Stops
) -> dict[Cut, float]:
    """KL(dense || copy) of the predictions, nats a token, for every copy; the streams are behind the last layer.

    Over the tokens that are out of neither stream. Raises NumericalError where there is none, or where it is no number, and
    Interrupted where a stop is due.
    """
    head, depth = stream.head(), stream.depth
    found = {}
    for cut, bank in copies.items():
        if stops.due():
            raise stops.stopped("at the head, with all layers done")
        total, tokens = 0.0, 0
        for batches in zip(dense.read(depth), bank.read(depth), strict=True):
            out_BL = any_out(*batches)
            rows = (x_BLD.flatten(0, 1) if out_BL is None else x_BLD[~out_BL] for x_BLD in batches)
            pieces = zip(*(torch.split(x_TD, HEAD_TOKENS) for x_TD in rows), strict=True)
            total += sum(divergence(head(dense_TD), head(copy_TD)) for dense_TD, copy_TD in pieces)
            tokens += batches[0][..., 0].numel() if out_BL is None else int((~out_BL).sum())
        mean = total / tokens if tokens else math.nan
        if not math.isfinite(mean):
            raise NumericalError(
                f"layer {cut.index} {cut.half}: divergence {mean} over {tokens} tokens; wanted a number. Try dtype float32."
            )
        found[cut] = max(0.0, mean)
    return found


def divergence(dense_TV: torch.Tensor, copy_TV: torch.Tensor) -> float:
    """Sum over tokens of KL(dense || copy), from logits."""
    p_TV, q_TV = dense_TV.float().log_softmax(dim=-1), copy_TV.float().log_softmax(dim=-1)
    return float((p_TV.exp() * (p_TV - q_TV)).sum(dtype=torch.float64))
