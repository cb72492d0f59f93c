"""The model of `configuration_nas`: a llama whose FFNs have widths of their own, and some of whose layers have no attention.

Importing this file registers both with transformers, unless there are such already. Copied as it is into every output folder of
that format, so that `trust_remote_code=True` works where streamlap is not installed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from .configuration_nas import NAS, DeciLMConfig, check_block, ffn_width


class NoAttention(nn.Module):
    """Stands where a layer has no attention: it adds nothing, and keeps no keys and values."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class DeciLMForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Raises ValueError where `block_configs` do not describe its layers."""

    config_class = DeciLMConfig
    config: DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        blocks, layers, heads = config.block_configs or [], self.model.layers, config.num_attention_heads
        if len(blocks) != len(layers):
            raise ValueError(f"block_configs: seen {len(blocks)}; wanted one for each of the {len(layers)} layers")
        attentions = 0
        for index, (layer, block) in enumerate(zip(layers, blocks, strict=True)):
            check_block(index, block, heads // (config.num_key_value_heads or heads))
            own = copy.copy(config)
            own.intermediate_size = ffn_width(block["ffn"], config.hidden_size)
            layer.mlp = type(layer.mlp)(own)
            if block["attention"].get("no_op"):
                layer.self_attn, layer.input_layernorm = NoAttention(), nn.Identity()
            else:
                layer.self_attn.layer_idx = attentions  # caches have a place for each attention
                attentions += 1
        self.post_init()  # type: ignore[no-untyped-call]


DeciLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]

if NAS not in CONFIG_MAPPING:
    AutoConfig.register(NAS, DeciLMConfig)
    AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM)
