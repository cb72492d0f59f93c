"""Widths of FFNs that engines like: multiples of so many channels, where linears stay dense."""

from __future__ import annotations

from collections.abc import Sequence

from streamlap.errors import RecipeError
from streamlap.families.stream import ModelStream
from streamlap.planning.layouts import dense_parameters
from streamlap.recipe import Recipe

STEPS = {"stock": (128, 64), "nas": (256, 16)}
"""Format -> channels that widths are a multiple of, and the least number of such steps in the dense width: where it has fewer,
the step is halved until it has as many, since a step is all the precision that the ratio has."""


def step_of(recipe: Recipe, width: int) -> int:
    """What the widths of FFNs, of `width` channels now, are a multiple of. Raises RecipeError for a wish above that width."""
    if recipe.multiple is not None:
        if recipe.multiple > width:
            raise RecipeError(f"multiple is {recipe.multiple}; wanted at most {width}, the channels of an FFN.")
        return recipe.multiple
    step, least = STEPS.get(recipe.format, (1, 1))
    while step > 1 and step * least > width:
        step //= 2
    return step


def in_steps(stream: ModelStream, recipe: Recipe, shares: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """The shares, rounded down to FFNs whose width is such a multiple, or all of it. Where layers may differ, those that lost
    most by it get a step back, as long as the sum allows. One that is removed stays so. Raises RecipeError where nothing is
    left of another."""
    whole = [stream.native(index, "down").shape[1] for index in range(stream.depth)]
    there, step = [index for index, row in enumerate(shares) if row["ffn"]], step_of(recipe, min(whole))
    if step == 1:
        return list(shares)
    costs = [channel_parameters(stream, index) for index in range(stream.depth)]
    fixed = [dense_parameters(stream, index, "ffn") - costs[index] * whole[index] for index in range(stream.depth)]
    wanted = [(row["ffn"] - fixed[index]) / costs[index] for index, row in enumerate(shares)]
    widths = [
        min(int(width) // step * step, whole[index]) if width < whole[index] else whole[index]
        for index, width in enumerate(wanted)
    ]
    if recipe.shape != "stock":
        spare = sum((wanted[index] - widths[index]) * costs[index] for index in there)
        for index in sorted(there, key=lambda index: widths[index] - wanted[index]):
            more = min(step, whole[index] - widths[index])
            if more * costs[index] <= spare:
                widths[index], spare = widths[index] + more, spare - more * costs[index]
    if not min(widths[index] for index in there):
        raise RecipeError(
            f"at ratio {recipe.ratio:g} an FFN would keep {min(wanted[index] for index in there):.0f} channels, and widths are "
            f"multiples of {step}; wanted a lower ratio or a smaller --multiple."
        )
    return [
        row | {"ffn": fixed[index] + costs[index] * widths[index]} if row["ffn"] else dict(row)
        for index, row in enumerate(shares)
    ]


def channel_parameters(stream: ModelStream, index: int) -> int:
    """What one channel of an FFN stores: a row of what reads its input, a column of down."""
    forms, reads = stream.natives(index), stream.family.sublayers["ffn"].reads
    return forms["down"].shape[0] + sum(forms[role].shape[1] + forms[role].bias for role in reads)
