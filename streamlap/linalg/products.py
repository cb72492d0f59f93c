"""Matrix products of large problems.

torch's `@` is MKL on x86, and MKL runs float32 at half speed on processors that are not Intel's. oneDNN, which torch also has,
does not. The bits of neither depend on the number of threads.

Shape suffixes: M rows, K inner, N columns.
"""

from __future__ import annotations

import torch


def product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """a b, in their dtype and on their device."""
    if a_MK.dtype != torch.float32 or a_MK.device.type != "cpu" or not _has_onednn() or 0 in (*a_MK.shape, *b_KN.shape):
        return a_MK @ b_KN
    made_MN: torch.Tensor = torch.ops.mkldnn._linear_pointwise(_packed(a_MK), _packed(b_KN).T, None, "none", [], "")
    return made_MN


def _has_onednn() -> bool:
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _packed(x: torch.Tensor) -> torch.Tensor:
    """A slice with gaps, copied to memory of its own: oneDNN would go through the gaps number by number."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()
