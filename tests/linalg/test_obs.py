"""Removal of inputs against refits that were really made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from streamlap.errors import NumericalError
from streamlap.linalg import triangles
from streamlap.linalg.gram import Gram
from streamlap.linalg.obs import Rest, removals

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


@pytest.mark.parametrize("counts", [[1], [23], [24, 20, 7], [20, 12, 12, 2]])
def test_what_is_left_is_what_refits_give(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights, and the loss by its formula, against least squares on the tokens."""
    monkeypatch.setattr(triangles, "PANEL", 7)
    w_OF, x_TF = problem()
    before = w_OF.clone()
    found = []
    for solution in removals(w_OF, Gram.of(x_TF.T @ x_TF), counts, TINY):
        pruned = solution.value
        found.append(len(pruned.kept_K))
        assert pruned.kept_K.tolist() == sorted(set(pruned.kept_K.tolist()))
        assert solution.error == pytest.approx(refit_loss(w_OF, x_TF, pruned.kept_K), rel=1e-6, abs=1e-9)
        x_TK = x_TF[:, pruned.kept_K]
        refit_OK = torch.linalg.lstsq(x_TK, x_TF @ w_OF.double().T).solution.T
        torch.testing.assert_close(pruned.w_OF[:, pruned.kept_K], refit_OK, rtol=1e-6, atol=1e-6)
        assert torch.count_nonzero(pruned.w_OF) == refit_OK.numel()
    assert found == counts
    assert torch.equal(w_OF, before)


def test_threads_do_not_move_a_bit_of_what_removal_costs(threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    w_OF = torch.randn(1500, 48, generator=generator, dtype=torch.float64)
    gram_FF, found = torch.eye(48, dtype=torch.float64), set()
    for count in (1, 2, 3, 4):
        threads(count)
        rest = Rest(w_OF, Gram.of(gram_FF), TINY)
        found.add((rest.loss(torch.arange(40)), rest.remove(torch.arange(40))))
    assert len(found) == 1


def test_the_first_to_go_has_the_lowest_score() -> None:
    w_OF, x_TF = problem()
    inverse_FF = torch.linalg.inv(x_TF.T @ x_TF)
    score_F = w_OF.double().square().sum(0) / inverse_FF.diagonal()
    (solution,) = removals(w_OF, Gram.of(x_TF.T @ x_TF), [WIDTH - 1], TINY)
    assert set(range(WIDTH)) - set(solution.value.kept_K.tolist()) == {int(score_F.argmin())}
    assert solution.error == pytest.approx(float(score_F.min()), rel=1e-6)
    rest = Rest(w_OF, Gram.of(x_TF.T @ x_TF), TINY)
    for channel in range(WIDTH):
        kept = [other for other in range(WIDTH) if other != channel]
        assert rest.loss(torch.tensor([channel])) == pytest.approx(float(score_F[channel]), rel=1e-6)
        assert float(score_F[channel]) == pytest.approx(refit_loss(w_OF, x_TF, torch.tensor(kept)), rel=1e-6)


def test_a_removal_leaves_the_inverse_and_the_weights_of_a_refit() -> None:
    w_OF, x_TF = problem()
    gram_FF = x_TF.T @ x_TF
    kept, gone = torch.arange(3, WIDTH), torch.tensor([2, 0, 1])
    rest = Rest(w_OF, Gram.of(gram_FF), TINY)
    rest.remove(gone[:2])
    rest.remove(gone[2:])
    inverse_KK = torch.linalg.inv(gram_FF[3:, 3:])
    torch.testing.assert_close(rest.rows(kept)[:, kept], inverse_KK, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rest.diagonal_F[kept], inverse_KK.diagonal(), rtol=1e-6, atol=1e-9)
    expected_OK = torch.linalg.lstsq(x_TF[:, kept], x_TF @ w_OF.double().T).solution.T
    torch.testing.assert_close(rest.w_OF[:, kept], expected_OK, rtol=1e-6, atol=1e-6)
    assert rest.w_OF[:, gone].abs().max() == 0
    assert rest.alive_F.nonzero()[:, 0].tolist() == kept.tolist()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_dead_channels_go_first_and_cost_nothing(scale: float) -> None:
    w_OF, x_TF = problem()
    dead = [3, 17]
    w_OF[:, dead] *= 100
    x_TF[:, dead] = 0
    before = w_OF.clone()
    (solution,) = removals(w_OF, Gram.of(x_TF.T @ x_TF * scale), [WIDTH - 2], 1e-3)
    assert torch.equal(w_OF, before)
    assert set(range(WIDTH)) - set(solution.value.kept_K.tolist()) == set(dead)
    assert solution.error == 0


def test_twins_are_not_both_removed() -> None:
    """Of two equal channels one is worth nothing and the other, once it is alone, what both were."""
    w_OF, x_TF = problem()
    x_TF[:, 4] = x_TF[:, 9]
    first, last = removals(w_OF, Gram.of(x_TF.T @ x_TF), [WIDTH - 1, WIDTH - 16], 1e-7)
    assert len({4, 9} & set(first.value.kept_K.tolist())) == 1
    assert first.error < 1e-6 * last.error
    assert last.error == pytest.approx(refit_loss(w_OF, x_TF, last.value.kept_K), rel=1e-3)


def test_nothing_to_remove() -> None:
    w_OF, x_TF = problem()
    (solution,) = removals(w_OF, Gram.of(x_TF.T @ x_TF), [WIDTH])
    assert solution.value.kept_K.tolist() == list(range(WIDTH))
    assert solution.error == 0
    assert torch.equal(solution.value.w_OF, w_OF.double())


@pytest.mark.parametrize("tokens", [1, 10])
def test_fewer_tokens_than_channels_work(tokens: int) -> None:
    w_OF, x_TF = problem(tokens)
    gram_FF = (x_TF.float().T @ x_TF.float()).double()
    found = list(removals(w_OF, Gram.of(gram_FF), [20, 12, 2]))
    assert all(bool(torch.isfinite(solution.value.w_OF).all()) for solution in found)
    lost = [solution.error for solution in found]
    assert lost == sorted(lost)


def test_statistics_that_are_not_finite_are_an_error() -> None:
    w_OF, x_TF = problem()
    x_TF[3, 5] = torch.nan
    with pytest.raises(NumericalError):
        list(removals(w_OF, Gram.of(x_TF.T @ x_TF), [3]))
