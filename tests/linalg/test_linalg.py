"""Numerics by identities, against independent constructions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from streamlap.linalg import channels, lowrank
from streamlap.linalg.budget import break_even, lorap_pair_ranks, lorap_removal
from streamlap.linalg.channels import kept_channels, lorap_scores, removed_energy
from streamlap.linalg.lowrank import awsvd, eigh
from streamlap.linalg.statistics import ROW_BLOCK, ZERO_SCALE, Energy

GOLDEN = Path(__file__).parents[1] / "data" / "lorap_scores.npz"


def weights(out: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator), torch.rand(width, generator=generator) + 0.1


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_full_rank_factors_give_the_matrix_back(shape: tuple[int, int]) -> None:
    w_OI, scale_I = weights(*shape)
    found = awsvd(w_OI, scale_I, min(shape))
    (up_OR, down_RI), error = found.value, found.error
    torch.testing.assert_close(up_OR @ down_RI, w_OI.double(), rtol=1e-9, atol=1e-9)
    assert error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("rank", [1, 7, 15])
def test_error_equals_the_measured_one_and_the_tail_of_an_independent_svd(shape: tuple[int, int], rank: int) -> None:
    w_OI, scale_I = weights(*shape)
    found = awsvd(w_OI, scale_I, rank)
    (up_OR, down_RI), error = found.value, found.error
    weighted_OI = w_OI.double() * scale_I.double()
    measured = ((w_OI.double() - up_OR @ down_RI) * scale_I.double()).square().sum() / weighted_OI.square().sum()
    values = torch.linalg.svdvals(weighted_OI)
    assert error == pytest.approx(float(measured), rel=1e-9)
    assert error == pytest.approx(float(values[rank:].square().sum() / values.square().sum()), rel=1e-9)


def test_the_scale_is_split_between_the_factors() -> None:
    """up = U S^1/2, so its columns have the norms S^1/2; one factor with all of S would lose bits in bf16."""
    w_OI, scale_I = weights(16, 40)
    up_OR, _ = awsvd(w_OI, scale_I, 5).value
    values = torch.linalg.svdvals(w_OI.double() * scale_I.double())[:5]
    torch.testing.assert_close(up_OR.square().sum(0), values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_or_columns_give_the_same_factors(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w_OI, scale_I = weights(*shape)
    whole = awsvd(w_OI.to(dtype), scale_I, 9)
    monkeypatch.setattr(lowrank, "BLOCK", 7)
    blocked = awsvd(w_OI.to(dtype), scale_I, 9)
    torch.testing.assert_close(torch.mm(*blocked.value), torch.mm(*whole.value), rtol=1e-9, atol=1e-9)
    assert blocked.error == pytest.approx(whole.error, rel=1e-9)


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_a_decomposition_has_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    gram_MM = torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram_MM = gram_MM @ gram_MM.T
    values_M, vectors_MM = eigh(gram_MM)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again = eigh(gram_MM)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(again[0], values_M)
    assert torch.equal(again[1], vectors_MM)


def test_a_decomposition_that_fails_leaves_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.Tensor) -> None:
        assert torch.get_num_threads() == lowrank.SOLVER_THREADS
        raise MemoryError

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(MemoryError):
            eigh(torch.eye(3, dtype=torch.float64))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_rank_deficient_matrix_gives_finite_factors(shape: tuple[int, int]) -> None:
    w_OI = torch.outer(torch.arange(1.0, shape[0] + 1), torch.arange(1.0, shape[1] + 1))
    found = awsvd(w_OI, torch.ones(shape[1]), 6)
    torch.testing.assert_close(torch.mm(*found.value), w_OI.double(), rtol=1e-9, atol=1e-9)
    assert found.error < 1e-12


def published_rule(h: int, s: float, alpha: float) -> tuple[int, int | None]:
    """LoRAP's allocation for h x h matrices, written from the paper: (rank of q and k, rank of v and o or dense)."""
    k_att = int((1 - s) * h / 2)
    k_vo = int(k_att * 2 * alpha / (1 + alpha))
    if k_vo >= h / 2:
        return int((1 - s) * h) - int(h / 2), None
    return int(k_att * 2 / (1 + alpha)), k_vo


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0, 5.0])
def test_square_matrices_get_exactly_the_published_ranks(alpha: float) -> None:
    for h in range(8, 700, 6):
        for percent in range(5, 96, 5):
            assert lorap_pair_ranks(h, h, percent / 100, alpha) == published_rule(h, percent / 100, alpha), (h, percent)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.5, 0.7])
def test_grouped_query_attention_meets_the_budget_by_parameters(ratio: float) -> None:
    hidden, kv = 4096, 1024
    stored = dense = 0
    for rows in (hidden, kv):
        weak, strong = lorap_pair_ranks(rows, hidden, ratio, 3.0)
        for rank in (weak, strong):
            assert rank is None or 1 <= rank < break_even(rows, hidden)
            stored += rows * hidden if rank is None else rank * (rows + hidden)
            dense += rows * hidden
    assert 0 <= (1 - ratio) - stored / dense < 0.002


def test_a_matrix_never_stores_more_as_factors_than_dense() -> None:
    for rows in (8, 24, 40, 100):
        for percent in range(1, 20):
            for rank in lorap_pair_ranks(rows, 100, percent / 1000, 3.0):
                assert rank is None or rank * (rows + 100) < rows * 100


