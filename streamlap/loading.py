"""Open an output folder as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from streamlap import hf_plugin as hf_plugin
from streamlap.store.confine import check_folder
from streamlap.store.hub import local_folder


def load(model: str | Path, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` with the loader registered; `options` are passed on (dtype, device_map, ...).

    Unless they say otherwise, no code of the folder runs and no pickle is opened. Raises CheckpointError for links out of the
    folder.
    """
    folder = local_folder(str(model))
    check_folder(folder)
    safe = {"trust_remote_code": False, "use_safetensors": True}
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **(safe | options))
    return loaded
