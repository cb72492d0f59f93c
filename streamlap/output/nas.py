"""The format nas: widths of their own for the FFNs and layers without attention, packaged as the public models of the
architecture DeciLM are, so that engines which run those run this. See `loader.configuration_nas`.

What an engine would get wrong without a word is not written: no FFN is removed alone, layer 0 keeps its attention, all layers
have the same heads, and a width is given in one way only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from streamlap.errors import UnsupportedModel
from streamlap.families.cache import window_of
from streamlap.families.linears import ROLES, SUBLAYERS
from streamlap.families.stream import ModelStream
from streamlap.loader.configuration_nas import MULTIPLE, NAS
from streamlap.loader.forms import Dense, Form, Removed
from streamlap.loader.shim import NAS_MAP
from streamlap.output.depth import is_gone, left
from streamlap.store.sink import TensorEntry

FAMILIES = ("llama", "mistral", "qwen2")
"""Those that are a llama by another name, where their attention sees all that went before."""

KEPT_KEYS = (
    "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
)  # fmt: skip
"""Keys of a source's config.json that mean the same here."""
SAID_KEYS = (
    "bos_token_id", "eos_token_id", "hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "rms_norm_eps", "vocab_size",
)  # fmt: skip
"""Those that have to be said: what config.json leaves out has the default of its own class, which may be another one here."""


def check_layers(stream: ModelStream, layers: Sequence[Mapping[str, Form]]) -> None:
    """Raise UnsupportedModel for what the format cannot express."""
    family, config = stream.family.model_type, stream.config
    if family not in FAMILIES or any(window_of(stream, index) for index in range(stream.depth)):
        windows = " with a sliding window" if family in FAMILIES else ""
        raise UnsupportedModel(
            f"the format nas is for {', '.join(FAMILIES)} without windows, and this is a {family}{windows}; wanted the format "
            "stock or factored."
        )
    if config.hidden_act != "silu":
        raise UnsupportedModel(
            f"hidden_act is {config.hidden_act!r}; the format nas wants silu. Take the format factored."
        )
    check_shapes(stream, layers, "the format nas", "Wanted the format factored.")


def check_shapes(stream: ModelStream, layers: Sequence[Mapping[str, Form]], to: str, way_out: str) -> None:
    """The same of the shapes alone. Args: to, the format in words; way_out, what to do where it cannot hold them."""
    first = left(layers)[0]
    for index, forms in enumerate(layers):
        for role, form in forms.items() if not is_gone(forms) else ():
            gone = isinstance(form, Removed) and role in stream.family.sublayers["attention"].roles and index > first
            if not isinstance(form, Dense) and not gone:
                raise UnsupportedModel(
                    f"{stream.linear_name(index, role)} is {form.kind}; {to} holds dense linears, and removes attention "
                    f"alone, in layers behind the first. {way_out}"
                )
            if role in ("q", "k") and not gone and form.shape != layers[first][role].shape:
                raise UnsupportedModel(
                    f"{stream.linear_name(index, role)} is {list(form.shape)}, and that of layer {first} "
                    f"{list(layers[first][role].shape)}; {to} has the same heads in all layers. {way_out}"
                )


def nas_config(stream: ModelStream, raw: Mapping[str, Any], layers: Sequence[Mapping[str, Form]]) -> dict[str, Any]:
    """config.json for layers of these forms; `raw`, that of the source with the sizes of the first layer."""
    # A flag for the attention of all layers; those that have no bias get zeros.
    biased = any(forms[role].bias for forms in layers for role in SUBLAYERS["attention"].roles)
    groups = raw.get("num_key_value_heads") or stream.config.num_key_value_heads
    heads = raw["num_attention_heads"] // groups
    rope = dict(getattr(stream.config, "rope_parameters", None) or {})
    return {
        "architectures": ["DeciLMForCausalLM"], "model_type": NAS, "auto_map": dict(NAS_MAP),
        **{key: getattr(stream.config, key) for key in SAID_KEYS}, **{key: raw[key] for key in KEPT_KEYS if key in raw},
        "head_dim": stream.head_dim, "attention_bias": biased,
        "rope_parameters": rope, **legacy_rope({"rope_theta": 10_000.0} | rope),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", stream.tied)),
        "block_configs": [block(forms, stream.width, heads, exact(layers)) for forms in layers],
    }  # fmt: skip


def legacy_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that `rope_parameters` has taken the place of. Some engines read the one, some the others, and take a default
    without a word where it is not there. None where kinds of layers have theirs apart: there never were such keys."""
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], **({} if plain else {"rope_scaling": scaling})}


def exact(layers: Sequence[Mapping[str, Form]]) -> bool:
    """Whether some width is no multiple of 256, so that all are given as numbers of channels. Fewer engines read that."""
    return any(forms["down"].shape[1] % MULTIPLE for forms in layers)


def block(forms: Mapping[str, Form], hidden: int, heads_in_group: int, exact: bool) -> dict[str, Any]:
    gone, width = isinstance(forms["q"], Removed), forms["down"].shape[1]
    # Rounded down: engines round the width that follows up to the next multiple.
    size = {"intermediate_size": width} if exact else {"ffn_mult": math.floor(width * 1.5 / hidden * 1e6) / 1e6}
    return {
        "attention": {
            "no_op": gone,
            "n_heads_in_group": None if gone else heads_in_group,
            "replace_with_linear": False,
        },
        "ffn": {"no_op": False, **size, "replace_with_linear": False},
    }


def nas_tensors(prefix: str, forms: Mapping[str, Form], entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of the layer `prefix`: nothing of an attention that is gone, nor of its norm; and zeros for the biases that
    some linears of an attention lack, since there is one flag for all four."""
    if isinstance(forms["q"], Removed):
        gone = (f"{prefix}.self_attn.", f"{prefix}.input_layernorm.")
        return {name: entry for name, entry in entries.items() if not name.startswith(gone)}
    roles = SUBLAYERS["attention"].roles
    if not any(forms[role].bias for role in roles):
        return dict(entries)
    dtype = entries[f"{prefix}.{ROLES['q']}.weight"].dtype
    zeros = {f"{prefix}.{ROLES[role]}.bias": torch.zeros(forms[role].shape[0], dtype=dtype) for role in roles}
    return {**zeros, **entries}
