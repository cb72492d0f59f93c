"""Files -> tokens_NL. The same files, settings and seed always give the same windows; nothing is fetched for local files.

Text is tokenised without special tokens and cut into windows that do not overlap. Token ids (.npy) are taken as they are.

Shape suffixes: T tokens, N windows, L length.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from streamlap.data.datasets import text_files
from streamlap.data.tokenizer import tokenise
from streamlap.errors import RecipeError, first_line, one_line, shown
from streamlap.recipe import Calibration
from streamlap.store.hub import TEXT_SUFFIXES
from streamlap.untrusted.npy import read_integers

log = logging.getLogger(__name__)

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048


def calibration_tokens(
    settings: Calibration, folder: Path, vocabulary: int, context: int, trust_remote_code: bool = False
) -> torch.Tensor:
    """The calibration windows, [N, L] int64, drawn with the settings' seed.

    Args: folder, where the tokenizer lies; vocabulary and context, the model's bounds on ids and on L; trust_remote_code,
    whether a tokenizer that is code in the folder may run.
    Raises RecipeError for a file that is missing, empty, not text, too short, or out of the vocabulary.
    """
    windows_NL = read_windows(
        settings.files or bundled_text("calibration"), folder, vocabulary, context, settings.length,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    ready_made = len(settings.files) == 1 and settings.files[0].endswith(".npy") and settings.samples is None
    wanted = len(windows_NL) if ready_made else settings.samples or DEFAULT_SAMPLES
    if wanted > len(windows_NL):
        log.warning("calibration has %d windows of %d tokens; asked for %d, using all", *windows_NL.shape, wanted)
    if wanted >= len(windows_NL):
        return windows_NL
    order = torch.randperm(len(windows_NL), generator=torch.Generator().manual_seed(settings.seed))
    return windows_NL[order[:wanted].sort().values]


def read_windows(
    files: Sequence[str], folder: Path, vocabulary: int, context: int, length: int | None, stride: int | None = None,
    trust_remote_code: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Every window of the files in order, [N, L] int64; the last partial window of each file is left out."""
    paths = [path for file in files for path in text_files(file)]
    windows = [
        cut_windows(path, read_tokens(path, folder, trust_remote_code), context, length, stride) for path in paths
    ]
    if len({part.shape[1] for part in windows}) > 1:
        raise RecipeError(f"{', '.join(files)} have windows of different lengths; set --length.")
    windows_NL = torch.cat(windows)
    low, high = int(windows_NL.min()), int(windows_NL.max())
    if low < 0 or high >= vocabulary:
        raise RecipeError(
            f"{', '.join(files)}: token ids from {low} to {high}; the model's vocabulary has 0 to {vocabulary - 1}. "
            "Were they made with another tokenizer?"
        )
    return windows_NL


def token_hash(tokens_NL: torch.Tensor) -> str:
    return hashlib.sha256(tokens_NL.numpy().tobytes()).hexdigest()


def bundled_text(purpose: str) -> tuple[str, ...]:
    """Public-domain English that ships with the package, for "calibration" or "validation"; they do not overlap."""
    return (str(resources.files("streamlap") / "demo" / f"{purpose}.txt"),)


def read_tokens(path: Path, folder: Path, trust_remote_code: bool) -> torch.Tensor:
    """The tokens of one file: [T] of a text, [T] or [N, L] of ids."""
    if not path.is_file():
        raise RecipeError(f"{path} is not a file; wanted text ({', '.join(TEXT_SUFFIXES)}) or token ids (.npy).")
    if path.stat().st_size == 0:
        raise RecipeError(f"{path} is empty; wanted text or token ids.")
    if path.suffix == ".npy":
        return _read_ids(path)
    return tokenise(_read_text(path), folder, path, trust_remote_code)


def cut_windows(path: Path, tokens: torch.Tensor, context: int, length: int | None, stride: int | None) -> torch.Tensor:
    """[N, L] of the tokens of `path`."""
    if tokens.ndim == 2:
        length = length or tokens.shape[1]
        if tokens.shape[1] % length:
            raise RecipeError(f"{path} has rows of {tokens.shape[1]} tokens; --length {length} does not divide that.")
        tokens = tokens.flatten() if stride is None else tokens
    length = length or min(DEFAULT_LENGTH, context)
    if length < 2:
        raise RecipeError(f"{path}: length is {length}; wanted windows of at least 2 tokens.")
    if length > context:
        raise RecipeError(
            f"length is {length}, and the model's context is {context}; choose --length {context} or less."
        )
    if tokens.shape[-1] < length:
        raise RecipeError(f"{path} has {tokens.shape[-1]} tokens, less than one window of {length}; give more text.")
    return tokens.unfold(-1, length, stride or length).reshape(-1, length)


def _read_ids(path: Path) -> torch.Tensor:
    try:
        ids = read_integers(path)
    except TypeError as error:
        raise RecipeError(f"{path} holds {error}.") from error
    except Exception as error:  # numpy raises a different one for every way to damage a header
        raise RecipeError(
            f"{path} is not a .npy array ({first_line(error)}); wanted token ids saved by numpy.save."
        ) from error
    if int(ids.max()) >= 2**63:
        raise RecipeError(f"{path} holds the id {int(ids.max())}; wanted token ids.")
    return torch.from_numpy(ids.astype(np.int64))


def _read_text(path: Path) -> str:
    if path.suffix not in TEXT_SUFFIXES:
        raise RecipeError(f"{path} ends in {path.suffix!r}; wanted {', '.join(TEXT_SUFFIXES)} or .npy.")
    try:
        if path.suffix == ".parquet":
            return "\n".join(_parquet_texts(path))
        text = path.read_text(encoding="utf-8")
        if "\0" in text:
            raise RecipeError(f"{path} is not text: character {text.index(chr(0))} is NUL; wanted UTF-8 text.")
        if path.suffix == ".txt":
            return text
        return "\n".join(_json_text(line) for line in text.split("\n") if line.strip())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}); convert it first.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"{path}: wanted one JSON object with a text field in each line, found {shown(error)}."
        ) from error


def _json_text(line: str) -> str:
    text = json.loads(line)["text"]
    if not isinstance(text, str):
        raise TypeError(f"text is {shown(text)}")
    return text


def _parquet_texts(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RecipeError(f"{path} needs pyarrow: pip install 'streamlap[parquet]'.") from error
    try:
        table = parquet.read_table(path, columns=["text"])
    except (ArrowException, OSError) as error:
        raise RecipeError(f"{path} is not a parquet file with a text column ({one_line(str(error))}).") from error
    return [str(value) for value in table["text"].to_pylist() if value is not None]
