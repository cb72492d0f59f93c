"""Perplexity over the layer stream: every window passes layer k before layer k + 1 is read.

exp of the mean negative log-likelihood in nats over the predicted positions inside each window. No BOS is added; windows do not
overlap unless a stride is given, and then each scores its last `stride` positions only.

Shape suffixes: N windows, L length, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from streamlap.data.calibration import bundled_text, file_names, find_files
from streamlap.data.datasets import EVALUATION
from streamlap.data.windows import ReadSettings, read_windows
from streamlap.errors import NumericalError, RecipeError, shown
from streamlap.families.opening import parse_dtype
from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.pipeline.place import check_place
from streamlap.pipeline.runner import LayerRunner, start_runner
from streamlap.pipeline.streams import HiddenStates, open_bank
from streamlap.planning.schedule import Fit, Schedule, fit, require_fit
from streamlap.planning.workload import evaluation_workload
from streamlap.settings import refuse_options, split_options
from streamlap.store.hidden import HiddenBank
from streamlap.store.hub import local_folder
from streamlap.store.sink import make_folder
from streamlap.system.allocator import steady_heap
from streamlap.system.budget import require_disk
from streamlap.system.meters import peak_ram_bytes, peak_vram_bytes, reset_peaks
from streamlap.system.progress import Progress


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
    text_column: str | None = None,
    dtype: str = "auto",
    **options: Any,
) -> Evaluation:
    """Perplexity of a checkpoint, original or compressed, on text or token ids (as for calibration; default: bundled text,
    which is not the one that calibration takes).

    Args: length, tokens a window (default 2048, the model's context, or the rows of an .npy); limit, tokens to use at most,
    each counted once where windows overlap, behind which nothing is read; text_column, where the text of a row of JSON or
    parquet is; dtype, compute dtype, auto is float32 on a CPU; options, single fields of RunSettings, of which `work` is where
    hidden states go when memory is short, and without which they stay in memory.
    """
    settings, others = split_options(options)
    refuse_options(evaluate, others)
    for name, value, least in (("stride", stride, 1), ("limit", limit, 1), ("length", length, 2)):
        if value is not None and (type(value) is not int or value < least):
            raise RecipeError(f"{name} is {shown(value)}; wanted a whole number of at least {least}.")
    files = bundled_text("validation") if text is None else file_names(text)
    start, settings = time.perf_counter(), settings.settled()
    steady_heap()
    reset_peaks()
    dtype = parse_dtype(dtype)
    if settings.work is not None:
        check_place(Path(settings.work), "--work")
    folder = local_folder(model, settings.trust_remote_code)
    dtype = "float32" if (settings.device, dtype) == ("cpu", "auto") else dtype
    stream = ModelStream(folder, settings.device, dtype)
    stream.require_head()
    reading = ReadSettings(
        folder=folder, vocabulary=stream.vocabulary, context=stream.context, text_column=text_column,
        trust_remote_code=settings.trust_remote_code, max_ram=settings.caps.ram,
    )  # fmt: skip
    tokens_NL = read_windows(find_files(files, EVALUATION), reading, length, stride, limit)
    windows, window = tokens_NL.shape
    work = evaluation_workload(stream, windows, window, disk=settings.work is not None)
    choice = fit(work, settings.caps, settings.overlap)
    require_fit(choice, settings.caps)
    nll_NL = token_losses(stream, tokens_NL, choice, Path(settings.work) if settings.work else None)
    scored_NL = nll_NL if stride is None else nll_NL[:, -stride:]
    mean = float(scored_NL.double().mean())
    if not math.isfinite(mean):
        way = (
            "Try dtype float32"
            if stream.dtype != torch.float32
            else "Some weight of norm or head is too large for float32"
        )
        raise NumericalError(f"mean NLL is {mean}; wanted a number. {way}.")
    return Evaluation(
        perplexity=math.exp(min(mean, 700.0)), nll=mean, tokens=scored_NL.numel(), length=tokens_NL.shape[1],
        seconds=time.perf_counter() - start, peak_ram_bytes=peak_ram_bytes(), peak_vram_bytes=peak_vram_bytes(),
    )  # fmt: skip


Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits [T, V] and the tokens that come [T] -> what is wanted of each."""


def nll(logits_TV: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits_TV, target_T, reduction="none")


def token_losses(
    stream: ModelStream, tokens_NL: torch.Tensor, choice: Fit, work: Path | None = None, score: Score = nll,
    target_NT: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """NLL of every predicted position, [N, T] float32, or another score of it.

    Args: target_NT, the tokens that come behind each of the first T; default all behind the first, T = L - 1.
    """
    target_NT = tokens_NL[:, 1:] if target_NT is None else target_NT
    with scratch_bank(stream, tokens_NL, choice.schedule, work) as bank:
        stream_layers(stream, choice, bank, tokens_NL)
        with choice.ram.claim(choice.schedule.ram["head"]), choice.vram.claim(choice.schedule.vram.get("head", {})):
            return head_losses(stream, bank.read(stream.depth), target_NT, score)


def stream_layers(
    stream: ModelStream, choice: Fit, bank: HiddenBank, tokens_NL: torch.Tensor, *, name: str = "evaluate",
    most_out: float = 0.0, before: Callable[[int], None] = lambda index: None, first: int = 0, keeps: bool = False,
) -> None:  # fmt: skip
    """Every layer in turn. All that the loop needed is free again at the end.

    Args: name, what the bar says; most_out, the share of the tokens that may go bad, before NumericalError: a perplexity over
    part of them would be another one; before, called with the number of each layer before it is read; first, the layer to go on
    with; keeps, whether what each layer reads stays on the disk.
    """
    kwargs = stream.layer_kwargs(tokens_NL.shape[1])
    with start_runner(stream, choice, [bank], Progress(name, stream.depth, first), most_out) as runner:
        if not first:
            runner.enter(bank, tokens_NL)
        for index in range(first, stream.depth):
            before(index)
            run_layer(runner, bank, index, kwargs[index], keeps)
            runner.require_baseline(index)


def run_layer(runner: LayerRunner, bank: HiddenBank, index: int, kwargs: Mapping[str, Any], keeps: bool) -> None:
    """One layer; a function of its own, so that nothing holds this layer while the next one is read."""
    runner.progress.phase("read")
    layer = runner.layer(index, kwargs)
    before, after = (HiddenStates(bank=bank, generation=generation) for generation in (index, index + 1))
    runner.carry(layer, index, before, after)
    bank.settle()
    if not keeps:
        bank.drop(index)
    runner.progress.next()


@torch.no_grad()
def head_losses(
    stream: ModelStream, batches: Iterable[torch.Tensor], target_NT: torch.Tensor, score: Score = nll
) -> torch.Tensor:
    """NLL [N, T], or another score, from the last hidden states, a piece of a sequence at a time: logits are as wide as the
    vocabulary."""
    head, rows = stream.head(), []
    sequences = (x_LD for x_BLD in batches for x_LD in x_BLD)
    for x_LD, target_T in zip(sequences, target_NT.to(stream.device), strict=True):
        pieces = zip(x_LD[: len(target_T)].split(HEAD_TOKENS), target_T.split(HEAD_TOKENS), strict=True)
        losses = [score(head(x_TD).float(), piece_T) for x_TD, piece_T in pieces]
        rows.append(torch.cat(losses).cpu())
    return torch.stack(rows)


@contextlib.contextmanager
def scratch_bank(
    stream: ModelStream, tokens_NL: torch.Tensor, schedule: Schedule, work: Path | None
) -> Iterator[HiddenBank]:
    """Memory where the schedule says so, else files in a folder of its own under `work`. The numbers are the same."""
    if schedule.tier != "disk":
        yield open_bank(stream, tokens_NL, schedule, None)
        return
    assert work is not None, "a schedule with the disk and no folder for it"
    make_folder(work)
    with tempfile.TemporaryDirectory(prefix="streamlap-eval-", dir=work) as scratch:
        bank = open_bank(stream, tokens_NL, schedule, Path(scratch))
        require_disk(work, 2 * bank.nbytes, "hidden states")
        yield bank
