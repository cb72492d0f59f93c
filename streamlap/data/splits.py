"""What splits a data set of the hub has, by the hub's own rules: the `configs` at the top of its README.md, else the names of
folders and files (https://huggingface.co/docs/hub/datasets-data-files-configuration).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from streamlap.data import text
from streamlap.errors import CheckpointError
from streamlap.store.hub import CARD
from streamlap.untrusted.paths import read_bytes
from streamlap.untrusted.yaml import parse_yaml

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words for it in names, as the hub has them."""
UNSPLIT = ""
"""The one split of a data set that names none. The hub calls it train, which says nothing of what it is for."""
SHARD = re.compile(r"data/([\w.]+)-\d{5}-of-\d{5}.*")
NO_DATA = re.compile(
    r"(README|LICEN[CS]E|NOTICE|CITATION|CHANGELOG|requirements)\b.*"
    r"|(dataset_infos?|dataset_dict|state|(.*_)?config|tokenizer|vocab|special_tokens_map|.*\.index)\.json", re.IGNORECASE
)  # fmt: skip
"""Files that say something of the data, or belong to a model or tokenizer beside it."""
MOST_CARD_BYTES = 1 << 20

Splits = Mapping[str, Collection[str]]
"""Split -> paths of its files."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What a data set of the hub holds."""

    name: str
    files: Mapping[str, int]
    """Path -> bytes, of its text files and token ids."""
    configurations: Mapping[str, Splits]
    default: str | None
    """The configuration that is meant where none is named; None where one must be."""


def is_text(path: str) -> bool:
    """Whether a file of this name is text of a data set; what is written about it in Markdown is not."""
    return text.is_text(Path(path)) and Path(path).suffix.lower() != ".md"


def is_data(path: str) -> bool:
    """Whether a file of this name is text or token ids."""
    return is_text(path) or text.is_ids(Path(path))


def read_data_set(name: str, folder: Path, listing: Mapping[str, int]) -> DataSet:
    """Configurations and splits of the files in `listing`, after the card in `folder`."""
    paths = sorted(path for path in listing if is_data(path))
    files = {path: listing[path] for path in paths if not any(part.startswith((".", "__")) for part in path.split("/"))}
    texts = [path for path in files if is_text(path) and not NO_DATA.fullmatch(PurePosixPath(path).name)]
    found: dict[str, Splits]
    if rows := _rows_of_card(folder):
        found = {row["config_name"]: _splits_of_row(row, texts) for row in rows}
        marked = [row["config_name"] for row in rows if row.get("default") is True] or ["default"]
    else:
        found = _configurations_of(texts)
        marked = ["default"] if UNSPLIT not in found.get("default", ()) else []
    default = next(iter(found)) if len(found) == 1 else next((key for key in marked if key in found), None)
    return DataSet(name=name, files=files, configurations=found, default=default)


def split_by_names(paths: Collection[str]) -> dict[str, list[str]]:
    """Splits by the names of shards in `data`, else by words in the names of folders, else in those of files.

    `paths` are those of one configuration. What has no word for a split is left out where others have one.
    """
    for rule in (_split_of_shard, _split_of_folder, _split_of_file):
        splits: dict[str, list[str]] = {}
        for path in paths:
            if (name := rule(path)) is not None:
                splits.setdefault(name, []).append(path)
        if splits:
            return splits
    return {UNSPLIT: list(paths)}


def _split_of_shard(path: str) -> str | None:
    match = SHARD.fullmatch(path)
    return match[1] if match else None


def _split_of_folder(path: str) -> str | None:
    return next((name for part in PurePosixPath(path).parts[:-1] if (name := _split_word(part))), None)


def _split_of_file(path: str) -> str | None:
    return _split_word(PurePosixPath(path).name)


def _split_word(name: str) -> str | None:
    """The split for which a word stands in a name, between other signs than letters."""
    parts = set(re.split(r"[-._ 0-9]+", name.lower()))
    return next((split for split, words in WORDS.items() if parts & set(words)), None)


def kind_of(name: str) -> str:
    """The split that a name is a word for, or the name itself."""
    return next((split for split, words in WORDS.items() if name in words), name)


def _configurations_of(texts: Collection[str]) -> dict[str, Splits]:
    """Without a card that says so, folders at the top are configurations, but for `data` and those of splits."""
    tops: dict[str, list[str]] = {}
    for path in texts:
        top = path.partition("/")[0] if "/" in path else ""
        tops.setdefault("" if top == "data" or _split_word(top) else top, []).append(path)
    if len(tops) <= 1:
        return {"default": split_by_names(texts)}
    return {top or "default": split_by_names(paths) for top, paths in tops.items()}


def _rows_of_card(folder: Path) -> list[dict[str, Any]]:
    """`configs` in the YAML at the top of README.md, those that have files; none where it cannot be read."""
    try:
        card = read_bytes(folder, CARD, MOST_CARD_BYTES) if (folder / CARD).exists() else b""
        lines = card.decode("utf-8", errors="replace").splitlines()
        front = "\n".join(lines[1 : lines.index("---", 1)]) if lines[:1] == ["---"] and "---" in lines[1:] else ""
        table = parse_yaml(front)
    except (ValueError, CheckpointError):
        return []
    rows = table.get("configs") if isinstance(table, dict) else None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [
        row for row in rows if isinstance(row.get("config_name"), str) and ("data_files" in row or "data_dir" in row)
    ]


def _splits_of_row(row: Mapping[str, Any], texts: Collection[str]) -> dict[str, list[str]]:
    """The files that a row of the card means: patterns, lists of them, or patterns by split."""
    base = row.get("data_dir")
    if isinstance(base, str) and base.strip("./"):
        start = base.removeprefix("./").strip("/") + "/"
        texts = [path for path in texts if path.startswith(start)]
    else:
        start = ""
    rows = row.get("data_files")
    if rows is None:
        return split_by_names(texts)
    if isinstance(rows, dict):
        rows = [{"split": split, "path": path} for split, path in rows.items()]
    splits: dict[str, list[str]] = {}
    for entry in rows if isinstance(rows, list) else [rows]:
        split, patterns = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (UNSPLIT, entry)
        chosen = [path for path in texts if any(matches(path, start + pattern) for pattern in _texts(patterns))]
        splits.setdefault(UNSPLIT if split is None else str(split), []).extend(chosen)
    return splits


def matches(path: str, pattern: str) -> bool:
    """Whether a path is meant by a pattern in which * stands for signs of one name and ** for any folders."""
    steps = pattern.removeprefix("./").split("/")
    places = _after_folders({0}, steps)
    for part in path.split("/"):
        taken = {place for place in places if place < len(steps) and steps[place] == "**"}
        moved = {place + 1 for place in places if place < len(steps) and fnmatchcase(part, steps[place])}
        places = _after_folders(taken | moved, steps)
    return len(steps) in places


def _after_folders(places: set[int], steps: list[str]) -> set[int]:
    """Places in a pattern that can be reached without a name: a ** may stand for none."""
    found = set(places)
    for place in range(len(steps)):
        if place in found and steps[place] == "**":
            found.add(place + 1)
    return found


def _texts(value: Any) -> list[str]:
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]
