"""Hub ids -> local folders, or headers alone. Safetensors, JSON, tokenizer and text files are fetched, never pickles, and code
only where the caller trusts it.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured by huggingface_hub itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfFileSystem, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from streamlap.errors import CheckpointError, RecipeError, first_line, whole
from streamlap.store.header import Header, parse_header
from streamlap.store.shards import PICKLE_SUFFIXES, files_in, find_shards
from streamlap.store.source import SafetensorsFolder, SafetensorsHeaders, TensorSource

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
WEIGHTS = "*.safetensors"
FETCHED = [WEIGHTS, "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.*", "*.jinja", "*.md", "LICENSE*",
           "NOTICE*", "USE_POLICY*"]  # fmt: skip
CODE = "*.py"
NEVER = [f"*{suffix}" for suffix in sorted(PICKLE_SUFFIXES)]

READ_AHEAD = 1 << 17
"""Bytes fetched with the first eight of a shard: nearly every header ends within them, so one request does."""
REQUESTS = 8
"""Shards asked for at the same time; each answer is small, so that the way there and back is what takes time."""


def model_name(model: str) -> str:
    """What to call a model in public: its hub id, or the bare name of its folder, which may have moved since."""
    return model if HUB_ID.fullmatch(model) and not Path(model).is_dir() else Path(model).resolve().name


def local_folder(model: str, trust_remote_code: bool = False) -> Path:
    """The folder `model` itself, or the snapshot of `org/name[@revision]` in the hub's cache, fetched where it is absent.

    Code is fetched with `trust_remote_code` alone. Raises CheckpointError when it is neither, or cannot be reached.
    """
    return Path(model) if Path(model).is_dir() else _model_snapshot(model, FETCHED, trust_remote_code)


def header_source(model: str, trust_remote_code: bool = False) -> tuple[Path, TensorSource]:
    """The folder of `model` with config and tokenizer, and its tensors: names, shapes, dtypes and places, as the headers tell.

    Of a hub id no weights are fetched, only the headers of the shards, by ranged reads; they pass the same checks as those
    of local files. Where the weights lie in the hub's cache already, they are used as they are, and offline too.
    Raises CheckpointError as `local_folder` and `SafetensorsFolder` do.
    """
    if Path(model).is_dir():
        return Path(model), SafetensorsFolder(Path(model))
    folder = _model_snapshot(model, [pattern for pattern in FETCHED if pattern != WEIGHTS], trust_remote_code)
    try:
        find_shards(folder, files_in(folder), model)
    except CheckpointError:
        return folder, _remote_headers(model, folder)
    return folder, SafetensorsFolder(folder)


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


def _remote_headers(model: str, folder: Path) -> SafetensorsHeaders:
    """The headers of the shards that belong to the snapshot `folder` and are not in it."""
    name, _, _ = model.partition("@")
    root = f"{name}@{folder.name}"  # a snapshot is called after its commit: config and shards are of one revision
    try:
        hub = HfFileSystem(skip_instance_cache=True)
        files = {str(path).rpartition("/")[2] for path in hub.ls(root, detail=False)}
        shards = find_shards(folder, files, model)
        return SafetensorsHeaders(model, shards, _fetch_headers(hub, root, folder, shards.files))
    except CheckpointError:
        raise
    except Exception as error:  # the hub's own errors, those of its HTTP client, and OSError: they share no other base
        raise CheckpointError(
            f"the shard headers of {model} cannot be fetched: {whole(error)}; wanted the hub, or the weights in its cache. "
            "Check the connection, HF_TOKEN and HF_HUB_OFFLINE, or name a local folder."
        ) from error


def _fetch_headers(hub: HfFileSystem, root: str, folder: Path, shards: Sequence[str]) -> dict[str, Header]:
    def fetch(shard: str) -> Header:
        try:
            with hub.open(f"{root}/{shard}", "rb", block_size=READ_AHEAD) as file:
                return parse_header(folder / shard, file, file.size)
        except CheckpointError as error:
            raise CheckpointError(f"{root} lies or is damaged on the hub: {error}") from error

    with ThreadPoolExecutor(REQUESTS) as pool:
        return dict(zip(shards, pool.map(fetch, shards), strict=True))


def _model_snapshot(model: str, patterns: list[str], trust_remote_code: bool) -> Path:
    if not HUB_ID.fullmatch(model) or Path(model).exists():
        raise CheckpointError(f"{model} is not a folder; wanted a checkpoint folder or a hub id like org/name.")
    return _snapshot(model, "model", [*patterns, CODE] if trust_remote_code else patterns, trust_remote_code)


def _snapshot(hub_id: str, kind: str, patterns: list[str], code: bool = False) -> Path:
    name, _, revision = hub_id.partition("@")
    try:
        return Path(
            snapshot_download(
                name, repo_type=kind, revision=revision or None, allow_patterns=patterns,
                ignore_patterns=NEVER if code else [*NEVER, CODE],
            )
        )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{hub_id} is not a folder, nor a hub id under which a {kind} can be had: {first_line(error)}"
        ) from error
