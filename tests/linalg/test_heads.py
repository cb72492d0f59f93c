"""Fewer KV heads, against refits of o that were really made."""

from __future__ import annotations

import pytest
import torch

from streamlap.linalg.gram import Gram
from streamlap.linalg.heads import kept_heads

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
        kept_heads(torch.ones(HIDDEN, 16), Gram.of(torch.eye(16).double()), heads_kv, heads_q, 1)


def refit_loss(w_o_DO: torch.Tensor, x_TO: torch.Tensor, gone: list[int], heads_kv: int) -> float:
    """Squared error of the best o that reads no head of the groups `gone`."""
    width = w_o_DO.shape[1] // heads_kv
    kept = torch.tensor([column for column in range(w_o_DO.shape[1]) if column // width not in gone])
    y_TD = x_TO @ w_o_DO.T
    return float((y_TD - x_TO[:, kept] @ torch.linalg.lstsq(x_TO[:, kept], y_TD).solution).square().sum())


@pytest.mark.parametrize(("heads_kv", "heads_q"), [(3, 3), (4, 8)])
def test_the_head_that_goes_is_the_one_a_refit_misses_least(heads_kv: int, heads_q: int) -> None:
    w_v_VI, bias_V, w_o_DO, mixed_HTI = problem(heads_kv, heads_q)
    x_TO = reads(w_v_VI, bias_V, mixed_HTI, heads_kv)
    gram_OO, stay = x_TO.T @ x_TO, set(range(heads_kv))
    for kept in range(heads_kv, 0, -1):
        found = kept_heads(w_o_DO, Gram.of(gram_OO), heads_kv, heads_q, kept, damping=TINY).value.tolist()
        rivals = {frozenset(stay - {other}) for other in stay} if kept < heads_kv else {frozenset(stay)}
        losses = {
            rival: refit_loss(w_o_DO, x_TO, [g for g in range(heads_kv) if g not in rival], heads_kv)
            for rival in rivals
        }
        assert found == sorted(min(rivals, key=lambda rival: losses[rival]))
        stay = set(found)


def test_a_silent_head_goes_first() -> None:
    w_v_VI, bias_V, w_o_DO, mixed_HTI = problem(4, 4)
    w_v_VI[2 * SIZE : 3 * SIZE], bias_V[2 * SIZE : 3 * SIZE] = 0, 0
    x_TO = reads(w_v_VI, bias_V, mixed_HTI, 4)
    assert kept_heads(w_o_DO, Gram.of(x_TO.T @ x_TO), 4, 4, 3).value.tolist() == [0, 1, 3]
