"""The methods by the names that recipes use. A new method is a file here and a row in METHODS."""

from __future__ import annotations

from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.groups import AttentionGroups
from streamlap.methods.base import Method
from streamlap.methods.final.gain import FinalGain
from streamlap.methods.lorap.attention import AttentionAwsvd
from streamlap.methods.lorap.ffn import FfnLorap
from streamlap.methods.trained.base import Distilled, Trained
from streamlap.methods.trained.loraprune import LoraPrune
from streamlap.methods.trained.pclora import PcLora
from streamlap.methods.trained.refine import Refine

AnyMethod = Method | Distilled | Trained | FinalGain

METHODS: dict[str, type[Method]] = {
    "attention_awsvd": AttentionAwsvd,
    "ffn_lorap": FfnLorap,
    "attention_anchored": AttentionAnchored,
    "attention_groups": AttentionGroups,
    "ffn_anchored": FfnAnchored,
}
"""What compresses a sub-layer."""

DISTILLED: dict[str, type[Distilled]] = {"loraprune": LoraPrune, "pclora": PcLora}
"""What compresses a whole layer by training it."""

TRAINED: dict[str, type[Trained]] = {"refine": Refine}
"""What trains a layer that methods for sub-layers have edited."""

FINAL: dict[str, type[FinalGain]] = {"final_gain": FinalGain}
"""What comes after the last layer."""

PRESETS: dict[str, tuple[AnyMethod, ...]] = {
    "best": (AttentionAnchored(), FfnAnchored(), FinalGain()),
    "lorap": (AttentionAwsvd(), FfnLorap()),
    "loraprune": (LoraPrune(),),
    "pclora": (PcLora(),),
}

WHOLE = (AttentionGroups(), FfnAnchored(shares=(1.0,)), FinalGain())
"""Linears stay dense: channels go, and what writes is fitted again."""

SHAPES: dict[str, dict[str, tuple[AnyMethod, ...]]] = {
    "free": PRESETS,
    "nas": {"best": WHOLE},
    "stock": {"best": WHOLE, "loraprune": PRESETS["loraprune"]},
}
"""What a result may be made of -> preset -> its methods.

free     every form
nas      dense linears: each FFN has a width of its own, attention is whole or removed; layers are there or not
stock    dense linears, of the same widths in every layer: fewer channels and KV heads; layers are there or not
"""

FORMATS = {"factored": "free", "stock": "stock", "nas": "nas"}
"""How an output folder can hold a result -> its shape; the factored format holds them all. See `output.formats`."""
