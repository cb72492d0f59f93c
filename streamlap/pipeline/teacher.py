"""The dense model's predictions at every position of some windows; the model need not fit into memory.

Shape suffixes: N windows, L length, P = L - 1 predicted positions, T tokens, D hidden, K most likely tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.methods.trained.recovery import Likely
from streamlap.pipeline.evaluate import stream_layers
from streamlap.pipeline.session import Session
from streamlap.pipeline.streams import open_bank
from streamlap.planning.schedule import Fit
from streamlap.store.sink import ShardFolder
from streamlap.store.source import read_tensors
from streamlap.system.allocator import trim_heap

TEACHER_NAME = "teacher.safetensors"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What the dense model predicts at each position of every window, but after its last token; see `Likely`."""

    words_NPK: torch.Tensor
    log_NPK: torch.Tensor

    def window(self, number: int) -> Likely:
        return Likely(words_TK=self.words_NPK[number], log_TK=self.log_NPK[number])


def ask_teacher(dense: ModelStream, tokens_NL: torch.Tensor, top: int, fit: Fit, session: Session) -> Teacher:
    """Its predictions, made once in a run and kept in its state.

    Raises Interrupted where a stop is asked for, NumericalError where a token's numbers are not finite.
    """
    path = session.state / TEACHER_NAME
    if not path.is_file():
        bank = open_bank(dense, tokens_NL, fit.schedule, session.run.hidden, "teacher")

        def stop(index: int) -> None:
            if session.stops.due(moved=False):
                raise session.stops.stopped(f"at layer {index} of {dense.depth} of the dense model")

        stream_layers(dense, fit, bank, tokens_NL, name="teacher", before=stop)
        trim_heap()
        with fit.ram.claim(fit.schedule.ram["head"]), fit.vram.claim(fit.schedule.vram.get("head", {})):
            found = predictions(dense, bank.read(dense.depth), top)
        bank.drop(dense.depth)
        ShardFolder(path.parent).write(path.name, {"words": found.words_NPK, "log": found.log_NPK})
    table = read_tensors(path)
    return Teacher(words_NPK=table["words"], log_NPK=table["log"])


@torch.no_grad()
def predictions(dense: ModelStream, batches: Iterable[torch.Tensor], top: int) -> Teacher:
    """From the last hidden states, a piece of a sequence at a time: logits are as wide as the vocabulary."""
    head, words, logs = dense.head(), [], []
    for x_LD in (x_LD for x_BLD in batches for x_LD in x_BLD):
        pieces = [Likely.of(head(x_TD), top) for x_TD in x_LD[:-1].split(HEAD_TOKENS)]
        words.append(torch.cat([piece.words_TK for piece in pieces]).cpu())
        logs.append(torch.cat([piece.log_TK for piece in pieces]).cpu())
    return Teacher(words_NPK=torch.stack(words), log_NPK=torch.stack(logs))
