"""How far the last linear of a sub-layer is moved, where held-out tokens decide."""

from __future__ import annotations

import pytest
import torch
from conftest import MakeModel

from streamlap.families.stream import ModelStream
from streamlap.linalg.gram import Gram
from streamlap.linalg.moments import Sample
from streamlap.methods.anchored.fitting import map_error, output_aim
from streamlap.methods.base import Captured

KEPT = torch.arange(0, 48, 2)


def captured(x_TI: torch.Tensor, target_TO: torch.Tensor, held: int) -> Captured:
    sample = Sample(held)
    sample.update(x_TI[:held], target_TO[:held])
    fitted_TI = x_TI[held:]
    gram = Gram.of(fitted_TI.T @ fitted_TI)
    return Captured(gram=gram, cross_IA=fitted_TI.T @ target_TO[held:], held=sample)


@pytest.mark.parametrize("noise", [0.0, 20.0])
def test_what_lost_inputs_gave_is_made_up_for_whatever_earlier_layers_lost(pico: MakeModel, noise: float) -> None:
    """Half of the channels are nearly the others'. What is missing from the stream is what all of them gave, and noise."""
    stream = ModelStream(pico("llama"))
    layer, generator = stream.layer(1, stream.layer_kwargs(16)[1]), torch.Generator().manual_seed(0)
    w_OI = layer.acting("down").double()
    x_TI = torch.randn(3000, 48, generator=generator, dtype=torch.float64)
    x_TI[:, 1::2] = 0.9 * x_TI[:, ::2] + 0.1 * x_TI[:, 1::2]
    clean_TO = x_TI @ w_OI.T
    lost_TO = noise * clean_TO.std() * torch.randn(clean_TO.shape, generator=generator, dtype=torch.float64)
    refitted_OI = w_OI[:, ::2] + 0.9 * w_OI[:, 1::2]

    others = captured(x_TI[2000:, KEPT], clean_TO[2000:], 999).held

    def error(refitted: torch.Tensor | None) -> float:
        seen = captured(x_TI[:2000, KEPT], (clean_TO + lost_TO)[:2000], 400)
        return map_error(output_aim(layer, "down", KEPT, seen, None, refitted).value.t_OI, others)

    beside, alone = error(refitted_OI.clone()), error(None)
    assert beside <= (0.5 if noise else 1.0) * alone
    if not noise:
        assert beside == pytest.approx(map_error(refitted_OI, others), rel=0.05)


def test_a_step_that_is_given_is_taken_from_the_dense_linear(pico: MakeModel) -> None:
    stream = ModelStream(pico("llama"))
    layer, generator = stream.layer(1, stream.layer_kwargs(16)[1]), torch.Generator().manual_seed(0)
    x_TI, target_TO = (torch.randn(300, width, generator=generator, dtype=torch.float64) for width in (24, 32))
    made = [
        output_aim(layer, "down", KEPT, captured(x_TI, target_TO, 50), 0.5, refitted).value.t_OI
        for refitted in (None, torch.zeros(32, 24))
    ]
    assert torch.equal(*made)
