"""Streamed second moments against their one-shot formulas, and what is solved from them."""

from __future__ import annotations

import pytest
import torch

from streamlap.errors import NumericalError
from streamlap.linalg import moments, triangles
from streamlap.linalg.anchor import anchored, best_step, root
from streamlap.linalg.gram import Gram
from streamlap.linalg.moments import Moments, Sample
from streamlap.linalg.triangles import solve_right

TOKENS, INPUTS, ANCHORS = 53, 6, 9


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and several panels of both sums, the last of each incomplete."""
    monkeypatch.setattr(moments, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(triangles, "PANEL", 4)


def tokens(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TI, anchor_TA = (
        torch.randn(TOKENS, INPUTS, generator=generator),
        torch.randn(TOKENS, ANCHORS, generator=generator),
    )
    return x_TI.to(dtype), anchor_TA.to(dtype)


def streamed(x_TI: torch.Tensor, anchor_TA: torch.Tensor, batches: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """S and C."""
    seen = Moments()
    for x, anchor in zip(x_TI.split(batches), anchor_TA.split(batches), strict=True):
        seen.update(x, anchor)
    assert seen.tokens == TOKENS
    return sums(seen)


def sums(seen: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    gram, cross_IA = seen.finish()
    return gram.dense(), cross_IA.T


BATCHINGS = [[1] * TOKENS, [3] * 17 + [2], [TOKENS], [7, 1, 20, 0, 25], [8] * 6 + [5]]


@pytest.mark.parametrize("batches", BATCHINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_streamed_sums_equal_one_shot_and_each_other_in_every_bit(batches: list[int], dtype: torch.dtype) -> None:
    x_TI, anchor_TA = tokens(dtype)
    before = x_TI.clone(), anchor_TA.clone()
    gram_II, cross_AI = streamed(x_TI, anchor_TA, batches)
    precision = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(gram_II, x_TI.double().T @ x_TI.double(), rtol=0, atol=precision * TOKENS)
    torch.testing.assert_close(cross_AI, anchor_TA.double().T @ x_TI.double(), rtol=0, atol=precision * TOKENS)
    whole = streamed(x_TI, anchor_TA, [TOKENS])
    assert torch.equal(gram_II, whole[0])
    assert torch.equal(cross_AI, whole[1])
    assert torch.equal(before[0], x_TI)
    assert torch.equal(before[1], anchor_TA)


def test_the_order_of_tokens_does_not_matter() -> None:
    x_TI, anchor_TA = tokens(torch.float64)
    there, back = streamed(x_TI, anchor_TA, [TOKENS]), streamed(x_TI.flip(0), anchor_TA.flip(0), [3] * 17 + [2])
    torch.testing.assert_close(there[0], back[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(there[1], back[1], rtol=1e-12, atol=1e-12)


def test_an_anchor_wider_than_the_tokens_keeps_its_precision() -> None:
    x_TI, anchor_TA = tokens(torch.float64)
    narrow_TI = x_TI.to(torch.bfloat16)
    _, cross_AI = streamed(narrow_TI, anchor_TA, [TOKENS])
    torch.testing.assert_close(cross_AI, anchor_TA.T @ narrow_TI.double(), rtol=1e-12, atol=1e-12)


def test_the_callers_memory_may_be_used_again() -> None:
    x_TI, anchor_TA = tokens(torch.float64)
    x_BI, anchor_BA, seen = torch.empty(5, INPUTS).double(), torch.empty(5, ANCHORS).double(), Moments()
    for first in range(0, 50, 5):
        seen.update(x_BI.copy_(x_TI[first : first + 5]), anchor_BA.copy_(anchor_TA[first : first + 5]))
    gram_II, cross_AI = sums(seen)
    torch.testing.assert_close(gram_II, x_TI[:50].T @ x_TI[:50], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cross_AI, anchor_TA[:50].T @ x_TI[:50], rtol=1e-12, atol=1e-12)


def test_moments_without_anchors() -> None:
    x_TI, _ = tokens(torch.float64)
    seen = Moments()
    for x in x_TI.split(3):
        seen.update(x, x[:, :0])
    gram_II, cross_AI = sums(seen)
    torch.testing.assert_close(gram_II, x_TI.T @ x_TI, rtol=1e-12, atol=1e-12)
    assert cross_AI.shape == (0, x_TI.shape[1])


@pytest.mark.parametrize("batch", [1, 3, TOKENS])
@pytest.mark.parametrize("limit", [1, 10, TOKENS, TOKENS + 1])
def test_a_sample_is_the_first_rows(batch: int, limit: int) -> None:
    x_TI, anchor_TA = tokens()
    sample = Sample(limit)
    for x, anchor in zip(x_TI.split(batch), anchor_TA.split(batch), strict=True):
        sample.update(x, anchor)
    assert torch.equal(sample.x_TI, x_TI[:limit])
    assert torch.equal(sample.anchor_TA, anchor_TA[:limit])
    assert sample.power == pytest.approx(float(anchor_TA[:limit].double().square().sum(1).mean()), rel=1e-12)


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W [O, I], x [T, I] and a target [T, O] that W does not reach."""
    generator = torch.Generator().manual_seed(3)
    w_OI, x_TI = torch.randn(ANCHORS, INPUTS, generator=generator), torch.randn(TOKENS, INPUTS, generator=generator)
    target_TO = torch.randn(TOKENS, ANCHORS, generator=generator).double()
    return w_OI.double(), x_TI.double(), target_TO + x_TI.double() @ w_OI.double().T


