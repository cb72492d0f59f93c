"""Large problems are solved in float32: the same answer, and from float64 where float32 cannot tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeModel

import streamlap
from streamlap.linalg import gram as grams
from streamlap.linalg.anchor import root, working
from streamlap.linalg.gram import LARGE, Gram
from streamlap.linalg.obs import removals
from streamlap.linalg.pivot import others, pivot_rows, shared_pivot_rows
from streamlap.linalg.subspace import refit, subspace

SHAPES = [(24, 24), (16, 40), (40, 16)]


def problem(shape: tuple[int, int], decades: float) -> tuple[torch.Tensor, torch.Tensor]:
    """T [O, I] and S, whose eigenvalues go over so many decades, in numbers that float32 has too."""
    generator = torch.Generator().manual_seed(0)
    t_OI = torch.randn(*shape, generator=generator)
    mix_II = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)).Q
    gram_II = mix_II * torch.logspace(0, -decades, shape[1], dtype=torch.float64) @ mix_II.T
    return t_OI.double(), gram_II.float().double()


def measured(t_OI: torch.Tensor, w_OI: torch.Tensor, gram_II: torch.Tensor) -> float:
    """tr((T - W) S (T - W)'), in float64."""
    missing_OI = t_OI.double() - w_OI.double()
    return float((missing_OI @ gram_II.double() * missing_OI).sum())


def test_problems_of_many_columns_are_solved_in_float32() -> None:
    small, large = torch.ones(2, LARGE), torch.ones(2, LARGE + 1)
    assert [part.dtype for part in working(small, small.float())] == [torch.float64] * 2
    assert [part.dtype for part in working(small, large.double())] == [torch.float32] * 2


def test_a_regular_gram_has_the_same_factor_root_and_inverse() -> None:
    _, gram_II = problem((24, 24), 3)
    exact, narrow = Gram.of(gram_II), Gram.of(gram_II.float())
    every = torch.arange(24)
    torch.testing.assert_close(root(narrow).value, root(exact).value.float(), rtol=1e-3, atol=1e-5)
    found, wanted = (gram.cholesky().value for gram in (narrow, exact))
    torch.testing.assert_close(found.dense(torch.float32), wanted.dense(torch.float32), rtol=1e-3, atol=1e-5)
    narrow_II, exact_II = (factor.inverse().rows(every) for factor in (found, wanted))
    assert narrow_II.dtype == torch.float32
    assert (narrow_II - exact_II).abs().max() < 1e-3 * exact_II.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_errs_as_it_does_in_float64(shape: tuple[int, int]) -> None:
    t_OI, gram_II = problem(shape, 3)
    exact = subspace(t_OI, Gram.of(gram_II), min(shape)).value
    found = subspace(t_OI.float(), Gram.of(gram_II.float()), min(shape)).value
    assert {found.basis_OR.dtype, found.map_RI.dtype, found.energies.dtype} == {torch.float32}
    total = float(exact.energies.sum())
    torch.testing.assert_close(found.energies.double(), exact.energies, rtol=0, atol=1e-5 * float(exact.energies[0]))
    for rank in range(1, min(shape)):
        w_OI = found.basis_OR[:, :rank] @ found.map_RI[:rank]
        assert measured(t_OI, w_OI, gram_II) == pytest.approx(float(exact.energies[rank:].sum()), abs=1e-5 * total)


@pytest.mark.parametrize("shape", SHAPES)
def test_energies_that_drown_are_found_in_float64(shape: tuple[int, int]) -> None:
    """Ranks beyond those that float32 can tell apart: the rounding of the exact answer, not of the inexact one."""
    t_OI, gram_II = problem(shape, 3)
    t_OI = (t_OI * torch.logspace(0, -6, shape[0])[:, None]).float().double()
    rank = min(shape) - 1
    exact, found = (
        subspace(t, Gram.of(gram), rank).value for t, gram in ((t_OI, gram_II), (t_OI.float(), gram_II.float()))
    )
    for name in ("basis_OR", "map_RI", "energies"):
        assert torch.equal(getattr(found, name), getattr(exact, name).float()), name


@pytest.mark.parametrize("groups", [1, 4])
def test_pivots_carry_the_matrix(groups: int) -> None:
    t_OI, gram_II = (part.float() for part in problem((40, 24), 3))
    found = subspace(t_OI, Gram.of(gram_II), 12).value
    w_OI, exact = found.basis_OR @ found.map_RI, subspace(t_OI.double(), Gram.of(gram_II.double()), 12).value
    for pivots in (
        pivot_rows(found.basis_OR, groups),
        shared_pivot_rows([found.basis_OR.clone(), found.basis_OR.clone()]),
    ):
        pivots_R = pivots.value
        base_RI, rest_N = w_OI[pivots_R], others(pivots_R, 40)
        rest_NR = refit(t_OI[rest_N], base_RI, Gram.of(gram_II)).value
        assert rest_NR.dtype == torch.float32
        assert rest_NR.abs().max() < 12
        torch.testing.assert_close(rest_NR @ base_RI, w_OI[rest_N], rtol=0, atol=2e-3)
        missing = measured(t_OI[rest_N], rest_NR @ base_RI, gram_II) + measured(t_OI[pivots_R], base_RI, gram_II)
        assert missing == pytest.approx(float(exact.energies[12:].sum()), rel=1e-3)


def test_the_same_channels_go_at_the_same_loss() -> None:
    w_OF, gram_FF = problem((8, 64), 3)
    exact, found = (removals(w_OF, Gram.of(gram), [50, 20]) for gram in (gram_FF, gram_FF.float()))
    for wanted, got in zip(exact, found, strict=True):
        assert got.value.w_OF.dtype == torch.float32
        assert got.value.kept_K.tolist() == wanted.value.kept_K.tolist()
        assert got.error == pytest.approx(wanted.error, rel=1e-3)
        most = float(wanted.value.w_OF.abs().max())
        torch.testing.assert_close(got.value.w_OF.double(), wanted.value.w_OF, rtol=0, atol=1e-3 * most)


def test_a_model_comes_out_as_well(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every problem in float32: other last bits, the same errors."""
    exact = streamlap.compress(pico("llama"), tmp_path / "exact", ratio=0.4, files=(str(tokens),), dtype="float32")
    monkeypatch.setattr(grams, "LARGE", 1)
    found = streamlap.compress(pico("llama"), tmp_path / "out", ratio=0.4, files=(str(tokens),), dtype="float32")
    for wanted, got in zip(exact.layers, found.layers, strict=True):
        for half, errors in got.errors.items():
            assert min(errors.values()) == pytest.approx(min(wanted.errors[half].values()), rel=1e-2)
    nll = [streamlap.evaluate(tmp_path / name, tokens, dtype="float32").nll for name in ("exact", "out")]
    assert nll[0] != nll[1]
    assert nll[1] == pytest.approx(nll[0], rel=2e-3)
