"""Attention as two activation-weighted factors: LoRAP's half for q, k, v, o (Li, Tang & Zhang 2024, arXiv 2404.09695)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from streamlap.errors import RecipeError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.table import Family
from streamlap.linalg.budget import lorap_pair_ranks
from streamlap.linalg.lowrank import awsvd, awsvd_bytes, awsvd_flops
from streamlap.linalg.statistics import Energy
from streamlap.linalg.storage import balanced
from streamlap.loader.linears import LowRankLinear
from streamlap.methods.base import Cost, Layout, Shapes, Statistic


@dataclass(frozen=True, kw_only=True)
class AttentionAwsvd:
    """Knobs of the method. `Edit.error` is the discarded share of the squared singular values of W D."""

    alpha: float = 3.0
    """Parameters given to (v, o) for each one given to (q, k)."""

    def __post_init__(self) -> None:
        if not 1 <= self.alpha <= 100:
            raise RecipeError(f"attention_awsvd: alpha is {self.alpha}; wanted a number from 1 to 100.")

    def paths(self, family: Family) -> tuple[str, ...]:
        return (*family.sites["attn_in"], *family.sites["attn_out"])

    def layout(self, family: Family, shapes: Shapes, target: float) -> Layout:
        (q, k, v), (o,) = family.sites["attn_in"], family.sites["attn_out"]
        ranks: dict[str, int | None] = {}
        for weak, strong in ((q, o), (k, v)):
            ranks[weak], ranks[strong] = lorap_pair_ranks(*shapes[weak], target, self.alpha)
        for path, rank in ranks.items():
            if rank is not None and rank < 1:
                raise RecipeError(
                    f"attention_awsvd: ratio {target} and alpha {self.alpha} leave {path} {list(shapes[path])} rank "
                    f"{rank}; wanted at least 1. Choose a lower ratio."
                )
        return {path: {"rank": rank} for path, rank in ranks.items() if rank is not None}

    def cost(self, family: Family, shapes: Shapes, target: float) -> Cost:
        ranks = {path: row["rank"] for path, row in self.layout(family, shapes, target).items()}
        return Cost(
            workspace_bytes=max((awsvd_bytes(*shapes[path], rank) for path, rank in ranks.items()), default=0),
            flops=sum(awsvd_flops(*shapes[path], rank) for path, rank in ranks.items()),
            decompositions=tuple(min(shapes[path]) for path in ranks),
        )

    def wants(self, layer: StreamLayer) -> dict[str, Statistic]:
        return {"attn_in": Energy(), "attn_out": Energy()}

    def edit(self, layer: StreamLayer, stats: Mapping[str, Statistic], target: float) -> list[Edit]:
        site_of = {path: site for site in ("attn_in", "attn_out") for path in layer.family.sites[site]}
        layout = self.layout(layer.family, layer.shapes(self.paths(layer.family)), target)
        return [factor(layer, path, stats[site_of[path]].scale(), row["rank"]) for path, row in layout.items()]


def factor(layer: StreamLayer, path: str, scale_I: torch.Tensor, rank: int) -> Edit:
    """The edit that replaces the linear at `path` by its activation-weighted factors. Its bias stays as it is."""
    dense, dtype = layer.linear(path), layer.storage_dtype(path)
    up_OR, down_RI, error = awsvd(dense.weight, scale_I, rank)
    up_OR, down_RI = balanced(up_OR, down_RI, dtype, path)
    bias = None if dense.bias is None else dense.bias.to(dtype)
    module = LowRankLinear.from_factors(up_OR.contiguous(), down_RI.contiguous(), bias)
    return Edit(path=path, module=module, of=(dense.out_features, dense.in_features), error=error)
