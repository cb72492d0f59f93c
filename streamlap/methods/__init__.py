"""The methods by the names that recipes use. A new method is a file here and a row in METHODS."""

from __future__ import annotations

from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.groups import AttentionGroups
from streamlap.methods.base import Anchored as Anchored
from streamlap.methods.base import OnePass as OnePass
from streamlap.methods.lorap.attention import AttentionAwsvd
from streamlap.methods.lorap.ffn import FfnLorap

OnePassMethod = AttentionAwsvd | FfnLorap
AnchoredMethod = AttentionAnchored | AttentionGroups | FfnAnchored
ANCHORED = (AttentionAnchored, AttentionGroups, FfnAnchored)
Method = OnePassMethod | AnchoredMethod

METHODS: dict[str, type[Method]] = {
    "attention_awsvd": AttentionAwsvd,
    "ffn_lorap": FfnLorap,
    "attention_anchored": AttentionAnchored,
    "attention_groups": AttentionGroups,
    "ffn_anchored": FfnAnchored,
}

PRESETS: dict[str, tuple[Method, ...]] = {
    "best": (AttentionAnchored(), *(FfnAnchored(share=share) for share in (0.25, 0.5, 0.75, 1.0))),
    "lorap": (AttentionAwsvd(), FfnLorap()),
}
