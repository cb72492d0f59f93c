"""The five parsers of files that strangers make, as functions of bytes. `test_fuzz` and `scripts/fuzz.py` share them.

Each writes the bytes into a folder and opens it as streamlap does. Only a StreamlapError may come out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from streamlap.errors import ResumeMismatch, StreamlapError
from streamlap.families.stream import ModelStream
from streamlap.output.report import LayerReport
from streamlap.pipeline import session
from streamlap.pipeline.compress import begun_recipe
from streamlap.pipeline.resume import COMMANDS, resume
from streamlap.pipeline.session import Run
from streamlap.recipe import Recipe
from streamlap.settings import RunSettings
from streamlap.store.header import read_header
from streamlap.store.journal import STATE_FOLDER, Journal
from streamlap.store.shards import INDEX_NAME, SINGLE_NAME
from streamlap.store.source import SafetensorsFolder

LONGEST = 2000
"""Characters in a message, with the folder's path in it."""

SIZES = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "vocab_size": 16, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip

WORDS = [
    *SIZES, "dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata", "model_type", "llama", "qwen3",
    "rope_parameters", "rope_type", "yarn", "factor", "quantization_config", "quant_method", "streamlap", "format_version",
    "modules", "model.layers.0.mlp.up_proj", "rank", "layer_types", "ratio", "methods", "method", "ffn_lorap", "calibration",
    "fingerprint", "arguments", "command", "compress", "export", "survey", "settings", "device", "work", "recipe", "refine",
    "index", "edits", "seconds", "F32", "t1", "model-1.safetensors", "../x.safetensors",
    "__class__", "\0", "\n", "é",
]  # fmt: skip
"""What the formats call things, and a few words that no format likes."""


@lru_cache
def home() -> Path:
    """The one folder in which files are made; it goes when the process ends."""
    holder = tempfile.TemporaryDirectory(prefix="streamlap-fuzz-")
    home.holder = holder  # type: ignore[attr-defined]
    folder = Path(holder.name).resolve()
    for name in ("header", "index", "config", "recipe", f"journal/{STATE_FOLDER}"):
        (folder / name).mkdir(parents=True)
    for number in (1, 2):
        save_file({f"t{number}": torch.zeros(2)}, folder / "index" / f"model-{number}.safetensors")
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "config")
    return folder


def header(raw: bytes) -> None:
    """The whole file of a shard."""
    path = home() / "header" / SINGLE_NAME
    path.write_bytes(raw)
    read_header(path)


def index(raw: bytes) -> None:
    (home() / "index" / INDEX_NAME).write_bytes(raw)
    SafetensorsFolder(home() / "index")


def config(raw: bytes) -> None:
    """config.json, up to the model on the meta device and what it passes to its layers."""
    (home() / "config" / "config.json").write_bytes(raw)
    ModelStream(home() / "config").layer_kwargs(4)


def recipe(raw: bytes) -> None:
    path = home() / "recipe" / "recipe.yaml"
    path.write_bytes(raw)
    Recipe.from_dict(Recipe.from_yaml(path).to_dict()).to_yaml()


def journal(raw: bytes) -> None:
    """The journal of a run, as `resume` reads it before it opens the model, whatever version it says it is of."""
    folder = home() / "journal"
    (folder / STATE_FOLDER / "journal.jsonl").write_bytes(raw)
    with mock.patch.object(session, "versions_mark", return_value=mock.ANY), mock.patch.dict(COMMANDS, look_only):
        resume(folder)
    found = Journal.load(folder)
    try:
        found.check({}, "compress")
    except ResumeMismatch as error:  # a line for each entry, and none that the file has made
        lines = str(error).splitlines()
        assert len(lines) <= 2 + len(found.start["fingerprint"])
        assert all(map(str.isprintable, lines))


def read_compression(run: Run, _: RunSettings) -> Any:
    """What a compression is made of again: the recipe that it was begun with, and the layers that are done."""
    begun_recipe(run)
    for line in Journal.load(run.folder).layers:
        LayerReport.from_json(line).to_json()


look_only: dict[str, Any] = dict.fromkeys(COMMANDS, lambda run, settings: None) | {"compress": read_compression}
"""In place of what goes on with a run."""

TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header, "index": index, "config": config, "recipe": recipe, "journal": journal,
}  # fmt: skip


class Watch:
    """Notes which files are opened outside `home` while it is on. A process has one: a hook is never taken off."""

    def __init__(self) -> None:
        self.on, self.opened = False, list[str]()
        code = {sys.prefix, sys.base_prefix, str(Path(__file__).parent.parent)}
        self._known = tuple({str(Path(place).resolve()) for place in code} | code)  # what Python imports as it goes
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((str(home()), *self._known)):
                self.opened.append(path)


@lru_cache
def watch() -> Watch:
    return Watch()


def check(target: str, raw: bytes) -> str:
    """What came out: "" or the message of the error. Raises for all that must not come out."""
    home()
    sentry = watch()
    sentry.opened, sentry.on = [], True
    try:
        TARGETS[target](raw)
        message = ""
    except StreamlapError as error:
        message = str(error)
    finally:
        sentry.on = False
    assert len(message) <= LONGEST, f"a message of {len(message)} characters"
    assert message.isprintable(), f"a message with control characters: {message!r}"
    assert not sentry.opened, f"opened outside the folder: {sentry.opened}"
    return message
