"""Which inputs of a linear can go when the others are fitted again (optimal brain surgeon; Nystrom).

Removing the inputs Q of y = W h costs, with the best refit, tr(W_Q [(S^-1)_QQ]^-1 W_Q'); one input j: |w_j|^2 / (S^-1)_jj.

Shape suffixes: O out, F inputs (channels), K kept, Q removed, C anchors' width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from streamlap.linalg.anchor import DAMPING, cholesky, inverse, root, solve_right, solve_triangular

ROUNDS = 16
"""Rounds in which all would go; each drops its share and settles what that does to the others."""

ROW_BLOCK = 2048
"""Rows of S^-1 that are brought up to date at a time."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What is left at one width."""

    kept_K: torch.Tensor
    """The channels that stay, ascending."""
    w_OK: torch.Tensor
    """W on these, fitted again."""
    lost: float
    """Squared error so far, in units of the Gram."""


def removals(
    w_OF: torch.Tensor, gram_FF: torch.Tensor, counts: Iterable[int], damping: float = DAMPING
) -> Iterator[Removal]:
    """The channels that stay at each of `counts`, which descend. Greedy in rounds: the lowest scores go, W and S^-1 are brought
    up to date."""
    w_OF, inverse_FF = start(w_OF, gram_FF, damping)
    alive_F = torch.ones(len(inverse_FF), dtype=torch.bool, device=w_OF.device)
    most, lost = -(-len(alive_F) // ROUNDS), 0.0
    for count in counts:
        while (left := int(alive_F.sum())) > count:
            score_F = w_OF.square().sum(dim=0) / inverse_FF.diagonal()
            score_F[~alive_F] = torch.inf
            out_Q = torch.sort(score_F, stable=True).indices[: min(most, left - count)]
            lost += remove(w_OF, inverse_FF, out_Q)
            alive_F[out_Q] = False
        yield Removal(kept_K=alive_F.nonzero()[:, 0], w_OK=w_OF[:, alive_F], lost=lost)


def start(w_OF: torch.Tensor, gram_FF: torch.Tensor, damping: float = DAMPING) -> tuple[torch.Tensor, torch.Tensor]:
    """W, a copy in which the columns of dead inputs are zero, so that they go first and cost nothing; and S^-1."""
    alive_F = gram_FF.diagonal() > 0
    return w_OF.to(gram_FF.dtype) * alive_F, inverse(cholesky(gram_FF, damping))


def loss(w_OF: torch.Tensor, inverse_FF: torch.Tensor, out_Q: torch.Tensor) -> float:
    """What it costs to remove the inputs Q: tr(W_Q [(S^-1)_QQ]^-1 W_Q')."""
    w_OQ = w_OF[:, out_Q]
    return float((solve_right(root(inverse_FF[out_Q][:, out_Q]), w_OQ) * w_OQ).sum())


def remove(w_OF: torch.Tensor, inverse_FF: torch.Tensor, out_Q: torch.Tensor) -> float:
    """Bring W and S^-1 up to date, in place, as if the inputs Q had never been; gives back what that costs."""
    rows_QF = inverse_FF[out_Q]
    factor_QQ = root(rows_QF[:, out_Q])
    w_OQ = w_OF[:, out_Q]
    weight_OQ = solve_right(factor_QQ, w_OQ)
    w_OF -= weight_OQ @ rows_QF
    half_QF = solve_triangular(factor_QQ, rows_QF, upper=False)
    for first in range(0, len(inverse_FF), ROW_BLOCK):
        block = slice(first, first + ROW_BLOCK)
        inverse_FF[block] -= half_QF[:, block].T @ half_QF
    w_OF[:, out_Q] = 0.0
    return float((weight_OQ * w_OQ).sum())
