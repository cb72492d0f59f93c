"""Removal of inputs against refits that were really made."""

from __future__ import annotations

import pytest
import torch

from streamlap.errors import NumericalError
from streamlap.linalg import obs
from streamlap.linalg.obs import kept_after, loss, refit_kept, removal_order, remove, start

OUT, WIDTH, TINY = 5, 24, 1e-13


def problem(tokens: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """W [O, F] and the tokens [T, F] that it reads, correlated."""
    generator = torch.Generator().manual_seed(0)
    w_OF = torch.randn(OUT, WIDTH, generator=generator)
    x_TF = torch.randn(tokens, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    return w_OF, x_TF.double()


def refit_loss(w_OF: torch.Tensor, x_TF: torch.Tensor, kept: torch.Tensor) -> float:
    """Squared error of the best map that reads `kept` only, by least squares on the tokens."""
    y_TO = x_TF @ w_OF.double().T
    return float((y_TO - x_TF[:, kept] @ torch.linalg.lstsq(x_TF[:, kept], y_TO).solution).square().sum())


@pytest.mark.parametrize("least", [1, 7, 20, 23])
def test_the_table_is_what_refits_lose(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs, "ROW_BLOCK", 7)
    w_OF, x_TF = problem()
    before = w_OF.clone()
    order_F, table = removal_order(w_OF, x_TF.T @ x_TF, least, TINY)
    assert sorted(order_F.tolist()) == list(range(WIDTH))
    assert len(table) == min(obs.ROUNDS, WIDTH - least)
    assert int(table[-1, 0]) == least
    assert torch.equal(w_OF, before)
    for left, lost in table.tolist():
        assert lost == pytest.approx(refit_loss(w_OF, x_TF, kept_after(order_F, int(left))), rel=1e-6)


def test_the_first_to_go_has_the_lowest_score() -> None:
    w_OF, x_TF = problem()
    inverse_FF = torch.linalg.inv(x_TF.T @ x_TF)
    score_F = w_OF.double().square().sum(0) / inverse_FF.diagonal()
    order_F, table = removal_order(w_OF, x_TF.T @ x_TF, WIDTH - 1, TINY)
    assert order_F[0] == score_F.argmin()
    assert float(table[0, 1]) == pytest.approx(float(score_F.min()), rel=1e-6)
    assert order_F[1:].tolist() == sorted(order_F[1:].tolist())
    w_OF, inverse_FF = start(w_OF, x_TF.T @ x_TF, TINY)
    for channel in range(WIDTH):
        kept = [other for other in range(WIDTH) if other != channel]
        assert loss(w_OF, inverse_FF, torch.tensor([channel])) == pytest.approx(float(score_F[channel]), rel=1e-6)
        assert float(score_F[channel]) == pytest.approx(refit_loss(w_OF, x_TF, torch.tensor(kept)), rel=1e-6)


def test_a_removal_leaves_the_inverse_and_the_weights_of_a_refit() -> None:
    w_OF, x_TF = problem()
    gram_FF = x_TF.T @ x_TF
    kept, gone = torch.arange(3, WIDTH), torch.tensor([2, 0, 1])
    now_OF, inverse_FF = start(w_OF, gram_FF, TINY)
    remove(now_OF, inverse_FF, gone)
    torch.testing.assert_close(inverse_FF[kept][:, kept], torch.linalg.inv(gram_FF[3:, 3:]), rtol=1e-6, atol=1e-9)
    expected_OK = torch.linalg.lstsq(x_TF[:, kept], x_TF @ w_OF.double().T).solution.T
    torch.testing.assert_close(now_OF[:, kept], expected_OK, rtol=1e-6, atol=1e-6)
    assert now_OF[:, gone].abs().max() == 0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_dead_channels_go_first_and_cost_nothing(scale: float) -> None:
    w_OF, x_TF = problem()
    dead = [3, 17]
    w_OF[:, dead] *= 100
    x_TF[:, dead] = 0
    before = w_OF.clone()
    order_F, table = removal_order(w_OF, x_TF.T @ x_TF * scale, WIDTH - 2, 1e-3)
    assert torch.equal(w_OF, before)
    assert sorted(order_F[:2].tolist()) == dead
    assert float(table[-1, 1]) == 0


def test_twins_are_not_both_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two equal channels one is worth nothing and the other, once it is alone, what both were."""
    monkeypatch.setattr(obs, "ROUNDS", 16)
    w_OF, x_TF = problem()
    x_TF[:, 4] = x_TF[:, 9]
    order_F, table = removal_order(w_OF, x_TF.T @ x_TF, WIDTH - 16, 1e-7)
    assert int(order_F[0]) in (4, 9)
    assert float(table[0, 1]) < 1e-6 * float(table[-1, 1])
    assert float(table[-1, 1]) == pytest.approx(refit_loss(w_OF, x_TF, kept_after(order_F, WIDTH - 16)), rel=1e-3)


def test_nothing_to_remove() -> None:
    w_OF, x_TF = problem()
    order_F, table = removal_order(w_OF, x_TF.T @ x_TF, WIDTH)
    assert order_F.tolist() == list(range(WIDTH))
    assert table.shape == (0, 2)


@pytest.mark.parametrize("tokens", [1, 10])
def test_fewer_tokens_than_channels_work(tokens: int) -> None:
    w_OF, x_TF = problem(tokens)
    gram_FF = (x_TF.float().T @ x_TF.float()).double()
    order_F, table = removal_order(w_OF, gram_FF, 2)
    assert sorted(order_F.tolist()) == list(range(WIDTH))
    assert bool(torch.isfinite(table).all())
    assert bool((table[:, 1].diff() >= 0).all())


def test_a_refit_of_what_was_kept_is_that_of_least_squares() -> None:
    w_OF, x_TF = problem()
    kept, target_TO = torch.arange(0, WIDTH, 2), x_TF @ w_OF.double().T
    x_TK = x_TF[:, kept]
    found_OK = refit_kept(target_TO.T @ x_TK, x_TK.T @ x_TK, TINY)
    torch.testing.assert_close(found_OK, torch.linalg.lstsq(x_TK, target_TO).solution.T, rtol=1e-8, atol=1e-8)


def test_statistics_that_are_not_finite_are_an_error() -> None:
    w_OF, x_TF = problem()
    x_TF[3, 5] = torch.nan
    with pytest.raises(NumericalError):
        removal_order(w_OF, x_TF.T @ x_TF, 3)
    with pytest.raises(NumericalError):
        refit_kept(w_OF.double(), x_TF.T @ x_TF)
