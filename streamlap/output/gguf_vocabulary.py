"""The tokenizer of a folder in the words of GGUF: its tokens, what each is, merges or scores, and how text is split before.

From tokenizer.json alone, by the library tokenizers. What would be read otherwise than it was meant is refused.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from streamlap.errors import CheckpointError, StreamlapError, UnsupportedModel, first_line, shown
from streamlap.untrusted.json import parse_json
from streamlap.untrusted.paths import CONFIG_BYTES, checked, read_bytes, read_object

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
MOST_BYTES = 256 << 20

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as GGUF numbers them."""
SPACE = "\u2581"
"""What a space is among pieces of text."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {LETTERS + r"\p{N}{1,3}" + REST: "llama-bpe", LETTERS + r"\p{N}" + REST: "qwen2"}
"""Pattern by which text is split before its bytes are merged -> what llama.cpp calls it."""


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Args: size, rows of the embedding; those that no token has are marked as unused.

    Raises CheckpointError where there is no tokenizer.json or a malformed one, UnsupportedModel for one that llama.cpp would
    read otherwise.
    """
    if not checked(folder, folder / TOKENIZER).is_file():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER}, and a GGUF file holds the tokenizer; wanted one. Put it there."
        )
    with well_formed(TOKENIZER):
        text = read_bytes(folder, TOKENIZER, MOST_BYTES).decode("utf-8", errors="replace")
        table, tokenizer = parse_json(text.encode()), Tokenizer.from_str(text)
        add_tokens(writer, table, tokenizer, size)
    with well_formed(f"{TOKENIZER} or {SETTINGS}"):
        add_specials(writer, folder, tokenizer)


@contextlib.contextmanager
def well_formed(names: str) -> Iterator[None]:
    """Raise CheckpointError for whatever goes wrong in the block, in which the files of these names are read."""
    try:
        yield
    except StreamlapError:
        raise
    except BaseException as error:
        # A panic in the tokenizers library is no Exception; a Ctrl-C is none either, and goes on.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{names} cannot be used ({first_line(error)}); wanted it as transformers saves it. Mend it, or put the original "
            "there."
        ) from error


def add_tokens(writer: Any, table: Mapping[str, Any], tokenizer: Tokenizer, size: int) -> None:
    """Tokens, what each is, and how text is split and merged into them. Args: table, tokenizer.json."""
    model = table["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModel(
            f"{TOKENIZER} is of type {shown(model.get('type'))}; wanted BPE, which a GGUF file can hold."
        )
    tokens = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    if not tokens:
        raise CheckpointError(f"{TOKENIZER} has no token; wanted those of the model. Put the original there.")
    if max(tokens) >= size:
        raise CheckpointError(
            f"{TOKENIZER} has a token {max(tokens)}; wanted none above {size - 1}, the last of the embedding."
        )
    added = {token["id"]: token["special"] for token in table.get("added_tokens") or []}
    kinds = [kind_of(number, tokens, added, model) for number in range(size)]
    writer.add_token_list([tokens.get(number, f"[UNUSED{number}]") for number in range(size)])
    writer.add_token_types(kinds)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    check_normalizer(table, ("Prepend", "Replace") if model.get("byte_fallback") else ("NFC",))
    if model.get("byte_fallback"):
        check_spaces(table)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores(merges, tokens, size))
        writer.add_add_space_prefix(adds_space(table))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_of(table))
        writer.add_token_merges(merges)


def kind_of(number: int, tokens: Mapping[int, str], added: Mapping[int, bool], model: Mapping[str, Any]) -> int:
    if number not in tokens:
        return UNUSED
    if tokens[number] == model.get("unk_token"):
        return UNKNOWN
    if number in added:
        return CONTROL if added[number] else USER_DEFINED
    return BYTE if model.get("byte_fallback") and BYTE_TOKEN.fullmatch(tokens[number]) else NORMAL


def scores(merges: list[str], tokens: Mapping[int, str], size: int) -> list[float]:
    """The higher, the earlier two pieces are merged: minus the place of the merge that makes the token."""
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        places.setdefault(merge.replace(" ", ""), place)
    return [-float(places.get(tokens.get(number, ""), len(merges))) for number in range(size)]


def adds_space(table: Mapping[str, Any]) -> bool:
    """Whether a space goes before the text."""
    return any(part.get("type") == "Prepend" for part in parts_of(table, "normalizer", "normalizers")) or any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in parts_of(table, "pre_tokenizer", "pretokenizers")
    )


