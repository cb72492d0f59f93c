"""What a checkpoint is opened with: what config.json describes, on the `meta` device, and whether what is stored fits it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from streamlap.errors import CheckpointError, RecipeError, UnsupportedModel, few, one_line, shown
from streamlap.families.fused import as_stored_apart
from streamlap.families.names import ModelTensors
from streamlap.families.table import Family, is_language_model
from streamlap.families.wrappers import DECODER, WRAPPERS
from streamlap.loader.linears import PivotedLinear
from streamlap.loader.modules import carriers, disk_name, swap_modules
from streamlap.store.foreign import ADAPTER
from streamlap.store.header import TensorInfo
from streamlap.store.source import TensorSource
from streamlap.untrusted.paths import CONFIG_BYTES, read_object

COMPUTE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What a layer may be computed in; "auto" is the checkpoint's dtype where the device is fast in it, else float32."""
SHORT_DTYPES = {
    "fp32": "float32", "f32": "float32", "float": "float32", "fp16": "float16", "f16": "float16", "half": "float16",
    "bf16": "bfloat16",
}  # fmt: skip
"""What else they are called."""
STORED_DTYPES = {*COMPUTE_DTYPES.values(), torch.float64}
"""What weights may be stored in. No device is fast in float64, so it is never computed in."""

logger = logging.getLogger(__name__)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as transformers takes it: a mistral with `layer_types` is a ministral, whose layers heed them. A phi3 is what
    it is but for its fused matrices, and a gpt2 is an opt, see `fused`.

    Raises CheckpointError when there is none or it is not a JSON object.
    """
    raw = as_stored_apart(read_object(folder, "config.json", CONFIG_BYTES))
    alternating = raw.get("model_type") == "mistral" and "layer_types" in raw
    return raw | {"model_type": "ministral"} if alternating else raw


def check_alone(folder: Path) -> None:
    """Raise CheckpointError for a folder with an adapter, which transformers would put onto the weights."""
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder} has an {ADAPTER}; wanted a model alone. Merge the adapter with peft, or take its files away."
        )


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config`, without weights, of transformers' own classes; of a wrapper only what text goes through."""
    wrapper = config.model_type in WRAPPERS
    classes: Any = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = classes.from_config(config, trust_remote_code=False)
    model.eval()  # type: ignore[no-untyped-call]
    if wrapper:
        base, _, decoder = DECODER.partition(".")
        whole = model.get_submodule(base)
        for name in [name for name, _ in whole.named_children() if name != decoder]:
            delattr(whole, name)
    return model


def head_dim_of(attention: Any) -> int:
    """Numbers in one head of an attention module."""
    return int(getattr(attention, "head_dim", None) or attention.head_size)


def joined_table(model: nn.Module, family: Family) -> dict[str, dict[str, int]]:
    """Path in the model of each matrix that holds several linears -> its row, see `loader.modules`."""
    table, attention = {}, family.sublayers["attention"].module
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for path, row in family.joined_rows.items():
            turns = {"head_dim": head_dim_of(layer.get_submodule(str(attention)))} if family.joined[path] else {}
            table[f"{family.layers}.{index}.{path}"] = row | turns
    return table


