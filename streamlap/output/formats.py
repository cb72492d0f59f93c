"""The formats of a compressed model: what config.json says of it, and the tensors of a layer as the folder holds them.

factored   every form; what reads it is the loader of this package
stock      a plain checkpoint of the same architecture, with smaller sizes in config.json
nas        widths of their own for the FFNs, and layers without attention, as engines know them; see `nas`
           both have no place for a layer of which nothing is left; see `depth`
dense      every matrix multiplied back, removed channels as zeros; the sizes are those of the original

`compress` writes the first three, `export` the last three. What a format cannot express is refused, with one that can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from streamlap.errors import CheckpointError, UnsupportedModel, one_line
from streamlap.families.bounds import native_config
from streamlap.families.opening import check_orders, joined_table, meta_model, swapped
from streamlap.families.stream import ModelStream
from streamlap.families.wrappers import text_of, with_text
from streamlap.loader.forms import Dense, Form, Removed, kind_of, read_row
from streamlap.loader.linears import PARTS
from streamlap.loader.modules import dense_linear
from streamlap.output.depth import check_kinds, depth_keys, left, renamed
from streamlap.output.nas import check_layers, legacy_rope, nas_config, nas_tensors
from streamlap.store.shards import NAMING_KEY
from streamlap.store.sink import Joined, TensorEntry

Forms = Mapping[str, Form]
"""Role -> what its linear is in the result."""
Config = dict[str, Any]

LEGACY_ROPE_KEYS = ("rope_theta", "rope_scaling")
"""Keys of config.json that stay as they are where they are there."""
OURS = ("quantization_config", "auto_map")
"""Keys of config.json by which this package's loader is found."""


def source_config(stream: ModelStream) -> Config:
    """config.json of a checkpoint as it holds for its tensors in another folder: the files have other names there, and a head
    that is not the embedding is said not to be."""
    raw = {key: value for key, value in stream.raw_config.items() if key != NAMING_KEY}
    apart = {"tie_word_embeddings": False}
    return with_text(raw | apart, apart) if stream.two_heads() else raw


def forms_after(stream: ModelStream, rows: Mapping[str, Mapping[str, int]]) -> list[dict[str, Form]]:
    """What the linears of every layer become by a table of rows, see `loader.forms`."""
    return [
        {
            role: read_row(name, rows[name], native) if (name := stream.linear_name(index, role)) in rows else native
            for role, native in stream.natives(index).items()
        }
        for index in range(stream.depth)
    ]


# --- config.json -------------------------------------------------------------------------------------------------------


def dense_config(stream: ModelStream, layers: Sequence[Forms]) -> Config:
    """config.json without a word of streamlap, with the flags of the biases that were added, and with the legacy keys of
    the positions too.

    Raises UnsupportedModel where the architecture has no such flag.
    """
    raw = {key: value for key, value in source_config(stream).items() if key not in OURS}
    text = text_of(raw)
    raw = with_text(
        raw,
        legacy_rope(text.get("rope_parameters") or {}) | {key: text[key] for key in LEGACY_ROPE_KEYS if key in text},
    )
    for index, forms in enumerate(layers):
        for role, form in forms.items():
            if form.bias and not stream.native(index, role).bias:
                raw = with_text(raw, {bias_flag(stream, index, role): True})
    return raw


def stock_config(stream: ModelStream, layers: Sequence[Forms]) -> Config:
    """The same with the sizes that every layer has now, without those that are gone. Raises UnsupportedModel where layers
    differ, or are not dense."""
    kept = left(layers)
    for index in kept:
        for role, form in layers[index].items():
            name = stream.linear_name(index, role)
            if not isinstance(form, Dense):
                raise UnsupportedModel(
                    f"{name} is {form.kind}, and the format stock holds dense linears alone; wanted {way_out(layers)}."
                )
            if form.shape != first_forms(layers)[role].shape:
                place = next(place for place in kept if role in layers[place])
                raise UnsupportedModel(
                    f"{name} is {list(form.shape)}, and that of layer {place} {list(layers[place][role].shape)}: the format "
                    f"stock has the same widths in every layer; wanted {way_out(layers)}."
                )
    sizes = stock_sizes(stream, first_forms(layers)) | depth_keys(stream, kept)
    raw = with_text(dense_config(stream, layers), sizes)
    check_sizes(stream, raw, layers)
    return raw


def first_forms(layers: Sequence[Forms]) -> Forms:
    """Each role as the first layer that has it holds it, of those that are not gone."""
    return {role: form for index in reversed(left(layers)) for role, form in layers[index].items()}


def stock_sizes(stream: ModelStream, forms: Forms) -> dict[str, int]:
    """Keys of config.json that the widths of a layer change."""
    sizes = {}
    if (width := forms["up"].shape[0]) != getattr(stream.config, stream.family.width_key):
        sizes[stream.family.width_key] = width
    if "o" not in forms:
        return sizes
    heads, groups = forms["o"].shape[1] // stream.head_dim, forms["k"].shape[0] // stream.head_dim
    if heads != stream.config.num_attention_heads:
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": stream.head_dim}
    return sizes


