"""Ratios as people write them; sizes and counts have their tests where their units are."""

from __future__ import annotations

import math
from typing import Any

import pytest

from streamlap.errors import RecipeError
from streamlap.system.amounts import parse_ratio

RATIOS: list[tuple[Any, float]] = [
    (0.2, 0.2), ("0.2", 0.2), (".2", 0.2), ("20%", 0.2), (" 20 % ", 0.2), ("33.3%", 0.333), ("0.5%", 0.005), ("2e-1", 0.2),
    ("99.9%", 0.999), ("1%", 0.01),
]  # fmt: skip


@pytest.mark.parametrize(("value", "ratio"), RATIOS)
def test_percent_is_the_same_number_to_the_last_bit(value: Any, ratio: float) -> None:
    assert parse_ratio(value) == ratio
    assert type(parse_ratio(value)) is float


WRONG = [
    0, 1, -0.2, 1.5, "0", "0%", "100%", "120%", "-20%", "%", "", "abc", "20 percent", "0,2", "nan", "inf", "1e999", math.nan,
    math.inf, True, None, [0.2], "0.2.1", "٢0%", "20%%", 10**400,
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_what_is_no_fraction_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"ratio is .*; wanted a fraction between 0 and 1, like 0.2 or 20%"):
        parse_ratio(value)


@pytest.mark.parametrize(("value", "hint"), [(20, "0.2 (20%)"), ("20", "0.2 (20%)"), (12.5, "0.125 (12.5%)")])
def test_percent_without_its_sign_is_asked_about(value: Any, hint: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        parse_ratio(value)
    assert str(refusal.value).endswith(f" Did you mean {hint}?")


@pytest.mark.parametrize("value", ["120%", 1, 100, "100", 1000, "20 %%"])
def test_nothing_is_guessed_of_what_cannot_be_percent(value: Any) -> None:
    with pytest.raises(RecipeError) as refusal:
        parse_ratio(value)
    assert "Did you mean" not in str(refusal.value)
