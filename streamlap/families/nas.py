"""A folder of the format nas as what it is: a llama, with a row for each linear that is narrower or gone.

So all that reads the factored format reads this one too. The one difference is that what is gone has left no mark.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamlap.errors import CheckpointError, one_line
from streamlap.families.linears import ROLES, SUBLAYERS
from streamlap.families.opening import read_config
from streamlap.loader.configuration_nas import NAS, check_block, ffn_width
from streamlap.loader.linears import RemovedLinear

FFN_ENDS = {"gate": "out", "up": "out", "down": "in"}
"""Role -> which of its ends are the channels."""


def is_nas(raw: Mapping[str, Any]) -> bool:
    return raw.get("model_type") == NAS


def known_config(folder: Path) -> dict[str, Any]:
    """config.json of any folder, with the model_type of a family."""
    raw = read_config(folder)
    return as_llama(raw, folder) if is_nas(raw) else raw


def as_llama(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """config.json of the llama that it is made from, with the table of rows. Raises CheckpointError for what no layers have."""
    try:
        rows, widest = block_rows(raw)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} has block_configs that no layers can have: {one_line(str(error))}"
        ) from error
    table = {"quant_method": "streamlap", "format_version": 2, "modules": rows}
    plain = {key: value for key, value in raw.items() if key not in ("block_configs", "auto_map")}
    sizes = {"intermediate_size": raw.get("intermediate_size") or widest}
    return plain | sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "quantization_config": table}


def block_rows(raw: Mapping[str, Any]) -> tuple[dict[str, dict[str, int]], int]:
    """Path of a linear -> its row; and the widest FFN."""
    blocks, depth, hidden, heads = (
        raw.get(key) for key in ("block_configs", "num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not isinstance(blocks, list) or len(blocks) != depth:
        raise ValueError(f"seen {str(blocks)[:120]}; wanted a list with one for each of {depth} layers")
    if type(hidden) is not int or type(heads) is not int:
        raise ValueError(f"seen hidden_size {hidden!r} and num_attention_heads {heads!r}; wanted whole numbers")
    groups, rows = raw.get("num_key_value_heads") or heads, dict[str, dict[str, int]]()
    for index, block in enumerate(blocks):
        check_block(index, block, heads // groups)
        if block["attention"].get("no_op"):
            rows |= {f"model.layers.{index}.{ROLES[role]}": {"removed": 1} for role in SUBLAYERS["attention"].roles}
    widths = [ffn_width(block["ffn"], hidden) for block in blocks]
    native = raw.get("intermediate_size") or max(widths)
    for index, width in enumerate(widths):
        if width != native:
            rows |= {f"model.layers.{index}.{ROLES[role]}": {end: width} for role, end in FFN_ENDS.items()}
    return rows, max(widths)


def unmark(layers: nn.Module) -> None:
    """What is gone has no tensor on the disk, nor has the norm before an attention that is gone."""
    for layer in layers.children():
        for part in [part for part in layer.modules() if isinstance(part, RemovedLinear)]:
            del part._buffers["weight"]
            part.register_buffer("weight", torch.zeros(1, 1), persistent=False)
        if isinstance(layer.get_submodule(ROLES["q"]), RemovedLinear):
            layer.set_submodule("input_layernorm", nn.Identity())
