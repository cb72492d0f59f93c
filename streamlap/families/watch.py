"""What can be seen of a layer while it runs, by hooks on its modules. None of them stays.

Shape suffixes: B batch, L length, D hidden, O out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from streamlap.families.layer import StreamLayer

LEAST = 1e-12
"""By less than that no token is divided."""

Look = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]
"""A hook: module, inputs, output."""


@torch.no_grad()
def norm_sizes(layer: StreamLayer, x_BLD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sub-layer -> by what the norm behind it divides each token, [B, L], when the layer is given x; for all that have one.

    Measured, not computed: such a norm makes gain * z / size of z, whatever it adds to the square of the size. A token of which
    no gain leaves anything has the size 1.
    """
    found: dict[str, torch.Tensor] = {}

    def note(name: str, gain_D: torch.Tensor) -> Look:
        def look(_: nn.Module, inputs: tuple[torch.Tensor, ...], made_BLD: torch.Tensor) -> None:
            scaled_BLD = inputs[0].float() * gain_D
            power_BL = scaled_BLD.square().sum(dim=-1)
            size_BL = power_BL / (scaled_BLD * made_BLD.float()).sum(dim=-1).clamp_min(LEAST)
            found[name] = size_BL.masked_fill(power_BL == 0, 1.0)

        return look

    looks = {}
    for name in layer.family.normed:
        part = layer.family.sublayers[name]
        gain_D = layer.gain(part.writes)
        assert part.norm is not None
        assert gain_D is not None
        looks[layer.module.get_submodule(part.norm)] = note(name, gain_D)
    run_watched(layer, looks, x_BLD)
    return {name: size_BL.clamp_min(LEAST) for name, size_BL in found.items()}


@torch.no_grad()
def linear_outputs(layer: StreamLayer, roles: Iterable[str], x_BLD: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the linears of these roles give [B, L, O] while the layer runs on x, of which no row is out. Some layers put all
    tokens in one row before a linear."""
    given: dict[str, torch.Tensor] = {}

    def keep(role: str) -> Look:
        return lambda module, inputs, y: given.update({role: y.view(*x_BLD.shape[:-1], -1)})

    run_watched(layer, {layer.linear(role): keep(role) for role in roles}, x_BLD)
    return given


def run_watched(layer: StreamLayer, looks: Mapping[nn.Module, Look], x_BLD: torch.Tensor) -> None:
    """The layer on x, with these hooks for as long as it runs."""
    with contextlib.ExitStack() as hooks:
        for module, look in looks.items():
            hooks.callback(module.register_forward_hook(look).remove)
        layer(x_BLD)
