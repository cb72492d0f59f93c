"""YAML settings: a small plain file, or it is refused. No tags that make objects, no aliases, no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from streamlap.errors import one_line, shown
from streamlap.untrusted.json import MOST_DIGITS, read_limited

MOST_BYTES = 1 << 18
MOST_LEVELS = 16


def read_yaml(path: Path) -> Any:
    """What the file says. Raises ValueError, with a short reason on one line, and OSError."""
    raw = read_limited(path, MOST_BYTES)
    try:
        return parse_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error


def parse_yaml(text: str) -> Any:
    """What the text says. Raises ValueError, with a short reason on one line."""
    try:
        return yaml.load(text, _PlainLoader)
    except Exception as error:  # beside its own errors yaml lets through those of int, float, datetime and base64
        raise ValueError(one_line(str(error))) from error


class _PlainLoader(yaml.SafeLoader):
    """An alias lets a few lines stand for billions, so there are none; a key that stands twice is a slip of the pen."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"anchor or alias {shown(event.anchor)} in line {event.start_mark.line + 1}; write it out")
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise ValueError(f"more than {MOST_LEVELS} levels in line {event.start_mark.line + 1}")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            raise ValueError(f"a whole number of {len(node.value)} characters in line {node.start_mark.line + 1}")
        number: int = super().construct_yaml_int(node)
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"a key in line {key.start_mark.line + 1} is no word")
            if key.value in seen:
                raise ValueError(f"the key {shown(key.value)} stands twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        table: dict[Any, Any] = super().construct_mapping(node, deep)
        return table


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
