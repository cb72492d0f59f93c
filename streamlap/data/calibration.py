"""Files -> tokens_NL, the calibration windows. The same files, settings and seed always give the same; nothing is fetched for
local files.

Text is tokenised without special tokens and cut into windows that do not overlap. Token ids (.npy) are taken as they are.

**Which windows are drawn.** Of a text the candidates are the windows of its first P = max(2^20, 4 x samples x length) tokens,
and no more of it is read. Several texts share P: each gives the windows of as many tokens as are left for each text that has
not been read, and one window at least, until P tokens are taken. Of token ids all windows are candidates. Of the candidates, in
the order of their files, `samples` are drawn with the seed, each at most once, and keep that order.

Shape suffixes: N windows, L length.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path

import torch

from streamlap.data.datasets import CALIBRATION, text_files
from streamlap.data.text import is_ids
from streamlap.data.windows import ReadSettings, TokenReader, Tokens, gather
from streamlap.errors import RecipeError, counted, shown
from streamlap.recipe import Calibration

log = logging.getLogger(__name__)

DEFAULT_SAMPLES = 128
LEAST_TOKENS, MOST_OF_SAMPLES = 1 << 20, 4
"""P, as it is above."""
MOST_PERMUTED = 1 << 22
"""Windows of which a whole permutation is drawn; it takes 8 bytes of each. Files of more were not read by earlier versions."""


def calibration_tokens(
    settings: Calibration,
    folder: Path,
    vocabulary: int,
    context: int,
    trust_remote_code: bool = False,
    max_ram: int | None = None,
) -> torch.Tensor:
    """The calibration windows, [N, L] int64, drawn with the settings' seed.

    Args: folder, where the tokenizer lies; vocabulary and context, the model's bounds on ids and on L; trust_remote_code,
    whether a tokenizer that is code in the folder may run; max_ram, cap in bytes on all that the process holds.
    Raises RecipeError for a file that is missing, empty, not text, too short, or out of the vocabulary, and BudgetError where
    the tokens do not fit.
    """
    paths = find_files(settings.files or bundled_text("calibration"))
    reading = ReadSettings(
        folder=folder, vocabulary=vocabulary, context=context, text_column=settings.text_column,
        trust_remote_code=trust_remote_code, max_ram=max_ram, advice="fewer --samples or a shorter --length",
    )  # fmt: skip
    reader = TokenReader(paths, reading, settings.length)
    length = reader.length
    found = read_candidates(reader, paths, settings.samples or DEFAULT_SAMPLES)
    count = sum(tokens.windows(length, length) for tokens in found)
    ready_made = settings.samples is None and len(found) == 1 and found[0].ready_made
    wanted = count if ready_made else settings.samples or DEFAULT_SAMPLES
    if wanted > count:
        log.warning(
            "calibration has %s of %d tokens; asked for %d, using all", counted(count, "window"), length, wanted
        )
    wanted = min(wanted, count)
    reader.claim(wanted * length * 8)
    return gather(found, draw(count, wanted, settings.seed), length, length)


def read_candidates(reader: TokenReader, paths: Sequence[Path], samples: int) -> list[Tokens]:
    """What windows are drawn from, by the rule above."""
    left = max(LEAST_TOKENS, MOST_OF_SAMPLES * samples * reader.length)
    texts = sum(not is_ids(path) for path in paths)
    found = []
    for path in paths:
        if not is_ids(path):
            if left <= 0:
                continue
            tokens = reader.read(path, max(reader.length, left // texts))
            left, texts = left - tokens.length, texts - 1
        else:
            tokens = reader.read(path, None)
        reader.claim(tokens.held)
        found.append(tokens)
    return found


def draw(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of the numbers below `count`, ascending; all of them where there are no more."""
    if wanted >= count:
        return list(range(count))
    chance = torch.Generator().manual_seed(seed)
    if count <= MOST_PERMUTED or wanted > count // 4:
        return sorted(torch.randperm(count, generator=chance)[:wanted].tolist())
    drawn: dict[int, None] = {}
    while len(drawn) < wanted:
        drawn.update(dict.fromkeys(torch.randint(count, (wanted,), generator=chance).tolist()))
    return sorted(list(drawn)[:wanted])


def find_files(files: Sequence[str], splits: Collection[str] = CALIBRATION) -> list[Path]:
    """Files, and those of data sets of the hub: where none of its splits is named, of the first of `splits` that is there."""
    return [path for file in files for path in text_files(file, splits)]


def file_names(files: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """The names of the text that a call gives. Raises RecipeError for none, which is not to mean the bundled text."""
    given = (files,) if isinstance(files, str | Path) else files
    if not isinstance(given, Sequence) or not given or not all(isinstance(file, str | Path) for file in given):
        raise RecipeError(f"text is {shown(files)}; wanted a file, or a list of one or more.")
    return tuple(map(str, given))


def token_hash(tokens_NL: torch.Tensor) -> str:
    return hashlib.sha256(tokens_NL.numpy().tobytes()).hexdigest()


def bundled_text(purpose: str) -> tuple[str, ...]:
    """Public-domain English that ships with the package, for "calibration" or "validation"; they do not overlap."""
    return (str(resources.files("streamlap") / "demo" / f"{purpose}.txt"),)
