"""The model without its weights: what config.json describes, and whether what is stored fits it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from streamlap.errors import CheckpointError, UnsupportedModel, one_line, shown, whole
from streamlap.families.table import Family
from streamlap.loader.linears import PivotedLinear
from streamlap.loader.modules import swap_modules
from streamlap.store.header import TensorInfo
from streamlap.untrusted.paths import CONFIG_BYTES, read_object

COMPUTE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What a layer may be computed and stored in; "auto" is the checkpoint's dtype where the device is fast in it, else float32."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises CheckpointError when there is none or it is not a JSON object."""
    return read_object(folder, "config.json", CONFIG_BYTES)


def meta_model(config: PreTrainedConfig, folder: Path) -> nn.Module:
    """The model of `config`, without weights, of transformers' own classes. Raises CheckpointError where there is none."""
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
        return model.eval()
    except Exception as error:  # whatever transformers makes of a config that is out of range
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model: {whole(error)}") from error


def module_table(raw: Mapping[str, Any], family: Family, depth: int) -> dict[str, dict[str, int]]:
    """quantization_config.modules of a folder that streamlap wrote, else nothing; linears of decoder layers alone."""
    rows = (raw.get("quantization_config") or {}).get("modules", {})
    known = {f"{family.layers}.{index}.{path}" for index in range(depth) for path in family.linears}
    faulty = [path for path in rows if path not in known or not isinstance(rows[path], dict)] if rows else []
    if not isinstance(rows, dict) or faulty:
        row = f" {shown(faulty[0])}: {shown(rows[faulty[0]])}" if isinstance(rows, dict) else f": {shown(rows)}"
        raise CheckpointError(
            f"quantization_config.modules in config.json has{row}; wanted linears of the {depth} decoder layers, with a "
            'row like {"rank": 7} for each.'
        )
    return rows


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
    elif info.dtype not in COMPUTE_DTYPES.values():
        raise UnsupportedModel(
            f"tensor {info.name!r} has dtype {info.dtype}; wanted float32, float16 or bfloat16 weights."
        )


def check_orders(root: nn.Module, name: str) -> None:
    """Raise CheckpointError where a pivoted linear in `root`, which the checkpoint calls `name`, has no usable order."""
    for path, module in root.named_modules(prefix=name):
        if isinstance(module, PivotedLinear) and not module.has_permutation():
            raise CheckpointError(f"tensor '{path}.order' is no permutation of its numbers. Fetch it again.")
