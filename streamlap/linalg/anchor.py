"""The map that is best for a linear on the inputs it will really get, and roots of Grams.

Shape suffixes: T tokens, O out, I in.
"""

from __future__ import annotations

import torch

from streamlap.linalg.gram import DAMPING, MOST_DAMPING, Gram, damping_notes, solve_dtype
from streamlap.linalg.products import product
from streamlap.linalg.solution import Solution
from streamlap.linalg.triangles import panels

RIDGES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""Damping for a root: the first with which the root exists. A Gram of fewer tokens than inputs, summed from float32 products,
has eigenvalues slightly below zero, by their rounding."""

MARGIN = 100.0
"""A root counts as existing where it exists with this many times less damping: with barely enough it amplifies rounding."""


def working(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the dtype to solve in, which the one of most columns says."""
    dtype = solve_dtype(max(tensor.shape[-1] for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]


def root(gram: Gram) -> Solution[torch.Tensor]:
    """L of L L' = S, lower [I, I], in the dtype of S, with no more damping than it needs.

    Raises NumericalError where even MOST_DAMPING leaves S indefinite.
    """
    found = root_if_any(gram)
    if found is None:
        gram.cholesky(MOST_DAMPING)  # which says what is wrong
        raise AssertionError("a Gram with a factor and without a root")
    return found


def root_if_any(gram: Gram) -> Solution[torch.Tensor] | None:
    """`root`, or None where even MOST_DAMPING leaves S indefinite.

    Singular Grams are common here, so there is a note only where it took more than the damping of a solve.
    """
    wide = gram.copy(torch.float64)
    ridge = next((ridge for ridge in RIDGES if wide.factor(ridge / MARGIN) is not None), RIDGES[-1])
    while (factor := wide.factor(ridge)) is None and ridge < MOST_DAMPING:
        ridge = min(10 * ridge, MOST_DAMPING)
    if factor is None:
        return None
    return Solution(factor.dense(gram.dtype), notes=damping_notes(len(gram), ridge, DAMPING))


def anchored(
    w_OI: torch.Tensor, gram: Gram, cross_IO: torch.Tensor, damping: float = DAMPING
) -> Solution[torch.Tensor]:
    """What W must become to give t instead of W x: (C + W ridge)(S + ridge)^-1, with C' = sum x t' in `cross_IO`, in whose
    memory it comes.

    The full-rank minimiser of sum |t - W' x|^2, with a ridge that pulls towards W: where the tokens say nothing, W stays.
    """
    factor = gram.cholesky(damping)
    for at in panels(len(gram)):
        cross_IO[at].addcmul_(w_OI[:, at].T.to(cross_IO.dtype), factor.value.ridge_I[at, None])
    return Solution(factor.value.solve(cross_IO).T, notes=factor.notes)


def best_step(w_OI: torch.Tensor, to_OI: torch.Tensor, x_TI: torch.Tensor, target_TO: torch.Tensor) -> float:
    """The b in [0, 1] for which W + b (W' - W) is nearest to the target on held-out tokens; W' is `to_OI`.

    The error is a parabola in b, so its minimum is known without a grid. Both maps come panel by panel to where the target is,
    in its dtype.
    """
    made_TO, moved_TO = (torch.zeros_like(target_TO) for _ in range(2))
    for at in panels(w_OI.shape[1]):
        x_TP, w_OP = x_TI[:, at].to(target_TO), w_OI[:, at].to(target_TO)
        made_TO += product(x_TP, w_OP.T)
        moved_TO += product(x_TP, (to_OI[:, at].to(target_TO) - w_OP).T)
    missing_TO = made_TO.neg_().add_(target_TO)
    # Sums of rows first: the bits of one sum over everything depend on the number of threads.
    power, gain = (float((rows_TO * moved_TO).sum(dim=1).sum()) for rows_TO in (moved_TO, missing_TO))
    return min(1.0, max(0.0, gain / power)) if power > 0 else 0.0
