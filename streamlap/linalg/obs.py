"""Which inputs of a linear can go when the others are fitted again (optimal brain surgeon; Nystrom).

Removing the inputs Q of y = W h costs, with the best refit, tr(W_Q [(S^-1)_QQ]^-1 W_Q'); one input j: |w_j|^2 / (S^-1)_jj.

Shape suffixes: O out, F inputs (channels), K kept, Q removed, P removed so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from streamlap.linalg.anchor import DAMPING, cholesky, root, solve_right, solve_triangular, triangular_inverse
from streamlap.linalg.products import product

ROUNDS = 16
"""Rounds in which all would go; each drops its share and settles what that does to the others."""


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
    rest = Rest(w_OF, gram_FF, damping)
    most, lost = -(-len(gram_FF) // ROUNDS), 0.0
    for count in counts:
        while (left := int(rest.alive_F.sum())) > count:
            score_F = rest.w_OF.square().sum(dim=0) / rest.diagonal_F
            score_F[~rest.alive_F] = torch.inf
            lost += rest.remove(torch.sort(score_F, stable=True).indices[: min(most, left - count)])
        yield Removal(kept_K=rest.alive_F.nonzero()[:, 0], w_OK=rest.w_OF[:, rest.alive_F], lost=lost)


class Rest:
    """W of the inputs that are left, fitted again, and S^-1 on them; where others were, W is zero and S^-1 is rounding.

    S^-1 = R' R - H' H is never formed: R is the inverse of the triangular factor of S, and each removal adds rows to H.
    """

    def __init__(self, w_OF: torch.Tensor, gram_FF: torch.Tensor, damping: float = DAMPING) -> None:
        # The columns of dead inputs are zero, so that they go first and cost nothing.
        self.w_OF = w_OF.to(gram_FF.dtype) * (gram_FF.diagonal() > 0)
        self.alive_F = torch.ones(len(gram_FF), dtype=torch.bool, device=w_OF.device)
        """Which inputs are left."""
        self._inverse_FF = triangular_inverse(cholesky(gram_FF, damping))
        self._gone_PF = gram_FF.new_empty(0, len(gram_FF))
        self.diagonal_F = self._inverse_FF.square().sum(dim=0)
        """Of S^-1."""

    def rows(self, at_Q: torch.Tensor, columns: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Of S^-1."""
        parts = self._inverse_FF, self._gone_PF
        mine, gone = (product(part[:, at_Q].T, part[:, columns]) for part in parts)
        return mine - gone

    def loss(self, out_Q: torch.Tensor) -> float:
        """What it costs to remove the inputs Q: tr(W_Q [(S^-1)_QQ]^-1 W_Q')."""
        w_OQ = self.w_OF[:, out_Q]
        return float((solve_right(root(self.rows(out_Q, out_Q)), w_OQ) * w_OQ).sum())

    def remove(self, out_Q: torch.Tensor) -> float:
        """Go on as if the inputs Q had never been; gives back what that costs."""
        rows_QF = self.rows(out_Q)
        factor_QQ = root(rows_QF[:, out_Q])
        w_OQ = self.w_OF[:, out_Q]
        weight_OQ = solve_right(factor_QQ, w_OQ)
        self.w_OF -= product(weight_OQ, rows_QF)
        half_QF = solve_triangular(factor_QQ, rows_QF, upper=False)
        self.diagonal_F -= half_QF.square().sum(dim=0)
        self._gone_PF = torch.cat([self._gone_PF, half_QF])
        self.alive_F[out_Q] = False
        self.w_OF[:, ~self.alive_F] = 0.0
        return float((weight_OQ * w_OQ).sum())
