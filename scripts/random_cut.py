"""Methods that cut at random, to compare others with: the layouts of the preset `lorap`, filled without a look at the text.

No command itself. Importing it gives recipes the names of its methods.

Shape suffixes: O out, I in, R rank, F channels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.channels import removed_energy
from streamlap.linalg.storage import balanced
from streamlap.loader.linears import LowRankLinear
from streamlap.methods import METHODS, AttentionAwsvd, FfnLorap
from streamlap.methods.base import DenseStatistics, Layouts, Solved
from streamlap.methods.lorap.ffn import narrowed_ffn


def chance(seed: int, layer: StreamLayer, role: str) -> torch.Generator:
    """Other numbers for each linear of each layer, the same in every run."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer.prefix} {role}".encode()))


@dataclass(frozen=True, kw_only=True)
class RandomAttention(AttentionAwsvd):
    """q, k, v and o see their inputs through random subspaces, of the ranks that `attention_awsvd` has. `Edit.error` is the
    share of the squared weights that is outside."""

    seed: int = 0

    def solve(self, statistics: DenseStatistics, layouts: Layouts) -> Solved:
        return Solved(edits=[self._factor(statistics.layer, role, form.rank) for role, form in layouts[""].items()])

    def _factor(self, layer: StreamLayer, role: str, rank: int) -> Edit:
        dense, dtype = layer.linear(role), layer.storage_dtype(role)
        noise_IR = torch.randn(dense.in_features, rank, generator=chance(self.seed, layer, role), dtype=torch.float64)
        basis_IR = torch.linalg.qr(noise_IR).Q
        up_OR = dense.weight.double() @ basis_IR
        error = 1 - float(up_OR.square().sum() / dense.weight.double().square().sum())
        factors = balanced(up_OR, basis_IR.T, dtype, layer.family.path(role))
        bias = None if dense.bias is None else dense.bias.to(dtype)
        module = LowRankLinear.from_factors(*(part.contiguous() for part in factors.value), bias)
        return Edit(role=role, module=module, native=layer.native(role), error=error, notes=factors.notes)


@dataclass(frozen=True, kw_only=True)
class RandomChannels(FfnLorap):
    """The FFN keeps random channels, as many as `ffn_lorap` keeps. `Edit.error` is what it is there."""

    seed: int = 0

    def solve(self, statistics: DenseStatistics, layouts: Layouts) -> Solved:
        layer, left = statistics.layer, layouts[""]["down"].shape[1]
        down_OF = layer.linear("down").weight
        order_F = torch.randperm(down_OF.shape[1], generator=chance(self.seed, layer, "down"))
        kept = order_F[:left].sort().values
        return Solved(edits=narrowed_ffn(layer, kept, removed_energy(down_OF, statistics.scale("down"), kept)))


METHODS.update(random_attention=RandomAttention, random_channels=RandomChannels)
