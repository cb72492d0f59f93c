"""What low-rank adapters say of the matrix that they are added to: its gradient, and the importance of groups in it.

LoRAPrune (Zhang et al. 2023, arXiv 2305.18403, equations 7 to 11): z = (W + c B A) x is trained in A and B alone. One step of
gradient descent on both changes B A by -(g_B A + B g_A - g_B g_A), so that is taken for the gradient of the merged matrix, and
its product with the matrix, entry by entry, for what the loss would change by without the entry.

Shape suffixes: O out, I in, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.products import product

BLOCK = 256
"""Rows that are looked at together."""


@dataclass(frozen=True)
class Factors:
    """An adapter, or its gradients: a_RI, b_OR."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor


def merged_gradient(at: Factors, gradient: Factors) -> torch.Tensor:
    """g_B A + B g_A - g_B g_A [O, I]: what a step of gradient descent at rate 1 takes from B A."""
    return product(gradient.b_OR, at.a_RI).add_(product(at.b_OR - gradient.b_OR, gradient.a_RI))


def importance(w_OI: torch.Tensor, at: Factors, gradient: Factors, scale: float) -> torch.Tensor:
    """|G * (W + c B A)| [O, I], of all entries."""
    return (merged_gradient(at, gradient) * product(at.b_OR, at.a_RI).mul_(scale).add_(w_OI)).abs_()


def line_importance(w_OI: torch.Tensor, at: Factors, gradient: Factors, scale: float, dim: int) -> torch.Tensor:
    """Sums of `importance` over each row [O] (`dim` 0) or each column [I] (`dim` 1), some rows at a time."""
    sums = []
    for rows in torch.split(torch.arange(len(w_OI), device=w_OI.device), BLOCK):
        part = Factors(at.a_RI, at.b_OR[rows]), Factors(gradient.a_RI, gradient.b_OR[rows])
        sums.append(importance(w_OI[rows], *part, scale).sum(dim=1 - dim))
    return torch.cat(sums) if dim == 0 else torch.stack(sums).sum(dim=0)


def group_scores(lines: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """[G]: of each matrix the sums over the lines (rows, or columns) of a group, which lie side by side, over their norm across
    the groups; then the sum over the matrices. So no matrix counts for more because its numbers are larger.

    Raises NumericalError where a score is not finite.
    """
    scores_G = torch.zeros(groups, dtype=torch.float64, device=lines[0].device)
    for line in lines:
        sums_G = line.double().view(groups, -1).sum(dim=1)
        scores_G += sums_G / sums_G.norm().clamp_min(torch.finfo(torch.float64).tiny)
    if not bool(torch.isfinite(scores_G).all()):
        raise NumericalError(
            f"of {groups} groups {int((~torch.isfinite(scores_G)).sum())} have an importance that is NaN or infinite; wanted "
            "numbers. Take a lower learning_rate, or dtype float32."
        )
    return scores_G


def lowest(scores_G: torch.Tensor, alive_G: torch.Tensor, count: int) -> torch.Tensor:
    """[G], whether a group stays where `count` have gone: those that are gone already, then the lowest-scored ones, of equal
    ones the first."""
    order = torch.where(alive_G, scores_G, -1.0).argsort(stable=True)
    stays_G = torch.ones_like(alive_G)
    stays_G[order[:count]] = False
    return stays_G
