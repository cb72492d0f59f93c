"""What config.json may say, checked before anything is built from it: a number there can ask for any amount of memory."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from streamlap.errors import CheckpointError, StreamlapError, UnsupportedModel, shown, whole
from streamlap.families.table import Family
from streamlap.families.wrappers import TEXT, is_wrapper, text_of
from streamlap.loader.forms import Dense, Form
from streamlap.loader.linears import StoredLinear

SIZES = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "ffn_dim": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}
"""Key -> the most that it may be; no known model has a tenth of it."""
MAY_BE_NULL = {"num_key_value_heads", "head_dim"}
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
ROPE_MOST = 1e15

UNUSED = {
    "auto_map", "architectures", "quantization_config", "configuration_files", "attn_implementation", "experts_implementation",
    "name_or_path", "transformers_weights", "num_labels", "id2label", "label2id", "problem_type", "task_specific_params",
    "transformers_version", "return_dict",
}  # fmt: skip
"""Keys that transformers would act on, by running code, fetching kernels, reading other files, filling tables or giving tuples,
and that say nothing of the architecture."""
DTYPES = {"float32", "float16", "bfloat16"}
OUTER = {"tie_word_embeddings", "dtype", "torch_dtype"}
"""What is taken from the config of a wrapper beside that of its language model. The rest of it is not run."""


@contextlib.contextmanager
def described_by(folder: Path) -> Iterator[None]:
    """Whatever transformers makes, in the block, of values that are out of range is a CheckpointError over config.json."""
    try:
        yield
    except (StreamlapError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a model that runs: {whole(error)}"
        ) from error


def native_config(raw: Mapping[str, Any], folder: Path) -> PreTrainedConfig:
    """The transformers config of a parsed config.json with a known model_type; no code of the folder runs.

    Raises CheckpointError for sizes out of bounds, and with transformers' reason for what it does not take; UnsupportedModel
    for layers that differ.
    """
    text = text_of(raw)
    if own := text.get("per_layer_config"):
        raise UnsupportedModel(
            f"{folder / 'config.json'} has per_layer_config {shown(own)}; wanted layers that are all alike."
        )
    check_sizes(text.get, folder, text)
    _check_lists(text, folder)
    for key in ROPE_KEYS:
        _check_rope(text.get(key), key, folder)
    kept = _kept(text)
    if is_wrapper(raw):
        outer = {key: value for key, value in _kept(raw).items() if key in OUTER}
        kept = outer | {TEXT: kept, "vision_config": {"num_hidden_layers": 1}}
    with described_by(folder):
        config: PreTrainedConfig = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(kept))
        config.name_or_path = str(folder)
    language = config.get_text_config()
    known = [key for key in SIZES if hasattr(language, key)]
    check_sizes(lambda key: getattr(language, key, None), folder, known)  # the defaults of what config.json leaves out
    return config


def _kept(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What says something of the architecture."""
    kept = {key: value for key, value in raw.items() if key not in UNUSED and not key.startswith("_")}
    return {k: v for k, v in kept.items() if k not in ("dtype", "torch_dtype") or (isinstance(v, str) and v in DTYPES)}


def check_sizes(value_of: Callable[[str], Any], folder: Path, given: Iterable[str]) -> None:
    """Raise CheckpointError unless those sizes that are `given` are whole numbers within bounds."""
    for key in SIZES.keys() & set(given):
        value = value_of(key)
        if value is None and key in MAY_BE_NULL:
            continue
        if type(value) is not int or not 1 <= value <= SIZES[key]:
            raise CheckpointError(
                f"{folder / 'config.json'} has {key} {shown(value)}; wanted a whole number from 1 to {SIZES[key]:,}."
            )
    if (value_of("head_dim") or 0) % 2:
        raise CheckpointError(
            f"{folder / 'config.json'} has head_dim {value_of('head_dim')}; wanted an even number: it is turned in pairs."
        )
    heads, groups = value_of("num_attention_heads"), value_of("num_key_value_heads")
    if heads and groups and heads % groups:
        raise CheckpointError(
            f"{folder / 'config.json'} has num_key_value_heads {groups}; wanted a divisor of num_attention_heads {heads}."
        )


