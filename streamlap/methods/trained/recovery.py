"""Recovery of a compressed model by LoRA on every linear that it stores, towards the dense model's own predictions.

The adapters lie on the stored parts: on both factors of a low-rank matrix, on the rows and the coefficients of a pivoted one.
So they merge into what is stored, and no rank and no shape changes.

LoRA: Hu et al. 2021, arXiv 2106.09685. Distillation: Hinton et al. 2015, arXiv 1503.02531, over the most likely tokens.

Shape suffixes: T positions, V vocabulary, K most likely tokens that are kept of it, O out, I in, S rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamlap.methods.trained.steps import Pace, check_pace, check_share, check_whole

LEAST_REST = 1e-6
"""Least probability of all tokens that are not kept, so that it has a logarithm."""


@dataclass(frozen=True, kw_only=True)
class Recovery(Pace):
    """Knobs of the training."""

    epochs: int = 2
    rank: int = 32
    """Of each adapter."""
    learning_rate: float = 1e-3
    """Highest; from there it falls to nothing along a cosine."""
    batch: int = 4
    """Windows a step."""
    distil: float = 0.5
    """Share of the loss that is the divergence from the dense model, where there is one; the rest is cross-entropy."""
    top: int = 64
    """Most likely tokens of the dense model's predictions that are kept at each position."""

    def __post_init__(self) -> None:
        check_pace("recover", self)
        for name in ("rank", "batch", "top"):
            check_whole("recover", name, getattr(self, name), 1, 4096)
        check_share("recover", "distil", self.distil, least=0)


@dataclass(frozen=True, kw_only=True)
class Likely:
    """The dense model's most likely tokens at some positions."""

    words_TK: torch.Tensor
    """Their ids, int32."""
    log_TK: torch.Tensor
    """Logarithms of their probabilities, float16."""

    @classmethod
    def of(cls, logits_TV: torch.Tensor, top: int) -> Likely:
        log_TV = logits_TV.float().log_softmax(dim=-1)
        log_TK, words_TK = log_TV.topk(min(top, log_TV.shape[-1]), dim=-1)
        return cls(words_TK=words_TK.to(torch.int32), log_TK=log_TK.to(torch.float16))

    def to(self, device: torch.device) -> Likely:
        return Likely(words_TK=self.words_TK.to(device), log_TK=self.log_TK.to(device))


def divergence(likely: Likely, log_TV: torch.Tensor) -> torch.Tensor:
    """KL(dense || model) [T], nats, over the tokens that were kept, with all others as one.

    Args: log_TV, log-probabilities of the model. It is at most the divergence over the vocabulary, and equal to it where those
    that were not kept have the same shares of the rest in both.
    """
    p_log_TK = likely.log_TK.float()
    q_log_TK = log_TV.gather(1, likely.words_TK.long())
    p_TK = p_log_TK.exp()
    p_rest_T, q_rest_T = (1 - kept_TK.sum(dim=-1).clamp_max(1 - LEAST_REST) for kept_TK in (p_TK, q_log_TK.exp()))
    kept_T = (p_TK * (p_log_TK - q_log_TK)).sum(dim=-1)
    return kept_T + p_rest_T * (p_rest_T.log() - q_rest_T.log())


def prediction_losses(
    logits_TV: torch.Tensor, next_T: torch.Tensor, likely: Likely | None, distil: float
) -> torch.Tensor:
    """Loss [T] of the predictions of the tokens `next_T`: cross-entropy, mixed with the divergence from the dense model."""
    log_TV = logits_TV.float().log_softmax(dim=-1)
    entropy_T = -log_TV.gather(1, next_T[:, None])[:, 0]
    if likely is None:
        return entropy_T
    return torch.lerp(entropy_T, divergence(likely, log_TV), distil)


def merged(stored_OI: torch.Tensor, up_OS: torch.Tensor, down_SI: torch.Tensor) -> torch.Tensor:
    """A stored matrix with its adapter in it, in its own dtype."""
    return torch.addmm(stored_OI.float(), up_OS.float(), down_SI.float()).to(stored_OI.dtype)
