"""Open an output folder as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from streamlap.errors import CheckpointError, shown
from streamlap.families.opening import SHORT_DTYPES, check_alone, read_config
from streamlap.loader import hf_plugin as hf_plugin
from streamlap.loader import modeling_nas as modeling_nas
from streamlap.output.folder import loader_of
from streamlap.store.hub import local_folder
from streamlap.untrusted.paths import check_folder


def load(model: str | Path, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` with the loader registered, or that of another class where the model has another
    task: the one that the card names. `options` are passed on (dtype, device_map, ...). A dtype may be short, like bf16.

    Unless they say otherwise, no code of the folder runs and no pickle is opened. Raises CheckpointError for links out of the
    folder.
    """
    folder = local_folder(model)
    check_folder(folder)
    check_config(folder)
    safe = {"trust_remote_code": False, "use_safetensors": True}
    if isinstance(dtype := options.get("dtype"), str):
        options["dtype"] = SHORT_DTYPES.get(dtype.lower(), dtype)
    task: Any = getattr(transformers, loader_of(read_config(folder)))
    loaded: PreTrainedModel = task.from_pretrained(folder, **(safe | options))
    return loaded


def check_config(folder: Path) -> None:
    """Raise CheckpointError where config.json would have transformers fetch kernels, or an adapter lies beside it."""
    raw = read_config(folder)
    parts = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    for key, value in ((key, value) for part in parts for key, value in part.items()):
        if key.endswith("_implementation") and "/" in str(value):
            raise CheckpointError(
                f"config.json has {shown(key)[1:-1]} {shown(value)}, code on a hub; wanted none. Take the key out, and name an "
                "implementation that you trust as an argument."
            )
    check_alone(folder)
