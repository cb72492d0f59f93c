"""Which inputs of a linear can go when its weights on the others are fitted again (optimal brain surgeon; Nystrom).

Removing the inputs Q of y = W h costs, with the best refit, tr(W_Q [(S^-1)_QQ]^-1 W_Q'); one input j: |w_j|^2 / (S^-1)_jj.

Shape suffixes: O out, F inputs (channels), K kept, Q removed, P removed so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from streamlap.linalg.anchor import DAMPING, cholesky, root, solve_right, solve_triangular, triangular_inverse
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution, joined

ROUNDS = 16
"""Rounds that it would take to remove all inputs. After each, W and S^-1 are brought up to date."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A linear of which only some inputs are left."""

    kept_K: torch.Tensor
    """The inputs that stay, ascending."""
    w_OK: torch.Tensor
    """W on these, fitted again."""


def removals(
    w_OF: torch.Tensor, gram_FF: torch.Tensor, counts: Iterable[int], damping: float = DAMPING
) -> Iterator[Solution[Pruned]]:
    """W pruned to each of `counts` inputs, which descend. Greedy, in rounds: those of the lowest scores go.

    The error of each is squared and absolute, in units of the Gram; its notes are all up to there.
    """
    rest = Rest(w_OF, gram_FF, damping)
    most, lost = -(-len(gram_FF) // ROUNDS), 0.0
    for count in counts:
        while (left := int(rest.alive_F.sum())) > count:
            score_F = rest.w_OF.square().sum(dim=0) / rest.diagonal_F
            score_F[~rest.alive_F] = torch.inf
            lost += rest.remove(torch.sort(score_F, stable=True).indices[: min(most, left - count)])
        pruned = Pruned(kept_K=rest.alive_F.nonzero()[:, 0], w_OK=rest.w_OF[:, rest.alive_F])
        yield Solution(pruned, error=lost, notes=rest.notes)


class Rest:
    """W on the inputs that are left, fitted again, and S^-1 on them. For the others W is zero and S^-1 is only rounding.

    S^-1 = R' R - H' H is never formed: R is the inverse of the triangular factor of S, and each removal adds rows to H.
    """

    def __init__(self, w_OF: torch.Tensor, gram_FF: torch.Tensor, damping: float = DAMPING) -> None:
        # With columns of zeros, dead inputs go first and cost nothing.
        self.w_OF = w_OF.to(gram_FF.dtype) * (gram_FF.diagonal() > 0)
        self.alive_F = torch.ones(len(gram_FF), dtype=torch.bool, device=w_OF.device)
        """Which inputs are left."""
        factor_FF = cholesky(gram_FF, damping)
        self.notes = factor_FF.notes
        """Of all solves so far."""
        self._inverse_FF = triangular_inverse(factor_FF.value)
        del factor_FF  # as large as the Gram, and so is what comes next
        self._gone_PF = gram_FF.new_empty(0, len(gram_FF))
        self.diagonal_F = self._inverse_FF.square().sum(dim=0)
        """The diagonal of S^-1."""

    def rows(self, at_Q: torch.Tensor, columns: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """The rows `at_Q` of S^-1, or only some of their columns."""
        parts = self._inverse_FF, self._gone_PF
        mine, gone = (product(part[:, at_Q].T, part[:, columns]) for part in parts)
        return mine - gone

    def loss(self, out_Q: torch.Tensor) -> float:
        """What it costs to remove the inputs Q: tr(W_Q [(S^-1)_QQ]^-1 W_Q')."""
        w_OQ = self.w_OF[:, out_Q]
        return float((solve_right(self._root(self.rows(out_Q, out_Q)), w_OQ) * w_OQ).sum())

    def remove(self, out_Q: torch.Tensor) -> float:
        """Remove the inputs Q; gives back what that costs."""
        rows_QF = self.rows(out_Q)
        factor_QQ = self._root(rows_QF[:, out_Q])
        w_OQ = self.w_OF[:, out_Q]
        weight_OQ = solve_right(factor_QQ, w_OQ)
        self.w_OF -= product(weight_OQ, rows_QF)
        half_QF = solve_triangular(factor_QQ, rows_QF, upper=False)
        self.diagonal_F -= half_QF.square().sum(dim=0)
        self._gone_PF = torch.cat([self._gone_PF, half_QF])
        self.alive_F[out_Q] = False
        self.w_OF[:, ~self.alive_F] = 0.0
        return float((weight_OQ * w_OQ).sum())

    def _root(self, part_QQ: torch.Tensor) -> torch.Tensor:
        factor_QQ = root(part_QQ)
        self.notes = joined(self.notes, factor_QQ.notes)
        return factor_QQ.value
