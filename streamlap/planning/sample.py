"""Whether there is enough calibration text for what is fitted to it.

A fit with fewer tokens than inputs is not determined: damping alone decides in the directions that no token shows.

Shape suffixes: N windows, L length.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import numpy as np
import torch

from streamlap.errors import RecipeError, counted
from streamlap.families.stream import ModelStream
from streamlap.linalg.moments import fitted_sequences
from streamlap.recipe import Recipe

log = logging.getLogger(__name__)

MOST_INPUTS = 16
"""Inputs for each token beyond which nothing is fitted: the result would be that of the damping."""

FEW_TOKENS = 1 << 17
"""Fewer are few: windows that are fitted to are then seen twice, see `pipeline.redraw`."""

ADVICE = "Give more --samples, a longer --length or more text."


def fitted_inputs(stream: ModelStream, sublayers: Iterable[str]) -> int:
    """Inputs of the widest linear in these sub-layers, over all layers; 0 where there are none."""
    wanted = {role for name in sublayers for role in stream.family.sublayers[name].roles}
    shapes = (
        native.shape
        for index in range(stream.depth)
        for role, native in stream.natives(index).items()
        if role in wanted
    )
    return max((inputs for _, inputs in shapes), default=0)


def redrawn_windows(recipe: Recipe, has_head: bool, shape_NL: tuple[int, int]) -> int:
    """How many windows there will be beside those that were given: as many again as are fitted to, where the tokens are few,
    for methods that fit to them. Only a model with a head can draw."""
    wanted = recipe.anchored and recipe.calibration.redraw and has_head
    return len(fitted_sequences(*shape_NL)) if wanted and math.prod(shape_NL) < FEW_TOKENS else 0


def check_sample(tokens_NL: torch.Tensor, inputs: int) -> None:
    """Warn of fewer tokens than inputs, and of windows that say the same. Raises RecipeError where the tokens are so few that a
    fit would mean nothing."""
    (sequences, length), tokens = tokens_NL.shape, tokens_NL.numel()
    if tokens * MOST_INPUTS < inputs:
        raise RecipeError(
            f"calibration has {tokens:,} tokens ({counted(sequences, 'window')} of {length:,}), and the widest linear to fit "
            f"has {inputs:,} inputs; wanted at least {-(-inputs // MOST_INPUTS):,} tokens, and better {inputs:,} or more. "
            f"{ADVICE}"
        )
    if tokens < inputs:
        log.warning(
            "calibration has %s tokens, and the widest linear to fit has %s inputs; wanted at least as many tokens. %s",
            f"{tokens:,}", f"{inputs:,}", ADVICE,
        )  # fmt: skip
    different = len({row_L.numpy().tobytes() for row_L in tokens_NL})
    words = np.unique(tokens_NL.numpy()).size
    if 1 < sequences >= 2 * different or words == 1:
        log.warning(
            "calibration has %d different windows among %d, and %d different tokens; wanted text that does not repeat itself. "
            "Choose another --calibration.", different, sequences, words,
        )  # fmt: skip
