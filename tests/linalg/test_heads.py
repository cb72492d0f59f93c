"""Smaller and fewer value heads, against what attention with them really gives to o."""

from __future__ import annotations

import pytest
import torch

from streamlap.linalg.heads import group_order, head_cut

HIDDEN, SIZE, TOKENS, TINY = 10, 4, 80, 1e-13
LAYOUTS = [(1, 1), (3, 3), (2, 4), (1, 4), (3, 6)]


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


@pytest.mark.parametrize(("heads_kv", "heads_q"), LAYOUTS)
def test_whole_heads_give_the_same_maps(heads_kv: int, heads_q: int) -> None:
    w_v_VI, bias_V, w_o_DO, mixed_HTI = problem(heads_kv, heads_q)
    x_TO = reads(w_v_VI, bias_V, mixed_HTI, heads_kv)
    cut = head_cut(w_v_VI, w_o_DO, x_TO.T @ x_TO, heads_kv, heads_q, SIZE, bias_V)
    assert cut.bias_V is not None
    group = heads_q // heads_kv
    for head in range(heads_q):
        into, out = slice(head // group * SIZE, (head // group + 1) * SIZE), slice(head * SIZE, (head + 1) * SIZE)
        expected_DI = w_o_DO[:, out] @ w_v_VI[into]
        torch.testing.assert_close(cut.w_o_DO[:, out] @ cut.w_v_VI[into], expected_DI, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(cut.w_o_DO[:, out] @ cut.bias_V[into], w_o_DO[:, out] @ bias_V[into])
    assert cut.error(SIZE) == 0


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize(("heads_kv", "heads_q"), LAYOUTS)
def test_a_head_errs_by_the_energies_it_leaves_out(heads_kv: int, heads_q: int, keep: int) -> None:
    """Exactly where a KV head serves one query head, at most where it serves several."""
    w_v_VI, bias_V, w_o_DO, mixed_HTI = problem(heads_kv, heads_q)
    x_TO = reads(w_v_VI, bias_V, mixed_HTI, heads_kv)
    cut = head_cut(w_v_VI, w_o_DO, x_TO.T @ x_TO, heads_kv, heads_q, keep, bias_V)
    assert cut.bias_V is not None
    assert cut.w_v_VI.shape == (heads_kv * keep, HIDDEN)
    assert cut.w_o_DO.shape == (HIDDEN, heads_q * keep)
    small_TO = reads(cut.w_v_VI, cut.bias_V, mixed_HTI, heads_kv)
    errors = torch.zeros(heads_kv).double()
    for head in range(heads_q):
        whole, part = slice(head * SIZE, (head + 1) * SIZE), slice(head * keep, (head + 1) * keep)
        missing_TD = x_TO[:, whole] @ w_o_DO[:, whole].T - small_TO[:, part] @ cut.w_o_DO[:, part].T
        errors[head // (heads_q // heads_kv)] += missing_TD.square().sum()
    bounds = cut.energies_GN[:, keep:].sum(1)
    if heads_q == heads_kv:
        torch.testing.assert_close(errors, bounds, rtol=1e-6, atol=0)
    else:
        assert bool((errors <= bounds).all())
    assert cut.error(keep) == pytest.approx(float(bounds.sum() / cut.energies_GN.sum()))


def test_a_single_head_is_cut_as_well_as_any_map_could_be() -> None:
    w_v_VI, bias_V, w_o_DO, mixed_HTI = problem(1, 1)
    x_TO = reads(w_v_VI, 0 * bias_V, mixed_HTI, 1)
    cut = head_cut(w_v_VI, w_o_DO, x_TO.T @ x_TO, 1, 1, 2)
    assert cut.bias_V is None
    values = torch.linalg.svdvals(x_TO @ w_o_DO.T)
    torch.testing.assert_close(cut.energies_GN[0], values[:SIZE].square(), rtol=1e-6, atol=0)


def test_numbers_that_o_does_not_read_and_tokens_never_set_are_harmless() -> None:
    w_v_VI, bias_V, w_o_DO, mixed_HTI = problem(2, 4)
    w_o_DO = w_o_DO.clone() * 1e-6
    w_o_DO[:, 1::SIZE] = 0
    w_v_VI[2], bias_V[2] = 0, 0
    x_TO = reads(w_v_VI, bias_V, mixed_HTI, 2)
    cut = head_cut(w_v_VI, w_o_DO, x_TO.T @ x_TO, 2, 4, SIZE - 1, bias_V)
    small_TO = reads(cut.w_v_VI, cut.bias_V, mixed_HTI, 2)
    torch.testing.assert_close(
        small_TO @ cut.w_o_DO.T, x_TO @ w_o_DO.T, rtol=0, atol=1e-4 * float((x_TO @ w_o_DO.T).std())
    )


@pytest.mark.parametrize(("heads_kv", "heads_q", "keep"), [(1, 4, 2), (2, 4, 5), (2, 4, 0)])
def test_sizes_that_do_not_fit_are_refused(heads_kv: int, heads_q: int, keep: int) -> None:
    w_v_VI, _, w_o_DO, _ = problem(2, 4)
    with pytest.raises(ValueError, match="wanted"):
        head_cut(w_v_VI, w_o_DO, torch.eye(w_o_DO.shape[1]).double(), heads_kv, heads_q, keep)


@pytest.mark.parametrize(("heads_kv", "heads_q"), [(3, 4), (2, 6)])
def test_heads_that_do_not_divide_are_refused(heads_kv: int, heads_q: int) -> None:
    with pytest.raises(ValueError, match=f"{heads_q} query heads"):
        group_order(torch.ones(HIDDEN, 16), torch.eye(16).double(), heads_kv, heads_q)


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
    order_G, losses = group_order(w_o_DO, gram_OO, heads_kv, heads_q, damping=TINY)
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
    order_G, losses = group_order(w_o_DO, x_TO.T @ x_TO, 4, 4, least=2)
    assert int(order_G[0]) == 2
    assert float(losses[0]) == 0
    assert len(losses) == 2
    assert order_G[2:].tolist() == sorted(order_G[2:].tolist())