@pytest.mark.parametrize("ratio", ["0.2", "0.3", "0.5"])
@pytest.mark.parametrize("layer", [0, 3])
def test_published_scores_give_the_published_channels(ratio: str, layer: int) -> None:
    golden = np.load(GOLDEN)
    score_F = torch.from_numpy(golden[f"{ratio}.{layer}.score"])
    kept = kept_channels(score_F, lorap_removal(len(score_F), float(ratio), 0.01))
    assert kept.tolist() == golden[f"{ratio}.{layer}.kept"].tolist()


def test_channel_scores_are_the_sum_of_three_weighted_norms() -> None:
    gate_FI, scale_I = weights(6, 4)
    up_FI, _ = weights(6, 4, seed=1)
    down_OF, scale_F = weights(4, 6, seed=2)
    expected = [
        sum((gate_FI[c, i] * scale_I[i]) ** 2 for i in range(4)) ** 0.5
        + sum((up_FI[c, i] * scale_I[i]) ** 2 for i in range(4)) ** 0.5
        + sum(down_OF[o, c] ** 2 for o in range(4)) ** 0.5 * scale_F[c]
        for c in range(6)
    ]
    torch.testing.assert_close(lorap_scores([gate_FI, up_FI], down_OF, scale_I, scale_F), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_a_solve_looks_at_stays_as_it_was(dtype: torch.dtype) -> None:
    gate_FI, up_FI, down_OF = (
        weights(*shape, seed)[0].to(dtype) for seed, shape in enumerate(((23, 4), (23, 4), (4, 23)))
    )
    given = (gate_FI, up_FI, down_OF, torch.rand(4) + 1, torch.rand(23) + 1)
    before = [tensor.clone() for tensor in given]
    lorap_scores(given[:2], *given[2:])
    removed_energy(down_OF, given[-1], torch.arange(11))
    awsvd(gate_FI, given[-2], 2)
    for tensor, old in zip(given, before, strict=True):
        assert torch.equal(tensor, old)


def test_blocks_of_channels_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_FI, scale_I = weights(23, 4)
    up_FI, _ = weights(23, 4, seed=1)
    down_OF, scale_F = weights(4, 23, seed=2)
    scores = lorap_scores([gate_FI, up_FI], down_OF, scale_I, scale_F)
    energy = removed_energy(down_OF, scale_F, torch.arange(11))
    monkeypatch.setattr(channels, "BLOCK", 7)
    torch.testing.assert_close(lorap_scores([gate_FI, up_FI], down_OF, scale_I, scale_F), scores)
    assert removed_energy(down_OF, scale_F, torch.arange(11)) == pytest.approx(energy, rel=1e-12)


def test_removed_energy_is_the_share_of_uncorrelated_channels() -> None:
    down_OF = torch.eye(4)
    assert removed_energy(down_OF, torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 3])) == pytest.approx(10 / 30)


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_streamed_energy_equals_one_shot_in_any_order(batch: int) -> None:
    x_TI = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    one_shot = x_TI.double().square().mean(0).sqrt()
    for rows in (x_TI, x_TI.flip(0)):
        energy = Energy()
        for part in rows.split(batch):
            energy.update(part)
        torch.testing.assert_close(energy.scale(), one_shot, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_energy_of_many_rows_in_any_dtype(dtype: torch.dtype) -> None:
    """More than go through at a time. Blocks of half-precision numbers add up in float32; the input stays as it was."""
    x_TI = torch.randn(2 * ROW_BLOCK + 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, energy = x_TI.clone(), Energy()
    energy.update(x_TI)
    assert torch.equal(x_TI, before)
    assert (energy.tokens, energy.scale().dtype) == (len(x_TI), torch.float64)
    precision = 1e-6 if dtype.itemsize == 2 else 1e-12
    torch.testing.assert_close(energy.scale(), x_TI.double().square().mean(0).sqrt(), rtol=precision, atol=0)


@pytest.mark.parametrize("size", [1e16, 1e20, -3e38])
def test_the_energy_of_large_numbers_of_bfloat16_is_finite(size: float) -> None:
    x_TI = torch.tensor([[size, 1.0]] * (ROW_BLOCK + 1), dtype=torch.bfloat16)
    energy = Energy()
    energy.update(x_TI)
    assert energy.finite
    torch.testing.assert_close(energy.scale(), x_TI[0].double().abs(), rtol=1e-6, atol=0)
    energy.update(torch.full((1, 2), torch.nan, dtype=torch.bfloat16))
    assert not energy.finite


def test_a_dead_channel_weighs_a_little_and_not_zero() -> None:
    energy = Energy()
    energy.update(torch.tensor([[0.0, 3.0], [0.0, 4.0]]))
    assert energy.scale().tolist() == [ZERO_SCALE, 12.5**0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_nothing_that_is_only_looked_at_is_changed(dtype: torch.dtype) -> None:
    """Widening a tensor that is wide enough copies nothing, so work in place would reach the model's own weights."""
    w_OI, x_TI, scale_I = torch.randn(24, 16).to(dtype), torch.randn(9, 16).to(dtype), torch.rand(16).double() + 0.1
    before = [tensor.clone() for tensor in (w_OI, x_TI, scale_I)]
    Energy().update(x_TI)
    awsvd(w_OI, scale_I, 4)
    awsvd(w_OI.T.contiguous(), torch.ones(24), 4)
    lorap_scores([w_OI, w_OI], w_OI.T, scale_I, torch.ones(24))
    removed_energy(w_OI, scale_I, torch.arange(8))
    for tensor, old in zip((w_OI, x_TI, scale_I), before, strict=True):
        assert torch.equal(tensor, old)
