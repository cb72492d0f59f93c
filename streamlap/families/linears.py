"""The linears of a decoder layer by their roles. Methods ask for roles; only a family knows the paths.

q k v    read the input of attention
o        writes what attention adds to the hidden states
gate up  read the input of the FFN; one without a gate has up alone
down     writes what the FFN adds to the hidden states
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """A part of a decoder layer that adds something to the hidden states: attention or the FFN."""

    module: str | None
    """Its path in the layer; None where its linears are in the layer itself."""
    reads: tuple[str, ...] = ()
    """Roles of the linears that read its input."""
    writes: str = ""
    """Role of the linear whose output is added to the hidden states; empty where no linear of it has a role, so that it stays
    as it is."""
    norm: str | None = None
    """Path in the layer of a norm that this output goes through before it is added."""
    multiplier: str | None = None
    """Attribute of the layer by which it is multiplied before it is added."""

    @property
    def roles(self) -> tuple[str, ...]:
        """All of its linears, in order."""
        return (*self.reads, self.writes) if self.writes else ()


ROLES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Role -> path in the layer, as most families have it."""

SUBLAYERS = {
    "attention": Sublayer(module="self_attn", reads=("q", "k", "v"), writes="o"),
    "ffn": Sublayer(module="mlp", reads=("gate", "up"), writes="down"),
}
"""In the order in which a layer runs them."""

POST_NORMED = {
    "attention": replace(SUBLAYERS["attention"], norm="post_attention_layernorm"),
    "ffn": replace(SUBLAYERS["ffn"], norm="post_feedforward_layernorm"),
}
"""The same where a norm comes behind each."""

MULTIPLIED = {name: replace(part, multiplier="residual_multiplier") for name, part in SUBLAYERS.items()}
"""The same where the layer multiplies what each gives."""

UNGATED = {role: path for role, path in ROLES.items() if role != "gate"}
WITHOUT_GATE = SUBLAYERS | {"ffn": replace(SUBLAYERS["ffn"], reads=("up",))}
"""Roles and sub-layers of a layer whose FFN has no gate."""
