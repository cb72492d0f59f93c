"""Attention as two activation-weighted factors: LoRAP's way with q, k, v, o (Li, Tang & Zhang 2024, arXiv 2404.09695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from streamlap.errors import RecipeError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.budget import lorap_pair_ranks
from streamlap.linalg.lowrank import awsvd, awsvd_bytes, awsvd_flops
from streamlap.linalg.storage import balanced
from streamlap.loader.forms import LowRank
from streamlap.loader.linears import LowRankLinear
from streamlap.methods.base import Cost, DenseStatistics, Layouts, Natives, ParameterBudget, Solved

READS = {"q": "q", "k": "q", "v": "q", "o": "o"}
"""Role -> the role whose inputs it reads."""


@dataclass(frozen=True, kw_only=True)
class AttentionAwsvd:
    """Knobs of the method. `Edit.error` is the discarded share of the squared singular values of W D."""

    sublayer: ClassVar[str] = "attention"
    needs: ClassVar[tuple[str, ...]] = ("q", "o")
    moves_inputs: ClassVar[bool] = False

    alpha: float = 3.0
    """Parameters given to (v, o) for each one given to (q, k)."""

    def __post_init__(self) -> None:
        if not 1 <= self.alpha <= 100:
            raise RecipeError(f"attention_awsvd: alpha is {self.alpha}; wanted a number from 1 to 100.")

    def layouts(self, natives: Natives, budget: ParameterBudget) -> Layouts:
        layout = {}
        for pair in (("q", "o"), ("k", "v")):
            for place, role in enumerate(
                pair
            ):  # each by its own shape: q may write gates too, and o has no part of them
                shape = natives[role].shape
                rank = lorap_pair_ranks(*shape, budget.ratio, self.alpha)[place]
                if rank is not None and rank < 1:
                    raise RecipeError(
                        f"attention_awsvd: ratio {budget.ratio} and alpha {self.alpha} leave {role} {list(shape)} rank "
                        f"{rank}; wanted at least 1. Choose a lower ratio."
                    )
                if rank is not None:
                    layout[role] = LowRank(shape, natives[role].bias, rank)
        return {"": layout}

    def cost(self, natives: Natives, layouts: Layouts, budget: ParameterBudget) -> Cost:
        forms = layouts[""].values()
        return Cost(
            workspace_bytes=max((awsvd_bytes(*form.shape, form.rank) for form in forms), default=0),
            flops=sum(awsvd_flops(*form.shape, form.rank) for form in forms),
            decompositions=tuple(min(form.shape) for form in forms),
        )

    def solve(self, statistics: DenseStatistics, layouts: Layouts) -> Solved:
        return Solved(
            edits=[
                factor(statistics.layer, role, statistics.scale(READS[role]), form.rank)
                for role, form in layouts[""].items()
            ]
        )


def factor(layer: StreamLayer, role: str, scale_I: torch.Tensor, rank: int) -> Edit:
    """The edit that replaces the linear of a role by its activation-weighted factors. Its bias stays as it is."""
    dense, dtype = layer.linear(role), layer.storage_dtype(role)
    found = awsvd(dense.weight, scale_I, rank)
    factors = balanced(*found.value, dtype, layer.family.path(role))
    up_OR, down_RI = factors.value
    bias = None if dense.bias is None else dense.bias.to(dtype)
    module = LowRankLinear.from_factors(up_OR.contiguous(), down_RI.contiguous(), bias)
    return Edit(role=role, module=module, native=layer.native(role), error=found.error, notes=factors.notes)
