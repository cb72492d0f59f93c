"""How a run goes about its work: device, folders, caps, time. None of it changes the result; that is the recipe's part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch

from streamlap.errors import RecipeError, shown
from streamlap.system.budget import parse_size
from streamlap.system.device import pick_device
from streamlap.system.signals import parse_time
from streamlap.untrusted.paths import path_of

KEPT: dict[str, tuple[type, ...]] = {
    "device": (str,), "work": (str, type(None)), "max_ram": (int, type(None)), "max_vram": (int, type(None)),
    "overlap": (bool,),
}  # fmt: skip
"""What a run that is resumed begins with again, and what each may be; the other settings are given anew each time."""


@dataclass(frozen=True, kw_only=True)
class Caps:
    """Limits in bytes; None is what the machine has free."""

    ram: int | None = None
    vram: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of one process. Raises RecipeError, naming the field, for what is no size, time or device."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N. A `torch.device` becomes its name."""
    work: str | Path | None = None
    """Folder for hidden states between layers; None is inside the output."""
    max_ram: int | str | None = None
    """Cap on all that the process holds, as bytes or as text like 8GiB; None is what is free."""
    max_vram: int | str | None = None
    """The same on the GPU."""
    overlap: bool = True
    """Whether reading, writing and computing go on beside each other."""
    stop_after: float | str | None = None
    """Time, in seconds or as text like 3h50m, after which the run ends at its next commit; None is never."""
    trust_remote_code: bool = False
    """Whether a tokenizer that is code in the model folder may run; no other code of it ever does."""

    def __post_init__(self) -> None:
        if isinstance(self.device, torch.device):
            object.__setattr__(self, "device", str(self.device))
        for name, kind, wanted in (
            ("device", str, "auto, cpu, cuda or cuda:N"), ("overlap", bool, "true or false"),
            ("trust_remote_code", bool, "true or false"),
        ):  # fmt: skip
            if not isinstance(value := getattr(self, name), kind):
                raise RecipeError(f"{name} is {shown(value)}; wanted {wanted}.")
        for name in ("max_ram", "max_vram"):
            object.__setattr__(self, name, parse_size(getattr(self, name), name))
        if self.stop_after is not None:
            object.__setattr__(self, "stop_after", parse_time(self.stop_after, "stop_after"))
        object.__setattr__(self, "work", None if self.work is None else str(path_of(self.work, "work").resolve()))

    @property
    def caps(self) -> Caps:
        ram, vram = self.max_ram, self.max_vram
        assert not isinstance(ram, str), "parsed above"
        assert not isinstance(vram, str), "parsed above"
        return Caps(ram=ram, vram=vram)

    def settled(self) -> RunSettings:
        """The same with a device that is there, which becomes torch's current one. Raises RecipeError where there is none."""
        return replace(self, device=pick_device(self.device))

    def deadline(self) -> float:
        """When to stop, for a run that begins now, on the clock of `time.monotonic`."""
        assert not isinstance(self.stop_after, str), "parsed above"
        return math.inf if self.stop_after is None else time.monotonic() + self.stop_after

    def to_json(self) -> dict[str, Any]:
        """What the journal keeps."""
        return {name: getattr(self, name) for name in KEPT}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> RunSettings:
        """Raises ValueError for a table that `to_json` did not write."""
        for name, kind in KEPT.items():
            if name not in table or type(table[name]) not in kind:
                raise ValueError(f"setting {name} is {shown(table[name]) if name in table else 'absent'}")
        return cls(**{name: table[name] for name in KEPT})


def split_options(options: Mapping[str, Any]) -> tuple[RunSettings, dict[str, Any]]:
    """Settings from the options that are theirs, and the other options."""
    names = {entry.name for entry in fields(RunSettings)}
    own = {name: value for name, value in options.items() if name in names}
    return RunSettings(**own), {name: value for name, value in options.items() if name not in names}


def refuse_options(function: Callable[..., Any], others: Mapping[str, Any], own: Iterable[str] = ()) -> None:
    """Raise RecipeError for options that a public function has not.

    Args: others, those that are no settings; own, names that it takes beside its parameters and the settings.
    """
    own = tuple(own)
    if unknown := [name for name in others if name not in own]:
        named = [
            entry.name for entry in signature(function).parameters.values() if entry.kind is Parameter.KEYWORD_ONLY
        ]
        known = dict.fromkeys((*named, *own, *(entry.name for entry in fields(RunSettings))))
        raise RecipeError(
            f"{function.__name__} has no options {', '.join(map(shown, unknown))}; wanted some of {', '.join(known)}."
        )
