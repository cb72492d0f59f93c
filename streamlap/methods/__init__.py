"""The methods by the names that recipes use. A new method is a file here and a row in METHODS."""

from __future__ import annotations

from streamlap.methods.attention_awsvd import AttentionAwsvd
from streamlap.methods.base import Method as Method
from streamlap.methods.ffn_lorap import FfnLorap

METHODS: dict[str, type[AttentionAwsvd] | type[FfnLorap]] = {
    "attention_awsvd": AttentionAwsvd,
    "ffn_lorap": FfnLorap,
}

PRESETS: dict[str, tuple[Method, ...]] = {
    "lorap": (AttentionAwsvd(), FfnLorap()),
}
