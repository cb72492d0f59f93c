"""Keys and values that a model keeps of the tokens before the next one, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from streamlap.families.stream import ModelStream
from streamlap.loader.forms import Form, Removed

KEPT = ("k", "v")
"""Roles whose outputs are kept."""


def cache_bytes(stream: ModelStream, index: int, forms: Mapping[str, Form], tokens: int = 1, sequences: int = 1) -> int:
    """Of one layer, in the dtype in which its linears are stored; a window keeps no more than it sees. `forms` are those that
    its linears have, by role; what is not in it is as in the source. What some layers have in place of attention keeps as much
    of one token as of many, which is not in it."""
    if not set(KEPT) <= stream.family_of(index).roles.keys():
        return 0
    kept = [forms.get(role, stream.native(index, role)) for role in KEPT]
    numbers = sum(form.shape[0] for form in kept if not isinstance(form, Removed))
    window = window_of(stream, index)
    itemsize = stream.storage_dtype(index, "k").itemsize
    return numbers * itemsize * sequences * (tokens if window is None else min(tokens, window))


def window_of(stream: ModelStream, index: int) -> int | None:
    """Tokens that the attention of a layer looks back to; None is all."""
    kinds, window = getattr(stream.config, "layer_types", None), getattr(stream.config, "sliding_window", None)
    slides = kinds[index] == "sliding_attention" if kinds else window is not None
    return int(window) if slides and window else None
