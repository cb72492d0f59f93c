"""Other containers of a compressed model. So far one: dense, every matrix multiplied back, removed channels as zeros."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from streamlap.errors import UnsupportedModel
from streamlap.families.shell import check_orders
from streamlap.families.stream import ModelStream
from streamlap.loader.modules import dense_linear
from streamlap.output.folder import source_config
from streamlap.store.sink import TensorEntry


def dense_config(stream: ModelStream) -> dict[str, Any]:
    """config.json without a word of streamlap, and with the flags of the biases that were added.

    Raises UnsupportedModel where the architecture has no such flag.
    """
    raw = {k: v for k, v in source_config(stream).items() if k not in ("quantization_config", "auto_map")}
    for index in range(stream.depth):
        for role in stream.family.roles:
            if stream.form(index, role).bias and not stream.native(index, role).bias:
                raw[bias_flag(stream, index, role)] = True
    return raw


def bias_flag(stream: ModelStream, index: int, role: str) -> str:
    path = stream.family.path(role)
    for prefix, flag in stream.family.bias_flags.items():
        if path.startswith(prefix):
            return flag
    raise UnsupportedModel(
        f"{stream.linear_name(index, role)} has a bias, and {stream.family.model_type} has no place for one there; "
        "wanted a folder without added biases. Load it with streamlap instead: nothing else can hold it."
    )


def dense_layer(stream: ModelStream, index: int, config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Tensors of one layer in the shapes that `config` wants. Untouched ones are copied as bytes."""
    prefix, names, tensors = stream.layer_name(index), stream.layer_names(index), stream.layer_tensors(index)
    entries: dict[str, TensorEntry] = {f"{prefix}.{n}": info for n, info in tensors.items()}
    for role, path in stream.family.roles.items():
        base, native = stream.linear_name(index, role), stream.native(index, role)
        if base in stream.rows:
            stored = {name.removeprefix(path + "."): name for name in tensors if name.startswith(path + ".")}
            for name in stored.values():
                del entries[f"{prefix}.{name}"]
            module = copy.deepcopy(stream.layers[index].get_submodule(path))
            module.load_state_dict({n: stream.source.read(names[name]) for n, name in stored.items()}, assign=True)
            check_orders(module, base)
            entries |= {f"{base}.{n}": t for n, t in dense_linear(module, native).state_dict().items()}
        flags = [flag for start, flag in stream.family.bias_flags.items() if path.startswith(start)]
        if f"{base}.bias" not in entries and any(config.get(flag) for flag in flags):
            dtype = stream.source.info(f"{base}.weight").dtype
            entries[f"{base}.bias"] = torch.zeros(native.shape[0], dtype=dtype)
    return entries
