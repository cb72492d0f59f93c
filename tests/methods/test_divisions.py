"""What rows of gate and up count where directions are chosen for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel

import streamlap
from streamlap.linalg.gram import Gram
from streamlap.linalg.subspace import subspace
from streamlap.methods.anchored import divisions
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.divisions import LEAST_COUNT, Division, weighed
from streamlap.methods.anchored.ffn import FfnAnchored, in_order
from streamlap.methods.anchored.fitting import Aim

TOKENS, INPUTS, CHANNELS = 4000, 12, 30


def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, gate, up and down of an FFN whose channels differ a hundredfold in what they do."""
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(TOKENS, INPUTS, generator=generator, dtype=torch.float64)
    gate_FI, up_FI = (
        torch.randn(CHANNELS, INPUTS, generator=generator, dtype=torch.float64) / INPUTS**0.5 for _ in range(2)
    )
    down_DF = torch.randn(8, CHANNELS, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, CHANNELS)
    return x_TI, gate_FI, up_FI, down_DF


def middle(x_TI: torch.Tensor, gate_FI: torch.Tensor, up_FI: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x_TI @ gate_FI.T) * (x_TI @ up_FI.T)


def test_a_row_counts_as_much_as_its_channel_moves_the_hidden_states() -> None:
    """With directions chosen so, an FFN whose up is cut to a rank is nearer to itself than with all rows alike."""
    x_TI, gate_FI, up_FI, down_DF = parts()
    gram, m_TF = Gram.of(x_TI.T @ x_TI), middle(x_TI, gate_FI, up_FI)
    aims = [Aim(role=role, t_OI=t_OI, bias_O=None, gram=gram) for role, t_OI in (("gate", gate_FI), ("up", up_FI))]
    _, up = weighed(aims, Gram.of(m_TF.T @ m_TF), down_DF)
    lost = []
    for counts_O in (up.counts_O, None):
        found = subspace(up_FI, gram, 5, gain_O=counts_O).value
        cut_TF = middle(x_TI, gate_FI, found.basis_OR @ found.map_RI)
        lost.append(float(((cut_TF - m_TF) @ down_DF.T).square().sum()))
    assert lost[0] < 0.7 * lost[1]


def test_a_channel_that_never_moves_counts_least() -> None:
    x_TI, gate_FI, up_FI, down_DF = parts()
    up_FI[3] = 0.0
    gram, m_TF = Gram.of(x_TI.T @ x_TI), middle(x_TI, gate_FI, up_FI)
    (up,) = weighed([Aim(role="up", t_OI=up_FI, bias_O=None, gram=gram)], Gram.of(m_TF.T @ m_TF), down_DF)
    assert up.counts_O is not None
    assert up.counts_O[3] == up.counts_O.min() == LEAST_COUNT
    assert 0.5 < float(up.counts_O.median()) <= 1
    assert bool(up.counts_O.isfinite().all())


def test_where_nothing_moves_all_rows_count_alike() -> None:
    _, _, up_FI, down_DF = parts()
    nothing = Gram.of(torch.zeros(INPUTS, INPUTS, dtype=torch.float64))
    still = Gram.of(torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64))
    (up,) = weighed([Aim(role="up", t_OI=up_FI, bias_O=None, gram=nothing)], still, down_DF)
    assert up.counts_O is None


def test_what_is_fitted_again_comes_in_the_order_of_the_channels() -> None:
    kept, channels = torch.tensor([1, 4, 6, 9]), torch.tensor([6, 1, 9, 4])
    last_DK = torch.arange(8.0).view(2, 4)
    found = in_order(Division(kept=kept, last_DK=last_DK), channels)
    assert found is not None
    assert found.tolist() == [[2.0, 0.0, 3.0, 1.0], [6.0, 4.0, 7.0, 5.0]]
    assert in_order(Division(kept=None), None) is None


@pytest.mark.parametrize("shares", [(0.25, 0.75), (0.5,)])
def test_directions_are_chosen_with_rows_that_count(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, ...]
) -> None:
    real, seen = divisions.subspace, list[bool]()

    def spy(*given: Any) -> Any:
        seen.append(given[-1] is not None)
        return real(*given)

    monkeypatch.setattr(divisions, "subspace", spy)
    methods = AttentionAnchored(), FfnAnchored(shares=shares)
    streamlap.compress(pico("llama"), tmp_path / "out", ratio=0.4, methods=methods, files=(str(tokens),))
    assert seen
    assert all(seen)
