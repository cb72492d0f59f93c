"""Low-rank factors of a linear map.

Only matrices of the smaller side squared are held whole. All else goes through in blocks of fixed size, so that the memory of a
solve is known beforehand (`awsvd_bytes`) and its result does not depend on how much memory there is.

Shape suffixes: O out, I in, R rank, M the smaller of O and I.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch

from streamlap.errors import NumericalError
from streamlap.linalg.solution import Solution

SOLVER_THREADS = 2
"""CPU threads of every decomposition and triangular solve. LAPACK's last bits depend on their number, so it is fixed: equal
input gives equal output on any machine. Half of the work is bound by memory, which two threads nearly use up."""

BLOCK = 1024
"""Rows or columns that are widened to float64 at a time."""


def awsvd(w_OI: torch.Tensor, scale_I: torch.Tensor, rank: int) -> Solution[tuple[torch.Tensor, torch.Tensor]]:
    """Activation-weighted SVD: the rank-R `up_OR @ down_RI` that is nearest to W in ||(W - W') diag(scale)||_F.

    AWSVD of LoRAP (Li, Tang & Zhang 2024, arXiv 2404.09695): W D = U S V', up = U_R S_R^1/2, down = S_R^1/2 V_R' D^-1.
    One eigen-decomposition of the smaller Gram side in float64 gives the same factors: with U, down = S^-1/2 U' W.

    Args: scale_I > 0; 1 <= rank <= min(O, I). Returns (up_OR, down_RI) in float64; its error is the discarded share of the
    squared singular values of W D.
    """
    wide, scale_I = w_OI.shape[0] <= w_OI.shape[1], scale_I.to(w_OI.device).double()
    gram_MM = _weighted_gram(w_OI, scale_I)
    energies_M, vectors_MM = eigh(gram_MM)
    del gram_MM
    energies_M = energies_M.flip(0).clamp_min(0.0)
    basis_MR = vectors_MM[:, -rank:].flip(1)
    del vectors_MM
    root_R = energies_M[:rank].sqrt()
    balance_R = root_R.sqrt()
    # Directions without energy carry nothing; 1/0 there would only make noise.
    inverse_R = torch.where(root_R > root_R[:1] * 1e-12, 1.0 / balance_R, torch.zeros_like(balance_R))
    if wide:
        down = [inverse_R[:, None] * (basis_MR.T @ w.double()) for w in torch.split(w_OI, BLOCK, dim=1)]
        up_OR, down_RI = basis_MR * balance_R, torch.cat(down, dim=1)
    else:
        up_OR = torch.cat([(w.double() * scale_I) @ basis_MR * inverse_R for w in torch.split(w_OI, BLOCK)])
        down_RI = balance_R[:, None] * basis_MR.T / scale_I
    total = energies_M.sum()
    error = float(energies_M[rank:].sum() / total) if total > 0 else 0.0
    return Solution((up_OR, down_RI), error=error)


def awsvd_bytes(rows: int, columns: int, rank: int) -> int:
    """Most memory that `awsvd` holds at one time beside its input, its factors included.

    The larger of two moments. In the decomposition: the Gram, its vectors, and two squares of LAPACK's. After it: the vectors
    that are kept, a block, and the factors, twice while their blocks are joined.
    """
    smaller, larger = sorted((rows, columns))
    return 8 * max(4 * smaller**2, smaller**2 + BLOCK * smaller + rank * (2 * smaller + 2 * larger))


def awsvd_flops(rows: int, columns: int, rank: int) -> int:
    """Floating-point operations of `awsvd`'s products, in float64. The decomposition of size min(O, I) comes on top."""
    return 2 * rows * columns * min(rows, columns) + 2 * rows * columns * rank


def eigh(gram_MM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors; the same bits for any number of torch's threads.

    Raises NumericalError where the decomposition fails, as it does on NaN.
    """
    try:
        with solver_threads(gram_MM.device):
            values_M, vectors_MM = torch.linalg.eigh(gram_MM)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericalError(
            f"a symmetric matrix of size {len(gram_MM)} has no eigenvalues ({error}); wanted finite statistics of the inputs. "
            "Try dtype float32 in the recipe."
        ) from error
    return values_M, vectors_MM


def orthonormal(basis_OR: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span what those of the basis do; the same bits for any number of torch's threads."""
    with solver_threads(basis_OR.device):
        q_OR: torch.Tensor = torch.linalg.qr(basis_OR).Q
    return q_OR


@contextlib.contextmanager
def solver_threads(device: torch.device) -> Iterator[None]:
    """Run the block's CPU work on SOLVER_THREADS: for LAPACK. Products need none of it, since their bits never change."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == SOLVER_THREADS:
        yield
        return
    torch.set_num_threads(SOLVER_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _weighted_gram(w_OI: torch.Tensor, scale_I: torch.Tensor) -> torch.Tensor:
    """(W D)(W D)' or (W D)'(W D), whichever is smaller, summed over blocks of the longer side."""
    wide, size = w_OI.shape[0] <= w_OI.shape[1], min(w_OI.shape)
    gram_MM = torch.zeros(size, size, dtype=torch.float64, device=w_OI.device)
    scales = torch.split(scale_I, BLOCK) if wide else itertools.repeat(scale_I)
    for w, scale in zip(torch.split(w_OI, BLOCK, dim=1 if wide else 0), scales, strict=False):
        block = w.double() * scale
        gram_MM.addmm_(*((block, block.T) if wide else (block.T, block)))
    return gram_MM
