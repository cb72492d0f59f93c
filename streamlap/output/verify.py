"""Is an output folder whole? Every shard, header, hash and shape is looked at; nothing is repaired.

Faults are collected, not raised, so that one look shows all of them.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from streamlap.errors import CheckpointError, StreamlapError, UnsupportedModel, shown
from streamlap.families.opening import read_config
from streamlap.families.stream import ModelStream
from streamlap.loader.linears import is_permutation
from streamlap.output.folder import REPORT_NAME
from streamlap.store.header import check_name
from streamlap.store.journal import STATE_FOLDER, Journal
from streamlap.store.shards import INDEX_NAME, files_in, find_shards
from streamlap.store.sink import file_hash
from streamlap.store.source import SafetensorsFolder, TensorSource
from streamlap.untrusted.paths import REPORT_BYTES, check_folder, looking_at, path_of, read_object

Fault = dict[str, str | None]


def verify(out: str | Path) -> dict[str, Any]:
    """{"ok": bool, "faults": [{"file", "tensor", "fault"}]} for a finished output folder or any checkpoint folder.

    Checks: the run is finished; headers; hashes from the report; names, shapes and dtypes against config.json on the meta
    device; every number finite. Raises CheckpointError only when there is no such folder, or none that can be read.
    """
    folder = path_of(out, "out")
    with looking_at(folder):
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; wanted one that streamlap wrote.")
        faults = unfinished(folder)
        if not faults:
            faults = [*wrong_hashes(folder), *wrong_tensors(folder)]
    return {"ok": not faults, "faults": faults}


def fault(file: str, text: str, tensor: str | None = None) -> Fault:
    return {"file": file, "tensor": tensor, "fault": text}


def unfinished(folder: Path) -> list[Fault]:
    if Journal.exists(folder):
        again = f"streamlap resume {shlex.quote(str(folder))}"
        return [fault(STATE_FOLDER, f"the run is not finished; go on with: {again}")]
    try:
        check_folder(folder)
    except CheckpointError as error:
        return [fault("", str(error))]
    if not (folder / "config.json").is_file():
        return [fault("config.json", "missing, so this is not a model; compress again")]
    return []


def wrong_hashes(folder: Path) -> list[Fault]:
    """Shards whose bytes are not those that were written."""
    report = folder / REPORT_NAME
    if not report.is_file():
        return []
    try:
        shards = read_object(folder, REPORT_NAME, REPORT_BYTES).get("shards")
    except CheckpointError as error:
        return [fault(REPORT_NAME, f"cannot be parsed ({error}), so hashes cannot be checked")]
    if not isinstance(shards, dict) or not all(isinstance(digest, str) for digest in shards.values()):
        return [fault(REPORT_NAME, f"has shards {shown(shards)}, so hashes cannot be checked")]
    faults = []
    for name, digest in shards.items():
        path = folder / Path(name).name
        if not check_name(name):
            faults.append(fault(REPORT_NAME, f"names a shard {shown(name)}"))
        elif not path.is_file():
            faults.append(fault(name, "missing"))
        elif file_hash(path) != digest:
            faults.append(fault(name, f"sha256 is not {digest[:16]}..., which was written: the file changed"))
    return faults


def weights_name(folder: Path) -> str:
    """The file or index that is read, by name."""
    try:
        return find_shards(folder, files_in(folder), str(folder)).chosen
    except StreamlapError:
        return INDEX_NAME


def wrong_tensors(folder: Path) -> list[Fault]:
    try:
        read_config(folder)
    except CheckpointError as error:
        return [fault("config.json", str(error))]
    try:
        source: TensorSource = SafetensorsFolder(folder)
    except StreamlapError as error:
        return [fault(weights_name(folder), str(error))]
    faults = []
    try:
        source = ModelStream(folder, source=source).source  # what the model has no place for is not looked at
    except (CheckpointError, UnsupportedModel) as error:
        faults.append(fault("config.json", str(error)))
    for name in source.names():
        info = source.info(name)
        try:
            tensor = source.read(name)
        except CheckpointError as error:
            faults.append(fault(info.path.name, str(error), info.name))
            continue
        if name.endswith(".order") and not is_permutation(tensor, tensor.numel()):
            text = f"tensor {info.name!r} is no permutation of 0..{tensor.numel() - 1}"
            faults.append(fault(info.path.name, text, info.name))
    return faults
