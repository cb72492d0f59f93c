"""Sums, factors and inverses in one array, against their one-shot formulas."""

from __future__ import annotations

import pytest
import torch

from streamlap.errors import NumericalError
from streamlap.linalg import gram as grams
from streamlap.linalg import triangles
from streamlap.linalg.gram import LARGE, LEFT, Gram, solve_dtype, squares
from streamlap.linalg.sums import GramSum, Sum
from streamlap.linalg.triangles import panels, solve_right

SIZE = 13
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[4, 1024])
def panel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Several panels, the last incomplete, and one."""
    monkeypatch.setattr(triangles, "PANEL", request.param)
    return int(request.param)


def tokens(count: int = 60, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return torch.randn(count, SIZE, generator=generator, dtype=torch.float64) @ mix_II


def matrix() -> torch.Tensor:
    x_TI = tokens()
    square_II = x_TI.T @ x_TI  # not symmetric to the last bit on every processor
    return square_II.triu() + square_II.triu(1).T


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


def test_panels_cover_all_columns_once() -> None:
    columns = [column for at in panels(SIZE) for column in range(at.start, at.stop)]
    assert columns == list(range(SIZE))


def test_many_columns_are_solved_in_float32() -> None:
    assert solve_dtype(LARGE) == torch.float64
    assert solve_dtype(LARGE + 1) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_is_that_of_all_tokens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "LARGE", 0 if dtype == torch.float32 else LARGE)
    x_TI, t_TA = tokens(), tokens(seed=1)[:, :7]
    summed, crossed = GramSum(SIZE, CPU), Sum((SIZE, 7), CPU)
    for x, t in zip(x_TI.to(dtype).split(11), t_TA.to(dtype).split(11), strict=True):
        summed.add(x.T)
        crossed.add(x.T, t.T)
    exact = 1e-6 if dtype == torch.float32 else 1e-12
    wanted_II, wanted_IA = x_TI.T @ x_TI, x_TI.T @ t_TA
    assert crossed.total.dtype == dtype
    torch.testing.assert_close(crossed.total.double(), wanted_IA, rtol=0, atol=exact * float(wanted_IA.abs().max()))
    gram = summed.gram()
    assert gram.dtype == dtype
    torch.testing.assert_close(gram.dense(torch.float64), wanted_II, rtol=0, atol=exact * float(wanted_II.abs().max()))


def test_a_float32_sum_over_many_chunks_keeps_what_each_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ** 25 + 1 is no float32 number, nor is any sum on the way there: a plain sum would stand still."""
    monkeypatch.setattr(grams, "LARGE", 0)
    summed, crossed = GramSum(SIZE, CPU), Sum((SIZE, 2), CPU)
    large = torch.full((1, SIZE), 2.0**12.5)
    ones = torch.ones(1, SIZE)
    for x in (large, *[ones] * 40):
        summed.add(x.T)
        crossed.add(x.T, x[:, :2].T)
    wanted = float(large[0, 0].double() ** 2) + 40
    assert torch.equal(summed.gram().dense(), torch.full((SIZE, SIZE), wanted).float())
    assert torch.equal(crossed.total, torch.full((SIZE, 2), wanted).float())


def test_products_with_a_gram() -> None:
    gram, t_OI = Gram.of(matrix()), tokens(5, seed=2)
    assert torch.equal(gram.dense(), matrix())
    close(gram.times(t_OI), t_OI @ matrix())
    close(gram.metric(t_OI), t_OI @ matrix() @ t_OI.T)
    assert gram.to(torch.float64) is gram
    assert torch.equal(gram.to(torch.float32).dense(), matrix().float())
    assert gram.to(torch.float32).times(t_OI).dtype == torch.float64
    close(squares(tokens()), matrix())


