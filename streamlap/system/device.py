"""The device that a run computes on."""

from __future__ import annotations

import re

from streamlap.accelerator.devices import KINDS, accelerator_of
from streamlap.errors import RecipeError, shown


def pick_device(name: str) -> str:
    """auto, cpu, cuda or cuda:N -> a device that is there, a GPU by its number; it becomes torch's current one."""
    if name == "auto":
        name = "cuda" if KINDS["cuda"].count() else "cpu"
    check_device_name(name)
    if name.startswith("cuda") and int(name[5:] or 0) >= (count := KINDS["cuda"].count()):
        raise RecipeError(f"device is {name!r}, and torch sees {count} CUDA devices; use --device cpu.")
    if name.startswith("cuda"):
        name = f"cuda:{int(name[5:] or 0)}"
        accelerator_of(name).select()
    return name


def check_device_name(name: str) -> None:
    """Raise RecipeError for what names no device, there or elsewhere."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise RecipeError(f"device is {shown(name)}; wanted auto, cpu, cuda or cuda:N.{hint(name)}")


def hint(name: str) -> str:
    """What a device of another name may be meant to be."""
    if match := re.fullmatch(r"(?:cuda|gpu)[: ]?([0-9]*)", name.strip().lower()):
        return f" Did you mean {f'cuda:{match[1]}' if match[1] else 'cuda'}?"
    return " Apple's GPUs are not served yet; use cpu." if name.strip().lower() == "mps" else ""
