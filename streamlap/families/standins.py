"""Stand-ins for parts of a decoder layer, by which its own code runs one of its sub-layers alone.

A sub-layer is the layer while the modules of all others return zeros. So no family has to say which norms and multipliers a
layer puts around its modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from streamlap.loader.modules import skip_removed

KEPT = "kept"
RETURNS: dict[str, Callable[[torch.Tensor], Any]] = {
    "attention": lambda y_BLD: (y_BLD, None),
    "ffn": lambda y_BLD: y_BLD,
    KEPT: lambda y_BLD: y_BLD,
}
"""Sub-layer -> what its module returns of its output: attention gives the attention weights too, where there are any. `KEPT`, a
module without roles that some layers have in place of one."""


class StandIn(nn.Module):
    """Returns what `returns` makes of its input; where it `keeps` that, it is there as `given`."""

    given: torch.Tensor

    def __init__(self, returns: Callable[[torch.Tensor], Any], keeps: bool) -> None:
        super().__init__()
        self._returns, self._keeps = returns, keeps

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        if self._keeps:
            self.given = hidden_states
        return self._returns(hidden_states)


def silent(sublayer: str, keeps: bool = False) -> StandIn:
    """Stands where the module of a sub-layer stands, and adds nothing to the hidden states."""
    return StandIn(lambda x_BLD: RETURNS[sublayer](torch.zeros_like(x_BLD)), keeps)


def silent_linear(width: int) -> StandIn:
    """Stands where a linear of this output width stands. Keeps its input."""
    return StandIn(lambda x: x.new_zeros(*x.shape[:-1], width), keeps=True)


@contextlib.contextmanager
def replaced(root: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """While the block lasts, these modules stand at their paths in `root`; what has no linear but removed ones is skipped."""
    before = {path: root.get_submodule(path) for path in parts}
    try:
        for path, part in parts.items():
            root.set_submodule(path, part)
        skip_removed(root)
        yield
    finally:
        for path, module in before.items():
            root.set_submodule(path, module)
        skip_removed(root)
