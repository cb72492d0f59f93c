"""What a method is: a frozen dataclass of its knobs that says what a sub-layer becomes, and makes it.

    layouts(natives, budget)         what each linear may become, from shapes alone; several where the method has variants
    cost(natives, layouts, budget)   what `solve` takes, from shapes alone
    needs                            roles whose input energies it asks of one dense pass; none where it looks at both streams
    moves_inputs                     whether it asks for the inputs on both streams
    solve(statistics, layouts)       the edits, of the best of its layouts

A method with `needs` is one-pass, one without is anchored: it is fitted to the dense model's stream. Methods that train are in
`trained.base`.

A method knows numbers and one layer. It never sees a file, a token or another layer.

Shape suffixes: I in, A anchor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from streamlap.errors import NumericalError
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.gram import Gram
from streamlap.linalg.moments import Sample
from streamlap.linalg.statistics import Energy
from streamlap.loader.forms import Dense, Form

Natives = Mapping[str, Dense]
"""Role -> the linear of the source."""
READS_FFN = ("gate", "up")
"""Roles that may read the input of an FFN; one without a gate has up alone."""


def ffn_reads(natives: Natives) -> tuple[str, ...]:
    """Those of them that there are."""
    return tuple(role for role in READS_FFN if role in natives)


Layout = Mapping[str, Form]
"""Role -> what its linear becomes. A linear whose form and width do not change is absent."""
Layouts = Mapping[str, Layout]
"""Variant of a method -> its layout; a method without variants has one, by the name ""."""


@dataclass(frozen=True, kw_only=True)
class ParameterBudget:
    """What a sub-layer may store."""

    ratio: float
    """Fraction of the model's decoder-linear parameters to remove."""
    parameters: int
    """In the linears of the sub-layer, biases and orders included."""
    itemsize: int
    """Bytes of a weight: an order counts as the bytes that it takes."""
    head_dim: int
    """Numbers in one attention head."""
    heads_stay: bool = False
    """Whether no head can go."""
    gained: bool = False
    """Whether what a sub-layer gives is multiplied before it is added to the hidden states."""
    converts: bool = False
    """Whether what is stored runs in another dtype."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What solving one sub-layer takes."""

    workspace_bytes: int = 0
    """Most memory held at one time beside the weights, the finished edits and what waits."""
    waiting_bytes: int = 0
    """Of what waits in RAM meanwhile, whatever the device: held-out tokens, and what is compared."""
    both_bytes: int = 0
    """Of these together, where the device is the CPU."""
    flops: int = 0
    """Floating-point operations of products in float64."""
    flops32: int = 0
    """Of products in float32."""
    flops_per_token: int = 0
    """Of these, what each calibration token adds."""
    capture_bytes: int = 0
    """Most that the sums over tokens hold, with what is summed into them at a time."""
    decompositions: tuple[int, ...] = ()
    """Sizes of the symmetric eigen-problems in float64, or of as long ones."""


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A sub-layer solved."""

    edits: Sequence[Edit]
    error: float = 0.0
    """How far it is from the target on held-out tokens, relative to the target; by it competing methods are compared."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Of all the variants that were tried."""
    notes: tuple[str, ...] = ()
    """What took more than arithmetic, in the edits or before them."""


def finite_error(error: float) -> float:
    """The error itself. Raises NumericalError where it is none to choose by: NaN would win or lose by its place in a list."""
    if not math.isfinite(error):
        raise NumericalError(f"its error on held-out tokens is {error}; wanted a number. Try dtype float32.")
    return error


@dataclass(frozen=True, kw_only=True)
class DenseStatistics:
    """A layer with the energies of its inputs, from one pass through the dense layer on the compressed stream."""

    layer: StreamLayer
    energies: Mapping[str, Energy]
    """By the roles that the methods need."""

    def scale(self, role: str) -> torch.Tensor:
        """Root mean square [I] of each input of a linear, float64; see `Energy.scale`."""
        return self.energies[role].scale()


@dataclass(frozen=True, kw_only=True)
class Captured:
    """Sums over most tokens, in the dtype to solve in, and rows of others to choose by."""

    gram: Gram
    cross_IA: torch.Tensor
    held: Sample


class StreamStatistics(Protocol):
    """A sub-layer with both its streams, the dense model's and the compressed one's."""

    @property
    def layer(self) -> StreamLayer: ...

    @property
    def sublayer(self) -> str: ...

    def pass_on(self) -> None:
        """Carry the streams to where the next sub-layer begins, for a method that does not call `middles`."""
        ...

    def input_gram(self) -> Gram:
        """Of what the first linears read on the compressed stream."""
        ...

    def forget_inputs(self) -> None:
        """Let go of `input_gram`, for a method that has no more use for it."""
        ...

    def inputs(self) -> Captured:
        """Sums of what the first linears read on the compressed stream, against what they read on the dense one."""
        ...

    def grams(self) -> tuple[Gram, Gram]:
        """`input_gram`, and `middle_gram` without edits, in one pass."""
        ...

    def middle_gram(self, edits: Sequence[Edit]) -> Gram:
        """Of what the last linear reads with these edits. Each token is divided by the size of the stream."""
        ...

    def middles(self, edits: Sequence[Edit]) -> Captured:
        """Sums of what the last linear reads with these edits, against what the sub-layer has to add to the compressed stream
        to arrive where the dense model is, without what the bias of the last linear adds. A method must call it with the edits
        that are stored in the end, or call `pass_on`.

        The map to fit between the two is the last linear as it acts on the hidden states, `StreamLayer.acting`; where a norm
        follows, what the linear reads is divided by the token's size there."""
        ...

    def held_middles(self, edits: Sequence[Edit]) -> Sample:
        """The held-out rows of `middles` alone."""
        ...


class Method(Protocol):
    """What compresses one sub-layer of a layer."""

    @property
    def sublayer(self) -> str:
        """attention or ffn."""
        ...

    needs: ClassVar[tuple[str, ...]]
    """Roles whose inputs' energies it asks of a dense pass; none where it looks at both streams, as anchored methods do."""

    @property
    def moves_inputs(self) -> bool:
        """Whether it asks for `StreamStatistics.inputs`."""
        ...

    def layouts(self, natives: Natives, budget: ParameterBudget) -> Layouts:
        """What the sub-layer may become. Raises RecipeError where the budget cannot be reached."""
        ...

    def cost(self, natives: Natives, layouts: Layouts, budget: ParameterBudget) -> Cost: ...

    def solve(self, statistics: Any, layouts: Layouts) -> Solved:
        """The edits, from DenseStatistics where there are `needs`, else from StreamStatistics.

        Raises NumericalError where its numbers are not finite.
        """
        ...
