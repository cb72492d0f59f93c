"""Fewer KV heads, against refits of o that were really made."""

from __future__ import annotations

import pytest
import torch

from streamlap.linalg.gram import Gram
from streamlap.linalg.heads import group_order

HIDDEN, SIZE, TOKENS, TINY = 10, 4, 80, 1e-13


def problem(heads_kv: int, heads_q: int) -> tuple[torch.Tensor, ...]:
    """W_v, its bias, W_o, and for every query head other mixtures of tokens [H, T, I]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixed_HTI = draw(heads_q, TOKENS, HIDDEN) @ draw(HIDDEN, HIDDEN)
    return draw(heads_kv * SIZE, HIDDEN), draw(heads_kv * SIZE), draw(HIDDEN, heads_q * SIZE), mixed_HTI


def reads(w_v_VI: torch.Tensor, bias_V: torch.Tensor, mixed_HTI: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """What o reads [T, O]: each query head its KV head's values, of tokens mixed with weights that sum to 1."""
    group = len(mixed_HTI) // heads_kv
    parts, biases = w_v_VI.chunk(heads_kv), bias_V.chunk(heads_kv)
    return torch.cat([x @ parts[h // group].T + biases[h // group] for h, x in enumerate(mixed_HTI)], dim=1)


@pytest.mark.parametrize(("heads_kv", "heads_q"), [(3, 4), (2, 6)])
def test_heads_that_do_not_divide_are_refused(heads_kv: int, heads_q: int) -> None:
    with pytest.raises(ValueError, match=f"{heads_q} query heads"):
        group_order(torch.ones(HIDDEN, 16), Gram.of(torch.eye(16).double()), heads_kv, heads_q)


def refit_loss(w_o_DO: torch.Tensor, x_TO: torch.Tensor, gone: list[int], heads_kv: int) -> float:
    """Squared error of the best o that reads no head of the groups `gone`."""
    width = w_o_DO.shape[1] // heads_kv
    kept = torch.tensor([column for column in range(w_o_DO.shape[1]) if column // width not in gone])
    y_TD = x_TO @ w_o_DO.T
    return float((y_TD - x_TO[:, kept] @ torch.linalg.lstsq(x_TO[:, kept], y_TD).solution).square().sum())


@pytest.mark.parametrize(("heads_kv", "heads_q"), [(3, 3), (4, 8)])
def test_losses_of_groups_are_those_of_refits(heads_kv: int, heads_q: int) -> None:
    w_v_VI, bias_V, w_o_DO, mixed_HTI = problem(heads_kv, heads_q)
    x_TO = reads(w_v_VI, bias_V, mixed_HTI, heads_kv)
    gram_OO = x_TO.T @ x_TO
    order_G, losses = group_order(w_o_DO, Gram.of(gram_OO), heads_kv, heads_q, damping=TINY).value
    assert len(losses) == heads_kv - 1
    gone: list[int] = []
    for g, lost in zip(order_G.tolist(), losses.tolist(), strict=False):
        rivals = [refit_loss(w_o_DO, x_TO, [*gone, other], heads_kv) for other in range(heads_kv) if other not in gone]
        gone.append(g)
        assert lost == pytest.approx(refit_loss(w_o_DO, x_TO, gone, heads_kv), rel=1e-6)
        assert lost == pytest.approx(min(rivals), rel=1e-6)


def test_groups_down_to_a_number_and_a_silent_one_first() -> None:
    w_v_VI, bias_V, w_o_DO, mixed_HTI = problem(4, 4)
    w_v_VI[2 * SIZE : 3 * SIZE], bias_V[2 * SIZE : 3 * SIZE] = 0, 0
    x_TO = reads(w_v_VI, bias_V, mixed_HTI, 4)
    order_G, losses = group_order(w_o_DO, Gram.of(x_TO.T @ x_TO), 4, 4, least=2).value
    assert int(order_G[0]) == 2
    assert float(losses[0]) == 0
    assert len(losses) == 2
    assert order_G[2:].tolist() == sorted(order_G[2:].tolist())
