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
in gate, up and down. Matrices that write to the residual stream are the smaller the deeper the published model is.

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
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": True,
}
LLAMA: Config = {
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
QWEN_25 = {
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
    "qwen2.5-32b": COMMON | QWEN_25 | _sizes(5120, 27648, 64, 40, 8),
    "llama-3-70b": COMMON | LLAMA_3 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3-405b": COMMON | LLAMA_3 | _sizes(16384, 53248, 126, 128, 8),
}
"""config.json as published, less torch_dtype and transformers_version."""

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


def scaled_down(config: Config, factor: int) -> Config:
    """The same architecture with widths divided by about `factor`: fewer heads of 128, then narrower ones, never below 8.

    Queries per key stay, and so do two key-value heads.
    """
    if factor == 1:
        return config
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    kv_heads = max(2, config["num_key_value_heads"] // factor)
    heads = kv_heads * group
    vocabulary = max(64, config["vocab_size"] // factor)
    return config | {
        "hidden_size": heads * _eights(config["hidden_size"] // factor // heads),
        "intermediate_size": _eights(config["intermediate_size"] // factor),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "bos_token_id": min(config["bos_token_id"], vocabulary - 2),
        "eos_token_id": min(config["eos_token_id"], vocabulary - 1),
    }


def _eights(width: int) -> int:
    return max(8, width // 8 * 8)


def tensor_shapes(config: Config) -> Shapes:
    """Every tensor of the checkpoint, in module order."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in _layer_shapes(config).items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _layer_shapes(config: Config) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {}
    for name, width in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
        shapes[f"self_attn.{name}.weight"] = (width, hidden)
        if config["model_type"] == "qwen2":
            shapes[f"self_attn.{name}.bias"] = (width,)
    return shapes | {
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


class Weights:
    """Any tensor of the checkpoint by name, block by block. `depth` is that of the published model."""

    def __init__(self, hidden: int, depth: int, seed: int, dtype: torch.dtype) -> None:
        self.depth, self.seed, self.dtype = depth, seed, dtype
        self._pool = torch.randn(POOL, generator=self._generator("pool"))
        self._outliers = torch.randperm(hidden, generator=self._generator("outliers"))[: max(1, hidden // OUTLIERS_PER)]

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The tensor from its first row to its last, at most `BLOCK` numbers or one row at a time."""
        if len(shape) == 2:
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
        norm = torch.exp(NORM_SPREAD * torch.randn(width, generator=self._generator(name)))
        norm[self._outliers] = OUTLIER_NORM
        return norm

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
    generation = {"_from_model_config": True} | {name: config[name] for name in ("bos_token_id", "eos_token_id")}
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
        write(
            folder, shards, files, Weights(config["hidden_size"], published["num_hidden_layers"], seed, DTYPES[dtype])
        )
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
