"""Layers that are gone as a whole: the formats stock and nas have no place for them, and number the others anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from streamlap.errors import UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.loader.forms import Form, Removed
from streamlap.loader.linears import StoredLinear
from streamlap.store.sink import TensorEntry

CLOSED = ("stock", "nas")
"""Formats without gaps."""
LISTS = ("layer_types", "no_rope_layers")
"""Keys of config.json with an entry for each layer."""


def is_gone(forms: Mapping[str, Form]) -> bool:
    """Whether nothing is left of a layer."""
    return all(isinstance(form, Removed) for form in forms.values())


def places(gone: Iterable[bool], to: str) -> list[int | None]:
    """The number of each layer in a folder of the format `to`; None where it is not in it.

    Args: gone, of each layer whether nothing is left of it.
    """
    found, following = list[int | None](), 0
    for absent in gone:
        stays = to not in CLOSED or not absent
        found.append(following if stays else None)
        following += stays
    return found


def left(layers: Sequence[Mapping[str, Form]]) -> list[int]:
    """The layers of which something is left. Raises UnsupportedModel where there is none."""
    if not (found := [index for index, forms in enumerate(layers) if not is_gone(forms)]):
        raise UnsupportedModel(f"all {len(layers)} layers are removed; wanted one that is not.")
    return found


def renamed(entries: Mapping[str, TensorEntry], prefix: str, name: str) -> dict[str, TensorEntry]:
    """The tensors of the layer `prefix` as those of the layer `name`."""
    return {name + own.removeprefix(prefix): entry for own, entry in entries.items()}


def depth_keys(stream: ModelStream, kept: Sequence[int]) -> dict[str, Any]:
    """Keys of config.json for these layers of the model alone; none where they are all. A pattern that config.json gives as a
    number is written as the list that it stands for. Raises UnsupportedModel where layers cannot go."""
    if len(kept) == stream.depth:
        return {}
    if reason := why_all_stay(stream):
        raise UnsupportedModel(f"some layer is removed, and {reason}; wanted the format factored.")
    lists = {key: getattr(stream.config, key, None) for key in LISTS}
    return {"num_hidden_layers": len(kept)} | {
        key: [value[index] for index in kept] for key, value in lists.items() if value is not None
    }


def why_all_stay(stream: ModelStream) -> str:
    """Why no layer of this model can go; nothing where some can."""
    family = stream.family
    if family.wraps:
        return f"a {family.model_type} is more than its layers: other parts of it count on their number"
    if family.kept:
        return f"a {family.model_type} has {', '.join(family.kept.values())} in some layers, which stays"
    return ""


def check_kinds(stream: ModelStream, native: nn.Module, kept: Sequence[int]) -> None:
    """Raise UnsupportedModel unless each layer of the model `native` is of the kind of that in whose place it is."""
    layers = list(native.get_submodule(stream.family.layers).children())
    for place, index in enumerate(kept):
        if kind(layers[place]) != kind(stream.layers[index]):
            raise UnsupportedModel(
                f"{stream.layer_name(index)} would be layer {place}, which is of another kind in a {stream.family.model_type} "
                "of so many layers; wanted the format factored."
            )


def kind(layer: nn.Module) -> dict[str, Any]:
    """What the modules of a layer, linears apart, say of themselves: windows, scales, flags."""
    parts = {path: part for path, part in layer.named_modules() if not isinstance(part, nn.Linear | StoredLinear)}
    return {
        f"{path}.{name}": value
        for path, part in parts.items()
        for name, value in vars(part).items()
        if name == "sliding_window" or isinstance(value, bool | str | float)
    }
