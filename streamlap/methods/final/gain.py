"""The final norm's gain scaled by one number, so that the compressed model is as sure of its predictions as it should be.

What compression has done to the last hidden states is noise to the head, and with noise predictions are surer than they have
reason to be. A gain below 1 takes that back and costs no parameter: it is temperature scaling (Guo et al. 2017, arXiv
1706.04599), written into a weight that is there anyway, and fitted to the dense model's predictions.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from streamlap.linalg.sums import total

STEPS = 5
"""Most steps of Newton's; the divergence is convex in the gain."""

LEAST, MOST = 0.5, 1.5
"""Bounds on the gain."""

CLOSE = 1e-4
"""A step below this is the last."""


@dataclass(frozen=True, kw_only=True)
class FinalGain:
    """It has no knobs."""


@dataclass(kw_only=True)
class GainStep:
    """Sums over tokens for a step from `gain`: slope and curvature of KL(dense || softmax(gain z)) along the gain."""

    gain: float
    slope: float = 0.0
    curvature: float = 0.0

    def update(self, dense_TV: torch.Tensor, z_TV: torch.Tensor) -> None:
        """Args: dense_TV, logits of the dense model; z_TV, those of the compressed one before it is scaled."""
        z_TV = z_TV.float()
        q_TV = (self.gain * z_TV).softmax(dim=-1)
        mean_T1 = (q_TV * z_TV).sum(dim=-1, keepdim=True)
        aim_T1 = dense_TV.float().softmax(dim=-1).mul_(z_TV).sum(dim=-1, keepdim=True)
        self.slope += total(mean_T1 - aim_T1, torch.float64)
        self.curvature += total(q_TV.mul_((z_TV - mean_T1).square_()), torch.float64)

    @property
    def next(self) -> float:
        """The gain after the step; the same where the sums are no numbers."""
        if not (math.isfinite(self.slope) and 0 < self.curvature < math.inf):
            return self.gain
        return min(MOST, max(LEAST, self.gain - self.slope / self.curvature))
