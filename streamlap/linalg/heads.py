"""Smaller value heads, and fewer of them: what attention's v and o become when the model around them keeps its form.

Query head h reads the values of KV head h // (Hq / Hkv), as transformers lays them out. What the softmax does in between mixes
tokens and not the numbers inside a head, so a map of these can move from o, where it is measured, to v.

Shape suffixes: I in of v, O in of o (Hq * head_dim), V out of v (Hkv * head_dim), D out of o, G KV heads, H query heads of one
KV head, N numbers in a head, K numbers kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streamlap.linalg.anchor import DAMPING, root, solve_triangular
from streamlap.linalg.lowrank import eigh
from streamlap.linalg.obs import Rest


@dataclass(frozen=True, kw_only=True)
class HeadCut:
    """v and o of which every head has fewer numbers."""

    w_v_VI: torch.Tensor
    bias_V: torch.Tensor | None
    w_o_DO: torch.Tensor
    energies_GN: torch.Tensor
    """Of each KV head, descending. The sum beyond K is the squared error, in units of the Gram, of what its query head gives
    to o; where it serves several it is a bound on the sum of theirs."""

    def error(self, keep_dim: int) -> float:
        """Share of the energy that a size of head leaves out."""
        total = float(self.energies_GN.sum())
        return float(self.energies_GN[:, keep_dim:].sum()) / total if total > 0 else 0.0


def head_cut(
    w_v_VI: torch.Tensor, w_o_DO: torch.Tensor, gram_OO: torch.Tensor, heads_kv: int, heads_q: int, keep_dim: int,
    bias_V: torch.Tensor | None = None,
) -> HeadCut:  # fmt: skip
    """Cut every value head to `keep_dim` numbers, in float64.

    Per KV head, with P the Gram of what its query heads read and Q = sum W_o' W_o of these: L L' = Q, U the leading
    eigenvectors of L' P L, W_v becomes U' L' W_v and W_o becomes W_o L^-T U. What one head could do for another is left to a
    refit of o.

    Args: gram_OO what o reads, float64; bias_V of v. Raises ValueError where the widths do not fit the heads.
    """
    size, group = _sizes(w_o_DO, heads_kv, heads_q)
    if len(w_v_VI) != heads_kv * size or not 1 <= keep_dim <= size:
        raise ValueError(f"v of {len(w_v_VI)} rows and a size of {keep_dim}; wanted {heads_kv} heads of {size} at most")
    values_GNI = torch.unflatten(w_v_VI.double(), 0, (heads_kv, size))
    reads_GDHN = torch.unflatten(w_o_DO.double(), 1, (heads_kv, group, size)).permute(1, 0, 2, 3)
    biases = None if bias_V is None else torch.unflatten(bias_V.double(), 0, (heads_kv, size))
    cut_v, cut_o, cut_bias, energies = [], [], [], []
    for head in range(heads_kv):
        into_KN, out_NK, energies_N = _cut(_power(gram_OO, head * group, group, size), reads_GDHN[head], keep_dim)
        cut_v.append(into_KN @ values_GNI[head])
        cut_o.append((reads_GDHN[head] @ out_NK).flatten(1))
        cut_bias += [] if biases is None else [into_KN @ biases[head]]
        energies.append(energies_N)
    return HeadCut(
        w_v_VI=torch.cat(cut_v), bias_V=torch.cat(cut_bias) if cut_bias else None, w_o_DO=torch.cat(cut_o, dim=1),
        energies_GN=torch.stack(energies),
    )  # fmt: skip


def group_order(
    w_o_DO: torch.Tensor, gram_OO: torch.Tensor, heads_kv: int, heads_q: int, least: int = 1, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """The KV heads in the order in which they should go, down to `least`; and the squared error once each has gone.

    Greedy, one a round. Returns order_G (first to go first, those that stay at the end, ascending) and losses [G - least], each
    that of all that have gone by then.
    """
    size, group = _sizes(w_o_DO, heads_kv, heads_q)
    rest = Rest(w_o_DO, gram_OO, damping)
    alive, gone, losses = list(range(heads_kv)), list[int](), list[float]()
    while len(alive) > least:
        columns = {g: _columns(w_o_DO, g, group * size) for g in alive}
        first = min(alive, key=lambda g: rest.loss(columns[g]))
        losses.append(rest.remove(columns[first]) + (losses[-1] if losses else 0.0))
        alive.remove(first)
        gone.append(first)
    return torch.tensor(gone + alive, device=w_o_DO.device), torch.tensor(losses, dtype=torch.float64)


def _sizes(w_o_DO: torch.Tensor, heads_kv: int, heads_q: int) -> tuple[int, int]:
    """Numbers in a head, and query heads of one KV head."""
    width = w_o_DO.shape[1]
    if heads_q % heads_kv or width % heads_q:
        raise ValueError(f"{heads_q} query heads, {heads_kv} KV heads and o of {width} columns; wanted each to divide")
    return width // heads_q, heads_q // heads_kv


def _columns(w_DO: torch.Tensor, group: int, width: int) -> torch.Tensor:
    """The columns of o that read a KV head."""
    return torch.arange(group * width, (group + 1) * width, device=w_DO.device)


def _power(gram_OO: torch.Tensor, first: int, count: int, size: int) -> torch.Tensor:
    """P [N, N]: the diagonal blocks of `count` query heads, summed."""
    starts = range(first * size, (first + count) * size, size)
    return torch.stack([gram_OO[at : at + size, at : at + size] for at in starts]).sum(0)


def _cut(
    power_NN: torch.Tensor, reads_DHN: torch.Tensor, keep_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U' L' [K, N] for v, L^-T U [N, K] for o, and all energies, descending."""
    reads_N = reads_DHN.flatten(0, 1)
    root_NN = root(reads_N.T @ reads_N)
    product_NN = root_NN.T @ power_NN @ root_NN
    energies, vectors = eigh((product_NN + product_NN.T) / 2)
    u_NK = vectors[:, -keep_dim:].flip(1)
    out_NK = solve_triangular(root_NN.T, u_NK, upper=True)
    return u_NK.T @ root_NN.T, out_NK, energies.flip(0).clamp_min(0.0)
