"""Groups of a layer that can go whole: KV heads with the query heads that read them, and channels of the FFN.

The lines of a group, rows or columns, lie side by side in every matrix: query head h reads KV head h // (Hq / Hkv).
"""

from __future__ import annotations

import math

from streamlap.errors import RecipeError
from streamlap.loader.forms import Dense
from streamlap.methods.base import Layout, Natives, ParameterBudget, ffn_reads
from streamlap.methods.lorap.ffn import fewer_channels

LINES = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1}
"""Role -> whether its groups lie in its rows or in its columns."""
LAST = {"attention": "o", "ffn": "down"}
"""Sub-layer -> the role whose inputs are masked: of a group that goes nothing else is heard."""


def heads_within(natives: Natives, budget: ParameterBudget) -> Layout:
    """Attention with as many KV heads as its share takes, one at least: a head that would go in part stays whole. What it then
    has more than its budget, the FFN has less; all of them where one norm spans them."""
    heads, roles = natives["v"].shape[0] // budget.head_dim, ("q", "k", "v", "o")
    dense = sum(natives[role].parameters(budget.itemsize) for role in roles)
    kept = heads if budget.heads_stay else min(heads, max(1, math.ceil(heads * budget.parameters / dense)))
    layout = {}
    for role in roles if kept < heads else ():
        rows, columns = natives[role].shape
        shape = (rows, columns // heads * kept) if LINES[role] else (rows // heads * kept, columns)
        layout[role] = Dense(shape, natives[role].bias)
    return layout


def channels_within(natives: Natives, budget: ParameterBudget) -> Layout:
    """An FFN with as many channels as its budget holds."""
    hidden, width = natives["down"].shape
    each = sum(natives[role].shape[1] + natives[role].bias for role in ffn_reads(natives)) + hidden
    kept = (budget.parameters - hidden * natives["down"].bias) // each
    if kept < 1:
        raise RecipeError(f"loraprune: {budget.parameters} parameters hold no channel of {each}; lower the ratio.")
    return fewer_channels(natives, kept) if kept < width else {}
