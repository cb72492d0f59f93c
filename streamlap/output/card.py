"""README.md of an output folder: the metadata that hubs read, the numbers that were measured, and how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from streamlap.output.report import KvCache, Parameters
from streamlap.untrusted.paths import checked

CARD_NAME = "README.md"
CARD_BYTES = 1 << 20

PLAIN = re.compile(r"[\w .,:;/@+()~%#?&=-]{1,200}")
"""What a model card takes over from a stranger's: no quotes, no markup, no line ends."""

IMPORT = dict.fromkeys(("factored", "nas"), "import streamlap  # registers the loader\n")
"""Format -> what has to be imported before it is loaded."""

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
    base = re.sub(r"[^\w./@+ -]", "_", base[:200])  # no quotes or markup, in a heading or in the front matter
    front = [
        f"base_model: {json.dumps(base, ensure_ascii=False)}",
        "base_model_relation: quantized",
        "library_name: transformers",
    ]
    front += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in licence.items()]
    front += ["tags:", "- streamlap", *["- low-rank"] * (to == "factored"), "- pruned"]
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
            "```python", f"{IMPORT.get(to, '')}from transformers import {loader}", "",
            f'model = {loader}.from_pretrained("path/to/this/folder")', "```", "",
            LOADING[to], "",
        ]
    )  # fmt: skip


def licence_of(source: Path) -> dict[str, str]:
    """The licence fields in the front matter of a checkpoint's model card, those that are plain words."""
    return front_matter(source, r"license(?:_name|_link)?")


def base_of(folder: Path) -> str:
    """The model of which the card of a folder says that it was made; the folder's own name where it says nothing."""
    return front_matter(folder, "base_model").get("base_model", folder.resolve().name)


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
