"""Hub ids -> local folders. Only safetensors, JSON, tokenizer and text files are fetched, never pickles or code.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured by huggingface_hub itself.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from streamlap.errors import CheckpointError, RecipeError, first_line

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")

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
    return _snapshot(model, "model", FETCHED)


def text_files(name: str) -> list[Path]:
    """The file `name` itself, or the text files of the hub data set `org/name[@revision]`, in order of their names.

    A name that is neither is given back as it is: the reader says what is wrong with it.
    """
    if Path(name).exists() or not HUB_ID.fullmatch(name) or Path(name).suffix in (*TEXT_SUFFIXES, ".npy"):
        return [Path(name)]
    try:
        folder = _snapshot(name, "dataset", [f"*{suffix}" for suffix in TEXT_SUFFIXES])
    except CheckpointError as error:
        raise RecipeError(f"{error}; wanted a text file or a data set") from error
    found = sorted(path for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES)
    if not found:
        raise RecipeError(f"data set {name} has no {', '.join(TEXT_SUFFIXES)} file; wanted text to calibrate on.")
    return found


def _snapshot(hub_id: str, kind: str, patterns: list[str]) -> Path:
    name, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id} is not a folder, nor a hub id under which a {kind} can be had: {first_line(error)}"
        ) from error