def test_a_factor_leaves_the_gram_above_it() -> None:
    gram = Gram.of(matrix())
    factor = gram.cholesky(1e-6)
    ridge = 1e-6 * gram.level
    factor_II = factor.value.dense(torch.float64)
    assert torch.equal(factor_II, factor_II.tril())
    close(factor_II @ factor_II.T, matrix() + ridge * torch.eye(SIZE).double())
    assert torch.equal(gram.dense(), matrix())
    b_OI = tokens(5, seed=3)
    wanted_OI = b_OI @ torch.linalg.inv(matrix() + ridge * torch.eye(SIZE).double())
    torch.testing.assert_close(factor.value.solve(b_OI.T.contiguous()).T, wanted_OI, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(solve_right(factor_II, b_OI), wanted_OI, rtol=1e-7, atol=1e-7)


def test_an_inverse_in_the_place_of_its_factor() -> None:
    gram = Gram.of(matrix())
    inverse = gram.cholesky(1e-9).value.inverse()
    wanted_II = torch.linalg.inv(matrix() + 1e-9 * gram.level * torch.eye(SIZE).double())
    every = torch.arange(SIZE)
    torch.testing.assert_close(inverse.rows(every), wanted_II, rtol=1e-6, atol=1e-9)
    assert torch.equal(inverse.rows(every[[7, 2]]), inverse.rows(every)[[7, 2]])
    torch.testing.assert_close(inverse.diagonal_I, wanted_II.diagonal(), rtol=1e-6, atol=1e-9)
    half_QI = tokens(3, seed=4)
    inverse.subtract(half_QI)
    torch.testing.assert_close(inverse.rows(every), wanted_II - half_QI.T @ half_QI, rtol=1e-6, atol=1e-6)
    assert torch.equal(gram.dense(), matrix())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ridge_is_a_share_of_the_mean_and_in_float32_of_huge_inputs(dtype: torch.dtype) -> None:
    gram = Gram.of(torch.diag(torch.tensor([0.0, 1.0, 5.0], dtype=dtype)) * 1e-7)
    torch.testing.assert_close(gram.ridge(0.5), torch.full((3,), 1e-7, dtype=dtype))
    assert torch.equal(Gram.of(torch.zeros(2, 2, dtype=dtype)).ridge(0.5), torch.full((2,), 0.5, dtype=dtype))
    loud = Gram.of(torch.diag(torch.tensor([1e-3] * 999 + [1e6], dtype=dtype)))
    plain = 1e-6 * loud.level
    assert plain < LEFT * 1e6
    assert float(loud.ridge(1e-6)[-1]) == pytest.approx(LEFT * 1e6 if dtype == torch.float32 else plain)
    assert float(loud.ridge(1e-6)[0]) == pytest.approx(plain)


def test_a_float32_factor_of_huge_inputs_is_right() -> None:
    """One input with ten thousand times the power of the others, most of which follow it."""
    x_TI = tokens(400)
    x_TI[:, 5] *= 1e3
    x_TI[:, 6:] += 1e-2 * x_TI[:, 5:6]
    exact, narrow = Gram.of(x_TI.T @ x_TI), Gram.of((x_TI.T @ x_TI).float())
    inverse, found = (g.cholesky(1e-6).value.inverse() for g in (exact, narrow))
    scale_I = inverse.diagonal_I.sqrt()
    every = torch.arange(SIZE)
    apart_II = (found.rows(every).double() - inverse.rows(every)) / scale_I / scale_I[:, None]
    assert apart_II[:5, :5].abs().max() < 1e-2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_that_are_not_finite_are_an_error(bad: float) -> None:
    spoilt_II = torch.eye(SIZE, dtype=torch.float64)
    spoilt_II[2, 1] = spoilt_II[1, 2] = bad
    with pytest.raises(NumericalError, match=f"size {SIZE}"):
        Gram.of(spoilt_II).cholesky()
    with pytest.raises(NumericalError, match="not positive definite"):
        Gram.of(-torch.eye(SIZE, dtype=torch.float64)).cholesky()
