"""Copies of modules."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def copy_of(module: M, replaced: dict[int, Any] | None = None) -> M:
    """A copy with parameters and buffers of its own. Configurations are shared: nobody changes them, and copying them takes
    longer than all the rest.

    Args: replaced, by the `id` of a part what stands in its place, as if it had been copied already.
    """
    shared = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    return copy.deepcopy(module, {**shared, **(replaced or {})})