def check_roles(model: nn.Module, family: Family, depth: int) -> None:
    """Raise UnsupportedModel where the row of a family names a linear that its layers do not have."""
    for index in range(depth):
        layer = model.get_submodule(f"{family.layers}.{index}")
        linears = {name for name, part in layer.named_modules() if isinstance(part, nn.Linear | StoredLinear)}
        roles = family.of_layer(layer).roles
        if missing := [f"{role} ({path})" for role, path in roles.items() if path not in linears]:
            if experts := [name for name, _ in layer.named_modules() if name.rpartition(".")[2] == "experts"]:
                raise UnsupportedModel(
                    f"layer {index} of {family.model_type} has a mixture of experts ({experts[0]}); wanted an FFN that every "
                    "token goes through: experts are not compressed yet. Take a dense model of a family in docs/families.md."
                )
            raise UnsupportedModel(
                f"layer {index} of {family.model_type} has no linear for {', '.join(missing)}; wanted one for each role "
                "of the family's row. docs/add-a-family.md says which models a row can describe."
            )


def check_widths(
    forms: Mapping[str, Form], natives: Mapping[str, Dense], family: Family, head_dim: int, name: str
) -> None:
    """Raise CheckpointError where the linears of the compressed layer `name` do not fit together.

    Args: forms and natives, each linear by role as it is and as it was before any edit.
    """
    out, wide = ({role: form.shape[side] for role, form in forms.items()} for side in (0, 1))
    parts = family.sublayers.values()
    ends = all(wide[role] == natives[role].shape[1] for part in parts for role in part.reads)
    ends = ends and all(out[part.writes] == natives[part.writes].shape[0] for part in parts if part.roles)
    heads = groups = True
    if "q" in forms:
        queries, inputs = natives["q"].shape[0], natives["o"].shape[1]  # where q writes gates too, they are not equal
        heads = out["q"] * inputs == wide["o"] * queries and out["k"] == out["v"] and out["k"] % head_dim == 0
        groups = out["q"] * natives["k"].shape[0] == out["k"] * queries
    channels = all(out[role] == wide["down"] for role in family.sublayers["ffn"].reads)
    if not (ends and heads and groups and channels):
        seen = ", ".join(f"{family.path(role)} {list(form.shape)}" for role, form in forms.items())
        raise CheckpointError(
            f"quantization_config.modules in config.json makes linears of {name} that do not fit together: {seen}; wanted "
            "the widths of one layer."
        )


def _check_lists(raw: Mapping[str, Any], folder: Path) -> None:
    for key, value in raw.items():
        if key.endswith("layer_types") and value is not None:
            depth = raw.get("num_hidden_layers")
            if not isinstance(value, list) or len(value) > SIZES["num_hidden_layers"] or len(value) != depth:
                raise CheckpointError(
                    f"{folder / 'config.json'} has {shown(key)[1:-1]} {shown(value)}; wanted one word for "
                    f"each of the {shown(depth)} layers."
                )


def _check_rope(value: Any, key: str, folder: Path, level: int = 0) -> None:
    """Flags, finite numbers and, as a type, words; lists as long as a head at most; one table within another at most."""
    if isinstance(value, dict) and level < 2 and len(value) <= 64:
        for name, inner in value.items():
            _check_rope(inner, f"{key}.{name}", folder, level + 1)
    elif isinstance(value, list) and level < 3 and len(value) <= SIZES["head_dim"]:
        for inner in value:
            _check_rope(inner, key, folder, 3)
    elif (
        isinstance(value, dict | list)
        or (isinstance(value, str) and not key.endswith("type"))
        or (isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= ROPE_MOST))
    ):
        raise CheckpointError(
            f"{folder / 'config.json'} has {shown(key)[1:-1]} {shown(value)}; wanted finite numbers and a short list of them."
        )
