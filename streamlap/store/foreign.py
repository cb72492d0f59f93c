"""What people take for a checkpoint and is none: adapters, other programs' containers, single files. Each is named for what it
is, with what to do; nothing of it is opened but an adapter's config.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path

from streamlap.errors import CheckpointError, shown
from streamlap.untrusted.paths import CONFIG_BYTES, read_object

ADAPTER = "adapter_config.json"
CONFIG = "config.json"
WANTED = f"wanted a checkpoint in transformers' layout, a {CONFIG} beside safetensors"


def describe_foreign(folder: Path, files: Collection[str], place: str) -> str | None:
    """What the checkpoint `place` is where it is of another kind, and what to do; None where nothing is known of it.

    `files` are the names of its files, `folder` is where those of them lie that are here.
    """
    if ADAPTER in files:
        return f"{place} is a PEFT adapter, and no model; wanted {_merged(folder, place)}"
    if "model_index.json" in files:
        return (
            f"{place} is a diffusers pipeline (model_index.json); {WANTED}: only causal language models are compressed."
        )
    if gguf := sorted(name for name in files if name.lower().endswith(".gguf")):
        return f"{place} holds {shown(gguf[0])[1:-1]}, {_of_gguf(place, gguf[0])}"
    if "params.json" in files or any(name.startswith("consolidated.") for name in files):
        return (
            f"{place} is in the layout of its makers (params.json, consolidated.*); {WANTED}. On the hub the same model often "
            "stands in that layout too (Llama: under a name that ends in -hf); transformers has scripts that convert it."
        )
    return None


def describe_file(path: Path) -> str:
    """What is wrong with a file in the place of a folder."""
    if path.suffix.lower() == ".gguf":
        return f"{path} is {_of_gguf(str(path.parent), path.name)}"
    return f"{path} is a file; wanted the folder that holds the checkpoint. Give {shlex.quote(str(path.parent))}."


def describe_folder(folder: Path) -> str | None:
    """Where the checkpoint is that belongs to a folder without one; None where there is none, or more than one."""
    found = sorted(folder.glob("snapshots/*" if folder.name.startswith("models--") else f"*/{CONFIG}"))
    inner = [path if path.is_dir() else path.parent for path in found]
    return f"{folder} holds no {CONFIG}, and {inner[0]} does; give that folder." if len(inner) == 1 else None


def require_config(folder: Path, files: Collection[str], place: str) -> None:
    """Raise CheckpointError, with what `place` seems to be, where `files` have no config.json."""
    if CONFIG in files:
        return
    if reason := describe_foreign(folder, files, place) or describe_folder(folder):
        raise CheckpointError(reason)


def _of_gguf(folder: str, name: str) -> str:
    return (
        f"a GGUF container; {WANTED}. Take the original that it was made from, or write one: "
        f"AutoModelForCausalLM.from_pretrained({shown(folder)}, gguf_file={shown(name)}).save_pretrained(...)."
    )


def _merged(folder: Path, place: str) -> str:
    base = (
        read_object(folder, ADAPTER, CONFIG_BYTES).get("base_model_name_or_path")
        if (folder / ADAPTER).exists()
        else None
    )
    base = shown(base) if isinstance(base, str) else "its base"
    return (
        f"the two in one. Merge it into {base}: PeftModel.from_pretrained(base, {shown(place)}).merge_and_unload()"
        ".save_pretrained(...), and save the tokenizer beside."
    )
