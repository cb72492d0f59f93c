"""What streamlap knows of each model family: names, and nothing else. A new family is one more row here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from streamlap.errors import UnsupportedModel, shown
from streamlap.families.linears import MULTIPLIED, POST_NORMED, ROLES, SUBLAYERS, UNGATED, WITHOUT_GATE, Sublayer
from streamlap.families.wrappers import DECODER, WRAPPERS, is_wrapper, text_of
from streamlap.loader.hf_plugin import READ_VERSIONS


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: where a family keeps its parts, as paths in the transformers model."""

    model_type: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    task_head: str = "score"
    """The head that transformers' classes for other tasks have; it is carried over as it stands."""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Endings of tensors that old checkpoints carry and no current model reads; they are left behind."""
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    """Role of a linear -> its path in the layer."""
    sublayers: Mapping[str, Sublayer] = field(default_factory=lambda: SUBLAYERS)
    """In their order. One after another they are the whole layer."""
    joined: Mapping[str, bool] = field(default_factory=dict)
    """Path of a matrix in the layer that holds several linears, whose paths begin with it -> whether they take turns in it,
    head by head, or follow one another."""
    stored_head: str | None = None
    """What checkpoints call the output layer, where that is not its path."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Sub-layer -> path of the module that some layers have in its place. Its linears have no roles: it stays as it is."""
    bias_flags: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a path -> the flag in config.json that gives every linear under it a bias."""
    parallel: bool | str = False
    """Whether all sub-layers read the input of the layer, and what they give is added up; or the attribute of a layer that says
    so."""
    norm_offset: float = 0.0
    """What the final norm adds to its stored weight."""
    width_key: str = "intermediate_size"
    """Key of config.json that says how many channels an FFN has."""
    heads_stay: bool = False
    """Whether no head can go: a norm behind q or k has numbers for all of them together, or attention counts on the number in
    config.json."""

    wraps: bool = False
    """Whether the decoder is one part of the model, see `wrappers`."""

    @property
    def base(self) -> str:
        """Where the decoder is in the whole model; a checkpoint of the decoder alone leaves it out of its names."""
        return self.layers.partition(".")[0]

    @property
    def layer_pattern(self) -> re.Pattern[str]:
        """Beginning of the name on disk of a layer's tensor; its group is the number of the layer."""
        if self.wraps:
            return re.compile(r"(?:(?:model|language_model)\.){0,2}layers\.(\d{1,9})\.")
        base, inner = map(re.escape, (self.base, self.layers.removeprefix(f"{self.base}.")))
        return re.compile(rf"(?:{base}\.){{0,2}}{inner}\.(\d{{1,9}})\.")

    @property
    def normed(self) -> tuple[str, ...]:
        """Sub-layers whose output goes through a norm before it is added."""
        return tuple(name for name, part in self.sublayers.items() if part.norm is not None)

    @property
    def gained(self) -> bool:
        """Whether what a sub-layer gives is multiplied before it is added, by a norm or by a number."""
        return any(part.norm or part.multiplier for part in self.sublayers.values())

    @property
    def joined_rows(self) -> dict[str, dict[str, int]]:
        """Path of a matrix that holds several linears -> how many, as `loader.modules` takes it."""
        return {path: {"parts": sum(part.startswith(f"{path}.") for part in self.paths)} for path in self.joined}

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths in the layer of all linears that count as decoder parameters, in order."""
        return tuple(self.roles.values())

    @property
    def compressible(self) -> tuple[str, ...]:
        """Sub-layers whose linears have roles."""
        return tuple(name for name, part in self.sublayers.items() if part.roles)

    def of_layer(self, layer: nn.Module) -> Family:
        """The row of one layer: without the roles of a sub-layer in whose place it has what is kept."""
        there = {name for name, _ in layer.named_children()}
        kept = {name: Sublayer(module=path) for name, path in self.kept.items() if path in there}
        if not kept:
            return self
        sublayers = {name: kept.get(name, part) for name, part in self.sublayers.items()}
        left = {role for part in sublayers.values() for role in part.roles}
        return replace(
            self, sublayers=sublayers, roles={role: path for role, path in self.roles.items() if role in left}
        )

    def path(self, role: str) -> str:
        """Where in the layer the linear of a role is."""
        return self.roles[role]

    def role(self, path: str) -> str:
        """The role of the linear at a path in the layer."""
        return {place: role for role, place in self.roles.items()}[path]

    def readers(self, role: str) -> tuple[str, ...]:
        """The roles of all linears that read what the linear of `role` reads, itself among them."""
        return next((part.reads for part in self.sublayers.values() if role in part.reads), (role,))

    def dead_inputs(self, role: str, count: int) -> str:
        """What a report says of inputs of this linear, and of others that read the same, that are zero for every token."""
        return f"{count} dead input{'s' * (count > 1)} of {', '.join(map(self.path, self.readers(role)))}"


QKV_BIAS = dict.fromkeys((ROLES["q"], ROLES["k"], ROLES["v"]), "attention_bias")
NEOX = {part: f"attention.query_key_value.{part}" for part in ("q", "k", "v")}
LLAMA_FLAGS = {"self_attn.": "attention_bias", "mlp.": "mlp_bias"}
SEED_FLAGS = {
    **QKV_BIAS,
    ROLES["o"]: "attention_out_bias",
    "mlp.": "mlp_bias",
}


def hybrid(model_type: str) -> Family:
    """A row of Qwen's hybrids: most layers have a gated delta net in place of attention, and the others gate what their heads
    give, by the second half of what q writes."""
    flags = {"self_attn.": "attention_bias"}
    return Family(
        model_type=model_type, kept={"attention": "linear_attn"}, heads_stay=True, norm_offset=1.0, bias_flags=flags
    )


FAMILIES = {
    "llama": Family(model_type="llama", bias_flags=LLAMA_FLAGS),
    "mistral": Family(model_type="mistral"),
    "qwen2": Family(model_type="qwen2"),
    "qwen3": Family(model_type="qwen3", bias_flags={"self_attn.": "attention_bias"}),
    "smollm3": Family(model_type="smollm3", bias_flags=LLAMA_FLAGS),
    "ministral": Family(model_type="ministral"),
    "ministral3": Family(model_type="ministral3"),
    "seed_oss": Family(model_type="seed_oss", bias_flags=SEED_FLAGS),
    "ernie4_5": Family(model_type="ernie4_5", bias_flags={"": "use_bias"}),
    "hunyuan_v1_dense": Family(model_type="hunyuan_v1_dense", bias_flags={"self_attn.": "attention_bias"}),
    "olmo2": Family(
        model_type="olmo2", sublayers=POST_NORMED, heads_stay=True, bias_flags={"self_attn.": "attention_bias"}
    ),
    "olmo3": Family(
        model_type="olmo3", sublayers=POST_NORMED, heads_stay=True, bias_flags={"self_attn.": "attention_bias"}
    ),
    "gemma": Family(model_type="gemma", norm_offset=1.0, bias_flags={"self_attn.": "attention_bias"}),
    "gemma2": Family(
        model_type="gemma2", sublayers=POST_NORMED, norm_offset=1.0, bias_flags={"self_attn.": "attention_bias"}
    ),
    "gemma3_text": Family(
        model_type="gemma3_text", sublayers=POST_NORMED, norm_offset=1.0, bias_flags={"self_attn.": "attention_bias"}
    ),
    "granite": Family(model_type="granite", sublayers=MULTIPLIED, bias_flags=LLAMA_FLAGS),
    "starcoder2": Family(
        model_type="starcoder2",
        roles=UNGATED | {"up": "mlp.c_fc", "down": "mlp.c_proj"},
        sublayers=WITHOUT_GATE,
        bias_flags={"": "use_bias"},
    ),
    "opt": Family(
        model_type="opt",
        layers="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        norm="model.decoder.final_layer_norm",
        roles=UNGATED | {"o": "self_attn.out_proj", "up": "fc1", "down": "fc2"},
        heads_stay=True,
        sublayers=WITHOUT_GATE | {"ffn": Sublayer(module=None, reads=("up",), writes="down")},
        bias_flags={"": "enable_bias"},
        width_key="ffn_dim",
    ),
    "cohere": Family(model_type="cohere", parallel=True, heads_stay=True, bias_flags={"self_attn.": "attention_bias"}),
    "cohere2": Family(model_type="cohere2", parallel=True, bias_flags={"self_attn.": "attention_bias"}),
    "stablelm": Family(
        model_type="stablelm",
        parallel="use_parallel_residual",
        heads_stay=True,
        bias_flags=dict.fromkeys((ROLES["q"], ROLES["k"], ROLES["v"]), "use_qkv_bias"),
    ),
    "exaone4": Family(model_type="exaone4", sublayers=POST_NORMED),
    "glm4": Family(
        model_type="glm4",
        roles=ROLES | {"gate": "mlp.gate_up_proj.gate", "up": "mlp.gate_up_proj.up"},
        joined={"mlp.gate_up_proj": False},
        sublayers={
            "attention": replace(SUBLAYERS["attention"], norm="post_self_attn_layernorm"),
            "ffn": replace(SUBLAYERS["ffn"], norm="post_mlp_layernorm"),
        },
        bias_flags=QKV_BIAS,
    ),
    "gpt_neox": Family(
        model_type="gpt_neox",
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
        stored_head="embed_out",
        ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
        roles=NEOX | {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        joined={"attention.query_key_value": True},
        sublayers=WITHOUT_GATE | {"attention": replace(SUBLAYERS["attention"], module="attention")},
        parallel="use_parallel_residual",
        bias_flags={"attention.": "attention_bias"},
    ),
    "qwen3_next": hybrid("qwen3_next"),
    "qwen3_5_text": hybrid("qwen3_5_text"),
}


HEADED = ("ForCausalLM", "ForConditionalGeneration")
"""Endings of the classes of transformers that have an output head."""


def find_family(config: Mapping[str, Any]) -> Family:
    """The row for a parsed config.json. Raises UnsupportedModel with what was found and what is known."""
    found, known = config.get("model_type"), ", ".join((*FAMILIES, *WRAPPERS, "phi3", "gpt2"))
    if not is_wrapper(config) and (not isinstance(found, str) or found not in FAMILIES):
        raise UnsupportedModel(
            f"model_type {shown(found)} (architectures {shown(config.get('architectures'))}) is not known; known are {known}. "
            "docs/families.md has more of them, and docs/add-a-family.md the row that a new one takes."
        )
    text = text_of(config)
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    named = isinstance(quantization, Mapping)
    method = quantization.get("quant_method") if named else quantization
    if quantization and not (named and method == "streamlap"):
        raise UnsupportedModel(
            f"the checkpoint is quantised ({shown(method)}); wanted plain float weights. "
            "Compress the original first and quantise the result. If its weights are plain floats all the same, take "
            "quantization_config out of config.json."
        )
    if quantization and quantization.get("format_version") not in READ_VERSIONS:
        raise UnsupportedModel(
            f"quantization_config has format_version {shown(quantization.get('format_version'))}; this streamlap reads "
            f"{' and '.join(map(str, READ_VERSIONS))}. Update streamlap."
        )
    return wrapped(str(found), text["model_type"]) if is_wrapper(config) else FAMILIES[str(found)]


def wrapped(wrapper: str, text: str) -> Family:
    """The row of a wrapper whose language model has the model_type `text`."""
    row = FAMILIES[WRAPPERS[wrapper][text]]
    paths = {part: getattr(row, part).replace(row.base, DECODER, 1) for part in ("layers", "embedding", "norm")}
    return replace(row, model_type=wrapper, wraps=True, **paths)


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json describes a model with an output head, as one does that names no architecture."""
    names = config.get("architectures")
    return not isinstance(names, list) or not names or any(str(name).endswith(HEADED) for name in names)
