"""Low-rank factors of a linear map.

Shape suffixes: O out, I in, R rank.
"""

from __future__ import annotations

import torch


def awsvd(w_OI: torch.Tensor, scale_I: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Activation-weighted SVD: the rank-R `up_OR @ down_RI` that is nearest to W in ||(W - W') diag(scale)||_F.

    AWSVD of LoRAP (Li, Tang & Zhang 2024, arXiv 2404.09695): W D = U S V', up = U_R S_R^1/2, down = S_R^1/2 V_R' D^-1.
    One eigen-decomposition of the smaller Gram side in float64 gives the same factors: with U, down = S^-1/2 U' W.

    Args: w_OI, scale_I > 0, 1 <= rank <= min(O, I). Returns the factors in float64 and the relative error: the discarded share
    of the squared singular values of W D.
    """
    weighted_OI = w_OI.double() * scale_I.double()
    wide = weighted_OI.shape[0] <= weighted_OI.shape[1]
    side_OI = weighted_OI if wide else weighted_OI.T
    energies, vectors = torch.linalg.eigh(side_OI @ side_OI.T)
    energies, vectors = energies.flip(0).clamp_min(0.0), vectors.flip(1)
    root_R = energies[:rank].sqrt()
    balance_R = root_R.sqrt()
    # Directions without energy carry nothing; 1/0 there would only make noise.
    inverse_R = torch.where(root_R > root_R[:1] * 1e-12, 1.0 / balance_R, torch.zeros_like(balance_R))
    basis = vectors[:, :rank]
    if wide:
        up_OR, down_RI = basis * balance_R, inverse_R[:, None] * (basis.T @ w_OI.double())
    else:
        up_OR, down_RI = weighted_OI @ basis * inverse_R, balance_R[:, None] * basis.T / scale_I.double()
    total = energies.sum()
    error = float(energies[rank:].sum() / total) if total > 0 else 0.0
    return up_OR, down_RI, error
