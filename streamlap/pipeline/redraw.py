"""More calibration windows where they are few: each window that is fitted to comes a second time, with half of its tokens drawn
anew from the dense model's own predictions. A window that is held out does not: half of it would be fitted to. A single window
is held out and fitted to, and comes again.

Few windows cover little of the vocabulary, and directions that no token uses are cut first. A token that the dense model
predicts at a position could have stood there. One forward gives one for every position. Rare tokens are preferred: the first
layers know each token by itself, and lose those that they are not shown.

Shape suffixes: N windows, L length, B batch, D hidden, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.linalg.rows import MOST_OUT, rows_out
from streamlap.pipeline.evaluate import stream_layers
from streamlap.pipeline.session import Session
from streamlap.pipeline.streams import Windows, open_bank
from streamlap.planning.plan import Plan
from streamlap.store.hidden import HiddenBank
from streamlap.store.journal import REDRAWN_NAME, read_tokens, write_tokens
from streamlap.system.allocator import trim_heap

SHARE = 0.5
"""Of the tokens of a window that are drawn anew."""

RARITY = 3.0
"""A token that was seen n times, in all windows so far, is drawn as if it were (n + 1) ** RARITY times less likely."""


def with_redrawn(stream: ModelStream, plan: Plan, tokens_NL: torch.Tensor, session: Session) -> Windows:
    """The windows, and behind them those that the plan has beside them; made once in a run, and kept in its state.

    Raises Interrupted where a stop is asked for.
    """
    if not plan.redrawn:
        return Windows(tokens_NL=tokens_NL)
    path = session.state / REDRAWN_NAME
    if not path.is_file():
        write_tokens(path, redrawn(stream, plan, tokens_NL, session))
    return Windows(tokens_NL=torch.cat([tokens_NL, read_tokens(path)]), redrawn=plan.redrawn)


def redrawn(stream: ModelStream, plan: Plan, tokens_NL: torch.Tensor, session: Session) -> torch.Tensor:
    """A forward through the dense model, inside the memory that the plan claims for its loop, and the draws at the head."""
    chosen_NL, fit = tokens_NL[Windows(tokens_NL=tokens_NL).fitted], plan.fit
    bank = open_bank(stream, chosen_NL, fit.schedule, session.run.hidden, "redraw")

    def stop(index: int) -> None:
        if session.stops.due(moved=False):
            raise session.stops.stopped(f"at layer {index} of {stream.depth}, before the first one is compressed")

    stream_layers(stream, fit, bank, chosen_NL, name="redraw", most_out=MOST_OUT, before=stop)
    trim_heap()
    with fit.ram.claim(fit.schedule.ram["head"]), fit.vram.claim(fit.schedule.vram.get("head", {})):
        found = draw(stream, bank, chosen_NL, plan.recipe.calibration.seed)
    bank.drop(stream.depth)
    return found


def draw(stream: ModelStream, bank: HiddenBank, tokens_NL: torch.Tensor, seed: int) -> torch.Tensor:
    """The windows with some tokens drawn anew; the draws of a window depend on its number and on the windows before it."""
    head, rows = stream.head(), list[torch.Tensor]()
    seen_V = torch.bincount(tokens_NL.flatten(), minlength=stream.vocabulary)
    sequences = (x_LD for x_BLD in bank.read(stream.depth) for x_LD in x_BLD)
    for number, (x_LD, tokens_L) in enumerate(zip(sequences, tokens_NL, strict=True)):
        generator = torch.Generator().manual_seed((seed + (number << 32)) % 2**63)
        likely_L = torch.cat([tokens_L[:1], *drawn(head, x_LD[:-1], seen_V, generator)])
        anew_L = torch.rand(len(tokens_L), generator=generator) < SHARE
        anew_L[1:] &= ~rows_out(x_LD[:-1]).cpu()
        rows.append(torch.where(anew_L, likely_L, tokens_L))
        seen_V += torch.bincount(rows[-1], minlength=len(seen_V))
    return torch.stack(rows)


def drawn(
    head: Callable[[torch.Tensor], torch.Tensor], x_TD: torch.Tensor, seen_V: torch.Tensor, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """For each token one that the model could go on with, rather one that was seen less. On the CPU, so that the draws are the
    same everywhere."""
    less_V = RARITY * torch.log1p(seen_V.float())
    for piece_TD in torch.split(x_TD, HEAD_TOKENS):
        p_TV = head(piece_TD).float().cpu().sub_(less_V).softmax(dim=-1).nan_to_num_(nan=1.0)
        yield torch.multinomial(p_TV, 1, generator=generator)[:, 0]