def check_sizes(stream: ModelStream, config: Config, layers: Sequence[Forms]) -> None:
    """Raise UnsupportedModel unless the native model of `config` has just the linears that are to be written."""
    try:
        native = meta_model(native_config(config, stream.folder))
        swapped(native, joined_table(native, stream.family))
    except CheckpointError as error:  # transformers wants the hidden size to be a multiple of the heads
        raise UnsupportedModel(
            f"a {stream.family.model_type} of such sizes is none to transformers ({one_line(str(error))[:200]}); wanted "
            f"{way_out(layers)}."
        ) from error
    kept = left(layers)
    for place, index in enumerate(kept):
        for role, form in layers[index].items():
            name = stream.linear_name(place, role)
            found = Dense.from_module(native.get_submodule(name))
            if found.shape != form.shape:
                raise UnsupportedModel(
                    f"{name} is {list(form.shape)}, and a {stream.family.model_type} of such sizes has {list(found.shape)} "
                    "there; wanted the format factored."
                )
    if len(kept) < stream.depth:
        check_kinds(stream, native, kept)


def way_out(layers: Sequence[Forms]) -> str:
    """The format that can express what stock cannot."""
    nas = all(isinstance(form, Dense | Removed) for forms in layers for form in forms.values())
    return f"the format {'nas, ' if nas else ''}factored, or dense for comparison"


def engine_config(stream: ModelStream, layers: Sequence[Forms]) -> Config:
    """That of the format nas."""
    check_layers(stream, layers)
    raw = dense_config(stream, layers)
    kept = [layers[index] for index in left(layers)]
    sizes = stock_sizes(stream, kept[0]) | depth_keys(stream, left(layers))
    wanted = {key: size for key, size in sizes.items() if key != "intermediate_size"}
    return nas_config(stream, {"intermediate_size": stream.config.intermediate_size} | raw | wanted, kept)


def bias_flag(stream: ModelStream, index: int, role: str) -> str:
    path = stream.family.path(role)
    for prefix, flag in stream.family.bias_flags.items():
        if path.startswith(prefix):
            return flag
    raise UnsupportedModel(
        f"{stream.linear_name(index, role)} has a bias, and {stream.family.model_type} has no place for one there; "
        "wanted a folder without added biases. Load it with streamlap instead: nothing else can hold it."
    )


CONFIGS: dict[str, Callable[[ModelStream, Sequence[Forms]], Config]] = {
    "stock": stock_config,
    "nas": engine_config,
    "dense": dense_config,
}
"""Format -> its config.json, for a result whose layers have these forms. Each raises UnsupportedModel for what it cannot
express. That of the format factored is in `folder`: it goes by the rows of the report."""


# --- tensors -----------------------------------------------------------------------------------------------------------


def packed(
    to: str, stream: ModelStream, index: int, place: int | None, forms: Forms, entries: Mapping[str, TensorEntry]
) -> Mapping[str, TensorEntry]:
    """The tensors of a layer as the format has them, under the names of the layer `place` there; none where that is None."""
    if place is None:
        return {}
    prefix = stream.layer_name(index)
    if to == "nas":
        entries = nas_tensors(prefix, forms, entries)
    elif to != "factored":
        entries = joined_tensors(prefix, entries, stream.joined)
    return renamed(entries, prefix, stream.layer_name(place))


def joined_tensors(
    prefix: str, entries: Mapping[str, TensorEntry], matrices: Mapping[str, Mapping[str, int]]
) -> dict[str, TensorEntry]:
    """The same with each matrix in the place of its parts and its mark."""
    whole = dict(entries)
    for path, row in matrices.items():
        if not path.startswith(f"{prefix}."):
            continue
        for leaf in ("weight", "bias"):
            names = [f"{path}.{part}.{leaf}" for part in PARTS[row["parts"]]]
            parts = [part for name in names if not isinstance(part := whole.pop(name, None), Joined | None)]
            if parts:
                whole[f"{path}.{leaf}"] = Joined(tuple(parts), row.get("head_dim"))
    return whole


def exported_layer(stream: ModelStream, index: int, wanted: Forms, config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Tensors of one layer of a compressed folder in the dense shapes `wanted`. Untouched ones are copied as bytes."""
    prefix, names, tensors = stream.layer_name(index), stream.layer_names(index), stream.layer_tensors(index)
    entries: dict[str, TensorEntry] = {f"{prefix}.{n}": info for n, info in tensors.items()}
    for role, path in stream.family_of(index).roles.items():
        base, form = stream.linear_name(index, role), stream.form(index, role)
        if not isinstance(wanted[role], Removed) and kind_of(form, Dense(wanted[role].shape)) != "dense":
            stored = {name.removeprefix(path + "."): name for name in tensors if name.startswith(path + ".")}
            for name in stored.values():
                del entries[f"{prefix}.{name}"]
            module = copy.deepcopy(stream.layers[index].get_submodule(path))
            module.load_state_dict({n: stream.source.read(names[name]) for n, name in stored.items()}, assign=True)
            check_orders(module, base)
            native = Dense(wanted[role].shape, stream.native(index, role).bias)
            dtype = stream.storage_dtype(index, role)
            entries |= {f"{base}.{n}": t for n, t in dense_linear(module, native, dtype).state_dict().items()}
        flags = [flag for start, flag in stream.family.bias_flags.items() if path.startswith(start)]
        if f"{base}.bias" not in entries and any(text_of(config).get(flag) for flag in flags):
            entries[f"{base}.bias"] = torch.zeros(wanted[role].shape[0], dtype=stream.storage_dtype(index, role))
    norm = f"{prefix}.input_layernorm.weight"
    if not stream.marked and norm not in entries:
        entries[norm] = torch.ones(stream.width, dtype=stream.storage_dtype(index, "q"))
    return entries
