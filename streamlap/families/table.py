"""What streamlap knows of each model family: names, and nothing else. A new family is one more row here.

Sites are groups of linears that read the same input, so that they share one statistic:
attn_in (q, k, v), attn_out (o), ffn_in (gate, up), ffn_mid (down). Paths are relative to the decoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamlap.errors import UnsupportedModel, shown
from streamlap.loader.hf_plugin import READ_VERSIONS

GATED_SITES = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn_mid": ("mlp.down_proj",),
}


@dataclass(frozen=True, kw_only=True)
class Half:
    """One half of a decoder layer, x + module(norm(x)): the paths of its parts, and its sites at either end."""

    norm: str
    module: str
    reads: str
    """Site whose inputs are norm(x)."""
    writes: str
    """Site whose outputs are added to x; one linear."""


PRE_NORM_HALVES = {
    "attention": Half(norm="input_layernorm", module="self_attn", reads="attn_in", writes="attn_out"),
    "ffn": Half(norm="post_attention_layernorm", module="mlp", reads="ffn_in", writes="ffn_mid"),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: where a family keeps its parts, as paths in the transformers model."""

    model_type: str
    backbone: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of tensors that old checkpoints carry and no current model reads; they are left behind."""
    sites: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: GATED_SITES)
    halves: Mapping[str, Half] = field(default_factory=lambda: PRE_NORM_HALVES)
    """The two halves in their order; together they are the whole layer."""
    bias_flags: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a path -> the flag in config.json that gives every linear under it a bias."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a decoder layer that counts as a decoder parameter, in order."""
        return tuple(path for paths in self.sites.values() for path in paths)

    def dead_inputs(self, site: str, count: int) -> str:
        """What a report says of inputs of a site that no token ever moved from zero."""
        return f"{count} dead input{'s' * (count > 1)} of {', '.join(self.sites[site])}"

    def last(self, half: str) -> str:
        """The linear at the end of a half."""
        (path,) = self.sites[self.halves[half].writes]
        return path

    def half_linears(self, half: str) -> tuple[str, ...]:
        """The linears of one half."""
        return (*self.sites[self.halves[half].reads], *self.sites[self.halves[half].writes])


FAMILIES = {
    "llama": Family(model_type="llama", bias_flags={"self_attn.": "attention_bias", "mlp.": "mlp_bias"}),
    "mistral": Family(model_type="mistral"),
    "qwen2": Family(model_type="qwen2"),
    "qwen3": Family(model_type="qwen3", bias_flags={"self_attn.": "attention_bias"}),
}


def find_family(config: Mapping[str, Any]) -> Family:
    """The row for a parsed config.json. Raises UnsupportedModel with what was found and what is known."""
    found, known = config.get("model_type"), ", ".join(FAMILIES)
    if not isinstance(found, str) or found not in FAMILIES:
        raise UnsupportedModel(
            f"model_type {shown(found)} (architectures {shown(config.get('architectures'))}) is not known; known are {known}. "
            "docs/add-a-family.md shows the row that a new one takes."
        )
    quantization = config.get("quantization_config") or {}
    named = isinstance(quantization, Mapping)
    method = quantization.get("quant_method") if named else quantization
    if quantization and not (named and method == "streamlap"):
        raise UnsupportedModel(
            f"the checkpoint is quantised ({shown(method)}); wanted plain float weights. "
            "Compress the original first and quantise the result."
        )
    if quantization and quantization.get("format_version") not in READ_VERSIONS:
        raise UnsupportedModel(
            f"quantization_config has format_version {shown(quantization.get('format_version'))}; this streamlap reads "
            f"{' and '.join(map(str, READ_VERSIONS))}. Update streamlap."
        )
    return FAMILIES[found]
