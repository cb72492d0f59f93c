#!/usr/bin/env python
"""A checkpoint folder with the true shapes of a public model and made-up weights, for measurements at full size.

    python scripts/make_synthetic_checkpoint.py OUT --shape llama-3-8b [--layers 2] [--dtype bfloat16] [--shard-size 4GB]
    python scripts/make_synthetic_checkpoint.py OUT --shape llama-3-405b --headers-only

config.json holds the published hyperparameters; tensors have their Hugging Face names, in module order, and fill one shard
after another, so that a layer may begin in one and end in the next. The folder has no tokenizer. The weights are made one
block of rows at a time and go straight to the disk:

    W = rows * (low-rank part + noise) * columns

The noise is a window of one random pool with the signs of its columns flipped at random, so that it costs no new random
numbers. The low-rank part makes the singular values fall. Rows and columns have scales of their own; those of the residual
stream are the same in every matrix that writes to it, with a few outlier channels, and those of an FFN channel are the same
in gate, up and down. Matrices that write to the residual stream are the smaller the deeper the published model is; where a
norm comes behind them, that norm's gain is.

The same shape, seed, dtype and --scale-down give the same weights for a layer whatever --layers says. --scale-down K divides
the widths by about K, for tests. An OUT that this command has already finished is left as it is.

With --headers-only the shards have their true headers and sizes, and holes where the weights would be, which take no room on
the disk and read as zeros. That is enough for `streamlap plan`.

Shape suffixes: O rows, I columns, R rank.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamlap.store.header import DTYPE_NAMES, byte_view
from streamlap.store.shards import INDEX_NAME
from streamlap.store.sink import durable, write_durably

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

COMMON: Config = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": True,
}
SILU: Config = {"hidden_act": "silu"}
LLAMA: Config = SILU | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
}
LLAMA_2 = LLAMA | {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3 = LLAMA | {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
QWEN_25 = SILU | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "max_window_layers": 64,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
QWEN_3 = SILU | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "max_window_layers": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
GEMMA_3: Config = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 168,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000.0,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PHI_4 = SILU | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rope_scaling": None,
    "rope_theta": 250000.0,
    "sliding_window": None,
    "bos_token_id": 100257,
    "eos_token_id": 100265,
    "pad_token_id": 100349,
}
OLMO_2 = SILU | {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "attention_bias": False,
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "eos_token_id": 100257,
    "pad_token_id": 100277,
}
MISTRAL_SMALL_3 = SILU | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 128,
    "vocab_size": 131072,
    "max_position_embeddings": 32768,
    "rope_theta": 100000000.0,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: dict[str, Config] = {
    "llama-2-7b": COMMON | LLAMA_2 | _sizes(4096, 11008, 32, 32, 32),
    "llama-3-8b": COMMON | LLAMA_3 | _sizes(4096, 14336, 32, 32, 8),
    "llama-2-13b": COMMON | LLAMA_2 | _sizes(5120, 13824, 40, 40, 40),
    "phi-4": COMMON | PHI_4 | _sizes(5120, 17920, 40, 40, 10),
    "mistral-small-3": COMMON | MISTRAL_SMALL_3 | _sizes(5120, 32768, 40, 32, 8),
    "gemma-3-27b": COMMON | GEMMA_3 | _sizes(5376, 21504, 62, 32, 16),
    "olmo-2-32b": COMMON | OLMO_2 | _sizes(5120, 27648, 64, 40, 8),
    "qwen2.5-32b": COMMON | QWEN_25 | _sizes(5120, 27648, 64, 40, 8),
    "qwen3-32b": COMMON | QWEN_3 | _sizes(5120, 25600, 64, 64, 8),
    "llama-3-70b": COMMON | LLAMA_3 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3-405b": COMMON | LLAMA_3 | _sizes(16384, 53248, 126, 128, 8),
}
"""config.json as published, less torch_dtype and transformers_version; of gemma-3-27b that of its language model."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

