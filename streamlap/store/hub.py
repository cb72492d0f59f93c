"""Hub ids -> local folders. Only safetensors, JSON, tokenizer and text files are fetched, never pickles or code.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured by huggingface_hub itself.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from streamlap.errors import CheckpointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
FETCHED = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.*", "*.jinja", "*.md", "LICENSE*",
           "NOTICE*", "USE_POLICY*"]  # fmt: skip


def model_name(model: str) -> str:
    """What to call a model in public: its hub id, or the bare name of its folder."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def local_folder(model: str) -> Path:
    """The folder `model` itself, or the snapshot of `org/name[@revision]` in the hub's cache, fetched where it is absent.

    Raises CheckpointError when it is neither, or cannot be reached.
    """
    if Path(model).is_dir():
        return Path(model)
    if not HUB_ID.fullmatch(model) or Path(model).exists():
        raise CheckpointError(f"{model} is not a folder; wanted a checkpoint folder or a hub id like org/name.")
    name, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=FETCHED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model} is not a local folder, and no hub id that the hub gives: {reason}") from error
