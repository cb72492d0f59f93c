"""Configurations of pico models, one for each family: what shows, in three layers, what its layers do and others do not.

Tests and benchmarks make their models from these. A benchmark asks for other sizes; all else stays.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from streamlap.families.table import FAMILIES
from streamlap.families.wrappers import WRAPPERS

VOCABULARY = 300
CONTEXT = 64

Settings = dict[str, Any]

PICO: Settings = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
PICO_OF: dict[str, Settings] = {
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
    "ministral": {"sliding_window": 5, "layer_types": KINDS},
    "ministral3": {"rope_parameters": ROPE | {"rope_type": "yarn", "llama_4_scaling_beta": 0.1}},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False},
    "ernie4_5": {"use_bias": True},
    "olmo3": {"sliding_window": 5, "layer_types": KINDS},
    "gemma2": {
        "sliding_window": 5,
        "layer_types": KINDS,
        "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 1.0,
    },
    "gemma3_text": {"sliding_window": 5, "layer_types": KINDS, "query_pre_attn_scalar": 5},
    "granite": {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
    },
    "cohere": {"use_qk_norm": True, "logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 5, "layer_types": KINDS},
    "stablelm": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    "exaone4": {"sliding_window": 5, "layer_types": KINDS},
    "gpt_neox": {"rotary_pct": 0.5},
    "qwen3_next": HYBRID | {"mlp_only_layers": [0, 1, 2], "num_experts": 4},
    "qwen3_5_text": HYBRID,
    "hunyuan_v1_dense": {"rope_parameters": ROPE | {"rope_type": "dynamic", "alpha": 1000.0}},
}
"""Model type -> its own settings."""

OTHER_NAMES = {
    "opt": {"ffn_dim": "intermediate_size", "word_embed_proj_dim": "hidden_size"},
    "gpt2": {"n_inner": "intermediate_size"},
}
"""Model type -> key of its config.json -> the size in `PICO` that it holds."""
UNKNOWN = dict.fromkeys(OTHER_NAMES, ("intermediate_size",))
"""Model type -> sizes in `PICO` for which it has only a name of its own."""

IMAGE = VOCABULARY - 1
VISION: Settings = {"hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
TOWER = VISION | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
BLOCKS = VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 32}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 298, "vision_start_token_id": 297, "vision_end_token_id": 296}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}

PARTS: dict[str, tuple[Settings, Settings, Settings]] = {
    "gemma3": (
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 298, "eoi_token_index": 297},
        {"query_pre_attn_scalar": 5, "sliding_window": 5, "layer_types": KINDS},
        TOWER,
    ),
    "mistral3": (
        {"image_token_index": IMAGE},
        {"model_type": "mistral", "sliding_window": None},
        TOWER | {"head_dim": 8, "model_type": "pixtral"},
    ),
    "qwen2_5_vl": (TOKENS, {"rope_parameters": MROPE}, BLOCKS | {"window_size": 16, "fullatt_block_indexes": [1]}),
    "qwen3_vl": (
        TOKENS,
        {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        BLOCKS | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3_5": (
        TOKENS,
        HYBRID | {"rope_parameters": MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}},
        BLOCKS | {"num_position_embeddings": 16},
    ),
}
"""Model with a vision tower -> its own settings, those of its language model, those of its tower. An image is four tokens."""

READ_AS_OTHERS = ("phi3", "gpt2")
"""Model types without a row of their own."""
EVERY_KIND = (*FAMILIES, *READ_AS_OTHERS, *WRAPPERS)
"""All that streamlap serves."""


def pico_config(model_type: str, *, tied: bool = False, **settings: object) -> PreTrainedConfig:
    """The configuration of a pico model; `settings` take the place of those of the table, or of sizes."""
    named = OTHER_NAMES.get(model_type, {})
    sizes = PICO | {key: value for key, value in settings.items() if key in PICO}
    own = {name: sizes[size] for name, size in named.items()} | PICO_OF.get(model_type, {})
    common = {key: value for key, value in PICO.items() if key not in UNKNOWN.get(model_type, ())}
    given = {key: value for key, value in settings.items() if key not in UNKNOWN.get(model_type, ())}
    return AutoConfig.for_model(model_type, **(common | own | {"tie_word_embeddings": tied} | given))


def pico_wrapper_config(model_type: str, *, tied: bool = False, **settings: object) -> PreTrainedConfig:
    """The same of a model with a vision tower; `settings` are those of its language model."""
    own, text, vision = PARTS[model_type]
    sizes = PICO | settings
    moved = sizes["vocab_size"] - VOCABULARY  # ids that stand for no text are the last ones
    own = {
        key: value + moved if "token_" in key and key in own and value >= 296 else value for key, value in own.items()
    }
    if "out_hidden_size" in vision:
        vision = vision | {"out_hidden_size": sizes["hidden_size"]}
    return AutoConfig.for_model(
        model_type, text_config=sizes | text | {"tie_word_embeddings": tied} | settings, vision_config=vision,
        tie_word_embeddings=tied, **own,
    )  # fmt: skip


def pico_model(model_type: str, *, tied: bool = False, **settings: object) -> Any:
    """A model of such a configuration, with the weights that transformers begins with."""
    if model_type in WRAPPERS:
        return AutoModelForImageTextToText.from_config(pico_wrapper_config(model_type, tied=tied, **settings))
    return AutoModelForCausalLM.from_config(pico_config(model_type, tied=tied, **settings))


def random_pico(model_type: str, *, tied: bool = False, seed: int = 0, **settings: object) -> Any:
    """The same with random weights; biases and norms are random too, so that losing one shows."""
    torch.manual_seed(seed)
    model = pico_model(model_type, tied=tied, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + torch.randn_like(parameter) * 0.15)
    model.tie_weights()
    return model