def module_table(
    raw: Mapping[str, Any], family: Family, depth: int, joined: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """quantization_config.modules of a folder that streamlap wrote, else nothing; linears of decoder layers alone, and either
    all matrices of `joined` or none."""
    rows = (raw.get("quantization_config") or {}).get("modules", {})
    known = {f"{family.layers}.{index}.{path}" for index in range(depth) for path in family.paths} | joined.keys()
    faulty = [path for path in rows if path not in known or not isinstance(rows[path], dict)] if rows else []
    faulty = faulty or [path for path in rows if "parts" in rows[path] and path not in joined]
    if isinstance(rows, dict) and not faulty and (given := rows.keys() & joined.keys()):
        faulty = [path for path in given if rows[path] != joined[path]]
        if lacking := sorted(joined.keys() - rows.keys()):
            raise CheckpointError(
                f"quantization_config.modules in config.json has no row for {lacking[0]}; wanted "
                f"{shown(dict(joined[lacking[0]]))} there, as for {min(given)}."
            )
    if not isinstance(rows, dict) or faulty:
        row = f" {shown(faulty[0])}: {shown(rows[faulty[0]])}" if isinstance(rows, dict) else f": {shown(rows)}"
        raise CheckpointError(
            f"quantization_config.modules in config.json has{row}; wanted linears of the {depth} decoder layers, with a "
            'row like {"rank": 7} for each.'
        )
    return rows


def parse_dtype(name: str | torch.dtype) -> str:
    """auto, or a compute dtype as people write it (bf16, BF16, torch.bfloat16) -> auto, or its key in COMPUTE_DTYPES.

    Raises RecipeError for any other.
    """
    word = str(name).strip().lower().removeprefix("torch.") if isinstance(name, str | torch.dtype) else ""
    word = SHORT_DTYPES.get(word, word)
    if word not in ("auto", *COMPUTE_DTYPES):
        raise RecipeError(
            f"dtype is {shown(name)}; wanted one of auto, {', '.join(COMPUTE_DTYPES)}, or short fp32, fp16, bf16."
        )
    return word


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 by itself; where it does not, float32 is several times faster."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def compute_dtype(name: str, stored: torch.dtype, fast: bool) -> torch.dtype:
    """What layers are computed in; `fast`, whether the device is fast in the dtype that they are stored in."""
    name = parse_dtype(name)
    if name != "auto":
        return COMPUTE_DTYPES[name]
    return stored if fast and stored in COMPUTE_DTYPES.values() else torch.float32


def swapped(model: nn.Module, rows: Mapping[str, Mapping[str, int]]) -> dict[str, nn.Linear]:
    """Put what an earlier compression made in its place; gives the linears that stood there, by path."""
    try:
        return swap_modules(model, rows)
    except (AttributeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"quantization_config.modules in config.json does not fit the model: {one_line(str(error))}"
        ) from error


def check_tensor(info: TensorInfo, wanted: torch.Tensor) -> None:
    """Whether a stored tensor is what the model on meta has in its place."""
    if info.shape != tuple(wanted.shape):
        raise CheckpointError(
            f"tensor {info.name!r} in {info.path.name} has shape {list(info.shape)}; config.json wants {list(wanted.shape)}."
        )
    if not wanted.is_floating_point():  # the order of a pivoted linear, and nothing else
        if info.dtype != wanted.dtype:
            raise UnsupportedModel(f"tensor {info.name!r} has dtype {info.dtype}; wanted {wanted.dtype}.")
    elif info.dtype not in STORED_DTYPES:
        raise UnsupportedModel(
            f"tensor {info.name!r} has dtype {info.dtype}; wanted float32, float16, bfloat16 or float64 weights."
        )


def checked_tensors(
    source: TensorSource, model: PreTrainedModel, family: Family, raw: Mapping[str, Any], folder: Path
) -> ModelTensors:
    """The source by the names of the model, each tensor of which was looked at. Warns of what the model has no place for."""
    parts, head, tied = carriers(model), f"{family.head}.weight", bool(model.config.tie_word_embeddings)
    wanted = {disk_name(name, parts): tensor for name, tensor in model.state_dict().items()}
    tensors = ModelTensors(source, wanted, family, tied)
    may_lack = tied or not is_language_model(raw)
    if head not in tensors and not may_lack and f"{family.embedding}.weight" in tensors:
        raise CheckpointError(
            f"tensor {head!r} is missing from {folder}, and config.json does not tie the head to the embedding; "
            "wanted one of the two. Where the model was trained with one matrix for both, set tie_word_embeddings to true."
        )
    for name, tensor in wanted.items():
        if name != head or not may_lack or head in tensors:
            check_tensor(tensors.info(name), tensor)
    if tensors.unused:
        depth = model.config.get_text_config().num_hidden_layers
        logger.warning("%s: tensors that the %d-layer %s of config.json has no place for are not read (%d in all): %s.",
                       folder, depth, family.model_type, len(tensors.unused), few(tensors.unused))  # fmt: skip
    return tensors


def check_orders(root: nn.Module, name: str) -> None:
    """Raise CheckpointError where a pivoted linear in `root`, which the checkpoint calls `name`, has no usable order."""
    for path, module in root.named_modules(prefix=name):
        if isinstance(module, PivotedLinear) and not module.has_permutation():
            raise CheckpointError(
                f"tensor '{path}.order' is no permutation of its numbers; wanted one. Copy its shard again."
            )