def parts_of(table: Mapping[str, Any], name: str, inside: str) -> list[Mapping[str, Any]]:
    """Of a normalizer or a pre-tokenizer: itself, or what it is a sequence of."""
    whole = table.get(name) or {}
    parts: list[Mapping[str, Any]] = whole.get(inside, [whole] if whole else [])
    return parts


def check_normalizer(table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise UnsupportedModel where text is changed in another way before it is split."""
    parts = parts_of(table, "normalizer", "normalizers")
    other = [part.get("type") for part in parts if part.get("type") not in known]
    if other:
        raise UnsupportedModel(
            f"{TOKENIZER} changes text by {shown(other[0])}, which a GGUF file cannot say; wanted none, or {', '.join(known)}. "
            "Write the format stock, and give that folder to llama.cpp's own converter."
        )


def check_spaces(table: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel where text is split otherwise than at spaces, before its pieces are merged."""
    if not all(map(at_spaces, parts_of(table, "pre_tokenizer", "pretokenizers"))):
        raise unknown_split(table["pre_tokenizer"], "none, Metaspace, or a split at spaces")


def at_spaces(part: Mapping[str, Any]) -> bool:
    """Whether a part of a pre-tokenizer splits at spaces, and keeps them."""
    if part.get("type") == "Metaspace":
        return part.get("replacement") == SPACE
    return part.get("type") == "Split" and part.get("pattern") == {"String": " "} and part.get("behavior") != "Removed"


def unknown_split(before: Mapping[str, Any], wanted: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{TOKENIZER} splits text by {shown(before)}, which has no name in GGUF that is known here; wanted {wanted}. Write the "
        "format stock, and give that folder to llama.cpp's own converter."
    )


def split_of(table: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which text is split before its bytes are merged."""
    before = table.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    merges_all = not (table.get("model") or {}).get("ignore_merges")
    plain = merges_all and not any(part.get("add_prefix_space") for part in parts)
    patterns = [(part.get("pattern") or {}).get("Regex") for part in parts if part.get("type") == "Split"]
    if plain and kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if (
        plain
        and kinds == ["Digits", "ByteLevel"]
        and parts[0].get("individual_digits")
        and parts[1].get("use_regex", True)
    ):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and patterns[0] in SPLITS and not parts[1].get("use_regex", True):
        # A token that is a whole word is taken without merging, or not: llama.cpp goes by the name of the split.
        name = SPLITS[patterns[0]]
        if merges_all is (name != "llama-bpe") and not parts[1].get("add_prefix_space"):
            return name
    raise unknown_split(before, "the way of gpt-2, smollm, llama 3 or qwen2")


def add_specials(writer: Any, folder: Path, tokenizer: Tokenizer) -> None:
    """Tokens with a meaning, the one before every text, and the template of chats."""
    settings = table_of(folder, SETTINGS)
    known = tokenizer.get_vocab(with_added_tokens=True)
    names = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    found = {name: token.get("content") if isinstance(token, dict) else token for name, token in names.items()}
    numbers = {name: known[token] for name, token in found.items() if isinstance(token, str) and token in known}
    for name, number in special_ids(folder).items():
        numbers.setdefault(name, number)
    for name, number in numbers.items():
        getattr(writer, f"add_{name}_token_id")(number)
    encoded, bare = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    before = [numbers["bos"]] if encoded[:1] == [numbers.get("bos")] else []
    after = [numbers["eos"]] if encoded[-1:] == [numbers.get("eos")] else []
    if encoded != [*before, *bare, *after]:
        raise UnsupportedModel(
            f"{TOKENIZER} makes {encoded} of a text that is {bare} without special tokens; wanted bos before, eos behind "
            "and no others, as a GGUF file can say. Name them in tokenizer_config.json."
        )
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    template = settings.get("chat_template")
    if checked(folder, folder / TEMPLATE).is_file():
        template = read_bytes(folder, TEMPLATE, CONFIG_BYTES).decode("utf-8", errors="replace")
    if isinstance(template, str):
        template.encode()  # JSON can hold half of a surrogate pair, and a file of text cannot
        writer.add_chat_template(template)


def special_ids(folder: Path) -> dict[str, int]:
    """Those that config.json names; of several the first."""
    config = table_of(folder, "config.json")
    found = {name: config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    first = {name: value[0] if isinstance(value, list) and value else value for name, value in found.items()}
    return {name: value for name, value in first.items() if type(value) is int and value >= 0}


def table_of(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no such file. Raises CheckpointError where it is none."""
    if not checked(folder, folder / name).is_file():
        return {}
    return read_object(folder, name, CONFIG_BYTES)
