"""Perplexity over the layer stream: every window passes layer k before layer k + 1 is read.

exp of the mean negative log-likelihood in nats over the predicted positions inside each window. No BOS is added; windows do not
overlap unless a stride is given, and then each scores its last `stride` positions only.

Shape suffixes: N windows, L length.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from streamlap.calibration import bundled_text, read_windows
from streamlap.errors import NumericalError, RecipeError
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream, batch_of
from streamlap.memory import peak_ram_bytes, peak_vram_bytes, require_disk, reset_peak_ram, steady_heap
from streamlap.preflight import pick_device
from streamlap.store.hidden import DiskBank, HiddenStates, RamBank
from streamlap.store.hub import local_folder

RAM_SHARE = 0.25
"""Hidden states stay in memory while two generations take less than this share of what is free; else they go to disk."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A perplexity and what it was measured on."""

    perplexity: float
    nll: float
    """Mean negative log-likelihood, nats a token."""
    tokens: int
    """Predicted positions."""
    length: int
    seconds: float
    peak_ram_bytes: int
    peak_vram_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    *,
    length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    work: str | Path | None = None,
) -> Evaluation:
    """Perplexity of a checkpoint, original or compressed, on text or token ids (as for calibration; default: bundled text,
    which is not the one that calibration takes).

    Args: length, tokens a window (default 2048, the model's context, or the rows of an .npy); limit, tokens to use at
    most, windows times length; dtype, compute dtype, auto is float32 on a CPU; work, where hidden states go when memory is
    short.
    """
    start = time.perf_counter()
    steady_heap()
    reset_peak_ram()
    stream = ModelStream(local_folder(str(model)), pick_device(device), dtype)
    files = (text,) if isinstance(text, str | Path) else tuple(text or bundled_text("validation"))
    tokens_NL = choose_windows(stream, [str(file) for file in files], length, stride, limit)
    nll_NL = token_losses(stream, tokens_NL, Path(work) if work else None)
    scored_NL = nll_NL if stride is None else nll_NL[:, -stride:]
    mean = float(scored_NL.double().mean())
    if not math.isfinite(mean):
        raise NumericalError(f"mean NLL is {mean}; wanted a number. Try dtype float32.")
    return Evaluation(
        perplexity=math.exp(min(mean, 700.0)), nll=mean, tokens=scored_NL.numel(), length=tokens_NL.shape[1],
        seconds=time.perf_counter() - start, peak_ram_bytes=peak_ram_bytes(), peak_vram_bytes=peak_vram_bytes(),
    )  # fmt: skip


def choose_windows(
    stream: ModelStream, files: Sequence[str], length: int | None, stride: int | None, limit: int | None
) -> torch.Tensor:
    """The windows to score, [N, L]. Raises RecipeError where the numbers do not fit the text or each other."""
    for name, value in (("stride", stride), ("limit", limit), ("length", length)):
        least = 2 if name == "length" else 1
        if value is not None and value < least:
            raise RecipeError(f"{name} is {value}; wanted at least {least}.")
    tokens_NL = read_windows(files, stream.folder, stream.vocabulary, stream.context, length, stride)
    if stride is not None and stride >= tokens_NL.shape[1]:
        raise RecipeError(f"stride is {stride}; wanted less than the window's {tokens_NL.shape[1]} tokens.")
    windows = len(tokens_NL) if limit is None else limit // tokens_NL.shape[1]
    if not windows:
        raise RecipeError(f"limit is {limit} tokens; wanted at least one window of {tokens_NL.shape[1]}.")
    return tokens_NL[:windows]


def token_losses(stream: ModelStream, tokens_NL: torch.Tensor, work: Path | None = None) -> torch.Tensor:
    """NLL of every predicted position, [N, L - 1] float32."""
    kwargs = stream.layer_kwargs(tokens_NL.shape[1])
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="streamlap-eval-", dir=work) as scratch:
        hidden = choose_bank(stream, tokens_NL, Path(scratch))
        hidden.write(0, stream.embed(tokens_NL))
        for index in tqdm(range(stream.depth), desc="evaluate", unit="layer"):
            propagate(stream.layer(index, kwargs[index]), hidden, index)
            hidden.drop(index)
        rows = [
            torch.nn.functional.cross_entropy(
                logits_LV[:-1].float(), tokens_L[1:].to(logits_LV.device), reduction="none"
            )
            for logits_LV, tokens_L in zip(stream.logits(hidden.read(stream.depth)), tokens_NL, strict=True)
        ]
    return torch.stack(rows).cpu()


def propagate(layer: StreamLayer, hidden: HiddenStates, index: int) -> None:
    """A function of its own, so that nothing holds this layer while the next one is read."""
    hidden.write(index + 1, (layer(x_BLD) for x_BLD in hidden.read(index)))


def choose_bank(stream: ModelStream, tokens_NL: torch.Tensor, scratch: Path) -> HiddenStates:
    """Memory where two generations fit well, else files in `scratch`. The numbers are the same."""
    sequences, length = tokens_NL.shape
    disk = DiskBank(scratch, (sequences, length, stream.width), stream.dtype, batch_of(length))
    if 2 * disk.nbytes < RAM_SHARE * psutil.virtual_memory().available:
        return RamBank()
    require_disk(scratch, 2 * disk.nbytes, "hidden states")
    return disk
