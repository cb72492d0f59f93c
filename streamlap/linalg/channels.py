"""Which channels of a gated FFN stay.

Shape suffixes: F channels, I in (hidden size), O out (hidden size).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamlap.linalg.budget import Removal

BLOCK = 1024
"""Channels that are widened at a time."""


def channel_bytes(hidden: int) -> int:
    """Most memory that `lorap_scores` or `removed_energy` takes: a block and its product, or a block in float64."""
    return 8 * BLOCK * hidden


def lorap_scores(
    rows: Sequence[torch.Tensor],
    down_OF: torch.Tensor,
    scale_in_I: torch.Tensor,
    scale_mid_F: torch.Tensor,
) -> torch.Tensor:
    """Importance of every channel, [F] float32 (LoRAP, Li, Tang & Zhang 2024, arXiv 2404.09695).

    Args: rows, the matrices [F, I] that make the channels: gate and up, or up alone where there is no gate.

    ||gate_c * d_in|| + ||up_c * d_in|| + ||down_c|| d_mid: each matrix's weighted norm of the channel's row or column.
    """
    scale_I, scale_F = scale_in_I.to(down_OF.device).float(), scale_mid_F.to(down_OF.device).float()
    blocks = zip(
        zip(*(torch.split(w_FI, BLOCK) for w_FI in rows), strict=True),
        torch.split(down_OF, BLOCK, dim=1),
        torch.split(scale_F, BLOCK),
        strict=True,
    )
    return torch.cat(
        [
            sum((w.float() * scale_I).norm(dim=1) for w in those) + down.float().norm(dim=0) * scale
            for those, down, scale in blocks
        ]
    )


def kept_channels(score_F: torch.Tensor, removal: Removal) -> torch.Tensor:
    """Indices of the channels that stay, ascending. Equal scores keep their order."""
    order = torch.sort(score_F, stable=True).indices
    kept = torch.cat([order[: removal.begin], order[removal.end :]])
    return kept.sort().values


def removed_energy(down_OF: torch.Tensor, scale_mid_F: torch.Tensor, kept: torch.Tensor) -> float:
    """Share of the FFN output's energy that the removed channels carried, counting them as uncorrelated."""
    square_F = torch.cat([down.float().square().sum(dim=0) for down in torch.split(down_OF, BLOCK, dim=1)]).double()
    energy_F = square_F * scale_mid_F.to(square_F.device).double().square()
    total = energy_F.sum()
    return float(1.0 - energy_F[kept].sum() / total) if total > 0 else 0.0
