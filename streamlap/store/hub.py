"""Hub ids -> local folders, or headers alone. Safetensors, JSON, tokenizer and text files are fetched, never pickles, and code
only where the caller trusts it.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured by huggingface_hub itself.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, HfFileSystem, snapshot_download

from streamlap.errors import CheckpointError, first_line, whole
from streamlap.store.foreign import describe_file, require_config
from streamlap.store.header import Header, parse_header
from streamlap.store.journal import refuse_unfinished
from streamlap.store.shards import PICKLE_SUFFIXES, files_in, find_shards
from streamlap.store.source import SafetensorsFolder, SafetensorsHeaders, TensorSource
from streamlap.untrusted.paths import checked, looking_at, path_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
WEIGHTS = "*.safetensors"
FETCHED = [WEIGHTS, "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.*", "*.jinja", "*.md", "LICENSE*",
           "NOTICE*", "USE_POLICY*"]  # fmt: skip
CODE = "*.py"
CARD = "README.md"
NEVER = [f"*{suffix}" for suffix in sorted(PICKLE_SUFFIXES)]
TWICE = ["consolidated*", f"*/{WEIGHTS}"]
"""Weights that some models have once more: in the layout of their makers, or in a folder for another program."""

READ_AHEAD = 1 << 17
"""Bytes fetched with the first eight of a shard: nearly every header ends within them, so one request does."""
REQUESTS = 8
"""Shards asked for at the same time; each answer is small, so that the way there and back is what takes time."""


def model_name(model: str) -> str:
    """What to call a model in public: its hub id, or the bare name of its folder, which may have moved since."""
    return model if HUB_ID.fullmatch(model) and not Path(model).is_dir() else Path(model).resolve().name


def local_folder(model: str | Path, trust_remote_code: bool = False) -> Path:
    """The folder `model` itself, or the snapshot of `org/name[@revision]` in the hub's cache, fetched where it is absent.

    Code is fetched with `trust_remote_code` alone. Raises CheckpointError when it is neither, or cannot be reached, and for
    what is known to be no checkpoint, see `foreign`; RecipeError for what is no name.
    """
    model = model if isinstance(model, str) else str(path_of(model, "model"))
    return _folder_here(model) or _model_snapshot(model, FETCHED, trust_remote_code)


def header_source(model: str | Path, trust_remote_code: bool = False) -> tuple[Path, TensorSource]:
    """The folder of `model` with config and tokenizer, and its tensors: names, shapes, dtypes and places, as the headers tell.

    Of a hub id no weights are fetched, only the headers of the shards, by ranged reads; they pass the same checks as those
    of local files. Where the weights lie in the hub's cache already, they are used as they are, and offline too.
    Raises CheckpointError as `local_folder` and `SafetensorsFolder` do.
    """
    model = model if isinstance(model, str) else str(path_of(model, "model"))
    if here := _folder_here(model):
        return here, SafetensorsFolder(here)
    folder = _model_snapshot(model, [pattern for pattern in FETCHED if pattern != WEIGHTS], trust_remote_code)
    try:
        find_shards(folder, files_in(folder), model)
    except CheckpointError:
        return folder, _remote_headers(model, folder)
    return folder, SafetensorsFolder(folder)


def list_data_set(hub_id: str) -> tuple[Path, dict[str, int]]:
    """The snapshot of the data set `org/name[@revision]` with its card alone, and the bytes of each file of it by path.

    Where the hub cannot be reached and its list is not in the cache, the files are those of the snapshot. Raises
    CheckpointError where there is no such data set, or where the hub cannot be reached and nothing of it is in the cache.
    """
    folder = _snapshot(hub_id, "dataset", [CARD])
    try:
        return folder, {row.path: row.size for row in _tree(_name(hub_id), folder.name) if hasattr(row, "size")}
    except Exception as error:  # the hub's own errors, those of its HTTP client, and OSError: they share no other base
        files = (path for path in folder.rglob("*") if path.is_file())
        here = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        if here.keys() <= {CARD}:
            raise CheckpointError(f"the files of data set {hub_id} cannot be listed: {whole(error)}") from error
        return folder, here


def _tree(name: str, commit: str) -> Iterable[Any]:
    """The files and folders of a data set: the list that came with the snapshot, where the hub's library keeps it, or a new
    one."""
    try:
        return huggingface_hub.get_cached_repo_tree(name, repo_type="dataset", revision=commit)
    except Exception:  # no such list, or an older library
        return list(HfApi().list_repo_tree(name, recursive=True, repo_type="dataset", revision=commit))


def fetch_data_files(hub_id: str, revision: str, files: Iterable[str]) -> list[Path]:
    """These files of a data set at a commit, in the hub's cache, in the order in which they are named. Raises CheckpointError
    where they cannot be fetched."""
    names = list(files)
    try:
        folder = _snapshot(f"{_name(hub_id)}@{revision}", "dataset", [glob.escape(name) for name in names])
    except CheckpointError as error:
        others = f" and {len(names) - 1} more" if names[1:] else ""
        raise CheckpointError(
            f"{names[0]}{others} of data set {hub_id} cannot be fetched: {first_line(error.__cause__ or error)}"
        ) from error
    return [checked(folder, folder / name) for name in names]


def _remote_headers(model: str, folder: Path) -> SafetensorsHeaders:
    """The headers of the shards that belong to the snapshot `folder` and are not in it."""
    root = (
        f"{_name(model)}@{folder.name}"  # a snapshot is called after its commit: config and shards are of one revision
    )
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


def _folder_here(model: str) -> Path | None:
    """The folder that is called so, if there is one; what is wrong with it is said."""
    folder = Path(model)
    with looking_at(folder):
        if not folder.is_dir():
            return None
        refuse_unfinished(folder)
        require_config(folder, files_in(folder), model)
    return folder


def _model_snapshot(model: str, patterns: list[str], trust_remote_code: bool) -> Path:
    name, at, _ = model.partition("@")
    if Path(model).exists():
        raise CheckpointError(describe_file(Path(model)))
    with looking_at(name):
        is_here = bool(at) and Path(name).is_dir()
    if is_here:
        raise CheckpointError(f"{name} is a folder here, and a folder has no revisions; wanted {name}, or a hub id.")
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model} is not a folder; wanted a checkpoint folder or a hub id like org/name.")
    folder = _snapshot(model, "model", [*patterns, CODE] if trust_remote_code else patterns, trust_remote_code)
    if not (folder / "config.json").exists():
        require_config(folder, _names_on_hub(model, folder), model)
    return folder


def _names_on_hub(model: str, folder: Path) -> set[str]:
    """The files of a model's revision, also those that are not fetched; where the hub cannot be reached, those in the cache."""
    try:
        return set(HfApi().list_repo_files(_name(model), revision=folder.name))
    except Exception:  # as above; that config.json is not there is said in any case
        return files_in(folder)


def _name(hub_id: str) -> str:
    return hub_id.partition("@")[0]


def _snapshot(hub_id: str, kind: str, patterns: list[str], code: bool = False) -> Path:
    name, _, revision = hub_id.partition("@")
    try:
        return Path(
            snapshot_download(
                name, repo_type=kind, revision=revision or None, allow_patterns=patterns,
                ignore_patterns=[*NEVER, *([] if code else [CODE]), *(TWICE if kind == "model" else [])],
            )
        )  # fmt: skip
    except Exception as error:  # the hub's own errors, those of its HTTP client and of Xet, and OSError: no other base
        raise CheckpointError(
            f"{hub_id} is not a folder, nor a hub id under which a {kind} can be had: {first_line(error)}"
        ) from error
