"""README.md of an output folder: the metadata that hubs read, the numbers that were measured, and how it is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from streamlap.output.report import KvCache, Parameters
from streamlap.store.sink import write_durably
from streamlap.untrusted.paths import checked, read_bytes

CARD_NAME = "README.md"
CARD_BYTES = 1 << 20

PLAIN = re.compile(r"[\w .,:;/@+()~%#?&=-]{1,200}")
"""What a model card takes over from a stranger's: no quotes, no markup, no line ends."""

OWN = re.compile(r"^# .*, (compressed|recovered) by streamlap$", re.MULTILINE)
"""The heading of a card that `model_card` or `bare_card` wrote."""
TASKS = "## Tasks of lm-eval"
COLUMNS = "| task | metric | value | documents | lm-eval |\n|---|---|---|---|---|\n"
TASKS_SECTION = re.compile(rf"\n*^{TASKS}\n\n((?:\|.*\n?)*)", re.MULTILINE)
"""All of the table, and nothing of what somebody wrote behind it."""

TaskRow = tuple[str, str, float, int | None, str]
"""Task, metric, value, documents that were scored (None of a group of tasks), version of lm-eval."""

OWN_LOADER = ("factored", "nas")
"""Formats whose loader is registered by importing streamlap."""

LOADING = {
    "factored": "Where streamlap is not installed, `from_pretrained(..., trust_remote_code=True)` uses the loader files in "
    "this folder. Any other loader refuses the weights rather than misread them.",
    "stock": "This is a plain checkpoint of its architecture: no other code is needed to load it.",
    "nas": "Where streamlap is not installed, `from_pretrained(..., trust_remote_code=True)` uses the files in this folder. It "
    "is packaged as the public models of the architecture DeciLM; docs/engines.md of streamlap says which engines were tried.",
    "dense": "This is a plain checkpoint, for comparison only: it has the size and the speed of the original.",
}
"""Format -> who else loads it."""


def model_card(
    *, base: str, licence: Mapping[str, str], parameters: Parameters, cache: KvCache, made: str, loader: str, to: str
) -> str:
    """Args: base, the name of the original; made, a sentence or two on how it came to be; loader, the class of transformers
    that loads it; to, its format."""
    base = plain(base)
    front = [
        f"base_model: {json.dumps(base, ensure_ascii=False)}",
        "base_model_relation: quantized",
        "library_name: transformers",
    ]
    front += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in licence.items()]
    front += ["tags:", "- streamlap", *["- low-rank"] * (to == "factored"), "- pruned"]
    registered = "import streamlap  # registers the loader\n" if to in OWN_LOADER else ""
    ratio = f"{parameters.ratio_decoder:.2%} of the decoder linears, {parameters.ratio_total:.2%} of the whole model"
    return "\n".join(
        [
            "---", *front, "---", f"# {base}, compressed by streamlap", "",
            f"Removed parameters: {ratio}.", "",
            "| | before | after |", "|---|---|---|",
            f"| decoder linears | {parameters.decoder_before:,} | {parameters.decoder_after:,} |",
            f"| whole model | {parameters.total_before:,} | {parameters.total_after:,} |",
            f"| keys and values, bytes a token | {cache.before:,} | {cache.after:,} |", "",
            made, "",
            "```python", f"{registered}from transformers import {loader}", "",
            f'model = {loader}.from_pretrained("path/to/this/folder")', "```", "",
            LOADING[to], "",
        ]
    )  # fmt: skip


def bare_card(base: str, licence: Mapping[str, str]) -> str:
    """Of a model that streamlap did not write: nothing is known but its name and licence."""
    base = plain(base)
    front = [f"base_model: {json.dumps(base, ensure_ascii=False)}", "library_name: transformers"]
    front += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in licence.items()]
    return "\n".join(["---", *front, "tags:", "- streamlap", "---", f"# {base}, recovered by streamlap"])


def plain(name: str) -> str:
    """A stranger's word without quotes or markup, in a heading, in a table or in the front matter."""
    return re.sub(r"[^\w./@+ -]", "_", name[:200])


def record_tasks(folder: Path, rows: Iterable[TaskRow]) -> Path | None:
    """Write what tasks gave into the card of a folder that streamlap wrote; rows of the same task that are there give way.

    Gives the card, or None where nothing was written: another's card, none, a link, or one that this user may not write.
    """
    path = folder / CARD_NAME
    if path.is_symlink() or not (os.access(path, os.W_OK) and os.access(folder, os.W_OK)):
        return None
    card = own_card(folder)
    if card is None:
        return None
    write_durably(path, with_tasks(card, rows).encode())
    return path


def own_card(folder: Path) -> str | None:
    """The card of a folder that streamlap wrote; None where there is another's, or none."""
    path = folder / CARD_NAME
    if not path.is_file() or path.stat().st_size > CARD_BYTES:
        return None
    card = read_bytes(folder, CARD_NAME, CARD_BYTES).decode("utf-8", errors="replace")
    return card if OWN.search(card) else None


def with_tasks(card: str, rows: Iterable[TaskRow]) -> str:
    """The card with a table of these rows, and of those that it has of other tasks."""
    lines: dict[str, str] = {}
    for *words, value, documents, version in rows:
        name, metric = (plain(str(word)) for word in words)
        scored = "" if documents is None else f"{documents:,}"
        lines[name] = lines.get(name, "") + f"| {name} | {metric} | {value:.4f} | {scored} | {version} |\n"
    found = TASKS_SECTION.search(card)
    old = found[1].removeprefix(COLUMNS).splitlines(keepends=True) if found else []
    kept = [line for line in old if line.split(" | ")[0].removeprefix("| ") not in lines]
    table = f"\n\n{TASKS}\n\n{COLUMNS}{''.join(kept)}{''.join(lines.values())}"
    return card[: found.start()] + table + card[found.end() :] if found else card.rstrip() + table


def without_tasks(card: str) -> str:
    """The card of a model with other weights, of which the tasks say nothing."""
    return TASKS_SECTION.sub("\n", card)


def licence_of(source: Path) -> dict[str, str]:
    """The licence fields in the front matter of a checkpoint's model card, those that are plain words."""
    return front_matter(source, r"license(?:_name|_link)?")


def base_of(folder: Path) -> str:
    """The model that a folder of ours was made of, by its card; the name of any other folder. A stranger's card names the model
    that this one was trained from."""
    found = {} if own_card(folder) is None else front_matter(folder, "base_model")
    return found.get("base_model", folder.resolve().name)


def front_matter(folder: Path, key: str) -> dict[str, str]:
    """The fields that a pattern names in the front matter of a folder's model card, those that are plain words."""
    path = checked(folder, folder / CARD_NAME)
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        card = file.read(CARD_BYTES).decode("utf-8", errors="replace")
    front = card.split("---", 2)[1] if card.startswith("---") and card.count("---") >= 2 else ""
    rows = re.findall(rf"^({key}):[ \t]*([\"']?)(.*?)\2[ \t]*$", front, flags=re.MULTILINE)
    return {name: value for name, _, value in rows if PLAIN.fullmatch(value)}