def test_the_corrected_map_is_that_of_least_squares() -> None:
    w_OI, x_TI, target_TO = case()
    delta_OI = -w_OI + anchored(w_OI, Gram.of(x_TI.T @ x_TI), x_TI.T @ target_TO, damping=1e-13).value
    expected_OI = torch.linalg.lstsq(x_TI, target_TO).solution.T
    torch.testing.assert_close(w_OI + delta_OI, expected_OI, rtol=1e-9, atol=1e-9)


def test_nothing_moves_where_the_target_is_met() -> None:
    w_OI, x_TI, _ = case()
    gram_II = x_TI.T @ x_TI
    for cross_IO in (gram_II @ w_OI.T, x_TI.T @ (x_TI @ w_OI.T)):
        torch.testing.assert_close(anchored(w_OI, Gram.of(gram_II), cross_IO).value, w_OI, rtol=1e-12, atol=1e-12)


def test_the_map_stays_itself_on_inputs_that_were_not_seen() -> None:
    """Fewer tokens than inputs, one of these dead: the move is inside what the tokens span."""
    w_OI, x_TI, target_TO = case()
    x_TI = x_TI[:3].clone()
    x_TI[:, 2] = 0
    delta_OI = -w_OI + anchored(w_OI, Gram.of(x_TI.T @ x_TI), x_TI.T @ target_TO[:3], damping=1e-9).value
    unseen_IK = torch.linalg.svd(x_TI).Vh[3:].T
    assert (delta_OI @ unseen_IK).abs().max() < 1e-6
    assert delta_OI[:, 2].abs().max() < 1e-15
    torch.testing.assert_close(x_TI @ (w_OI + delta_OI).T, target_TO[:3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stretch", [-1.0, 0.0, 0.3, 1.0, 4.0])
def test_the_best_step_is_that_of_a_fine_grid(stretch: float) -> None:
    w_OI, x_TI, noise_TO = case()
    delta_OI = -w_OI + anchored(w_OI, Gram.of(x_TI.T @ x_TI), x_TI.T @ noise_TO).value
    target_TO = x_TI @ (w_OI + stretch * delta_OI).T + 0.1 * noise_TO
    grid = torch.linspace(0, 1, 1001).tolist()
    errors = [float((target_TO - x_TI @ (w_OI + b * delta_OI).T).square().sum()) for b in grid]
    best = grid[errors.index(min(errors))]
    assert best_step(w_OI, w_OI + delta_OI, x_TI, target_TO) == pytest.approx(best, abs=5.1e-4)
    assert best_step(w_OI, w_OI, x_TI, target_TO) == 0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_gram_has_a_root(scale: float, dtype: torch.dtype) -> None:
    """Fewer tokens than inputs, summed from products in float32, and a dead input."""
    x_TI = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * scale**0.5
    x_TI[:, 5] = 0
    gram_II = (x_TI.T @ x_TI).double()
    root_II = root(Gram.of(gram_II)).value
    torch.testing.assert_close(
        root_II @ root_II.T / scale, gram_II / scale, rtol=0, atol=2e-2 if dtype.itemsize == 4 else 1e-6
    )
    assert float(root_II[5, 5]) ** 2 < 1e-2 * float(gram_II.diagonal().max())


def test_a_regular_gram_is_its_root_times_itself() -> None:
    _, x_TI, _ = case()
    gram_II = x_TI.T @ x_TI
    root_II = root(Gram.of(gram_II)).value
    torch.testing.assert_close(root_II @ root_II.T, gram_II, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(solve_right(root_II, gram_II), torch.eye(INPUTS).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_root_of_statistics_that_are_not_finite(bad: float) -> None:
    gram_II = torch.eye(4, dtype=torch.float64)
    gram_II[2, 1] = gram_II[1, 2] = bad
    with pytest.raises(NumericalError, match="size 4"):
        root(Gram.of(gram_II))
