"""The tokenizer of a model folder, from transformers. Code that lies in the folder runs only where the caller says so.

A chat template is text that is carried over, never rendered.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available, is_tiktoken_available

from streamlap.errors import CheckpointError, RecipeError, StreamlapError, first_line, shown
from streamlap.families.bounds import native_config
from streamlap.families.nas import known_config
from streamlap.families.table import find_family
from streamlap.loader.configuration_nas import NAS
from streamlap.untrusted.paths import CONFIG_BYTES, check_folder, read_object

log = logging.getLogger(__name__)

SETTINGS, TOKENS, WHOLE = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
PATH_KEY = re.compile(r"vocab|merges|.*_(file|path|dir)")
"""Keys of what transformers hands to a tokenizer's class, whose text it might open."""
LEFT_OVER = re.compile(r"(?!gguf_).*_(file|path|dir)")
"""Of these, the keys by which a tokenizer kept where it had its files from when it was saved, on another machine. They are
taken out of the settings, so that the files are those of the folder."""
LABELS = {"name_or_path", "special_tokens_map_file"}
"""Such keys that nearly every folder has, and that are not opened."""
VOCABULARY = re.compile(
    r"(tokenizer(?!_config).*|vocab.*|tekken|bpe.*)\.(json|txt)|.*\.(model|tiktoken|spm|bpe)(\.\w+)?"
)
"""Files that a tokenizer's tokens are in."""
MODEL = re.compile(r"\.(model|tiktoken|spm)\b")
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""How such a file begins; a model of sentencepiece is no text."""
GENERIC = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""What reads tokenizer.json as it stands, and the name of it that all versions of transformers know."""
Result = TypeVar("Result")
Ids = npt.NDArray[np.int64]


