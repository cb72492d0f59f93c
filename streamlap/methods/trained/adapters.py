"""A dense layer with adapters: every linear W gets a low-rank one beside it, and only the adapters are trained.

    y = fade (W x + b) + weight (B A x) + c

LoRAPrune trains with fade and weight fixed and x masked; in PC-LoRA the fade goes to nothing, and then W is not read any more.

Shape suffixes: O out, I in, R rank; B batch, L length, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from streamlap.families.layer import StreamLayer
from streamlap.linalg.lora import Factors
from streamlap.linalg.statistics import all_finite
from streamlap.loader.forms import Dense
from streamlap.methods.trained.steps import scale

RUN = 4
"""Bytes of a number in training: it is done in float32."""
MASTER, STATE = 16, 12
"""Bytes a number that is trained: itself, its gradient and two moments; without the gradient on the disk."""


class Adapter(nn.Module):
    """Stands in place of a linear while a layer is trained. Its linear stays as it is."""

    def __init__(self, linear: nn.Linear, a_RI: torch.Tensor, b_OR: torch.Tensor, c_O: torch.Tensor | None) -> None:
        super().__init__()
        # In a tuple they are no parameters of this module, which has only what is trained.
        self._dense = (linear.weight.detach().float(), None if linear.bias is None else linear.bias.detach().float())
        self.a_RI, self.b_OR = nn.Parameter(a_RI), nn.Parameter(b_OR)
        self.c_O = None if c_O is None else nn.Parameter(c_O)
        self.fade = self.weight = 1.0
        self.mask_I: torch.Tensor | None = None
        """What x is multiplied by."""
        self.given: torch.Tensor | None = None
        """Its last output, where it keeps that."""
        self.keeps = False

    @property
    def w_OI(self) -> torch.Tensor:  # noqa: N802
        return self._dense[0]

    @property
    def bias_O(self) -> torch.Tensor | None:  # noqa: N802
        return self._dense[1]

    @property
    def factors(self) -> Factors:
        return Factors(self.a_RI.detach(), self.b_OR.detach())

    @property
    def gradient(self) -> Factors:
        """Of both factors, by the backward pass before."""
        assert self.a_RI.grad is not None, "a backward pass came before"
        assert self.b_OR.grad is not None, "a backward pass came before"
        return Factors(self.a_RI.grad, self.b_OR.grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.mask_I is None else x * self.mask_I
        y = nn.functional.linear(nn.functional.linear(x, self.a_RI), self.b_OR)
        y = y if self.weight == 1.0 else y * self.weight
        y = y if self.c_O is None else y + (self.c_O if self.weight == 1.0 else self.weight * self.c_O)
        if self.fade:
            dense = nn.functional.linear(x, *self._dense)
            y = (dense if self.fade == 1.0 else dense * self.fade) + y
        if self.keeps:
            self.given = y
        return y


def random_factors(linear: nn.Linear, rank: int, generator: torch.Generator) -> Factors:
    """A as `nn.Linear` begins, B zero: the start of LoRA (Hu et al. 2021, arXiv 2106.09685). Drawn on the CPU, so that every
    device begins alike."""
    rows, columns = linear.weight.shape
    a_RI = (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
    device = linear.weight.device
    return Factors(a_RI.to(device), torch.zeros(rows, rank, device=device))


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A layer with an adapter in place of each of its linears."""

    layer: StreamLayer
    adapters: Mapping[str, Adapter]
    """By role."""

    def __call__(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """In float32; gradients go to the adapters."""
        return self.layer.with_linears(self.adapters, self._rest(), x_BLD)

    def _rest(self) -> dict[str, torch.Tensor]:
        """What is neither a linear nor trained."""
        linears = tuple(f"{self.layer.family.path(role)}." for role in self.adapters)
        named = self.layer.module.named_parameters()
        return {name: tensor.detach().float() for name, tensor in named if not name.startswith(linears)}

    @property
    def masters(self) -> dict[str, torch.Tensor]:
        """What is trained, by names that tell role and part."""
        return dict(self._named())

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        for role, adapter in self.adapters.items():
            for name, tensor in adapter.named_parameters():
                yield f"{role} {name}", tensor

    @property
    def sizes(self) -> dict[str, float]:
        """The scale of each, by which it is moved. B, which may begin at zero, goes by where B A would be as large as W."""
        sizes: dict[str, float] = {}
        for role, adapter in self.adapters.items():
            w, a = scale(adapter.w_OI), scale(adapter.a_RI)
            own = {"a_RI": a, "b_OR": w / (math.sqrt(len(adapter.a_RI)) * a), "c_O": w}
            sizes |= {f"{role} {name}": own[name] for name, _ in adapter.named_parameters()}
        return sizes

    @property
    def finite(self) -> bool:
        return all(all_finite(tensor) for _, tensor in self._named())


def adapter_numbers(natives: Mapping[str, Dense], ranks: Mapping[str, int]) -> int:
    """Numbers in the factors of these ranks."""
    return sum(rank * sum(natives[role].shape) for role, rank in ranks.items())


def dense_numbers(natives: Mapping[str, Dense]) -> int:
    return sum(native.weights for native in natives.values())
