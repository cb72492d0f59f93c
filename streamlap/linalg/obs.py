"""Which inputs of a linear can go when the others are fitted again (optimal brain surgeon; Nystrom).

Removing the inputs Q of y = W h costs, with the best refit, tr(W_Q [(S^-1)_QQ]^-1 W_Q'); one input j: |w_j|^2 / (S^-1)_jj.

Shape suffixes: O out, F inputs (channels), K kept, Q removed, C anchors' width.
"""

from __future__ import annotations

import torch

from streamlap.linalg.anchor import DAMPING, cholesky, inverse, root, solve_right, solve_triangular

ROUNDS = 4
"""Rounds of the greedy choice; each drops its share and settles what that does to the others."""

ROW_BLOCK = 2048
"""Rows of S^-1 that are brought up to date at a time."""


def removal_order(
    w_OF: torch.Tensor, gram_FF: torch.Tensor, least: int, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels in the order in which they should go, down to `least` that stay; and what is lost by then, [rounds, 2].

    Greedy in rounds: the lowest scores go, W and S^-1 are brought up to date. Returns order_F (first to go first, those that
    stay at the end, ascending) and a table of (channels left, squared error in units of the Gram), a line a round.
    """
    w_OF, inverse_FF = start(w_OF, gram_FF, damping)
    width = len(gram_FF)
    alive_F = torch.ones(width, dtype=torch.bool, device=w_OF.device)
    gone, table, lost = [], [], 0.0
    for turn in range(ROUNDS):
        left = width - round((width - least) * (turn + 1) / ROUNDS)
        count = int(alive_F.sum()) - left
        if count <= 0:
            continue
        score_F = w_OF.square().sum(dim=0) / inverse_FF.diagonal()
        score_F[~alive_F] = torch.inf
        out_Q = torch.sort(score_F, stable=True).indices[:count]
        # After the last round nobody asks what is left.
        lost += (remove if left > least else loss)(w_OF, inverse_FF, out_Q)
        alive_F[out_Q] = False
        gone.append(out_Q)
        table.append((left, lost))
    order_F = torch.cat([*gone, alive_F.nonzero()[:, 0]])
    return order_F, torch.tensor(table, dtype=torch.float64).view(-1, 2)


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


def kept_after(order_F: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` channels that stay, ascending."""
    return order_F[len(order_F) - count :].sort().values


def refit_kept(cross_CF: torch.Tensor, gram_FF: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """W' = C (S + lambda)^-1 for the channels that stayed: moments of these only."""
    return solve_right(cholesky(gram_FF, damping), cross_CF)
