"""Everything that is checked before the first heavy second: device, output folder, recipe against shapes, disk, fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from streamlap.data.calibration import token_hash
from streamlap.errors import RecipeError
from streamlap.families.stream import ModelStream
from streamlap.output.folder import RECIPE_NAME, companions
from streamlap.recipe import Recipe
from streamlap.store.journal import JOURNAL_NAME, STATE_FOLDER, Journal
from streamlap.store.lock import OutputLock
from streamlap.store.sink import file_hash, fsync_folder, remove_file
from streamlap.store.source import data_digest
from streamlap.system.budget import existing_ancestor, require_disk
from streamlap.version import __version__

COMPANION_BYTES = 64 << 20
"""Room on the disk for what stands beside the shards and hidden states: tokenizer, report, kept channels."""


def pick_device(name: str) -> str:
    """auto, cpu, cuda or cuda:N -> a device that is there, a GPU by its number; it becomes torch's current one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise RecipeError(f"device is {name!r}; wanted auto, cpu, cuda or cuda:N.")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"device is {name!r}, and torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu."
        )
    if name.startswith("cuda"):
        name = f"cuda:{int(name[5:] or 0)}"
        torch.cuda.set_device(name)
    return name


def check_output(folder: Path, out: Path, overwrite: bool) -> None:
    """Refuse an output folder that is the input or holds something else; empty it where `overwrite` allows."""
    check_apart(folder, out)
    companions(folder)  # what cannot be copied at the end is said at the start
    entries = {path.name for path in out.iterdir()} if out.exists() else set()
    ours = STATE_FOLDER in entries or RECIPE_NAME in entries
    if overwrite and entries:
        if not ours:
            raise RecipeError(
                f"--overwrite: {out} was not written by streamlap ({min(entries)}, ...); choose another folder."
            )
        empty_output(out)
    elif entries and not Journal.exists(out) and entries != {STATE_FOLDER}:
        state = "holds a finished model" if RECIPE_NAME in entries else f"is not empty ({min(entries)}, ...)"
        raise RecipeError(
            f"output folder {out} {state}; wanted a new one. Choose another, or --overwrite a streamlap output."
        )


def check_apart(folder: Path, out: Path) -> None:
    """Refuse a place for results that is, holds or lies in the source, or that cannot be a folder."""
    source, target = folder.resolve(), out.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise RecipeError(
            f"output folder {out} is, holds or is inside the input {folder}; wanted a folder apart from it."
        )
    if not existing_ancestor(out).is_dir():
        raise RecipeError(f"output {out}: {existing_ancestor(out)} is a file; wanted a folder.")


def empty_output(out: Path) -> None:
    """Remove an earlier result. Cut short, what is left is no model and no run to resume, and is still known as ours."""
    with OutputLock(out):
        for mark in (out / "config.json", out / STATE_FOLDER / JOURNAL_NAME):
            remove_file(mark)
            fsync_folder(mark.parent)
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path) if path.name != STATE_FOLDER else None
            else:
                path.unlink()
        shutil.rmtree(out / STATE_FOLDER, ignore_errors=True)  # on NFS the lock that is held stays until it is let go


def source_marks(stream: ModelStream) -> dict[str, Any]:
    """What tells a checkpoint, and the programs that read it, from others."""
    shards = {
        f"source {name}": f"{h.file_bytes} bytes, header {h.digest[:16]}, data {data_digest(h)[:16]}"
        for name, h in stream.source.headers.items()
    }
    config = json.dumps(stream.raw_config, sort_keys=True).encode()
    return {
        **shards, "source config.json": hashlib.sha256(config).hexdigest()[:16],
        "versions": f"streamlap {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }  # fmt: skip


def stream_marks(stream: ModelStream, tokens_NL: torch.Tensor) -> dict[str, Any]:
    """All that the hidden states of a dense model depend on."""
    return {
        **source_marks(stream), "calibration tokens": f"{list(tokens_NL.shape)} {token_hash(tokens_NL)[:16]}",
        "compute": f"{stream.dtype} on {stream.device.type}",
    }  # fmt: skip


def fingerprint(stream: ModelStream, recipe: Recipe, tokens_NL: torch.Tensor) -> dict[str, Any]:
    """All that the bytes of the output depend on."""
    # Not the names of files: the tokens that came out of them, or what a survey says, is what counts, however they are spelt.
    rows = recipe.to_dict().items()
    recipe_rows = {f"recipe {key}": value for key, value in rows if key not in ("calibration", "survey")}
    survey = file_hash(Path(recipe.survey))[:16] if recipe.survey else None
    return {**recipe_rows, **stream_marks(stream, tokens_NL), "survey": survey}


def hidden_folder(out: Path, work: str | Path | None) -> Path:
    """Hidden states live in the output's state folder, or in a folder of this output's own under `work`."""
    mark = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    return out / STATE_FOLDER / "hidden" if work is None else Path(work) / f"streamlap-hidden-{mark}"


def forecast_disk(model_bytes: int, work_bytes: int, out: Path, folder: Path) -> None:
    """Raise BudgetError before the first layer where the disk cannot hold the result and the hidden states."""
    same_disk = existing_ancestor(folder).stat().st_dev == existing_ancestor(out).stat().st_dev
    require_disk(out, model_bytes + COMPANION_BYTES + work_bytes * same_disk, "the output folder")
    if not same_disk:
        require_disk(folder, work_bytes, "the hidden states")
