"""Low rank in the metric of the inputs, and both forms of its storage, by identities."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from streamlap.errors import NumericalError
from streamlap.linalg import pivot
from streamlap.linalg import subspace as spaces
from streamlap.linalg.anchor import root
from streamlap.linalg.gram import Gram
from streamlap.linalg.pivot import folded_order, others, output_order, pivot_rows, shared_pivot_rows
from streamlap.linalg.subspace import energies_of, refit, subspace, two_factors
from streamlap.loader.linears import PivotedLinear

SHAPES = [(12, 12), (8, 20), (20, 8)]


def problem(shape: tuple[int, int], tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """T [O, I] and S of correlated inputs of very different power."""
    generator = torch.Generator().manual_seed(seed)
    t_OI = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(tokens, shape[1], generator=generator, dtype=torch.float64)
    x_TI = x_TI @ torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    x_TI = x_TI * torch.logspace(0, -2, shape[1], dtype=torch.float64)
    return t_OI, x_TI.T @ x_TI


def measured(t_OI: torch.Tensor, w_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    """tr((T - W) S (T - W)')."""
    missing_OI = t_OI - w_OI.double()
    return float((missing_OI @ gram_II * missing_OI).sum())


def plain(t_OI: torch.Tensor, gram_II: torch.Tensor, rank: int) -> torch.Tensor:
    """The optimum by a root of S, its inverse, and an SVD."""
    values, vectors = torch.linalg.eigh(gram_II)
    root_II = vectors * values.sqrt() @ vectors.T
    u, s, vh = torch.linalg.svd(t_OI @ root_II, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank] @ torch.linalg.inv(root_II)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_map_back(shape: tuple[int, int]) -> None:
    t_OI, gram_II = problem(shape)
    found = subspace(t_OI, Gram.of(gram_II), min(shape)).value
    torch.testing.assert_close(found.basis_OR @ found.map_RI, t_OI, rtol=1e-9, atol=1e-9)
    assert found.error(min(shape)) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_errs_by_its_tail_and_no_map_errs_less(shape: tuple[int, int]) -> None:
    t_OI, gram_II = problem(shape)
    found = subspace(t_OI, Gram.of(gram_II), min(shape)).value
    total = float((t_OI @ gram_II * t_OI).sum())
    assert float(found.energies.sum()) == pytest.approx(total, rel=1e-8)
    assert found.energies.tolist() == sorted(found.energies.tolist(), reverse=True)
    for rank in range(1, min(shape)):
        w_OI = found.basis_OR[:, :rank] @ found.map_RI[:rank]
        optimum_OI = plain(t_OI, gram_II, rank)
        error = measured(t_OI, w_OI, gram_II)
        assert error == pytest.approx(float(found.energies[rank:].sum()), rel=1e-6, abs=1e-9 * total)
        assert error == pytest.approx(measured(t_OI, optimum_OI, gram_II), rel=1e-6, abs=1e-9 * total)
        assert found.error(rank) == pytest.approx(error / total, rel=1e-6, abs=1e-9)
        torch.testing.assert_close(w_OI, optimum_OI, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_smaller_rank_is_the_beginning_of_a_larger_one(shape: tuple[int, int]) -> None:
    t_OI, gram_II = problem(shape)
    small, large = (subspace(t_OI, Gram.of(gram_II), rank).value for rank in (3, 7))
    first_OI = large.basis_OR[:, :3] @ large.map_RI[:3]
    torch.testing.assert_close(small.basis_OR @ small.map_RI, first_OI, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(large.basis_OR.T @ large.basis_OR, torch.eye(7).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_root_that_is_known_gives_the_same(shape: tuple[int, int]) -> None:
    t_OI, gram_II = problem(shape)
    alone, given = (
        subspace(t_OI, Gram.of(gram_II), 5, root_II).value for root_II in (None, root(Gram.of(gram_II)).value)
    )
    for name in ("basis_OR", "map_RI", "energies"):
        assert torch.equal(getattr(alone, name), getattr(given, name)), name


SERVED = [(40, 12, 30), (40, 12, 9), (20, 40, 15)]
"""Rows, columns, and how many of the rows are served: more than columns, and fewer."""


@pytest.mark.parametrize(("rows", "columns", "count"), SERVED)
def test_rows_that_are_not_served_are_the_best_combinations(rows: int, columns: int, count: int) -> None:
    """And those that are, as if they were alone."""
    t_OI, gram_II = problem((rows, columns))
    serves = torch.randperm(rows, generator=torch.Generator().manual_seed(5))[:count].sort().values
    alone, found = (
        subspace(t_OI[serves], Gram.of(gram_II), 6).value,
        subspace(t_OI, Gram.of(gram_II), 6, serves=serves).value,
    )
    torch.testing.assert_close(found.energies, alone.energies, rtol=1e-9, atol=0)
    together = alone.basis_OR @ alone.map_RI
    torch.testing.assert_close(found.basis_OR[serves] @ found.map_RI, together, rtol=1e-4, atol=1e-4)
    for rank in (2, 6):
        best_OR = refit(t_OI, found.map_RI[:rank], Gram.of(gram_II)).value
        torch.testing.assert_close(found.basis_OR[:, :rank], best_OR, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns", "count"), SERVED)
def test_rows_are_themselves_at_full_rank_though_few_tokens_came(rows: int, columns: int, count: int) -> None:
    """The Gram knows of three directions only."""
    t_OI, _ = problem((rows, columns))
    t_OI[count:] = torch.randn(rows - count, count).double() @ t_OI[:count]
    x_TI = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).double()
    found = subspace(t_OI, Gram.of(x_TI.T @ x_TI), min(count, columns), serves=torch.arange(count)).value
    torch.testing.assert_close(found.basis_OR @ found.map_RI, t_OI, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-9, 1.0])
def test_few_tokens_and_a_dead_input_are_harmless(shape: tuple[int, int], scale: float) -> None:
    """S of rank 5 at most: rank 5 is exact on it, and the dead input draws no rank to itself."""
    t_OI, _ = problem(shape)
    x_TI = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1)).double() * scale**0.5
    x_TI[:, 1] = 0
    gram_II = x_TI.T @ x_TI
    total = float((t_OI @ gram_II * t_OI).sum())
    for rank in range(1, min(shape) + 1):
        found = subspace(t_OI, Gram.of(gram_II), rank).value
        w_OI = found.basis_OR @ found.map_RI
        assert bool(torch.isfinite(w_OI).all())
        assert w_OI.norm() <= t_OI.norm() * (1 + 1e-9)
        assert measured(t_OI, w_OI, gram_II) == pytest.approx(float(found.energies[rank:].sum()), abs=1e-6 * total)
    assert found.error(5) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_that_are_not_finite_are_an_error(shape: tuple[int, int]) -> None:
    t_OI, gram_II = problem(shape)
    gram_II[1, 2] = gram_II[2, 1] = torch.nan
    with pytest.raises(NumericalError):
        subspace(t_OI, Gram.of(gram_II), 3)


def test_what_a_solve_looks_at_stays_as_it_was() -> None:
    t_OI, gram_II = problem((20, 8))
    before = t_OI.clone(), gram_II.clone()
    two_factors(subspace(t_OI, Gram.of(gram_II), 3).value, Gram.of(gram_II), t_OI, torch.float64)
    assert torch.equal(t_OI, before[0])
    assert torch.equal(gram_II, before[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_is_shared_by_the_factors(shape: tuple[int, int]) -> None:
    t_OI, gram_II = problem(shape)
    found = subspace(t_OI, Gram.of(gram_II), 5).value
    up_OR, down_RI = two_factors(found, Gram.of(gram_II), t_OI, torch.float64).value
    torch.testing.assert_close(up_OR.norm(dim=0), down_RI.norm(dim=1), rtol=1e-4, atol=0)
    best = float(found.energies[5:].sum())
    assert measured(t_OI, up_OR @ down_RI, gram_II) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_refit_after_rounding_brings_the_error_down(shape: tuple[int, int]) -> None:
    t_OI, gram_II = problem(shape)
    found = subspace(t_OI, Gram.of(gram_II), 5).value
    up_OR, down_RI = two_factors(found, Gram.of(gram_II), t_OI, torch.bfloat16).value
    assert up_OR.dtype == down_RI.dtype == torch.bfloat16
    down_RI = down_RI.double()
    unfitted_OR = found.basis_OR * found.map_RI.norm(dim=1).sqrt()
    fitted_OR = refit(t_OI, down_RI, Gram.of(gram_II)).value
    assert measured(t_OI, fitted_OR @ down_RI, gram_II) < measured(t_OI, unfitted_OR @ down_RI, gram_II)
    assert torch.equal(up_OR, fitted_OR.to(torch.bfloat16))


def test_a_refit_is_weighted_least_squares() -> None:
    t_OI, gram_II = problem((20, 12))
    base_RI = torch.randn(5, 12, generator=torch.Generator().manual_seed(2)).double()
    base_RI *= torch.logspace(0, -6, 5, dtype=torch.float64)[:, None]  # rows of very different size
    factor_II = torch.linalg.cholesky(gram_II)
    expected_OR = torch.linalg.lstsq((base_RI @ factor_II).T, (t_OI @ factor_II).T).solution.T
    found_OR = refit(t_OI, base_RI, Gram.of(gram_II)).value
    assert measured(t_OI, found_OR @ base_RI, gram_II) == pytest.approx(
        measured(t_OI, expected_OR @ base_RI, gram_II), rel=1e-8
    )
    torch.testing.assert_close(found_OR @ base_RI, expected_OR @ base_RI, rtol=1e-3, atol=1e-3)


def test_a_refit_follows_the_map_where_no_token_went() -> None:
    """With one token the metric would leave all but one direction to chance."""
    t_OI, _ = problem((20, 12))
    base_RI = torch.randn(5, 12, generator=torch.Generator().manual_seed(2)).double()
    t_OI = t_OI[:, :5] @ base_RI
    x_I = torch.randn(12, generator=torch.Generator().manual_seed(3)).double()
    for gram_II in (torch.outer(x_I, x_I), torch.zeros(12, 12).double()):
        torch.testing.assert_close(refit(t_OI, base_RI, Gram.of(gram_II)).value @ base_RI, t_OI, rtol=1e-6, atol=1e-6)


def test_a_refit_to_rows_that_repeat_is_finite() -> None:
    t_OI, gram_II = problem((20, 12))
    base_RI = t_OI[[0, 1, 1, 0]] * torch.tensor([1.0, 1.0, 2.0, 0.0]).double()[:, None]
    fitted_OR = refit(t_OI[:2], base_RI, Gram.of(gram_II)).value
    assert bool(torch.isfinite(fitted_OR).all())
    torch.testing.assert_close(fitted_OR @ base_RI, t_OI[:2], rtol=1e-6, atol=1e-6)


PIVOTS = [(12, 12, 5, 1), (8, 20, 3, 1), (20, 8, 6, 1), (24, 24, 12, 4), (32, 16, 12, 4), (12, 12, 11, 1)]


@pytest.mark.parametrize(("rows", "columns", "rank", "groups"), PIVOTS)
def test_pivot_rows_and_a_map_are_the_matrix(rows: int, columns: int, rank: int, groups: int) -> None:
    t_OI, gram_II = problem((rows, columns))
    found = subspace(t_OI, Gram.of(gram_II), rank).value
    w_OI = found.basis_OR @ found.map_RI
    pivots_R = pivot_rows(found.basis_OR, groups).value
    assert pivots_R.tolist() == sorted(set(pivots_R.tolist()))
    assert torch.bincount(pivots_R // (rows // groups), minlength=groups).tolist() == [rank // groups] * groups
    rest_N = others(pivots_R, rows)
    assert sorted([*pivots_R.tolist(), *rest_N.tolist()]) == list(range(rows))
    rest_NR = refit(w_OI[rest_N], w_OI[pivots_R], Gram.of(gram_II)).value
    torch.testing.assert_close(rest_NR @ w_OI[pivots_R], w_OI[rest_N], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_map_from_the_pivots_is_of_moderate_size(groups: int, seed: int) -> None:
    """Rows taken at random give coefficients of hundreds and more: rounding would be amplified as much."""
    generator = torch.Generator().manual_seed(seed)
    basis_OR = torch.linalg.qr(torch.randn(64, 32, generator=generator, dtype=torch.float64)).Q
    pivots_R = pivot_rows(basis_OR, groups).value
    rest_NR = basis_OR[others(pivots_R, 64)] @ torch.linalg.inv(basis_OR[pivots_R])
    assert rest_NR.abs().max() < 12


def test_a_group_never_spans_what_another_has() -> None:
    """The second half repeats the first: its pivots are those that the first left out."""
    first = torch.eye(4, dtype=torch.float64)
    pivots_R = pivot_rows(torch.cat([first, first]), groups=2).value
    assert sorted((pivots_R % 4).tolist()) == [0, 1, 2, 3]


def test_a_pivot_is_chosen_by_what_all_before_it_have_left() -> None:
    """The third row is made of the first two, though with one of them it is large."""
    head = torch.tensor([[3.0, 0, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0], [-1, 1.9, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]])
    other = torch.tensor([[0.0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
    basis_OR = torch.cat([head, other]).double()
    assert pivot_rows(basis_OR, groups=2).value.tolist() == [0, 1, 3, 4, 5, 6]


def test_a_head_of_silent_rows_still_has_pivots_of_its_own() -> None:
    basis_OR = torch.cat([torch.zeros(4, 6), torch.randn(4, 6)]).double()
    assert pivot_rows(basis_OR, groups=2).value[:3].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alive", "lost"), [(16, 0), (4, 0), (3, 1), (1, 3), (0, 4)])
def test_pivots_that_add_nothing_are_told(alive: int, lost: int, dtype: torch.dtype) -> None:
    """One of four heads has so many independent rows; 4 are asked of each. The other heads span all but what it has."""
    generator = torch.Generator().manual_seed(alive)
    w_OI = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    w_OI[16:32] = torch.randn(16, max(1, alive), generator=generator).double() @ w_OI[16 : 16 + max(1, alive)]
    w_OI[16:32] *= alive > 0
    basis_OR = torch.linalg.svd(w_OI, full_matrices=False).U[:, :16].to(dtype)
    found = pivot_rows(basis_OR, groups=4)
    assert found.error == lost / 16
    assert int(torch.linalg.matrix_rank(basis_OR[found.value].double(), tol=1e-4)) == 16 - lost


def test_a_singular_basis_has_pivots() -> None:
    basis_OR = torch.zeros(8, 2, dtype=torch.float64)
    basis_OR[3, 0] = 1
    pivots_R = pivot_rows(basis_OR).value
    assert 3 in pivots_R
    assert len(pivots_R.unique()) == 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [5, 64])
def test_pivots_that_two_matrices_share_serve_both(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivot, "BLOCK", block)
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.linalg.qr(torch.randn(96, 32, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    pivots_R = shared_pivot_rows([gate.clone(), up.clone()]).value
    assert pivots_R.tolist() == sorted(set(pivots_R.tolist()))
    assert len(pivots_R) == 32
    for basis_OR in (gate, up):
        rest_NR = basis_OR[others(pivots_R, 96)] @ torch.linalg.inv(basis_OR[pivots_R])
        assert rest_NR.abs().max() < 16


def test_a_row_that_is_nothing_in_one_matrix_is_no_shared_pivot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivot, "POOL", 1)
    gate, up = torch.tensor([[0.9], [0.4]]).double(), torch.tensor([[0.0], [1.0]]).double()
    assert shared_pivot_rows([gate, up]).value.tolist() == [1]


def test_shared_pivots_are_never_chosen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pivot, "BLOCK", 1)
    basis_OR = torch.zeros(6, 3).double()
    basis_OR[0] = torch.tensor([0.3, 0.5, 0.7])
    assert len(shared_pivot_rows([basis_OR]).value.unique()) == 3


def test_shared_pivots_of_one_matrix_span_it_too() -> None:
    basis_OR = torch.zeros(9, 3).double()
    basis_OR[[1, 4, 7]] = torch.eye(3).double()
    assert shared_pivot_rows([basis_OR.clone()]).value.tolist() == [1, 4, 7]
    assert shared_pivot_rows([basis_OR[:3], torch.eye(3).double()]).value.tolist() == [0, 1, 2]


@pytest.mark.parametrize("groups", [3, 5])
def test_groups_that_do_not_divide_are_refused(groups: int) -> None:
    with pytest.raises(ValueError, match=f"{groups} groups"):
        pivot_rows(torch.randn(12, 10 if groups == 3 else 5), groups)


@pytest.mark.parametrize(("rows", "columns", "rank", "groups"), PIVOTS)
def test_orders_agree_with_the_module(rows: int, columns: int, rank: int, groups: int) -> None:
    t_OI, gram_II = problem((rows, columns))
    found = subspace(t_OI, Gram.of(gram_II), rank).value
    w_OI = found.basis_OR @ found.map_RI
    pivots_R = pivot_rows(found.basis_OR, groups).value
    base_RI, rest_N = w_OI[pivots_R], others(pivots_R, rows)
    rest_NR = refit(w_OI[rest_N], base_RI, Gram.of(gram_II)).value
    x_TI, bias_O = torch.randn(3, columns).double(), torch.randn(rows).double()
    expected_TO = x_TI @ w_OI.T + bias_O
    stored = PivotedLinear.from_parts(base_RI, rest_NR, bias_O, output_order(pivots_R, rows))
    torch.testing.assert_close(stored(x_TI), expected_TO, rtol=1e-7, atol=1e-7)
    order_O = folded_order(pivots_R, rows, groups)
    folded = PivotedLinear.from_parts(base_RI, rest_NR, bias_O[order_O], groups=groups)
    torch.testing.assert_close(folded(x_TI), expected_TO[:, order_O], rtol=1e-7, atol=1e-7)
    assert torch.equal(
        order_O.view(groups, -1) // (rows // groups), torch.arange(groups)[:, None].expand(-1, rows // groups)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("served", [None, 6, 15])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_count_by_their_gain(shape: tuple[int, int], served: int | None, dtype: torch.dtype) -> None:
    """No map of that rank errs less where errors of rows are multiplied first; in every branch, and undone in the basis."""
    t_OI, gram_II = problem(shape)
    gain_O = torch.logspace(-1, 1, shape[0], dtype=torch.float64)
    serves = None if served is None else torch.arange(min(served, shape[0]))
    served_N = torch.arange(shape[0]) if serves is None else serves
    found = subspace(t_OI.to(dtype), Gram.of(gram_II.to(dtype)), 3, None, serves, gain_O).value
    w_OI = (found.basis_OR @ found.map_RI).double()
    counted = measured(t_OI[served_N] * gain_O[served_N, None], w_OI[served_N] * gain_O[served_N, None], gram_II)
    optimum_NI = plain(t_OI[served_N] * gain_O[served_N, None], gram_II, 3)
    least = measured(t_OI[served_N] * gain_O[served_N, None], optimum_NI, gram_II)
    assert counted == pytest.approx(least, rel=1e-6 if dtype == torch.float64 else 1e-3)
    assert float(found.energies[3:].sum()) == pytest.approx(least, rel=1e-6 if dtype == torch.float64 else 1e-2)


def test_energies_are_those_of_what_each_row_gives() -> None:
    t_OI, gram_II = problem((20, 8))
    torch.testing.assert_close(energies_of(t_OI, Gram.of(gram_II)), (t_OI @ gram_II @ t_OI.T).diagonal())


def test_a_gram_waits_elsewhere_while_what_needs_none_of_it_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the eigen-problem of a wide linear, and while rows are fitted to what is stored. It has nothing to give then."""
    resting, seen = list[Gram](), dict[str, bool]()

    @contextlib.contextmanager
    def rest(gram: Gram) -> Iterator[None]:
        square_II, gram._square_II = gram._square_II, torch.empty(0)
        resting.append(gram)
        yield
        gram._square_II = square_II
        resting.remove(gram)

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(spaces, name)

        def watch(*args: Any, **kwargs: Any) -> Any:
            seen[name] = bool(resting)
            return original(*args, **kwargs)

        return watch

    for name in ("_spectrum", "_fit", "solve_right"):
        monkeypatch.setattr(spaces, name, watched(name))
    t_OI, gram_II = problem((8, 20))
    gram = Gram.of(gram_II)
    wanted = subspace(t_OI, gram, 3).value
    rest_NR = refit(t_OI, wanted.map_RI, gram).value
    monkeypatch.setattr(Gram, "resting", rest)
    found = subspace(t_OI, gram, 3).value
    assert torch.equal(found.map_RI, wanted.map_RI)
    assert torch.equal(refit(t_OI, found.map_RI, gram).value, rest_NR)
    assert seen == {"_spectrum": True, "_fit": True, "solve_right": True}
