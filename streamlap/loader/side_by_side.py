"""Linears that an engine computes as one, each in a form of its own: which they are, and where a tensor on disk belongs.

An engine merges q, k and v, or gate and up, whose outputs lie side by side. On disk each has its own path, and the names of its
own parts behind it (see `modules.disk_name`).

Shape suffixes: I in; leading dimensions of activations are written `...`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .forms import Dense, Form, read_row, short
from .modules import check_loaded

SHARDS: dict[str | int, int] = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the parts of a merged linear -> their place; other linears have numbers."""


def paths_of(prefix: str, merged: Mapping[str, Sequence[str]]) -> list[str]:
    """Paths on disk of the linears that the one at `prefix` is made of: its own where `merged` has not its last name."""
    parent, dot, name = prefix.rpartition(".")
    return [f"{parent}{dot}{part}" for part in merged.get(name, (name,))]


def layer_of(path: str) -> str:
    """The decoder layer that a path leads into, like model.layers.3; the path itself where it has no number."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else path


def forms_at(
    paths: Sequence[str], modules: Mapping[str, Mapping[str, int]], width: int, outputs: Sequence[int], bias: bool
) -> list[Form]:
    """The form of the linear at each of `paths`: by its row in `modules`, or dense.

    Natively they read `width` numbers, and each gives its number of `outputs`; one path with several outputs is a linear
    that is merged on disk too.

    Raises ValueError for a row that does not fit, and for widths by which the engine would cut the result wrongly: it takes the
    outputs that it knows, or two equal ones where those that it knows are two equal ones.
    """
    natives = [Dense((out, width), bias) for out in ([sum(outputs)] if len(paths) == 1 else outputs)]
    if len(natives) != len(paths):
        raise ValueError(f"streamlap modules {short(list(paths))}: seen {len(paths)}; wanted one for each of {outputs}")
    pairs = list(zip(paths, natives, strict=True))
    forms = [read_row(path, modules[path], native) if path in modules else native for path, native in pairs]
    seen = [form.shape[0] for form in forms]
    # Of gate and up it takes a half each; of q, k and v the widths that config.json gives.
    even = len(outputs) <= 2 and len(set(outputs)) == 1 and len(set(seen)) == 1 and sum(seen) % len(outputs) == 0
    if not even and seen != [native.shape[0] for native in natives]:
        raise ValueError(
            f"streamlap modules {short(list(paths))}: seen outputs of {seen}; wanted {list(outputs)}"
            + (", or equal ones" if len(outputs) == 2 and len(set(outputs)) == 1 else "")
        )
    return forms


class SideBySide(nn.Module):
    """y = [part 0 of x, part 1 of x, ...]; knows which of its tensors are still to be loaded."""

    def __init__(
        self, paths: Sequence[str], forms: Sequence[Form], device: torch.device | str, dtype: torch.dtype
    ) -> None:
        """Memory is taken and not set: every tensor has to be loaded."""
        super().__init__()
        self.paths = list(paths)
        self.parts = nn.ModuleList(form.build("meta", dtype).to_empty(device=device) for form in forms)
        self.requires_grad_(False)
        self.waiting = set(self.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., I] -> [..., sum of the outputs]."""
        if len(self.parts) == 1:
            y: torch.Tensor = self.parts[0](x)
            return y
        return torch.cat([part(x) for part in self.parts], -1)

    def load(self, leaf: str, shard: str | int | None, tensor: torch.Tensor) -> str:
        """Take what is called `leaf` behind the path of the part `shard`, which may be None where there is one only.

        Gives back the name of what it fills here. Raises ValueError for a tensor that has no place, or another shape than that.
        """
        place = (0 if len(self.parts) == 1 else None) if shard is None else SHARDS.get(shard, shard)
        if not isinstance(place, int) or not 0 <= place < len(self.parts):
            raise ValueError(
                f"streamlap modules {short(self.paths)}: seen {leaf} of part {short(shard)}; wanted one of each"
            )
        part, path = self.parts[place], self.paths[place]
        have = part.state_dict()
        carried = f"{getattr(part, 'carrier', '')}.{leaf}"
        name = leaf if leaf in have else carried
        if name not in have:
            raise ValueError(f"streamlap module {short(path)}: seen {short(leaf)} in the folder; wanted {sorted(have)}")
        if have[name].shape != tensor.shape:
            raise ValueError(
                f"streamlap module {short(path)}: seen {leaf} of shape {tuple(tensor.shape)} in the folder; wanted "
                f"{tuple(have[name].shape)}, as quantization_config.modules says"
            )
        have[name].copy_(tensor)
        filled = f"parts.{place}.{name}"
        self.waiting.discard(filled)
        return filled

    def check(self) -> None:
        """Raise ValueError where a tensor was not loaded, or an order is none."""
        if self.waiting:
            raise ValueError(
                f"streamlap modules {short(self.paths)}: seen no {', '.join(sorted(self.waiting))} in the folder; wanted all"
            )
        for path, part in zip(self.paths, self.parts, strict=True):
            check_loaded(path, part)
