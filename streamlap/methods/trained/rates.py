"""Learning rates over the steps of a training."""

from __future__ import annotations

import math


def warm_cosine(step: int, steps: int, warm_up: float) -> float:
    """Share of the highest rate at a step of so many: it rises in a line over the share `warm_up` of them, and falls to
    nothing along a cosine."""
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2
