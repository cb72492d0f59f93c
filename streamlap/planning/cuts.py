"""What a survey cuts of each layer, and what may go from a layer in the shapes whose linears are dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamlap.errors import StreamlapError
from streamlap.families.bounds import native_config
from streamlap.families.stream import ModelStream
from streamlap.families.wrappers import with_text
from streamlap.loader.forms import Form, Removed
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.groups import AttentionGroups, group_parameters, groups_layout
from streamlap.methods.base import Method
from streamlap.output.depth import why_all_stay
from streamlap.output.formats import CONFIGS, Forms, source_config, stock_sizes
from streamlap.planning.layouts import dense_parameters

LAYER = "layer"
"""What a survey calls a whole layer, beside the names of its sub-layers."""

CUTS: dict[str, dict[str, tuple[float | None, Method | None]]] = {
    "free": {"attention": (0.6, AttentionAnchored()), "ffn": (0.8, FfnAnchored(shares=(0.25,)))},
    "nas": {"attention": (0.0, None), "ffn": (0.8, FfnAnchored(shares=(1.0,)))},
    "stock": {"attention": (None, AttentionGroups()), "ffn": (0.8, FfnAnchored(shares=(1.0,))), LAYER: (0.0, None)},
}
"""Shape -> sub-layer, or the whole layer -> the share of it that stays, and what cuts it; None removes it. A share of None is
as many KV heads as the architecture can have below its own number, which is one fewer where it takes any. Layers that are gone
are not measured for nas: whether a choice by such sums pays has not been shown. A file that has them is followed.

Only how sub-layers compare is wanted, so one good method does for all that a recipe may try. A shallower cut of attention moves
the predictions by no more than rounding does.
"""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One of a layer to come."""

    keep: float
    """Share that stays."""
    parameters: int
    """Those that stay."""
    method: Method | None
    """None removes it."""


def cuts_of(stream: ModelStream, shape: str) -> list[dict[str, Cut]]:
    """What a survey cuts of every layer, each alone; what the shape cannot lose in this architecture is not cut."""
    table = CUTS[shape]
    counts = fitting_counts(stream) if None in [keep for keep, _ in table.values()] else []
    layers = fitting_layers(stream) if LAYER in table else []
    found: list[dict[str, Cut]] = []
    for index in range(stream.depth):
        cuts = dict[str, Cut]()
        for name, (keep, method) in table.items():
            if name == LAYER and index in layers:
                cuts[name] = Cut(keep=0.0, parameters=0, method=None)
            elif name in stream.family_of(index).compressible:
                dense = dense_parameters(stream, index, name)
                if keep is not None:
                    cuts[name] = Cut(keep=keep, parameters=int(keep * dense), method=method)
                elif len(counts) > 1:
                    count = attention_parameters(stream, index, counts[1])
                    cuts[name] = Cut(keep=count / dense, parameters=count, method=method)
        found.append(cuts)
    return found


# --- layers ------------------------------------------------------------------------------------------------------------


def removable(stream: ModelStream) -> list[int]:
    """Layers whose attention may go: engines, and the masks of transformers, look at the first of each kind."""
    kinds = list(getattr(stream.config, "layer_types", None) or ["full_attention"] * stream.depth)
    there = [index for index in range(stream.depth) if "attention" in stream.family_of(index).compressible]
    return [index for index in there if index > kinds.index(kinds[index])]


def removable_layers(stream: ModelStream) -> list[int]:
    """Layers that may go as a whole."""
    return [] if why_all_stay(stream) else removable(stream)


def fitting_layers(stream: ModelStream) -> list[int]:
    """The same, none where the architecture cannot say that one is gone."""
    layers: list[Forms] = [stream.natives(index) for index in range(stream.depth)]
    those = removable_layers(stream)
    for index in those[:1]:
        layers[index] = {role: Removed(native.shape) for role, native in layers[index].items()}
    return those if those and _is_plain(stream, layers) else []


# --- KV heads ----------------------------------------------------------------------------------------------------------


def group_counts(stream: ModelStream) -> list[int]:
    """Numbers of KV heads that all layers may have, the most first; those of the source alone where none can go."""
    if stream.family.heads_stay or "k" not in stream.family_of(0).roles:
        return [1]
    heads = stream.native(0, "k").shape[0] // stream.head_dim
    return [heads, *(count for count in range(heads - 1, 0, -1) if _taken(stream, count))]


def fitting_counts(stream: ModelStream) -> list[int]:
    """The same, one alone where the widths of the architecture do not follow from that number."""
    counts = group_counts(stream)
    narrow: list[Forms] = [
        {**stream.natives(index), **groups_layout(stream.natives(index), stream.head_dim, count)}
        for count in counts[1:2]
        for index in range(stream.depth)
    ]
    return counts if narrow and _is_plain(stream, narrow) else counts[:1]


def attention_parameters(stream: ModelStream, index: int, count: int) -> int:
    """What the linears of an attention store with so many KV heads."""
    heads, each = group_parameters(stream.natives(index), stream.head_dim)
    return dense_parameters(stream, index, "attention") - (heads - count) * each


def _taken(stream: ModelStream, count: int) -> bool:
    """Whether transformers takes that number of KV heads in such a config.json."""
    forms: dict[str, Form] = {**stream.natives(0), **groups_layout(stream.natives(0), stream.head_dim, count)}
    try:
        native_config(with_text(source_config(stream), stock_sizes(stream, forms)), stream.folder)
    except StreamlapError:
        return False
    return True


def _is_plain(stream: ModelStream, layers: Sequence[Forms]) -> bool:
    """Whether layers of these forms are a plain checkpoint of the architecture."""
    try:
        CONFIGS["stock"](stream, layers)
    except StreamlapError:
        return False
    return True
