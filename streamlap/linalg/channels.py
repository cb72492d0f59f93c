"""Which channels of a gated FFN stay.

Shape suffixes: F channels, I in (hidden size), O out (hidden size).
"""

from __future__ import annotations

import torch

from streamlap.linalg.budget import Removal


def lorap_scores(
    gate_FI: torch.Tensor,
    up_FI: torch.Tensor,
    down_OF: torch.Tensor,
    scale_in_I: torch.Tensor,
    scale_mid_F: torch.Tensor,
) -> torch.Tensor:
    """Importance of every channel, [F] float32 (LoRAP, Li, Tang & Zhang 2024, arXiv 2404.09695).

    ||gate_c * d_in|| + ||up_c * d_in|| + ||down_c|| d_mid: each matrix's weighted norm of the channel's row or column.
    """
    scale_I, scale_F = scale_in_I.float(), scale_mid_F.float()
    gate_F = (gate_FI.float() * scale_I).norm(dim=1)
    up_F = (up_FI.float() * scale_I).norm(dim=1)
    score_F: torch.Tensor = gate_F + up_F + down_OF.float().norm(dim=0) * scale_F
    return score_F


def kept_channels(score_F: torch.Tensor, removal: Removal) -> torch.Tensor:
    """Indices of the channels that stay, ascending. Equal scores keep their order."""
    order = torch.sort(score_F, stable=True).indices
    kept = torch.cat([order[: removal.begin], order[removal.end :]])
    return kept.sort().values


def removed_energy(down_OF: torch.Tensor, scale_mid_F: torch.Tensor, kept: torch.Tensor) -> float:
    """Share of the FFN output's energy that the removed channels carried, counting them as uncorrelated."""
    energy_F = (down_OF.double().norm(dim=0) * scale_mid_F.double()).square()
    total = energy_F.sum()
    return float(1.0 - energy_F[kept].sum() / total) if total > 0 else 0.0