class Encoder:
    """The tokenizer of a model folder at work; `of` is what messages call the text that it is loaded for.

    Raises RecipeError where the folder has no tokenizer that loads and works, CheckpointError where its files may not be read.
    """

    def __init__(self, folder: Path, of: Path, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self._tokenizer = load_tokenizer(folder, of, trust_remote_code)
        self.gives_places = bool(getattr(self._tokenizer, "is_fast", False))
        """Whether it says where in a text a token stands: what the tokenizers library runs does, what Python runs does not."""

    def ids(self, text: str, of: Path) -> Ids:
        """The ids of a text, [T], without special tokens."""
        return self._tried(lambda: np.array(self._call(text)["input_ids"], np.int64), of)

    def places(self, text: str, of: Path) -> Ids:
        """[T, 3]: the ids, and the characters at which each token begins and ends."""

        def encode() -> Ids:
            found = self._call(text, return_offsets_mapping=True)
            ids, places = np.array(found["input_ids"], np.int64), np.array(found["offset_mapping"], np.int64)
            return np.column_stack([ids, places.reshape(-1, 2)])

        return self._tried(encode, of)

    def token(self, index: int) -> str:
        """What the tokenizer calls a token, as messages show it."""
        return shown(self._tried(lambda: self._tokenizer.convert_ids_to_tokens(index), self.folder))

    def _call(self, text: str, **options: bool) -> Any:
        return self._tokenizer(text, add_special_tokens=False, verbose=False, **options)

    def _tried(self, act: Callable[[], Result], of: Path) -> Result:
        return _tried(act, f"the tokenizer in {self.folder} fails", f"wanted token ids of {of}. Give them as .npy.")


def load_tokenizer(folder: Path, of: Path, trust_remote_code: bool = False) -> Any:
    """AutoTokenizer's, with the config of transformers' own class: `auto_map` in config.json is not heeded.

    It goes by the model_type too, so that has to be the folder's own, also where the model is read as another family's.
    """
    check_folder(folder)
    if any("\ud800" <= char <= "\udfff" for char in str(folder)):  # bytes that Python could not decode
        raise RecipeError(
            f"the path {folder} is no UTF-8 text in this locale, and tokenizers open no other; wanted one that is. Set "
            "LC_ALL=C.UTF-8, rename it, or give token ids as .npy."
        )
    raw = known_config(folder)
    find_family(raw)
    config, own = native_config(raw, folder), model_type_of(folder)
    if own not in (raw["model_type"], NAS):
        config = CONFIG_MAPPING[own].from_dict({key: raw[key] for key in ("tokenizer_class",) if key in raw})
    code = check_settings(folder, raw.get("tokenizer_class"), trust_remote_code)
    seen = f"{folder} has no tokenizer that loads"
    wanted = f"wanted one to read {of}. Put its files there, or give token ids as .npy."
    names = sorted(path.name for path in folder.iterdir() if VOCABULARY.fullmatch(path.name) and path.is_file())
    if not names:
        seen += ": no tokenizer.json, and no other file of tokens"
    if missing := [] if code else missing_packages(folder, names):
        packages = " and ".join(missing)
        raise RecipeError(
            f"{seen}: {names[0]} needs {packages}, not installed here; wanted it to read {of}. Run pip install "
            f"{' '.join(missing)}, or give token ids as .npy."
        )

    def load() -> Any:
        with without_paths(folder) as place:
            return AutoTokenizer.from_pretrained(place, config=config, local_files_only=True, trust_remote_code=code)

    tokenizer = _tried(load, seen, wanted)
    if not names and not code and type(tokenizer).vocab_files_names:
        raise RecipeError(f"{seen}; {wanted}")
    return tokenizer


def model_type_of(folder: Path) -> str:
    """As config.json has it."""
    return str(read_object(folder, "config.json", CONFIG_BYTES)["model_type"])


def class_elsewhere(folder: Path, model_type: str) -> str | None:
    """The class that the settings of a copy have to name, whose config.json has this model_type: the one by which transformers
    opens the folder's own. None where nothing has to be said: the model_type is the same, or nothing opens here either."""
    if model_type_of(folder) == model_type:
        return None
    try:
        name = type(load_tokenizer(folder, folder)).__name__
    except StreamlapError:
        return None
    return GENERIC.get(name, name)


def missing_packages(folder: Path, names: list[str]) -> list[str]:
    """What is to be installed before transformers can read a folder whose files of tokens are `names`, where each of them is a
    model of sentencepiece or tiktoken."""
    if not names or not all(MODEL.search(name) for name in names):
        return []
    with (folder / names[0]).open("rb") as file:
        if TIKTOKEN.match(file.read(1 << 10)):
            return [] if is_tiktoken_available() else ["tiktoken"]
    packages = {"sentencepiece": is_sentencepiece_available, "protobuf": is_protobuf_available}
    return [name for name, is_there in packages.items() if not is_there()]


@functools.cache
def say_once(message: str) -> None:
    """The tokenizer of a folder is loaded for each text."""
    log.warning(message)


@contextlib.contextmanager
def without_paths(folder: Path) -> Iterator[Path]:
    """The folder, or one of links to its files in which the settings name no other files: transformers opens what they name,
    from anywhere."""
    settings = read_object(folder, SETTINGS, CONFIG_BYTES) if (folder / SETTINGS).exists() else {}
    dropped = left_over(settings)
    if not dropped:
        yield folder
        return
    keys = ", ".join(shown(key)[1:-1] for key in dropped[:8])
    say_once(f"{folder / SETTINGS} has {keys}, of the machine that wrote it: ignored, the files are those of {folder}")
    with tempfile.TemporaryDirectory(prefix="streamlap-") as scratch:
        place = Path(scratch) / (folder.resolve().name or "model")
        place.mkdir()
        for path in folder.iterdir():
            if path.name != SETTINGS:
                (place / path.name).symlink_to(path.resolve())
        kept = {key: value for key, value in settings.items() if key not in dropped}
        (place / SETTINGS).write_text(json.dumps(kept), encoding="utf-8")
        yield place


def left_over(settings: Mapping[str, Any]) -> list[str]:
    """Keys by which settings name files or folders of the machine that wrote them."""
    return [
        key
        for key, value in settings.items()
        if LEFT_OVER.fullmatch(key) and isinstance(value, str) and key not in LABELS
    ]


def check_settings(folder: Path, default: Any, trust_remote_code: bool) -> bool:
    """Whether code of the folder is to run: where it names some and the caller trusts it. `default` is config.json's class.

    Raises RecipeError for a tokenizer that is neither transformers' own nor trusted, CheckpointError for names of files
    outside the folder.
    """
    settings = read_object(folder, SETTINGS, CONFIG_BYTES) if (folder / SETTINGS).exists() else {}
    files = settings.get("fast_tokenizer_files") or []
    if not isinstance(files, list) or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise CheckpointError(
            f"{SETTINGS} has fast_tokenizer_files {shown(files)}; wanted names of files inside {folder}."
        )
    dropped = left_over(settings)
    check_paths({key: value for key, value in settings.items() if key not in dropped}, SETTINGS, folder)
    check_paths(read_object(folder, TOKENS, CONFIG_BYTES) if (folder / TOKENS).exists() else {}, TOKENS, folder)
    if settings.get("init_inputs"):
        raise CheckpointError(f"{SETTINGS} has init_inputs {shown(settings['init_inputs'])}; wanted settings by name.")
    code = _code(settings.get("auto_map"))
    if code and trust_remote_code:
        if any("--" in word for word in code):
            raise CheckpointError(
                f"{SETTINGS} has auto_map {shown(code)}, code of another repository; wanted code inside {folder}."
            )
        return True
    unknown = [name for name in (settings.get("tokenizer_class"), default) if name is not None and not _known(name)]
    named = settings.get("tokenizer_class") is not None  # else transformers takes config.json's, and has to have it
    if unknown and named and not code and (folder / WHOLE).is_file() and all(map(_free, unknown)):
        say_once(
            f"{folder} names {shown(unknown[0])} as its tokenizer, and transformers has none of that name: it takes {WHOLE}"
        )
    elif unknown:
        why = "transformers has no tokenizer of that name. Name one that it has,"
        if code:
            why = (
                f"its code is in the folder ({shown(', '.join(code))[1:-1]}) and is not run unless you say so. Read it, then "
                "give --trust-remote-code (in Python trust_remote_code=True),"
            )
        raise RecipeError(
            f"the tokenizer in {folder} is a {shown(unknown[0])}: {why} or give the text as token ids in an .npy file."
        )
    return False


def check_paths(table: Any, file: str, folder: Path) -> None:
    """Raise CheckpointError where settings, at whatever depth, name a file to read: transformers takes such a name as it
    stands, from anywhere. Where the vocabulary lies follows from the folder."""
    if isinstance(table, dict):
        for key, value in table.items():
            if PATH_KEY.fullmatch(key) and key not in LABELS and isinstance(value, str):
                raise CheckpointError(
                    f"{file} has {shown(key)[1:-1]} {shown(value)}; wanted none, the files are those of {folder}. Take the "
                    "key out, or give the text as token ids in an .npy file."
                )
            check_paths(value, file, folder)
    elif isinstance(table, list):
        for value in table:
            check_paths(value, file, folder)


def _code(table: Any) -> list[str]:
    """Where auto_map has the code of a tokenizer: `module.Class`, slow and fast."""
    rows = table.get("AutoTokenizer") if isinstance(table, dict) else table
    rows = rows if isinstance(rows, list) else [rows]
    return [row for row in rows if isinstance(row, str)]


def _known(name: Any) -> bool:
    """Whether transformers has a tokenizer of that name; it looks names up among all that it has, models included."""
    kinds = [kind for kind in _called(name) if isinstance(kind, type)]
    # What needs a package that is not installed has a stand-in with _backends, which says so when it is used.
    return any(issubclass(kind, PreTrainedTokenizerBase) or hasattr(kind, "_backends") for kind in kinds)


def _free(name: Any) -> bool:
    """Whether nothing in transformers has that name, so that it reads tokenizer.json with the tokenizers library."""
    return isinstance(name, str) and all(found is None for found in _called(name))


def _called(name: Any) -> list[Any]:
    """What transformers finds under the name of a tokenizer, fast or slow."""
    if not isinstance(name, str):
        return []
    return [tokenizer_class_from_name(word) for word in (name, f"{name}Fast", name.removesuffix("Fast"))]


def _tried(act: Callable[[], Result], seen: str, wanted: str) -> Result:
    """What `act` gives. Raises RecipeError for whatever goes wrong in it."""
    try:
        return act()
    except BaseException as error:
        # A panic in the tokenizers library is no Exception; a Ctrl-C is none either, and goes on.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RecipeError(f"{seen} ({first_line(error)}); {wanted}") from error
