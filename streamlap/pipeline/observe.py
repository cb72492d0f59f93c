"""What an anchored method may see of a sub-layer: sums and rows of what goes through it on both streams, token by token.

Shape suffixes: N windows, L length, B batch, D hidden, I in, A anchor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from streamlap.errors import NumericalError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.linears import Sublayer
from streamlap.linalg.gram import Gram
from streamlap.linalg.moments import HELD_TOKENS, Moments, Sample, is_held
from streamlap.linalg.rows import any_out, blanked, finite_rows
from streamlap.methods.base import Captured
from streamlap.pipeline.runner import LayerRunner
from streamlap.pipeline.streams import HiddenStates
from streamlap.system.meters import PhaseClock

Rows = tuple[torch.Tensor, torch.Tensor]
"""Of a batch: x [B, L, I] and its anchors [B, L, A], of no width where none are needed."""
Look = Callable[..., Rows]
"""Batches of the streams -> rows."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Sums over the tokens that are fitted to, rows of those that are held out, and which tokens are in neither."""

    moments: Moments
    held: Sample
    out_NL: torch.Tensor

    @property
    def finite(self) -> bool:
        return self.moments.finite and self.held.finite


@dataclass(frozen=True, kw_only=True)
class SublayerStatistics:
    """One sub-layer of a layer with both its streams; see `methods.base.StreamStatistics`."""

    runner: LayerRunner
    clock: PhaseClock
    layer: StreamLayer
    index: int
    sublayer: str
    dense: HiddenStates
    """The dense stream before the sub-layer."""
    target: HiddenStates
    """The dense stream after it."""
    compressed: HiddenStates
    """The compressed stream before it."""
    _outs: list[torch.Tensor] = field(default_factory=list)
    _dead: dict[str, int] = field(default_factory=dict)

    @property
    def out_NL(self) -> torch.Tensor:  # noqa: N802
        """Tokens that were left out of something that was seen so far."""
        outs = self._outs or [torch.zeros(self.compressed.bank.shape_NLD[:2], dtype=torch.bool)]
        return functools.reduce(torch.logical_or, outs)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was seen of inputs that no token ever moved from zero: they draw no rank, and channels of them go first. What is
        not cut keeps its weight for them, of which the calibration says nothing."""
        return tuple(self.layer.family.dead_inputs(role, count) for role, count in self._dead.items() if count)

    def inputs(self) -> Captured:
        read = functools.partial(self.layer.sublayer_input, self.sublayer)

        def look(dense_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
            return read(x_BLD), read(dense_BLD)

        return self._capture(look, [self.dense, self.compressed], self._parts.reads[0])

    def input_gram(self) -> Gram:
        def look(x_BLD: torch.Tensor) -> Rows:
            return self.layer.sublayer_input(self.sublayer, x_BLD), x_BLD[..., :0]

        return self._capture(look, [self.compressed], self._parts.reads[0]).gram

    def middles(self, edits: Sequence[Edit]) -> Captured:
        with self.layer.tried(edits):
            return self._capture(self._middle, [self.target, self.compressed], self._parts.writes)

    def middle_gram(self, edits: Sequence[Edit]) -> Gram:
        def look(target_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
            x_BLI, _ = self._middle(target_BLD, x_BLD)
            return x_BLI, target_BLD[..., :0]

        with self.layer.tried(edits):
            return self._capture(look, [self.target, self.compressed], self._parts.writes).gram

    def held_middles(self, edits: Sequence[Edit]) -> Sample:
        with self.layer.tried(edits):
            return self._gather(self._middle, [self.target, self.compressed], fitted=False).held

    @property
    def _parts(self) -> Sublayer:
        return self.layer.family.sublayers[self.sublayer]

    def _middle(self, target_BLD: torch.Tensor, x_BLD: torch.Tensor) -> Rows:
        """What the last linear reads, and what is missing from the stream, its own bias apart."""
        bias_O = self.layer.linear(self._parts.writes).bias
        target_BLD = target_BLD.float()
        missing_BLD = target_BLD - x_BLD.float()
        if bias_O is not None:
            missing_BLD = missing_BLD - bias_O.float()
        weight_BL1 = evenly(target_BLD)
        middle_BLI = self.layer.sublayer_middle(self.sublayer, x_BLD)
        return middle_BLI.float() * weight_BL1, missing_BLD * weight_BL1

    def _capture(self, look: Look, states: Sequence[HiddenStates], role: str) -> Captured:
        """Sums and rows of what the linear of `role` reads, in the dtype to solve in."""
        found = self._gather(look, states)
        gram, cross_AI = found.moments.finish()
        self._dead.setdefault(role, int((gram.diagonal_I == 0).sum()))
        return Captured(gram=gram, cross_AI=cross_AI, held=found.held)

    def _gather(self, look: Look, states: Sequence[HiddenStates], fitted: bool = True) -> Gathered:
        """Sums over (x, anchor) of every sequence, or where its turn comes its rows; without `fitted` these alone.

        Tokens that are out in one of the streams are left out, and so are those that `look` makes something of that is not
        finite. These are searched for only where the sums show that there are some, which is nearly never.
        """
        with self.clock.phase("capture"):
            for careful in (False, True):
                attempt = functools.partial(self._sums, look, states, fitted, careful)
                found = self.runner.ladder.climb("capture", self.index, attempt)
                if found.finite:
                    break
            else:
                raise NumericalError("products of activations overflow; wanted finite ones. Scale the model.")
        self._outs.append(self.runner.require_few("what is fitted to", found.out_NL))
        if not found.held.tokens:
            raise NumericalError(
                "no token of the windows that are held out is finite; wanted some to choose by. Take more windows, or dtype "
                "float32."
            )
        return found

    def _sums(self, look: Look, states: Sequence[HiddenStates], fitted: bool, careful: bool) -> Gathered:
        """One attempt at `_gather`; `careful`, whether it looks at every row."""
        self.runner.heap.trim()
        shape_NLD = self.compressed.bank.shape_NLD
        moments, sample, number, total = Moments(), Sample(HELD_TOKENS), 0, shape_NLD[0]
        out_NL = torch.zeros(shape_NLD[:2], dtype=torch.bool)
        for batches in self.runner.together(states, "capture"):
            for parts in zip(*(torch.split(x_BLD, self.runner.ladder.micro) for x_BLD in batches), strict=True):
                first, number = number, number + len(parts[0])
                numbers = [n for n in range(first, number) if fitted or is_held(n + 1, total)]
                if not numbers or (sample.full and not fitted):
                    continue
                if not fitted:
                    parts = tuple(x_BLD[[n - first for n in numbers]] for x_BLD in parts)
                out_BL = any_out(*parts)
                x_BLI, anchor_BLA = look(*(blanked(x_BLD, out_BL) for x_BLD in parts))
                if careful:
                    bad_BL = ~(finite_rows(x_BLI) & finite_rows(anchor_BLA))
                    out_BL = bad_BL if out_BL is None else out_BL | bad_BL
                if out_BL is not None:
                    out_NL[numbers] = out_BL.cpu()
                for place, n in enumerate(numbers):
                    good = slice(None) if out_BL is None else ~out_BL[place]
                    into = sample if is_held(n + 1, total) and not sample.full else moments
                    into.update(x_BLI[place][good], anchor_BLA[place][good])
        if fitted and not moments.tokens and sample.tokens:  # a single sequence: nothing is left to hold out
            moments.update(sample.x_TI, sample.anchor_TA)
        return Gathered(moments=moments, held=sample, out_NL=out_NL)


def evenly(target_BLD: torch.Tensor) -> torch.Tensor:
    """[B, L, 1]: what a token counts. What follows is a norm, so an error counts by its share of the stream, or a few huge
    tokens would be all that counts."""
    return target_BLD.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()
