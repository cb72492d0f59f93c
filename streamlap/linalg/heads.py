"""Which KV heads of attention can go, with the query heads that read them, when o is fitted again.

Query head h reads the values of KV head h // (Hq / Hkv), as transformers lays them out.

Shape suffixes: O in of o (Hq * head_dim), D out of o, G KV heads.
"""

from __future__ import annotations

import torch

from streamlap.linalg.gram import DAMPING, Gram
from streamlap.linalg.obs import Rest
from streamlap.linalg.solution import Solution


def kept_heads(
    w_o_DO: torch.Tensor, gram: Gram, heads_kv: int, heads_q: int, kept: int, damping: float = DAMPING
) -> Solution[torch.Tensor]:
    """The KV heads that should stay, ascending, where `kept` of them are to. Greedy: one goes a round, the one that o misses
    least. Raises ValueError where the widths do not fit the heads.
    """
    size, group = _sizes(w_o_DO, heads_kv, heads_q)
    rest, alive = Rest(w_o_DO, gram, damping), list(range(heads_kv))
    while len(alive) > kept:
        columns = {g: _columns(w_o_DO, g, group * size) for g in alive}
        first = min(alive, key=lambda g: rest.loss(columns[g]))
        rest.remove(columns[first])
        alive.remove(first)
    return Solution(torch.tensor(alive, device=w_o_DO.device), notes=rest.notes)


def _sizes(w_o_DO: torch.Tensor, heads_kv: int, heads_q: int) -> tuple[int, int]:
    """Numbers in a head, and query heads of one KV head."""
    width = w_o_DO.shape[1]
    if heads_q % heads_kv or width % heads_q:
        raise ValueError(f"{heads_q} query heads, {heads_kv} KV heads and o of {width} columns; wanted each to divide")
    return width // heads_q, heads_q // heads_kv


def _columns(w_DO: torch.Tensor, group: int, width: int) -> torch.Tensor:
    """The columns of o that read a KV head."""
    return torch.arange(group * width, (group + 1) * width, device=w_DO.device)
