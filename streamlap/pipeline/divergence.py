"""How far predictions have moved from those of the dense model.

Shape suffixes: B batch, L length, D hidden, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from streamlap.errors import NumericalError
from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.linalg.rows import MOST_OUT, any_out, rows_out
from streamlap.linalg.sums import total
from streamlap.planning.survey import Perturbation
from streamlap.store.hidden import HiddenBank

Head = Callable[[torch.Tensor], torch.Tensor]
"""Last hidden states x_TD -> logits_TV."""


@torch.no_grad()
def mean_divergence(
    stream: ModelStream,
    head: Head,
    dense: HiddenBank,
    copy: HiddenBank,
    perturbed: Perturbation,
    numbers: Sequence[int],
) -> float:
    """KL(dense || copy) of the predictions, nats a token; the streams are behind the last layer. The copy has the sequences of
    these numbers alone.

    Over the tokens that are out of neither stream. Raises NumericalError where there is none, where it is no number, or where
    more than `MOST_OUT` of the tokens that the dense stream has are out of the copy.
    """
    sum_kl, tokens = 0.0, 0
    for dense_TD, copy_TD in last_rows(stream, dense, copy, numbers, whole=False):
        sum_kl += divergence(head(dense_TD), head(copy_TD))
        tokens += len(dense_TD)
    mean = sum_kl / tokens if tokens else math.nan
    if not math.isfinite(mean):
        raise NumericalError(
            f"layer {perturbed.index} {perturbed.sublayer}: divergence {mean} over {tokens} tokens; wanted a number. Try dtype "
            "float32."
        )
    there = sum(int((~rows_out(x_BLD)).sum()) for x_BLD in dense.read(stream.depth, numbers))
    if tokens < (1 - MOST_OUT) * there:
        raise NumericalError(
            f"layer {perturbed.index} {perturbed.sublayer}: its cut made {there - tokens} of {there} tokens NaN or infinite; "
            f"wanted at most {MOST_OUT:.0%}. Try dtype float32."
        )
    return max(0.0, mean)


def last_rows(
    stream: ModelStream,
    dense: HiddenBank,
    other: HiddenBank,
    numbers: Sequence[int],
    whole: bool = True,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Rows of two streams behind the last layer, as many at a time as the head takes; without tokens that are out of either.

    Args: numbers, of the sequences that are looked at; whole, whether the other stream has more than these.
    """
    others = other.read(stream.depth, numbers if whole else None)
    for pair in zip(dense.read(stream.depth, numbers), others, strict=True):
        here = [x_BLD.to(stream.device) for x_BLD in pair]  # one may come from the disk and one be there
        out_BL = any_out(*here)
        rows = (x_BLD.flatten(0, 1) if out_BL is None else x_BLD[~out_BL] for x_BLD in here)
        yield from zip(*(torch.split(x_TD, HEAD_TOKENS) for x_TD in rows), strict=True)


def divergence(dense_TV: torch.Tensor, copy_TV: torch.Tensor) -> float:
    """Sum over tokens of KL(dense || copy), from logits."""
    p_TV, q_TV = dense_TV.float().log_softmax(dim=-1), copy_TV.float().log_softmax(dim=-1)
    return total(p_TV.exp() * (p_TV - q_TV), torch.float64)
