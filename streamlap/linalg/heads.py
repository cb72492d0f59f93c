"""Which KV heads of attention can go, with the query heads that read them, when o is fitted again.

Query head h reads the values of KV head h // (Hq / Hkv), as transformers lays them out.

Shape suffixes: O in of o (Hq * head_dim), D out of o, G KV heads.
"""

from __future__ import annotations

import torch

from streamlap.linalg.gram import DAMPING, Gram
from streamlap.linalg.obs import Rest
from streamlap.linalg.solution import Solution


def group_order(
    w_o_DO: torch.Tensor, gram: Gram, heads_kv: int, heads_q: int, least: int = 1, damping: float = DAMPING
) -> Solution[tuple[torch.Tensor, torch.Tensor]]:
    """The order in which KV heads should go until `least` are left, and the squared error after each. Greedy, one a round.

    Returns order_G (the first to go comes first, those that stay come last, ascending) and losses [G - least], in units of the
    Gram, each of all heads that have gone by then. Raises ValueError where the widths do not fit the heads.
    """
    size, group = _sizes(w_o_DO, heads_kv, heads_q)
    rest = Rest(w_o_DO, gram, damping)
    alive, gone, losses = list(range(heads_kv)), list[int](), list[float]()
    while len(alive) > least:
        columns = {g: _columns(w_o_DO, g, group * size) for g in alive}
        first = min(alive, key=lambda g: rest.loss(columns[g]))
        losses.append(rest.remove(columns[first]) + (losses[-1] if losses else 0.0))
        alive.remove(first)
        gone.append(first)
    order_G = torch.tensor(gone + alive, device=w_o_DO.device)
    return Solution((order_G, torch.tensor(losses, dtype=torch.float64)), notes=rest.notes)


def _sizes(w_o_DO: torch.Tensor, heads_kv: int, heads_q: int) -> tuple[int, int]:
    """Numbers in a head, and query heads of one KV head."""
    width = w_o_DO.shape[1]
    if heads_q % heads_kv or width % heads_q:
        raise ValueError(f"{heads_q} query heads, {heads_kv} KV heads and o of {width} columns; wanted each to divide")
    return width // heads_q, heads_q // heads_kv


def _columns(w_DO: torch.Tensor, group: int, width: int) -> torch.Tensor:
    """The columns of o that read a KV head."""
    return torch.arange(group * width, (group + 1) * width, device=w_DO.device)
