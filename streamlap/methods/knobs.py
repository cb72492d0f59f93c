"""The knobs that all anchored methods share."""

from __future__ import annotations

from dataclasses import dataclass

from streamlap.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How far linears are moved from what they were towards what brings the compressed stream to the dense one, 0 to 1."""

    step: float | None = None
    """Of the last linear of the half. None is what serves held-out tokens best."""
    input_step: float | None = 0.0
    """Of those that read the half's input."""

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("input_step", self.input_step)):
            if value is not None and (isinstance(value, str) or not 0 <= value <= 1):
                raise RecipeError(
                    f"{name} is {value!r}; wanted a number from 0 to 1, or nothing to choose it by held-out tokens."
                )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise RecipeError for a word that a knob does not know."""
    if value not in choices:
        raise RecipeError(f"{name} is {value!r}; wanted one of {', '.join(choices)}.")
