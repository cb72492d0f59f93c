"""A sub-layer that is gone: what it becomes where it may store nothing. The next one that is fitted takes up what it can, since
its target is the dense model's stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from streamlap.families.layer import Edit
from streamlap.linalg.moments import HELD_TOKENS
from streamlap.loader.forms import Removed
from streamlap.methods.anchored.fitting import map_error
from streamlap.methods.base import Cost, Layouts, Natives, ParameterBudget, Solved, StreamStatistics


@dataclass(frozen=True, kw_only=True)
class Removal:
    """It has no knobs and no row in recipes: a budget of nothing asks for it."""

    sublayer: str
    roles: Sequence[str]
    needs: ClassVar[tuple[str, ...]] = ()
    moves_inputs: ClassVar[bool] = False

    def layouts(self, natives: Natives, budget: ParameterBudget) -> Layouts:
        return {"": {role: Removed(natives[role].shape) for role in self.roles}}

    def cost(self, natives: Natives, layouts: Layouts, budget: ParameterBudget) -> Cost:
        held = 4 * HELD_TOKENS * sum(natives[self.roles[-1]].shape)
        return Cost(waiting_bytes=held, both_bytes=held, capture_bytes=held)

    def solve(self, statistics: StreamStatistics, layouts: Layouts) -> Solved:
        (layout,), layer = layouts.values(), statistics.layer
        statistics.pass_on()
        last_OI = layer.linear(self.roles[-1]).weight
        edits = [
            Edit(
                role=role, module=form.build(last_OI.device, layer.storage_dtype(role)), native=layer.native(role),
                error=1.0,
            )
            for role, form in layout.items()
        ]  # fmt: skip
        return Solved(edits=edits, error=map_error(torch.zeros_like(last_OI), statistics.held_middles(())))
