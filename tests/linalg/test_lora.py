"""The gradient that adapters stand for is that of a step on their product, and a group scores as the sum of its members."""

from __future__ import annotations

import pytest
import torch

from streamlap.errors import NumericalError
from streamlap.linalg import lora
from streamlap.linalg.lora import Factors, group_scores, importance, line_importance, lowest, merged_gradient

SCALE = 2.0


def trained(rows: int = 12, columns: int = 10, rank: int = 3) -> tuple[torch.Tensor, Factors, Factors]:
    """A matrix, its adapter, and the adapter's gradients of a squared error, by autograd."""
    torch.manual_seed(0)
    w_OI, x_TI, y_TO = torch.randn(rows, columns), torch.randn(50, columns), torch.randn(50, rows)
    a_RI, b_OR = torch.randn(rank, columns).requires_grad_(), torch.randn(rows, rank).requires_grad_()
    loss = (x_TI @ (w_OI + SCALE * b_OR @ a_RI).T - y_TO).square().mean()
    grads = torch.autograd.grad(loss, (a_RI, b_OR))
    return w_OI, Factors(a_RI.detach(), b_OR.detach()), Factors(*grads)


def test_the_gradient_is_what_a_step_of_sgd_takes_from_the_merged_weight() -> None:
    _, at, gradient = trained()
    stepped = [factor.clone().requires_grad_() for factor in (at.a_RI, at.b_OR)]
    stepped[0].grad, stepped[1].grad = gradient.a_RI, gradient.b_OR
    torch.optim.SGD(stepped, lr=1.0).step()
    change_OI = (stepped[1] @ stepped[0] - at.b_OR @ at.a_RI).detach()
    assert torch.allclose(merged_gradient(at, gradient), -change_OI, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1])
def test_lines_are_sums_of_entries_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    w_OI, at, gradient = trained()
    whole = importance(w_OI, at, gradient, SCALE).sum(dim=1 - dim)
    for block in (5, 1024):
        monkeypatch.setattr(lora, "BLOCK", block)
        assert torch.allclose(line_importance(w_OI, at, gradient, SCALE, dim), whole, rtol=1e-5)


def test_a_group_scores_as_its_members_one_by_one() -> None:
    """Four groups of three rows in one matrix, of five columns in another."""
    made = [trained(12, 10), trained(8, 20)]
    scores_G = group_scores([line_importance(*made[0], SCALE, 0), line_importance(*made[1], SCALE, 1)], 4)
    members = []
    for (w_OI, at, gradient), dim in zip(made, (0, 1), strict=True):
        merged_OI, sums = w_OI + SCALE * at.b_OR @ at.a_RI, [0.0] * 4
        g_OI = gradient.b_OR @ at.a_RI + at.b_OR @ gradient.a_RI - gradient.b_OR @ gradient.a_RI
        for row in range(w_OI.shape[0]):
            for column in range(w_OI.shape[1]):
                group = (row, column)[dim] * 4 // w_OI.shape[dim]
                sums[group] += abs(float(g_OI[row, column]) * float(merged_OI[row, column]))
        length = sum(value**2 for value in sums) ** 0.5
        members.append([value / length for value in sums])
    for group in range(4):
        assert float(scores_G[group]) == pytest.approx(members[0][group] + members[1][group], rel=1e-4)


def test_no_matrix_counts_for_more_because_its_numbers_are_larger() -> None:
    lines = [torch.rand(12), torch.rand(8)]
    assert torch.allclose(group_scores(lines, 4), group_scores([1e6 * lines[0], lines[1]], 4), rtol=1e-6)


def test_scores_that_are_no_numbers_are_refused_and_zeros_are_not() -> None:
    with pytest.raises(NumericalError, match="3 have an importance that is NaN or infinite"):
        group_scores([torch.full((6,), torch.nan), torch.ones(3)], 3)
    assert group_scores([torch.zeros(6), torch.zeros(3)], 3).tolist() == [0, 0, 0]


def test_the_lowest_go_and_none_comes_back() -> None:
    scores_G, alive_G = torch.tensor([0.5, 0.1, 0.9, 0.1, 0.3]), torch.ones(5, dtype=torch.bool)
    alive_G = lowest(scores_G, alive_G, 2)
    assert alive_G.tolist() == [True, False, True, False, True]
    scores_G = torch.tensor([0.2, 8.0, 0.1, 9.0, 0.3])  # those that are gone would stay now
    assert lowest(scores_G, alive_G, 3).tolist() == [True, False, False, False, True]
    assert lowest(scores_G, alive_G, 0).all()
