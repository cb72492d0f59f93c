"""Numbers as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from streamlap.errors import RecipeError, shown

AMOUNT = r"(\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)"
LONGEST = 40
"""Characters of the longest amount."""
RATIO = r"(\d*\.?\d+(?:[eE]-?\d{1,3})?)\s*(%?)"


def parse_amount(text: str | int, units: Mapping[str, int]) -> int | None:
    """A number with a unit, in upper or lower case, with or without a space -> a whole number; None for what is none, or 0."""
    known = isinstance(text, str | Real) and not (isinstance(text, int) and abs(text) >= 10**LONGEST)
    words = str(text).strip() if known else ""
    match = re.fullmatch(AMOUNT, words, re.ASCII) if len(words) <= LONGEST else None
    if not match or match[2].upper() not in units:
        return None
    return int(Decimal(match[1]) * units[match[2].upper()]) or None


def parse_ratio(value: Any) -> float:
    """0.2, or text like 20% or 0.2 -> 0.2. Raises RecipeError for what is no fraction inside (0, 1)."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    match = re.fullmatch(RATIO, value.strip(), re.ASCII) if isinstance(value, str) else None
    percent = match is not None and bool(match[2])
    if match:
        number = float(Decimal(match[1]) / (100 if percent else 1))
    if 0 < number < 1:
        return float(number)
    hint = f" Did you mean {number / 100:g} ({number:g}%)?" if 1 < number < 100 and not percent else ""
    raise RecipeError(
        f"ratio is {shown(value)}; wanted a fraction between 0 and 1, like 0.2 or 20% for 20 % removed.{hint}"
    )
