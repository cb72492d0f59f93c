"""The model without its weights: what config.json describes, and whether what is stored fits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from streamlap.errors import CheckpointError, UnsupportedModel, whole
from streamlap.modules import PivotedLinear, swap_modules
from streamlap.store.header import TensorInfo

COMPUTE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What a layer may be computed and stored in; "auto" is the checkpoint's dtype where the device is fast in it, else float32."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises CheckpointError when there is none or it is not a JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; wanted a checkpoint folder with a config.json.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}; wanted a JSON object.")
    return config


def meta_model(folder: Path) -> nn.Module:
    """The model that config.json describes, without weights. Raises CheckpointError where it describes none."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        return model.eval()
    except Exception as error:  # whatever transformers makes of a config that is out of range
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model: {whole(error)}") from error


def swapped(model: nn.Module, rows: Any) -> dict[str, nn.Linear]:
    """Put what an earlier compression made in its place; gives the linears that stood there, by path."""
    try:
        return swap_modules(model, rows)
    except (AttributeError, ValueError, TypeError) as error:
        raise CheckpointError(f"quantization_config.modules in config.json does not fit the model: {error}") from error


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
