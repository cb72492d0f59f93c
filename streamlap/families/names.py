"""Names on disk -> names in the model, by the rule of transformers' own loader.

A checkpoint may be saved from the bare decoder (`layers.0...`, without `model.` in front), or hold tensors that the model has
no place for. From here on every tensor goes by the name that the whole model has for it, and so it is written, but for a head
that checkpoints call otherwise. The parts of a wrapper that are not its language model go by their names on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from streamlap.errors import CheckpointError
from streamlap.families.table import Family
from streamlap.families.wrappers import names_inside
from streamlap.store.header import TensorInfo
from streamlap.store.source import TensorSource


class ModelTensors:
    """A source by the names of the model. What `info` gives keeps the name on disk, for messages.

    Args: wanted, the names that the model has; tied, whether one matrix may be embedding and head.
    Raises CheckpointError where two tensors have one place.
    """

    def __init__(self, source: TensorSource, wanted: Collection[str], family: Family, tied: bool) -> None:
        self._source, self.headers = source, source.headers
        self._stored: dict[str, str] = {}
        """Name in the model -> name on disk."""
        unused = []
        for stored in source.names():
            name = name_in_model(stored, wanted, family)
            if name is not None:
                self._place(name, stored)
            elif not stored.endswith(family.ignored):
                unused.append(stored)
        self.unused = tuple(sorted(unused))
        """What the model has no place for, by the names on disk."""
        embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
        if tied and embedding not in self._stored and head in self._stored:
            self._stored[embedding] = self._stored.pop(head)

    def _place(self, name: str, stored: str) -> None:
        if name in self._stored:
            raise CheckpointError(
                f"tensor {name!r} stands twice, as {self._stored[name]!r} and as {stored!r}; wanted it once. Remove one."
            )
        self._stored[name] = stored

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> Iterable[str]:
        return self._stored

    def info(self, name: str) -> TensorInfo:
        return self._source.info(self._stored.get(name, name))

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._stored.get(name, name))


def name_in_model(stored: str, wanted: Collection[str], family: Family) -> str | None:
    """What the model calls the tensor that is `stored` on disk; None where it has no place for it. The heads of other tasks
    keep their names: the model does not run them, and transformers has classes that do. So do the other parts of a wrapper."""
    short, long = stored.removeprefix(f"{family.base}."), f"{family.base}.{stored}"
    if family.stored_head is not None and stored == f"{family.stored_head}.weight":
        return f"{family.head}.weight"
    names: list[str] = [short, long, stored, *(names_inside(stored) if family.wraps else ())]
    for name in names:
        if name in wanted:
            return name
    beside = family.wraps and not stored.endswith(family.ignored) and not family.layer_pattern.match(stored)
    return stored if beside or stored.startswith(f"{family.task_head}.") else None


def check_depth(depth: int, source: TensorSource, family: Family, folder: Path) -> None:
    """Raise CheckpointError unless the shards hold tensors of every decoder layer that config.json wants; more may be there."""
    layer = family.layer_pattern
    found = {
        int(match[1]) for name in source.names() if (match := layer.match(name)) and not name.endswith(family.ignored)
    }
    if missing := sorted(set(range(depth)) - found):
        if not found and (others := sorted(name for name in source.names() if ".0." in name)):
            raise CheckpointError(
                f"the shards in {folder} hold no {family.layers}.0, but {others[0]!r}; wanted the names that transformers "
                f"gives a {family.model_type}. Rename the tensors, or save the model with save_pretrained of transformers."
            )
        extent = f"{len(found)} decoder layers, the last numbered {max(found)}" if found else "no decoder layer"
        lacking = f", but not layer {missing[0]}" if found and missing[0] < max(found) else ""
        raise CheckpointError(
            f"{folder / 'config.json'} has num_hidden_layers {depth}, and the shards hold {extent}{lacking}; wanted both to "
            "agree. Take config.json, index and shards of one checkpoint."
        )
