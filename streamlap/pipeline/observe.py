"""What an anchored method may see of a sub-layer: sums and rows of what goes through it on both streams, token by token.

Shape suffixes: N windows, L length, B batch, D hidden, I in, A anchor.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from streamlap.errors import NumericalError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.linears import Sublayer
from streamlap.linalg.gram import Gram
from streamlap.linalg.moments import HELD_TOKENS, Moments, Sample
from streamlap.linalg.rows import any_out, blanked, finite_rows
from streamlap.methods.base import Captured
from streamlap.pipeline.runner import LayerRunner
from streamlap.pipeline.streams import Source, Windows
from streamlap.system.meters import PhaseClock

Rows = tuple[torch.Tensor, torch.Tensor]
"""Of a batch: x [B, L, I] and its anchors [B, L, A], of no width where none are needed."""
Look = Callable[..., Rows]
"""Batches of the streams, and the numbers of their sequences -> rows."""


@dataclass(kw_only=True)
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
    windows: Windows
    clock: PhaseClock
    layer: StreamLayer
    index: int
    sublayer: str
    dense: Source
    """The dense stream before the sub-layer."""
    target: Source
    """The dense stream after it."""
    compressed: Source
    """The compressed stream before it."""
    summed: list[Gram] = field(default_factory=list)
    """The Gram of the inputs, where an earlier pass has it."""
    weight_NL: torch.Tensor | None = None
    """What a token counts behind the sub-layer, where an earlier pass has it."""
    size_NL: torch.Tensor | None = None
    """By what a norm behind the sub-layer divides a token on the dense stream, where there is such a norm."""
    _outs: list[torch.Tensor] = field(default_factory=list)
    _dead: dict[str, int] = field(default_factory=dict)

    @property
    def out_NL(self) -> torch.Tensor:  # noqa: N802
        """Tokens that were left out of something that was seen so far."""
        outs = self._outs or [torch.zeros(self._shape_NL, dtype=torch.bool)]
        return functools.reduce(torch.logical_or, outs)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was seen of inputs that no token ever moved from zero: they draw no rank, and channels of them go first. What is
        not cut keeps its weight for them, of which the calibration says nothing."""
        return tuple(self.layer.family.dead_inputs(role, count) for role, count in self._dead.items() if count)

    def pass_on(self) -> None:
        """See the protocol `methods.base.StreamStatistics`, also for the functions below."""
        for source in (self.target, self.compressed):
            if source.keep is not None:
                self._gather([], [source])

    def input_gram(self) -> Gram:
        if not self.summed:
            (found,) = self._gather([self._input], [self.compressed], hold=0)
            self.summed.append(found.moments.finish()[0])
        return self._noted(self._parts.reads[0], self.summed[0])

    def forget_inputs(self) -> None:
        self.summed.clear()

    def inputs(self) -> Captured:
        def look(dense_BLD: torch.Tensor, x_BLD: torch.Tensor, numbers: Sequence[int]) -> Rows:
            return self._input(x_BLD, numbers)[0], self._input(dense_BLD, numbers)[0]

        return self._capture(look, [self.dense, self.compressed], self._parts.reads[0])

    def grams(self) -> tuple[Gram, Gram]:
        if self.summed or self.weight_NL is None:
            return self.input_gram(), self.middle_gram(())
        found = self._gather([self._input, self._middle], [self.compressed], hold=0)
        gram, middle = (each.moments.finish()[0] for each in found)
        self.summed.append(gram)
        return self.input_gram(), self._noted(self._parts.writes, middle)

    def middle_gram(self, edits: Sequence[Edit]) -> Gram:
        def look(target_BLD: torch.Tensor, x_BLD: torch.Tensor, numbers: Sequence[int]) -> Rows:
            return self._missing(target_BLD, x_BLD, numbers)[0], target_BLD[..., :0].float()

        with self.layer.tried(edits):
            if self.weight_NL is None:
                (found,) = self._gather([look], [self.target, self.compressed], hold=0)
            else:
                (found,) = self._gather([self._middle], [self.compressed], hold=0)
        return self._noted(self._parts.writes, found.moments.finish()[0])

    def middles(self, edits: Sequence[Edit]) -> Captured:
        with self.layer.tried(edits):
            return self._capture(self._missing, [self.target, self.compressed], self._parts.writes)

    def held_middles(self, edits: Sequence[Edit]) -> Sample:
        with self.layer.tried(edits):
            (found,) = self._gather([self._missing], [self.target, self.compressed], self.windows.held)
        return found.held

    @property
    def _parts(self) -> Sublayer:
        return self.layer.family.sublayers[self.sublayer]

    @property
    def _shape_NL(self) -> tuple[int, int]:  # noqa: N802
        return self.windows.shape_NL

    def _input(self, x_BLD: torch.Tensor, _: Sequence[int]) -> Rows:
        """What the first linears read."""
        return self.layer.sublayer_input(self.sublayer, x_BLD), x_BLD[..., :0]

    def _middle(self, x_BLD: torch.Tensor, numbers: Sequence[int]) -> Rows:
        """What the last linear reads, times the weight of each token."""
        assert self.weight_NL is not None, "no earlier pass has it"
        middle_BLI = self.layer.sublayer_middle(self.sublayer, x_BLD)
        weight_BL1 = self.weight_NL[numbers, :, None].to(x_BLD.device)
        if self.size_NL is not None:
            weight_BL1 = weight_BL1 / self.size_NL[numbers, :, None].to(x_BLD.device)
        return middle_BLI.float().mul_(weight_BL1), x_BLD[..., :0].float()

    def _missing(self, target_BLD: torch.Tensor, x_BLD: torch.Tensor, numbers: Sequence[int]) -> Rows:
        """What the last linear reads, and what is missing from the compressed stream behind it, without what its bias adds;
        both times the weight of each token.

        Behind a norm the stream is given gain * (W m) / size. So it is m / size that the rows of W, times the gain, are fitted
        to, with the size that the dense model has: a norm leaves the direction of W m alone.
        """
        role = self._parts.writes
        bias_O, gain_O = self.layer.linear(role).bias, self.layer.gain(role)
        target_BLD = target_BLD.float()
        missing_BLD, weight_BL1 = target_BLD - self.layer.base(self.sublayer, x_BLD), evenly(target_BLD)
        middle_BLI = self.layer.sublayer_middle(self.sublayer, x_BLD).float()
        size_BL1 = None if self.size_NL is None else self.size_NL[numbers, :, None].to(x_BLD.device)
        if bias_O is not None:
            added_O = bias_O.float() if gain_O is None else bias_O.float() * gain_O
            missing_BLD -= added_O if size_BL1 is None else added_O / size_BL1
        if size_BL1 is not None:
            middle_BLI = middle_BLI / size_BL1
        return middle_BLI.mul_(weight_BL1), missing_BLD.mul_(weight_BL1)

    def _noted(self, role: str, gram: Gram) -> Gram:
        self._dead.setdefault(role, int((gram.diagonal_I == 0).sum()))
        return gram

    def _capture(self, look: Look, sources: Sequence[Source], role: str) -> Captured:
        """Sums and rows of what the linear of `role` reads, in the dtype to solve in."""
        (found,) = self._gather([look], sources)
        gram, cross_IA = found.moments.finish()
        return Captured(gram=self._noted(role, gram), cross_IA=cross_IA, held=found.held)

    def _gather(
        self, looks: Sequence[Look], sources: Sequence[Source], numbers: Sequence[int] | None = None,
        hold: int = HELD_TOKENS,
    ) -> list[Gathered]:  # fmt: skip
        """For each look, sums over (x, anchor) of all sequences, and up to `hold` rows of those that are held out; of the
        sequences of these `numbers` alone, where they are given.

        Tokens that are out in one of the streams are left out, and so are those that a look makes something of that is not
        finite. These are searched for only where the sums show that there are some, which is nearly never.
        """
        with self.clock.phase("capture"):
            for careful in (False, True):
                attempt = functools.partial(self._sums, looks, sources, numbers, hold, careful)
                found = self.runner.ladder.climb("capture", self.index, attempt)
                if all(each.finite for each in found):
                    break
            else:
                raise NumericalError("products of activations overflow; wanted finite ones. Scale the model.")
        for each in found:
            self._outs.append(self.runner.require_few("what is fitted to", each.out_NL))
            if hold and not each.held.tokens:
                raise NumericalError(
                    "no token of the windows that are held out is finite; wanted some to choose by. Take more windows, or "
                    "dtype float32."
                )
        for source in sources if numbers is None else ():
            if source.keep is not None:
                source.kept()
        return found

    def _sums(
        self, looks: Sequence[Look], sources: Sequence[Source], numbers: Sequence[int] | None, hold: int, careful: bool
    ) -> list[Gathered]:
        """One attempt at `_gather`; `careful`, whether it looks at every row."""
        self.runner.heap.trim()
        sequences, length = self._shape_NL
        found = [
            Gathered(moments=Moments(), held=Sample(hold), out_NL=torch.zeros(sequences, length, dtype=torch.bool))
            for _ in looks
        ]
        keeper = next((source for source in sources if numbers is None and source.keep is not None), None)

        def passing() -> Iterator[torch.Tensor]:
            """What is kept of every batch, once it was looked at."""
            left = iter(range(sequences) if numbers is None else numbers)
            for batches in self._batches(sources, numbers):
                those = list(itertools.islice(left, len(batches[0])))
                for look, into in zip(looks, found, strict=True):
                    self._look(look, into, batches, those, careful)
                if keeper is not None:
                    x_BLD = self._through("dense", keeper.onward, batches[sources.index(keeper)])
                    if keeper.weight_NL is not None:
                        parts = torch.split(x_BLD, self.runner.ladder.micro)
                        keeper.weight_NL[those] = torch.cat([weights(some_BLD) for some_BLD in parts])
                    yield x_BLD

        if keeper is None:
            collections.deque(passing(), maxlen=0)
        else:
            assert keeper.keep is not None
            self._outs.append(self.runner.take(keeper.keep, passing(), f"{self.layer.prefix} {self.sublayer}"))
        return found

    def _batches(self, sources: Sequence[Source], numbers: Sequence[int] | None) -> Iterator[tuple[torch.Tensor, ...]]:
        """Batches of all sources, each brought on to where it is looked at."""
        states = [source.states for source in sources]
        for batches in self.runner.together(states, "capture", numbers):
            yield tuple(
                self._through("dense" if source is self.target else "propagate", source.part, x_BLD)
                for source, x_BLD in zip(sources, batches, strict=True)
            )

    def _through(
        self, phase: str, part: Callable[[torch.Tensor], torch.Tensor] | None, x_BLD: torch.Tensor
    ) -> torch.Tensor:
        if part is None:
            return x_BLD
        with self.clock.phase(phase):
            return self.runner.forward(part, x_BLD)

    def _look(
        self, look: Look, into: Gathered, batches: Sequence[torch.Tensor], numbers: Sequence[int], careful: bool
    ) -> None:
        """Take in the sequences of these numbers."""
        held, fitted, first = set(self.windows.held), set(self.windows.fitted), 0
        for parts in zip(*(torch.split(x_BLD, self.runner.ladder.micro) for x_BLD in batches), strict=True):
            those = numbers[first : first + len(parts[0])]
            first += len(those)
            out_BL = any_out(*parts)
            x_BLI, anchor_BLA = look(*(blanked(x_BLD, out_BL) for x_BLD in parts), those)
            if careful:
                bad_BL = ~(finite_rows(x_BLI) & finite_rows(anchor_BLA))
                out_BL = bad_BL if out_BL is None else out_BL | bad_BL
            if out_BL is not None:
                into.out_NL[those] = out_BL.cpu()
            for place, number in enumerate(those):
                good = slice(None) if out_BL is None else ~out_BL[place]
                if number in held:
                    into.held.update(x_BLI[place][good], anchor_BLA[place][good])
                if number in fitted:
                    into.moments.update(x_BLI[place][good], anchor_BLA[place][good])


def evenly(target_BLD: torch.Tensor) -> torch.Tensor:
    """Weight of each token, [B, L, 1]: 1 / root mean square. What follows is a norm, so an error counts relative to the size of
    the stream. Else a few huge tokens would decide everything."""
    return target_BLD.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()


def weights(target_BLD: torch.Tensor) -> torch.Tensor:
    """The same as [B, L] on the CPU; of tokens that are out, some number."""
    return evenly(target_BLD.float())[..., 0].nan_to_num().cpu()
