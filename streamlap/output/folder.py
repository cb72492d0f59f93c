"""The files of an output folder beside its shards. config.json is written last: only then is the folder a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from streamlap.errors import CheckpointError, counted
from streamlap.families.stream import ModelStream
from streamlap.families.table import is_language_model
from streamlap.families.wrappers import is_wrapper
from streamlap.loader.hf_plugin import FORMAT_VERSION
from streamlap.loader.shim import NAS_FILES, SHIM_FILES, write_nas, write_shim
from streamlap.output.card import CARD_NAME, licence_of, model_card
from streamlap.output.formats import CONFIGS, forms_after, source_config
from streamlap.output.report import LayerReport, Report
from streamlap.store.shards import INDEX_NAME, PICKLE_SUFFIXES
from streamlap.store.sink import SHARD, write_durably
from streamlap.untrusted.paths import checked, read_bytes, read_object

RECIPE_NAME = "streamlap_recipe.yaml"
REPORT_NAME = "streamlap_report.json"
KEPT_NAME = "streamlap_kept_channels.json"
SURVEY_NAME = "streamlap_survey.json"
TOKENIZER_NAME = "tokenizer_config.json"

COPIED = (
    "tokenizer*", "vocab.*", "merges.txt", "tekken.json", "special_tokens_map.json", "added_tokens.json", "*.model", "spiece.*",
    "chat_template.*", "additional_chat_templates/*", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What is carried over from the source folder as it stands."""
NOT_COPIED = {".py", ".so", *PICKLE_SUFFIXES}
"""Endings of what can run code."""
WRITTEN = {
    "config.json", INDEX_NAME, RECIPE_NAME, REPORT_NAME, KEPT_NAME, SURVEY_NAME, CARD_NAME, *SHIM_FILES, *NAS_FILES,
}  # fmt: skip
"""What is written beside the shards."""
MOST_COMPANION_BYTES = 256 << 20


def companions(source: Path) -> list[Path]:
    """Tokenizer, templates, generation settings and licence texts of a checkpoint, as paths in it.

    Raises CheckpointError, before anything is opened, for a file out of bounds or larger than such a file is.
    """
    files = [path for path in sorted(named_companions(source)) if not path.is_dir() and checked(source, path).is_file()]
    for path in files:
        if path.stat().st_size > MOST_COMPANION_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes; wanted at most {MOST_COMPANION_BYTES:,}. Remove it."
            )
    return [path.relative_to(source) for path in files]


def named_companions(folder: Path) -> set[Path]:
    """By their names alone. `._tokenizer.model` is no tokenizer, but what some desktops put beside one."""
    found = (path for pattern in COPIED for path in folder.glob(pattern))
    return {path for path in found if path.suffix.lower() not in NOT_COPIED and not path.name.startswith(".")}


def copy_companions(source: Path, out: Path, tokenizer: str | None = None) -> None:
    """What `companions` lists, as bytes. Args: tokenizer, the class that the tokenizer's settings have to name, if any."""
    for name in companions(source):
        (out / name).parent.mkdir(exist_ok=True)
        write_durably(out / name, read_bytes(source, str(name), MOST_COMPANION_BYTES))
    if tokenizer is not None:
        found = source / TOKENIZER_NAME
        settings = read_object(source, TOKENIZER_NAME, MOST_COMPANION_BYTES) if found.exists() else {}
        write_json(out / TOKENIZER_NAME, settings | {"tokenizer_class": tokenizer})


def written_files(out: Path) -> list[Path]:
    """The files of an output folder that streamlap writes or copies there, by their names. All others are somebody's own."""
    found = {path for path in out.iterdir() if path.name in WRITTEN or SHARD.fullmatch(path.name)}
    found |= {path for path in named_companions(out) if path.parent == out or not path.parent.is_symlink()}
    return sorted(path for path in found if path.is_symlink() or not path.is_dir())


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    write_durably(path, (json.dumps(value, indent=indent) + "\n").encode())


def finish_folder(
    out: Path,
    stream: ModelStream,
    base: str,
    report: Report,
    recipe_yaml: str,
    survey: Path | None,
    tokenizer: str | None,
) -> None:
    """Everything that makes shards and index a model folder. May be run again after a crash: it writes the same bytes.

    Args: stream, the source; base, the name that the card gives to it; survey, the file that the recipe goes by, of which it
    keeps a copy; tokenizer, as for `copy_companions`.
    """
    source = stream.folder
    copy_companions(source, out, tokenizer)
    if survey is not None:
        write_durably(out / SURVEY_NAME, survey.read_bytes())
    write_durably(out / RECIPE_NAME, recipe_yaml.encode())
    write_json(out / REPORT_NAME, report.to_json(), indent=1)
    kept = {
        f"{layer.index}.{edit.path}": list(edit.kept)
        for layer in report.layers
        for edit in layer.edits
        if edit.kept is not None
    }
    write_json(out / KEPT_NAME, kept, indent=None)
    write_durably(out / CARD_NAME, card_of(report, base, source).encode())
    write_json(out / "config.json", result_config(out, stream, report))


def card_of(report: Report, base: str, source: Path) -> str:
    sequences, length = report.calibration_tokens
    made = (
        f"Preset `{report.recipe['preset']}`, ratio {report.recipe['ratio']}, calibrated on "
        f"{counted(sequences, 'window')} of {length} tokens. All settings: `{RECIPE_NAME}`; what was done to each layer: "
        f"`{REPORT_NAME}`."
    )
    return model_card(
        base=base, licence=licence_of(source), parameters=report.parameters, cache=report.kv_cache, made=made,
        loader=report.loader, to=report.format,
    )  # fmt: skip


def result_config(out: Path, stream: ModelStream, report: Report) -> dict[str, Any]:
    """config.json of a result in its format. Code that the format needs is put beside it."""
    if report.format == "nas":
        write_nas(out, write_durably)
    if report.format in CONFIGS:
        return CONFIGS[report.format](stream, forms_after(stream, module_rows(report.layers, stream.family.layers)))
    table = quantization_config(report, stream)
    places = write_shim(out, write_durably, wraps=stream.family.wraps)
    return source_config(stream) | {"auto_map": places, "quantization_config": table}


def loader_of(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads a checkpoint, or the result of one, by its parsed config.json: that of its task."""
    if is_language_model(config):
        return "AutoModelForImageTextToText" if is_wrapper(config) else "AutoModelForCausalLM"
    task = re.fullmatch(r"\w+For(Sequence|Token)Classification", str(config["architectures"][0]))
    return f"AutoModelFor{task[1]}Classification" if task else "AutoModel"


def quantization_config(report: Report, stream: ModelStream) -> dict[str, Any]:
    """The object in config.json that tells a loader which modules to put where."""
    return {
        "quant_method": "streamlap",
        "format_version": FORMAT_VERSION,
        "modules": stream.joined | module_rows(report.layers, stream.family.layers),
    }


def module_rows(layers: Iterable[LayerReport], layers_path: str) -> dict[str, dict[str, int]]:
    """Module path in the model -> its row, for every linear that is not a dense one of the same shape."""
    rows = ((f"{layers_path}.{layer.index}.{edit.path}", edit.row) for layer in layers for edit in layer.edits)
    return {path: dict(row) for path, row in rows if row}
