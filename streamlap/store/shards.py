"""Which files of a checkpoint hold its weights, by the rule of transformers' own loader.

The file or index that config.json names as `transformers_weights` comes first, then `model.safetensors`, then the index. A
variant (`model.fp16.safetensors`) is read by that key alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from streamlap.errors import CheckpointError, few, shown
from streamlap.store.foreign import describe_foreign
from streamlap.store.header import check_name
from streamlap.untrusted.paths import CONFIG_BYTES, INDEX_BYTES, looking_at, read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
NAMING_KEY = "transformers_weights"
"""Key of config.json that names the file or index to read. The files of a result have other names, so it is not taken over."""

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
PICKLE_INDEX = "pytorch_model.bin.index.json"

RIVAL = re.compile(r"model\.safetensors(\.index\.json)?|model-\d+-of-\d+\.safetensors")
"""What another reader may take for the weights."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files that are read, and what was not chosen."""

    chosen: str
    """The whole file, or the index."""
    files: tuple[str, ...]
    """In the order of their names, in which transformers reads them."""
    index: Mapping[str, str]
    """Tensor name -> file, as the index has it; nothing for a whole file."""
    unused: tuple[str, ...] = ()
    """Other weights that lie beside them."""

    def tell(self, place: str) -> None:
        """Log which weights of the checkpoint `place` are read, where there are others."""
        if self.unused:
            logger.warning("%s: the weights are those of %s, as transformers reads them; unused beside it: %s.",
                           place, self.chosen, few(self.unused))  # fmt: skip


def files_in(folder: Path) -> set[str]:
    """Names of the files right in `folder`; none where there is no such folder."""
    return {path.name for path in folder.glob("*") if os.path.isfile(path)}


def find_shards(folder: Path, files: Collection[str], place: str) -> Shards:
    """The files with the weights.

    `files` are the names in the checkpoint `place`. Of these only config.json and the index need lie in `folder`.
    Raises CheckpointError when there are no safetensors, or not all that config.json and the index name.
    """
    named = _named_in_config(folder, files)
    chosen = named or next((name for name in (SINGLE_NAME, INDEX_NAME) if name in files), None)
    if chosen is None:
        raise _nothing_to_read(folder, files, place)
    index = _read_index(folder, chosen, files, place) if chosen.endswith(INDEX_SUFFIX) else {}
    read = sorted(set(index.values())) if chosen.endswith(INDEX_SUFFIX) else [chosen]
    unused = (name for name in files if RIVAL.fullmatch(name) and name not in (chosen, *read))
    return Shards(chosen=chosen, files=tuple(read), index=index, unused=tuple(sorted(unused)))


def _named_in_config(folder: Path, files: Collection[str]) -> str | None:
    with looking_at(folder):
        is_there = (folder / "config.json").is_file()
    config = read_object(folder, "config.json", CONFIG_BYTES) if is_there else {}
    name: Any = config.get(NAMING_KEY)
    if name is None:
        return None
    inside = isinstance(name, str) and check_name(name) and "\\" not in name and _is_inside(PurePosixPath(name))
    if not inside or not name.endswith((SUFFIX, INDEX_SUFFIX)):
        raise CheckpointError(
            f"config.json has {NAMING_KEY} {shown(name)}; wanted the name of a .safetensors file, or of its index, inside "
            "the folder. Mend that key or take it out."
        )
    if name not in files and not os.path.isfile(folder / name):
        raise CheckpointError(
            f"{shown(name)[1:-1]} is missing; config.json names it as {NAMING_KEY}. Fetch it, or take that key out."
        )
    return str(name)


def _is_inside(path: PurePosixPath) -> bool:
    return not path.is_absolute() and ".." not in path.parts


def _nothing_to_read(folder: Path, files: Collection[str], place: str) -> CheckpointError:
    wanted = f"{place} holds neither {INDEX_NAME} nor {SINGLE_NAME}"
    if reason := describe_foreign(folder, files, place):
        return CheckpointError(reason)
    if others := [name for name in files if name.endswith(SUFFIX)]:
        way = "Rename the file, or name it" if len(others) == 1 else "Shards need their index, under that name or named"
        return CheckpointError(
            f"{wanted}, but {few(others)}; wanted weights under a name that transformers reads. {way} in config.json as "
            f"{NAMING_KEY}."
        )
    pickles = [name for name in files if Path(name).suffix in PICKLE_SUFFIXES or name == PICKLE_INDEX]
    if pickles:
        return CheckpointError(
            f"{place} holds only pickled weights ({few(pickles)}), which can run code when opened; wanted "
            "safetensors. Convert once where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    return CheckpointError(f"{wanted}; wanted a safetensors checkpoint.")


def _read_index(folder: Path, index: str, files: Collection[str], place: str) -> dict[str, str]:
    table = read_object(folder, index, INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise CheckpointError(f"{index} has weight_map {shown(table)}; wanted tensor name -> shard file name.")
    for name, shard in table.items():
        if not check_name(name) or not check_name(shard) or "\\" in shard or not _is_inside(PurePosixPath(shard)):
            raise CheckpointError(
                f"{index} puts tensor {shown(name)} into {shown(shard)}; wanted a .safetensors file inside {place}. "
                "Do not trust it."
            )
        if not shard.endswith(SUFFIX):
            raise CheckpointError(
                f"{index} puts tensor {name!r} into {shown(shard)}; wanted a .safetensors file. Pickled weights can run "
                "code when opened, and no other kind is read."
            )
        if shard not in files and not os.path.isfile(folder / shard):
            raise CheckpointError(
                f"shard {shown(shard)[1:-1]} is missing; {index} wants it for tensor {name!r}. Fetch it from where the others "
                "came."
            )
    return {name: str(PurePosixPath(shard)) for name, shard in table.items()}
