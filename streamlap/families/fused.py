"""Checkpoints that store the linears of a known architecture otherwise: several in one matrix, or transposed.

A phi3 is a llama, or where it has a window a mistral, whose q, k, v are the rows of one matrix and whose gate, up are those of
another. It is read as what it is: config.json says llama, and each part of a matrix is a tensor of its own, at its place in the
file. So a result has no fused matrix, and opens wherever a llama does.

A gpt2 is an opt by other names: q, k, v are columns of one matrix, all matrices of its layers are stored [in, out], and its
positions begin at row 0 of their table, not at row 2. So a result is an opt, with two rows of zeros before the positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from streamlap.errors import CheckpointError, UnsupportedModel, shown
from streamlap.families.table import Family
from streamlap.store.header import TensorInfo
from streamlap.store.source import TensorSource, read_tensor

PHI3 = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
"""What config.json of a phi3 may leave out, where a llama has another default."""
LEFT_BEHIND = ("auto_map", "architectures", "original_max_position_embeddings", "partial_rotary_factor", "rope_scaling")
PHI3_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""A matrix in a layer -> the linears whose rows it holds, in order."""


GPT2 = {
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""The same of a gpt2."""
GPT2_PLAIN = ("layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention")
"""Keys whose default alone is that of an opt."""
GPT2_OWN = (
    "auto_map", "embd_pdrop", "n_ctx", "n_embd", "n_head", "n_inner", "n_layer", "n_positions", "reorder_and_upcast_attn",
    "resid_pdrop", "attn_pdrop", "initializer_range", *GPT2_PLAIN,
)  # fmt: skip
"""Keys that an opt has not."""
GPT2_CLASSES = {"GPT2LMHeadModel": "OPTForCausalLM"}
GPT2_NAMES = {
    "wte": "embed_tokens",
    "wpe": "embed_positions",
    "ln_f": "final_layer_norm",
    "ln_1": "self_attn_layer_norm",
    "ln_2": "final_layer_norm",
    "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.c_proj": "self_attn.out_proj",
    "mlp.c_fc": "fc1",
    "mlp.c_proj": "fc2",
}
"""Path in a gpt2, or in a layer of it -> the paths in an opt of what is there."""
GPT2_NAME = re.compile(r"(?:transformer\.)?(?:h\.(?P<index>\d{1,9})\.)?(?P<path>[\w.]+)\.(?P<leaf>weight|bias)")
GPT2_IGNORED = (".attn.bias", ".attn.masked_bias")
"""Endings of tensors that no current model reads."""
FIRST_POSITION = 2
"""Row of an opt's table of positions for the first token."""


def as_stored_apart(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json of a phi3 as that of the llama or mistral that it is, of a gpt2 as that of the opt; any other as it stands.

    Raises UnsupportedModel where it differs from these in more than names.
    """
    if raw.get("model_type") == "gpt2":
        return _as_opt(raw)
    return _as_llama(raw) if raw.get("model_type") == "phi3" else raw


def _as_llama(raw: dict[str, Any]) -> dict[str, Any]:
    rope = raw.get("rope_parameters")
    turned = {"rope_scaling": raw.get("rope_scaling"), "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0)}
    if isinstance(rope, Mapping):
        kind, part = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
        turned |= {"rope_scaling": kind if kind != "default" else turned["rope_scaling"]}
        turned |= {"partial_rotary_factor": part if part != 1.0 else turned["partial_rotary_factor"]}
    for key, plain in (("rope_scaling", None), ("partial_rotary_factor", 1.0)):
        if turned[key] != plain:
            raise UnsupportedModel(
                f"a phi3 with {key} {shown(turned[key])}; wanted {plain}, as in a llama. Take a model of another family."
            )
    kind = "llama" if raw.get("sliding_window") is None else "mistral"
    kept = {key: value for key, value in raw.items() if key not in LEFT_BEHIND}
    named = raw.get("architectures") or ["Phi3ForCausalLM"]
    classes = [str(name).replace("Phi3", kind.capitalize()) for name in named]
    heads = {"num_key_value_heads": raw.get("num_attention_heads", PHI3["num_attention_heads"])}
    said = {key: value for key, value in kept.items() if key not in heads or value is not None}
    return PHI3 | heads | said | {"model_type": kind, "architectures": classes}


def _as_opt(raw: dict[str, Any]) -> dict[str, Any]:
    gpt2 = GPT2 | raw
    for key in GPT2_PLAIN:
        if gpt2[key] != GPT2[key]:
            raise UnsupportedModel(
                f"a gpt2 with {key} {shown(gpt2[key])}; wanted {GPT2[key]}, as in an opt. Take a model of another family."
            )
    width, inner = gpt2["n_embd"], gpt2["n_inner"]
    named = raw.get("architectures") or ["GPT2LMHeadModel"]
    own = {key: value for key, value in gpt2.items() if key not in GPT2_OWN and not key.startswith("summary_")}
    return own | {
        "model_type": "opt",
        "architectures": [GPT2_CLASSES.get(str(name), str(name).replace("GPT2", "OPT")) for name in named],
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width if inner is None and type(width) is int else inner,
        "num_hidden_layers": gpt2["n_layer"],
        "num_attention_heads": gpt2["n_head"],
        "max_position_embeddings": gpt2["n_positions"],
        "dropout": gpt2["resid_pdrop"],
        "attention_dropout": gpt2["attn_pdrop"],
        "layerdrop": 0.0,
        "do_layer_norm_before": True,
    }


def read_as(source: TensorSource, family: Family) -> TensorSource:
    """A source whose tensors have the names and shapes of the family: of a gpt2 those of an opt."""
    gpt2 = family.model_type == "opt" and any(name.endswith("attn.c_attn.weight") for name in source.names())
    return ReadAsOpt(source) if gpt2 else source


@dataclass(frozen=True, kw_only=True)
class Together:
    """A matrix on the disk that holds several linears."""

    path: str
    """In the layer."""
    parts: Mapping[str, int]
    """Path of each linear -> its rows, in their order."""
    head_dim: int | None = None
    """In turns of so many rows; None where one linear follows the other."""
    marked: bool = False
    """Whether its own name stays, for a mark of one number, see `loader.linears.JoinedLinear`."""


class Placed:
    """A source some tensors of which have other names and places than another source says."""

    def __init__(self, source: TensorSource) -> None:
        self._source, self.headers = source, source.headers
        self._parts: dict[str, TensorInfo] = {}
        self._names: list[str] = []

    def add(self, part: TensorInfo) -> None:
        self._parts[part.name] = part
        self._names.append(part.name)

    def names(self) -> Iterable[str]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        return self._parts[name] if name in self._parts else self._source.info(name)

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self._parts[name]) if name in self._parts else self._source.read(name)


class ReadAsOpt(Placed):
    """A gpt2 by the names and shapes of an opt. Raises CheckpointError for a matrix that cannot be q, k and v."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__(source)
        for name in source.names():
            match = GPT2_NAME.fullmatch(name)
            if name.endswith(GPT2_IGNORED):
                continue
            if match is None or match["path"] not in GPT2_NAMES:
                self._names.append(name)
            else:
                self._rename(source.info(name), match)

    def _rename(self, info: TensorInfo, match: re.Match[str]) -> None:
        layer = "" if match["index"] is None else f"layers.{match['index']}."
        names = [f"model.decoder.{layer}{path}.{match['leaf']}" for path in GPT2_NAMES[match["path"]].split()]
        matrix, size = bool(layer) and len(info.shape) == 2, info.dtype.itemsize
        if not info.shape or info.shape[-1] % len(names):
            raise CheckpointError(
                f"tensor {info.name!r} in {info.path.name} has shape {list(info.shape)}; wanted {len(names)} equal parts."
            )
        if match["path"] == "wpe" and len(info.shape) == 2:
            blank, shape = FIRST_POSITION * info.shape[1] * size, (info.shape[0] + FIRST_POSITION, info.shape[1])
            self.add(replace(info, name=names[0], shape=shape, blank=blank))
            return
        count, row = info.shape[-1] // len(names), info.shape[-1] * size
        for place, name in enumerate(names):
            begin = info.begin + place * count * size
            if matrix:
                end, shape = info.end - row + (place + 1) * count * size, (count, info.shape[0])
                run = count * size
                self.add(
                    replace(info, name=name, shape=shape, begin=begin, end=end, run=run, step=row, transposed=True)
                )
            elif len(names) > 1:
                self.add(replace(info, name=name, shape=(count,), begin=begin, end=begin + count * size))
            else:
                self.add(replace(info, name=name))


class StoredApart(Placed):
    """A source in which linears that are stored together are tensors of their own, at their places in the file.

    Raises CheckpointError where a matrix has not as many rows.
    """

    def __init__(self, source: TensorSource, matrices: Sequence[Together]) -> None:
        super().__init__(source)
        for name in source.names():
            matrix = next((matrix for matrix in matrices if f"{matrix.path}." in name), None)
            if matrix is None:
                self._names.append(name)
            else:
                self._split(name, matrix)

    def _split(self, name: str, matrix: Together) -> None:
        info, counts = self._source.info(name), matrix.parts.values()
        if not info.shape or info.shape[0] != sum(counts):
            raise CheckpointError(
                f"tensor {name!r} in {info.path.name} has shape {list(info.shape)}; config.json wants "
                f"{' + '.join(map(str, counts))} rows."
            )
        width, begin = info.nbytes // info.shape[0], info.begin
        for part, count in matrix.parts.items():
            run = (matrix.head_dim or count) * width
            step = 0 if matrix.head_dim is None else len(matrix.parts) * run
            end = begin + (count * width // run - 1) * step + run
            shape = count, *info.shape[1:]
            apart = name.replace(matrix.path, part)
            self.add(replace(info, name=apart, shape=shape, begin=begin, end=end, run=run, step=step))
            begin += run
        if matrix.marked and name.endswith(".weight"):
            self.add(replace(info, shape=(1, 1), end=info.begin + info.dtype.itemsize))
