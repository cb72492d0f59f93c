"""What a method that trains is. A trained one (`Trained`) takes a layer that others have edited and makes more of it, step by
step. A distilled one (`Distilled`) makes the edits of a whole layer so, from where it is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch

from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.gram import Gram
from streamlap.methods.base import Cost, Layout, Natives, ParameterBudget

Pair = tuple[torch.Tensor, torch.Tensor]
"""x_BLD, the compressed stream before a layer, and target_BLD, the dense one after it; see `linalg.rows.paired`."""
Lesson = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""The same; dense_BLD, the dense stream before the layer; and gradient_BLD, that of the dense model's language-model loss
behind it, see `pipeline.gradients`. Both are blank where the target is out, and of no width where they are not asked for."""
RunLayer = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""A layer as a function of its parameters by name, in float32, and of x_BLD."""
Taught = TypeVar("Taught", contravariant=True)
"""What a step takes: Pair or Lesson."""


class Training(Protocol[Taught]):
    """A layer in training. All of it that the next epoch needs is in `state`, so that a run that dies goes on from there."""

    held: list[float]
    """Loss on held-out tokens at the start and after each epoch."""

    @property
    def epoch(self) -> int:
        """Epochs done."""
        ...

    @property
    def ends(self) -> bool:
        """Whether there is nothing more to do."""
        ...

    def order(self, layer: int, numbers: Sequence[int]) -> list[int]:
        """The sequences of these numbers as the coming epoch takes them."""
        ...

    def measure(self, held: Iterable[Taught]) -> float:
        """Loss on held-out tokens of what would be stored."""
        ...

    def begin(self, loss: float) -> None:
        """Take down the loss on held-out tokens before the first epoch."""
        ...

    def step(self, place: int, taught: Taught) -> None:
        """The step of that number in this epoch."""
        ...

    def close_epoch(self, loss: float) -> None:
        """Take down the loss after an epoch."""
        ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state`, unless it belongs to a training that began otherwise."""
        ...


class RefiningLayer(Training[Pair], Protocol):
    """That of a layer that others have edited."""

    def finish(self) -> dict[str, torch.Tensor]:
        """The parameters by name that are to take the place of the layer's, as they will be stored; none where nothing was
        gained."""
        ...


class DistillingLayer(Training[Lesson], Protocol):
    """That of a layer from where it is dense."""

    def finish(self) -> Sequence[Edit]:
        """The edits of the whole layer. Raises NumericalError where its numbers are not finite."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """What training one layer takes."""

    parameters: int
    """Numbers that are trained."""
    held_bytes: int
    """Held for them, and beside the layer."""
    state_bytes: int
    """Of these, what is on the disk between two epochs."""
    token_bytes: int = 0
    """For each token of a window, beside what a forward leaves for its gradients."""
    forwards: int = 3
    """What a step costs, as forwards of the layer: gradients take two."""


class Trained(Protocol):
    """What trains a layer that other methods have edited."""

    held_bytes: ClassVar[int]
    """For each parameter of the layer, while it is trained."""
    state_bytes: ClassVar[int]
    """Of these, what is on the disk between two epochs."""

    @property
    def epochs(self) -> int:
        """Most epochs over the calibration windows."""
        ...

    def start(self, parameters: Iterable[tuple[str, torch.Tensor]], run: RunLayer, steps: int) -> RefiningLayer:
        """Args: parameters by name as they are stored; run, the layer; steps, in one epoch."""
        ...


class Distilled(Protocol):
    """What compresses a whole layer by training it from where it is dense, towards the dense model's stream."""

    @property
    def reads_dense(self) -> bool:
        """Whether a step looks at the dense stream before the layer."""
        ...

    @property
    def reads_gradient(self) -> bool:
        """Whether it looks at the gradient of the dense model's language-model loss behind the layer."""
        ...

    @property
    def epochs(self) -> int:
        """Epochs over the calibration windows."""
        ...

    def layout(self, sublayer: str, natives: Natives, budget: ParameterBudget) -> Layout:
        """What a sub-layer becomes, from shapes alone. Raises RecipeError where the budget cannot be reached."""
        ...

    def cost(self, sublayer: str, natives: Natives, layout: Layout, budget: ParameterBudget) -> Cost:
        """What `start` takes for a sub-layer."""
        ...

    def training_cost(self, natives: Natives, layout: Layout, itemsize: int) -> TrainingCost:
        """Of a layer that becomes `layout`; itemsize, bytes of a number in the compute dtype."""
        ...

    def require_steps(self, steps: int) -> None:
        """Raise RecipeError where so many steps in all are too few for it."""
        ...

    def start(
        self, layer: StreamLayer, index: int, layout: Layout, gram: Callable[[str], Gram], steps: int
    ) -> DistillingLayer:
        """Args: index, of the layer; gram, a pass over the compressed stream, for the Gram of what a role's linear reads in the
        dense layer; steps, in one epoch."""
        ...
