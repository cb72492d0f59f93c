"""Which inputs of a linear can go when its weights on the others are fitted again (optimal brain surgeon; Nystrom).

Removing the inputs Q of y = W h costs, with the best refit, tr(W_Q [(S^-1)_QQ]^-1 W_Q'); one input j: |w_j|^2 / (S^-1)_jj.

Shape suffixes: O out, F inputs (channels), K kept, Q removed, P removed so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from streamlap.linalg.anchor import root
from streamlap.linalg.gram import DAMPING, Gram
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution, joined
from streamlap.linalg.sums import total
from streamlap.linalg.triangles import panels, solve_right, solve_triangular

ROUNDS = 16
"""Rounds that it would take to remove all inputs. After each, W and S^-1 are brought up to date."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A linear of which only some inputs are left."""

    kept_K: torch.Tensor
    """The inputs that stay, ascending."""
    w_OF: torch.Tensor
    """W on these, fitted again, and zero on the others; until the next is asked for."""


def removals(
    w_OF: torch.Tensor, gram: Gram, counts: Iterable[int], damping: float = DAMPING
) -> Iterator[Solution[Pruned]]:
    """W pruned to each of `counts` inputs, which descend. Greedy, in rounds: those of the lowest scores go.

    The error of each is squared and absolute, in units of the Gram; its notes are all up to there.
    """
    rest = Rest(w_OF, gram, damping)
    most, lost = -(-len(gram) // ROUNDS), 0.0
    for count in counts:
        while (left := int(rest.alive_F.sum())) > count:
            score_F = rest.energy_F / rest.diagonal_F
            score_F[~rest.alive_F] = torch.inf
            lost += rest.remove(torch.sort(score_F, stable=True).indices[: min(most, left - count)])
        pruned = Pruned(kept_K=rest.alive_F.nonzero()[:, 0], w_OF=rest.w_OF)
        yield Solution(pruned, error=lost, notes=rest.notes)


class Rest:
    """W on the inputs that are left, fitted again, and S^-1 on them. For the others W is zero and S^-1 is only rounding."""

    def __init__(self, w_OF: torch.Tensor, gram: Gram, damping: float = DAMPING) -> None:
        # With columns of zeros, dead inputs go first and cost nothing.
        self.w_OF = w_OF.to(gram.dtype, copy=True)
        self.w_OF[:, gram.diagonal_I <= 0] = 0.0
        self.alive_F = torch.ones(len(gram), dtype=torch.bool, device=w_OF.device)
        """Which inputs are left."""
        factor = gram.cholesky(damping)
        self.notes = factor.notes
        """Of all solves so far."""
        self._inverse = factor.value.inverse()

    @property
    def energy_F(self) -> torch.Tensor:  # noqa: N802
        """Squared length of the columns of W."""
        return torch.cat([self.w_OF[:, at].square().sum(dim=0) for at in panels(self.w_OF.shape[1])])

    @property
    def diagonal_F(self) -> torch.Tensor:  # noqa: N802
        """The diagonal of S^-1."""
        return self._inverse.diagonal_I

    def rows(self, at_Q: torch.Tensor) -> torch.Tensor:
        """The rows `at_Q` of S^-1."""
        return self._inverse.rows(at_Q)

    def loss(self, out_Q: torch.Tensor) -> float:
        """What it costs to remove the inputs Q: tr(W_Q [(S^-1)_QQ]^-1 W_Q')."""
        w_OQ = self.w_OF[:, out_Q]
        return total(solve_right(self._root(self.rows(out_Q)[:, out_Q]), w_OQ) * w_OQ)

    def remove(self, out_Q: torch.Tensor) -> float:
        """Remove the inputs Q; gives back what that costs."""
        rows_QF = self.rows(out_Q)
        factor_QQ = self._root(rows_QF[:, out_Q])
        w_OQ = self.w_OF[:, out_Q]
        weight_OQ = solve_right(factor_QQ, w_OQ)
        for at in panels(rows_QF.shape[1]):
            self.w_OF[:, at] -= product(weight_OQ, rows_QF[:, at])
        self._inverse.subtract(solve_triangular(factor_QQ, rows_QF, upper=False))
        self.alive_F[out_Q] = False
        self.w_OF[:, ~self.alive_F] = 0.0
        return total(weight_OQ * w_OQ)

    def _root(self, part_QQ: torch.Tensor) -> torch.Tensor:
        factor_QQ = root(Gram.of(part_QQ))
        self.notes = joined(self.notes, factor_QQ.notes)
        return factor_QQ.value
