"""Compressed folders put together by hand, tensor by tensor, so that nothing under test has written what it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from streamlap.loader.linears import LowRankLinear, PivotedLinear
from streamlap.loader.shim import write_shim

Rows = dict[str, dict[str, int]]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=16),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}
ATTENTION: Rows = {
    f"model.layers.0.self_attn.{name}_proj": {"rank": rank} for name, rank in {"q": 7, "k": 5, "v": 6, "o": 9}.items()
}
# Layer 1 is factored in other places than layer 0, and its channels have another width.
MIXED: Rows = ATTENTION | {
    "model.layers.0.mlp.gate_proj": {"out": 33},
    "model.layers.0.mlp.up_proj": {"out": 33},
    "model.layers.0.mlp.down_proj": {"in": 33},
    "model.layers.1.self_attn.v_proj": {"rank": 3},
    "model.layers.1.mlp.gate_proj": {"out": 20},
    "model.layers.1.mlp.up_proj": {"out": 20},
    "model.layers.1.mlp.down_proj": {"in": 20},
}


def all_kinds(head_dim: int) -> Rows:
    """Layer 0 has the kinds of version 2 and both of them narrowed; layer 1 lacks a group of heads and has new biases."""
    attention, mlp = "model.layers.{}.self_attn.{}_proj", "model.layers.{}.mlp.{}_proj"
    return {
        attention.format(0, "q"): {"pivots": 7},
        attention.format(0, "k"): {"pivots": 4, "groups": 2},
        attention.format(0, "v"): {"rank": 5},
        attention.format(0, "o"): {"rank": 6, "bias": 1},
        mlp.format(0, "gate"): {"pivots": 6, "groups": 3, "out": 33},
        mlp.format(0, "up"): {"pivots": 5, "out": 33},
        mlp.format(0, "down"): {"in": 33, "bias": 1},
        attention.format(1, "q"): {"out": 2 * head_dim},
        attention.format(1, "k"): {"out": head_dim},
        attention.format(1, "v"): {"out": head_dim},
        attention.format(1, "o"): {"in": 2 * head_dim, "pivots": 9, "bias": 1},
        mlp.format(1, "gate"): {"rank": 5, "bias": 1},
        mlp.format(1, "up"): {"bias": 1},
    }


# One row of each kind in an otherwise dense model.
SINGLE: dict[str, Rows] = {
    "ordered": {"model.layers.0.self_attn.o_proj": {"pivots": 7}},
    "folded": {"model.layers.0.mlp.up_proj": {"pivots": 6, "groups": 2}},
    "biased": {"model.layers.0.mlp.down_proj": {"in": 40, "bias": 1}},
}
TOKENS_BL = torch.arange(24).reshape(2, 12) * 7 % 96


class Case(NamedTuple):
    folder: Path
    reference: PreTrainedModel
    tensors: dict[str, torch.Tensor]  # as they are on disk


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS_BL).logits
    return found


def make_case(folder: Path, config: PreTrainedConfig, rows: Rows, dtype: torch.dtype = torch.float32) -> Case:
    """A native model with the listed modules replaced, and the folder that streamlap would write for it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide a lost one
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for path, row in rows.items():
        weight, bias = tensors.pop(f"{path}.weight"), tensors.pop(f"{path}.bias", None)
        weight = weight[: row.get("out"), : row.get("in")].contiguous()
        bias = torch.randn(len(weight), dtype=dtype) if "bias" in row else bias
        bias = None if bias is None else bias[: len(weight)].clone()
        parts, module = stored_parts(weight, bias, row)
        tensors |= {f"{path}.{name}": part.contiguous() for name, part in parts.items()}
        model.set_submodule(path, module)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    table = {"quant_method": "streamlap", "format_version": 2, "modules": rows}
    edit_config(folder, quantization_config=table, auto_map=write_shim(folder))
    return Case(folder, model, tensors)


def stored_parts(
    weight: torch.Tensor, bias: torch.Tensor | None, row: dict[str, int]
) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """What lies on disk for a linear of this weight, by the end of its name, and the module that computes with it."""
    dtype, biases = weight.dtype, {} if bias is None else {"bias": bias}
    if "rank" in row:
        u_OO, s_K, vh_II = torch.linalg.svd(weight.float(), full_matrices=False)
        factors = (u_OO * s_K)[:, : row["rank"]], vh_II[: row["rank"]]
        up_OR, down_RI = (factor.to(dtype).contiguous() for factor in factors)
        return {"weight": up_OR, "down.weight": down_RI, **biases}, LowRankLinear.from_factors(up_OR, down_RI, bias)
    if "pivots" in row:
        order_O = torch.randperm(len(weight)).to(torch.int32)
        pivots, others = order_O[: row["pivots"]], order_O[row["pivots"] :]
        rest_NR = (
            torch.linalg.lstsq(weight[pivots].float().T, weight[others].float().T).solution.T.to(dtype).contiguous()
        )
        stored = None if "groups" in row else order_O
        module = PivotedLinear.from_parts(weight[pivots], rest_NR, bias, stored, row.get("groups", 1))
        orders = {} if stored is None else {"order": stored}
        return {"weight": weight[pivots], "rest.weight": rest_NR, **orders, **biases}, module
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias)
    return dict(dense.state_dict()), dense


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
