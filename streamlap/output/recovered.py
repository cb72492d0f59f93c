"""The folder of a model whose stored weights were trained further: the same files, with other numbers in the shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamlap.errors import counted
from streamlap.families.opening import read_config
from streamlap.families.stream import ModelStream
from streamlap.loader.shim import NAS_MAP, write_nas, write_shim
from streamlap.output.card import CARD_NAME, bare_card, licence_of, own_card, without_tasks
from streamlap.output.folder import (
    KEPT_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    SURVEY_NAME,
    copy_companions,
    write_json,
)
from streamlap.output.formats import OURS, source_config
from streamlap.store.shards import NAMING_KEY
from streamlap.store.sink import write_durably
from streamlap.untrusted.paths import read_bytes, read_object

CARRIED = (RECIPE_NAME, KEPT_NAME, SURVEY_NAME)
MOST_REPORT_BYTES = 1 << 30


def finish_recovered(
    out: Path, stream: ModelStream, base: str, recovery: Mapping[str, Any], shards: Mapping[str, str]
) -> None:
    """Everything beside the shards; config.json last. May be run again after a crash: it writes the same bytes.

    Args: stream, the compressed model; base, the name that the card gives to it where streamlap wrote none; recovery, what the
    report says of it; shards, their hashes.
    """
    source = stream.folder
    copy_companions(source, out)
    for name in (name for name in CARRIED if (source / name).is_file()):
        write_durably(out / name, read_bytes(source, name, MOST_REPORT_BYTES))
    known = (source / REPORT_NAME).is_file()
    report = read_object(source, REPORT_NAME, MOST_REPORT_BYTES) if known else {}
    write_json(out / REPORT_NAME, report | {"shards": dict(shards), "recovery": dict(recovery)}, indent=1)
    own = own_card(source)
    card = bare_card(base, licence_of(source)) if own is None else without_tasks(own)
    write_durably(out / CARD_NAME, f"{card.rstrip()}\n\n{card_section(recovery)}\n".encode())
    config = source_config(stream) if stream.marked else read_config(source)
    # A folder that transformers saved has no code, and names none.
    if not stream.marked:
        write_nas(out, write_durably)
        config["auto_map"] = dict(NAS_MAP)
    elif stream.compressed:
        config["auto_map"] = write_shim(out, write_durably, wraps=stream.family.wraps)
    else:
        config = {key: value for key, value in config.items() if key not in OURS}
    write_json(out / "config.json", {key: value for key, value in config.items() if key != NAMING_KEY})


def card_section(recovery: Mapping[str, Any]) -> str:
    towards = " and the dense model's predictions" if recovery["distilled"] else ""
    return (
        f"Recovered by LoRA of rank {recovery['rank']} on {recovery['tokens']:,} tokens, "
        f"{counted(recovery['epochs'], 'epoch')}, towards "
        f"the text{towards}; merged, with the same ranks and widths. Loss on {recovery['held_tokens']:,} held-out tokens: "
        f"{recovery['before']:.4f} before, {recovery['after']:.4f} after."
    )