BLOCK = 1 << 21
"""Numbers in memory at a time. Part of the recipe: another block gives other weights."""
POOL = BLOCK * 4
RANK = 64
DECAY = 0.5
"""The singular values of the low-rank part fall like 1 / k**DECAY, those of the whole a little less steeply."""

OUTLIERS_PER = 1024
OUTLIER_SCALE = 10.0
OUTLIER_NORM = 0.4
"""One residual channel of 1024 is 10 times as large as the others; norms bring it down to 4 times."""
NORM_SPREAD = 0.1
BIAS_STD = 0.5


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the matrices of one kind look like."""

    gain: float
    """rms of the output for independent inputs of rms 1; what writes to the residual stream is divided by its depth."""
    signal: float
    """Share of the energy that lies in the low-rank part."""
    rows: float = 0.3
    columns: float = 0.3
    """Standard deviations of the logarithms of the scales."""


KINDS = {
    "embed_tokens": Kind(gain=0.02, signal=0.3, rows=0.1),
    "q_proj": Kind(gain=1.5, signal=0.7, columns=0.5),
    "k_proj": Kind(gain=1.5, signal=0.7, columns=0.5),
    "v_proj": Kind(gain=1.0, signal=0.4),
    "o_proj": Kind(gain=3.0, signal=0.4),
    "gate_proj": Kind(gain=1.0, signal=0.3),
    "up_proj": Kind(gain=1.0, signal=0.3),
    "down_proj": Kind(gain=4.0, signal=0.3),
    "lm_head": Kind(gain=1.0, signal=0.3, rows=0.1),
}
WRITERS = ("o_proj", "down_proj")
GATES = ("gate_proj", "up_proj")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": GATES}
"""A matrix of phi3 -> those whose rows it holds, in order."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
NORMS = {
    "gemma3_text": ("input_layernorm", POST_NORMS[0], "pre_feedforward_layernorm", POST_NORMS[1]),
    "olmo2": POST_NORMS,
}
"""model_type -> norms of a layer, where there are norms behind its sub-layers."""
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
"""Those of all others."""


