"""The recipes that an ablation compares: parts added one by one, and parts left out of the preset. No command itself."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from streamlap.methods import PRESETS, AnyMethod
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.recipe import Recipe


def rebuilt(share: float = 0.0, **knobs: Any) -> tuple[AnyMethod, ...]:
    """Both sub-layers rebuilt, the FFN with one division of its cut."""
    return AttentionAnchored(**knobs), FfnAnchored(shares=(share,), **knobs)


def best(**knobs: Any) -> tuple[AnyMethod, ...]:
    """The methods of the preset, with these knobs where they have them."""
    return tuple(
        replace(method, **{entry.name: knobs[entry.name] for entry in fields(method) if entry.name in knobs})
        for method in PRESETS["best"]
    )


NAMED: dict[str, tuple[AnyMethod, ...]] = {
    "lorap": PRESETS["lorap"],
    "factors b=0": rebuilt(storage="factors", output="low_rank", step=0.0),
    "+anchor": rebuilt(storage="factors", output="low_rank"),
    "+pivot": rebuilt(output="low_rank"),
    "+prune .25": rebuilt(0.25, output="low_rank"),
    "+dense out": rebuilt(0.25),
    "prune .65": rebuilt(0.65),
    "prune 1": rebuilt(1.0),
    "best": PRESETS["best"],
    "best -anchor": best(step=0.0),
    "best -pivot": best(storage="factors"),
    "best +inputs": best(input_step=None),
}
"""Each row from `factors b=0` to `+dense out` adds a part to the one before; each `prune` is that with another share; `best`
chooses among four shares for each layer; each `best -` leaves a part out, and `best +` adds one that the preset has not."""


def named_recipe(name: str) -> Recipe:
    """By its name in the table, or from a file; in both cases only the ratio and the calibration are the grid's."""
    if name.endswith(".yaml"):
        return Recipe.from_yaml(Path(name))
    return Recipe(methods=NAMED[name], preset=name if name in PRESETS else "custom")