def scaled_down(config: Config, factor: int) -> Config:
    """The same architecture with widths divided by about `factor`: fewer heads of 128, then narrower ones, never below 8.

    Queries per key stay, and so do two key-value heads. A head_dim of its own follows the width that a head has of the hidden
    states.
    """
    if factor == 1:
        return config
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    kv_heads = max(2, config["num_key_value_heads"] // factor)
    heads = kv_heads * group
    vocabulary = max(64, config["vocab_size"] // factor)
    before, width = (
        config["hidden_size"] // config["num_attention_heads"],
        _eights(config["hidden_size"] // factor // heads),
    )
    small = {
        "hidden_size": heads * width,
        "intermediate_size": _eights(config["intermediate_size"] // factor),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }
    if "head_dim" in config:
        small["head_dim"] = _eights(config["head_dim"] * width // before)
    if "query_pre_attn_scalar" in config:
        small["query_pre_attn_scalar"] = width
    ends = {"bos_token_id": vocabulary - 2}
    small |= {name: min(config[name], ends.get(name, vocabulary - 1)) for name in TOKENS if name in config}
    return config | small


def _eights(width: int) -> int:
    return max(8, width // 8 * 8)


def tensor_shapes(config: Config) -> Shapes:
    """Every tensor of the checkpoint, in module order."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in _layer_shapes(config).items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (vocabulary, hidden)}


def _layer_shapes(config: Config) -> Shapes:
    hidden, ffn, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    reads = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    gates = dict.fromkeys(GATES, ffn)
    if kind == "phi3":
        reads, gates = {"qkv_proj": queries + 2 * keys}, {"gate_up_proj": 2 * ffn}
    shapes: Shapes = {}
    for name, width in reads.items():
        shapes[f"self_attn.{name}.weight"] = (width, hidden)
        if kind == "qwen2":
            shapes[f"self_attn.{name}.bias"] = (width,)
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    if kind in ("qwen3", "gemma3_text", "olmo2"):  # olmo2's are over all heads together
        of_q, of_k = (queries, keys) if kind == "olmo2" else (head, head)
        shapes |= {"self_attn.q_norm.weight": (of_q,), "self_attn.k_norm.weight": (of_k,)}
    shapes |= {f"mlp.{name}.weight": (width, hidden) for name, width in gates.items()}
    shapes["mlp.down_proj.weight"] = (hidden, ffn)
    return shapes | {f"{name}.weight": (hidden,) for name in NORMS.get(kind, PRE_NORMS)}


def parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


class Weights:
    """Any tensor of the checkpoint by name, block by block. `depth` is that of the published model.

    Args: kind, the model_type, which says where norms are and what they add to the stored weight.
    """

    def __init__(self, hidden: int, depth: int, seed: int, dtype: torch.dtype, kind: str = "llama") -> None:
        self.depth, self.seed, self.dtype, self.kind = depth, seed, dtype, kind
        self._pool = torch.randn(POOL, generator=self._generator("pool"))
        self._outliers = torch.randperm(hidden, generator=self._generator("outliers"))[: max(1, hidden // OUTLIERS_PER)]

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The tensor from its first row to its last, at most `BLOCK` numbers or one row at a time."""
        module = name.split(".")[-2]
        if module in FUSED and len(shape) == 2:
            for part, rows in zip(FUSED[module], _part_rows(module, *shape), strict=True):
                yield from self._matrix(name.replace(module, part), rows, shape[1])
        elif len(shape) == 2:
            yield from self._matrix(name, *shape)
        else:
            yield self._vector(name, shape[0]).to(self.dtype)

    def _generator(self, what: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _scales(self, what: str, width: int, spread: float) -> torch.Tensor:
        """Positive numbers of mean square 1; the same for the same `what`."""
        scales = torch.exp(spread * torch.randn(width, generator=self._generator(what)))
        if what == "residual":
            scales[self._outliers] = OUTLIER_SCALE
        return scales / scales.square().mean().sqrt()

    def _vector(self, name: str, width: int) -> torch.Tensor:
        if name.endswith("bias"):
            return BIAS_STD * torch.randn(width, generator=self._generator(name))
        norm, module = torch.exp(NORM_SPREAD * torch.randn(width, generator=self._generator(name))), name.split(".")[-2]
        if module not in ("q_norm", "k_norm"):
            norm[self._outliers] = OUTLIER_NORM
        if self.kind in NORMS and module in POST_NORMS:
            norm /= math.sqrt(2 * self.depth)
        return norm - 1 if self.kind == "gemma3_text" else norm

    def _axes(self, name: str) -> tuple[str, str]:
        """What the scales of rows and columns belong to; axes that name the same thing have the same scales."""
        owner, module = name.removesuffix(".weight").rpartition(".")[::2]
        rows, columns = f"{name} rows", f"{name} columns"
        rows = "residual" if module in WRITERS else f"{owner} channels" if module in GATES else rows
        columns = "residual" if module == "embed_tokens" else f"{owner} channels" if module == "down_proj" else columns
        return rows, columns

    def _gain(self, module: str, columns: int) -> float:
        """What a matrix of unit variance is multiplied by."""
        gain = KINDS[module].gain / (1 if module == "embed_tokens" else math.sqrt(columns))
        return gain / math.sqrt(2 * self.depth) if module in WRITERS else gain

    def _low_rank(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """The right factor, of mean square 1 / rank on the whole; a left factor of unit variance keeps the product at 1."""
        rank = max(1, min(RANK, rows // 4, columns // 4))
        spectrum_R = torch.arange(1, rank + 1) ** -DECAY
        right_RI = torch.randn(rank, columns, generator=self._generator(f"{name} right"))
        return right_RI * (spectrum_R / spectrum_R.norm())[:, None]

    def _matrix(self, name: str, rows: int, columns: int) -> Iterator[torch.Tensor]:
        module = name.split(".")[-2]
        kind, (row_axis, column_axis) = KINDS[module], self._axes(name)
        scale_O = self._gain(module, columns) * self._scales(row_axis, rows, kind.rows)
        scale_I = self._scales(column_axis, columns, kind.columns)
        right_RI = math.sqrt(kind.signal) * self._low_rank(name, rows, columns)
        for rows_O in torch.arange(rows).split(max(1, BLOCK // columns)):
            generator = self._generator(f"{name} {int(rows_O[0])}")
            left_OR = torch.randn(len(rows_O), len(right_RI), generator=generator)
            signs_I = torch.randint(2, (columns,), generator=generator) * 2.0 - 1.0
            noise_OI = self._window(len(rows_O), columns, generator)
            # The signs go into the low-rank part as well, so that they cancel there and flip the noise alone.
            w_OI = torch.addmm(noise_OI, left_OR, right_RI * signs_I, beta=math.sqrt(1 - kind.signal))
            yield w_OI.mul_(scale_I * signs_I).mul_(scale_O[rows_O, None]).to(self.dtype)

    def _window(self, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
        start = int(torch.randint(POOL - rows * columns + 1, (), generator=generator))
        return self._pool[start : start + rows * columns].view(rows, columns)


def _part_rows(module: str, rows: int, columns: int) -> list[int]:
    """Rows of the parts of a fused matrix: q is square, k and v share the rest; gate and up are equal."""
    return [columns] + [(rows - columns) // 2] * 2 if module == "qkv_proj" else [rows // 2] * 2


@dataclass(frozen=True, kw_only=True)
class Shard:
    name: str
    header: bytes
    shapes: Shapes
    nbytes: int


def plan_shards(shapes: Shapes, dtype: torch.dtype, limit: int, note: str) -> list[Shard]:
    """Fill shards in order up to `limit` bytes of data; a tensor is never split, so a larger one has a shard of its own."""
    groups: list[Shapes] = [{}]
    room = limit
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > room and groups[-1]:
            groups.append({})
            room = limit
        groups[-1][name] = shape
        room -= nbytes
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [_shard(name, group, dtype, note) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, shapes: Shapes, dtype: torch.dtype, note: str) -> Shard:
    """All of the file but its data; `note` is kept in the header."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", "synthetic": note}}
    offset = 0
    for tensor, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        table[tensor] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    header = len(raw).to_bytes(8, "little") + raw
    return Shard(name=name, header=header, shapes=shapes, nbytes=len(header) + offset)


def write_shard(folder: Path, shard: Shard, weights: Weights) -> None:
    with durable(folder / shard.name, shard.nbytes) as file:
        file.write(shard.header)
        for name, shape in shard.shapes.items():
            for block in weights.blocks(name, shape):
                file.write(byte_view(block))


def small_files(config: Config, shards: list[Shard], itemsize: int) -> dict[str, bytes]:
    """The index, generation_config.json and, last, config.json, which makes the folder a checkpoint."""
    weight_map = {name: shard.name for shard in shards for name in shard.shapes}
    count = sum(parameters(shard.shapes) for shard in shards)
    index = {
        "metadata": {"total_parameters": count, "total_size": count * itemsize},
        "weight_map": dict(sorted(weight_map.items())),
    }
    generation = {"_from_model_config": True} | {name: config[name] for name in TOKENS[:2] if name in config}
    files = {INDEX_NAME: index, "generation_config.json": generation, "config.json": dict(sorted(config.items()))}
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}


def is_complete(folder: Path, shards: list[Shard], files: dict[str, bytes]) -> bool:
    """Whether the folder is what this very command writes, by headers, sizes and the small files."""
    for name, content in files.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            return False
    return all(_is_written(folder / shard.name, shard) for shard in shards)


def _is_written(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


def require_room(folder: Path, wanted: int) -> None:
    ancestor = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(ancestor).free
    if free < wanted:
        raise SystemExit(
            f"the checkpoint takes {wanted:,} bytes, and {free:,} are free under {ancestor}. "
            "Free some space, choose another folder, or give fewer --layers."
        )


def make(
    folder: Path,
    shape: str,
    *,
    layers: int | None = None,
    dtype: str = "bfloat16",
    shard_bytes: int = 4 * 10**9,
    seed: int = 0,
    scale_down: int = 1,
) -> tuple[int, int]:
    """Write the checkpoint, or leave a finished one; returns its parameters and the bytes of its shards."""
    published = SHAPES[shape]
    config = scaled_down(published, scale_down) | {"torch_dtype": dtype}
    config["num_hidden_layers"] = layers or published["num_hidden_layers"]
    note = f"{shape}, seed {seed}, scale-down {scale_down}"
    shards = plan_shards(tensor_shapes(config), DTYPES[dtype], shard_bytes, note)
    files = small_files(config, shards, DTYPES[dtype].itemsize)
    total = sum(shard.nbytes for shard in shards)
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder; choose another.")
    if is_complete(folder, shards, files):
        print(f"{folder} is complete already", file=sys.stderr)
    elif folder.is_dir() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds something else or part of a checkpoint; delete it or choose another folder.")
    else:
        require_room(folder, total + sum(map(len, files.values())))
        sizes = config["hidden_size"], published["num_hidden_layers"]
        write(folder, shards, files, Weights(*sizes, seed, DTYPES[dtype], config["model_type"]))
    return sum(parameters(shard.shapes) for shard in shards), total


def write_header(path: Path, shard: Shard) -> None:
    """The file of a shard with a hole in place of its data; one that is there stays as it is."""
    if not path.exists():
        with path.open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)


def make_headers(folder: Path, shape: str, layers: int | None = None, dtype: str = "bfloat16") -> tuple[int, int]:
    """Write the checkpoint without weights, or leave a finished one; returns what `make` returns."""
    config = SHAPES[shape] | {"torch_dtype": dtype}
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    shards = plan_shards(tensor_shapes(config), DTYPES[dtype], 4 * 10**9, f"{shape}, no weights")
    files = small_files(config, shards, DTYPES[dtype].itemsize)
    if folder.exists() and not is_complete(folder, shards, files):
        raise SystemExit(f"{folder} holds something else; delete it or choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        write_header(folder / shard.name, shard)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sum(parameters(shard.shapes) for shard in shards), sum(shard.nbytes for shard in shards)


def write(folder: Path, shards: list[Shard], files: dict[str, bytes], weights: Weights) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        start = time.perf_counter()
        write_shard(folder, shard, weights)
        print(f"{shard.name}  {shard.nbytes:,} bytes  {time.perf_counter() - start:.1f} s", file=sys.stderr)
    for name, content in files.items():
        write_durably(folder / name, content)


def size(text: str) -> int:
    """Bytes of "4GB", "500 MB", "1GiB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if not match or match[2] not in SIZE_UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; wanted one such as 4GB or 500MB")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; wanted 1 or more")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=positive, help="decoder layers; as many as the published model by default")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shard-size", type=size, default="4GB", help="most bytes of tensors in a shard (4GB)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale-down", type=positive, default=1, metavar="K", help="divide the widths by K")
    parser.add_argument("--headers-only", action="store_true", help="no weights: holes that take no disk")
    args = parser.parse_args()
    start = time.perf_counter()
    settings = {"layers": args.layers, "dtype": args.dtype, "shard_bytes": args.shard_size, "seed": args.seed}
    if args.headers_only:
        count, total = make_headers(args.out, args.shape, args.layers, args.dtype)
    else:
        count, total = make(args.out, args.shape, **settings, scale_down=args.scale_down)
    print(f"{args.out}  {count:,} parameters  {total:,} bytes  {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
