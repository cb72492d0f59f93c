#!/usr/bin/env python
"""Counts what the package is built of and prints a markdown table. Parses the files and imports none of them.

    python scripts/measure_house.py CHECKOUT [--names]

A module is a file. An import counts wherever in a file it stands, once for each pair of modules, and leads to the module that
holds the name: `from streamlap.x import y` to `streamlap.x.y` where there is such a file, else to `streamlap.x`. A room is a
folder right in `streamlap/`, with all that is in it, or a file there. A circle is a largest set of modules, or rooms, of which
each leads to every other; for the floors it counts as one module.

Parameters are all but self, cls, *args and **kwargs. A module reads rows of the table of modules by key where one of `ROW_KEYS`
stands in text as `row["rank"]`, `row.get("rank")` or `"rank" in row`; see the names, for other tables may have such a key.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import median

ROOT = "streamlap"
MOST_PARAMETERS = 5
ROW_KEYS = {"rank", "pivots", "out", "in", "groups", "out_heads", "in_heads"}

Graph = Mapping[str, set[str]]
Row = tuple[str, object, Iterable[str]]
"""What is counted, the count, and names behind it."""


class House:
    """The parsed package of a checkout. Modules by their names inside it; "" is the package's own `__init__`."""

    def __init__(self, checkout: Path) -> None:
        self.folder = checkout / ROOT
        self.paths = {self._name(path): path for path in sorted(self.folder.rglob("*.py"))}
        self.trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in self.paths.items()}
        self.imports = {module: set(self._inside(module)) - {module} for module in self.paths}

    def _name(self, path: Path) -> str:
        parts = path.relative_to(self.folder).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _imported(self, module: str) -> Iterator[str]:
        """Full dotted names, `from x import y` as x.y."""
        package = [ROOT, *filter(None, module.split("."))]
        if self.paths[module].name != "__init__.py":
            package.pop()
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                yield from (f"{base}.{alias.name}" for alias in node.names)

    def _inside(self, module: str) -> Iterator[str]:
        """Modules of the package that `module` imports."""
        for name in self._imported(module):
            if name.split(".")[0] == ROOT:
                inner = name.removeprefix(ROOT).removeprefix(".")
                while inner not in self.paths:  # a class or function: the module that holds it
                    inner = inner.rpartition(".")[0]
                yield inner

    def room(self, module: str) -> str:
        """A folder's name ends in a slash."""
        top = self.paths[module].relative_to(self.folder).parts[0]
        return top if top.endswith(".py") else f"{top}/"

    @property
    def rooms(self) -> dict[str, set[str]]:
        """Room -> rooms that it imports from."""
        found: dict[str, set[str]] = {self.room(module): set() for module in self.paths}
        for module, others in self.imports.items():
            found[self.room(module)] |= {self.room(other) for other in others} - {self.room(module)}
        return found

    def lines(self, module: str) -> int:
        return count_lines(self.paths[module])


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def reachable(graph: Graph, start: str) -> set[str]:
    """Where the arrows lead from `start`; itself only by a circle."""
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph[node]
    return found


def strong(graph: Graph) -> dict[str, frozenset[str]]:
    """Node -> the set of those that it reaches and that reach it, and itself."""
    beyond = {node: reachable(graph, node) for node in graph}
    return {node: frozenset({node, *(other for other in beyond[node] if node in beyond[other])}) for node in graph}


def circles(graph: Graph) -> list[str]:
    return sorted(" ".join(sorted(map(shown, group))) for group in set(strong(graph).values()) if len(group) > 1)


def longest_path(graph: Graph) -> list[str]:
    """Nodes from top to bottom, one of each circle."""
    groups = strong(graph)

    @cache
    def below(group: frozenset[str]) -> tuple[str, ...]:
        under = {groups[other] for node in group for other in graph[node]} - {group}
        return (min(group), *longest(under))

    def longest(tops: set[frozenset[str]]) -> tuple[str, ...]:
        paths = [below(top) for top in sorted(tops, key=lambda group: sorted(group))]
        return max(paths, key=len, default=())

    return list(longest({*groups.values()}))


def shown(module: str) -> str:
    return module or "__init__"


def long_signatures(house: House) -> Iterator[str]:
    for module, tree in house.trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len(found) - (bool(found) and found[0].arg in ("self", "cls"))
                if count > MOST_PARAMETERS:
                    yield f"{shown(module)}:{node.lineno} {node.name} ({count})"


def row_readers(house: House) -> Iterator[str]:
    for module, tree in house.trees.items():
        keys = ROW_KEYS & {key for node in ast.walk(tree) for key in keys_read(node)}
        if keys:
            yield f"{shown(module)} ({', '.join(sorted(keys))})"


def keys_read(node: ast.AST) -> Iterator[str]:
    """Texts that are taken as keys of something that is no constant."""
    key: ast.expr | None = None
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        key = node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        key = node.args[0]
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        key = None if isinstance(node.comparators[0], ast.Constant | ast.Tuple | ast.List | ast.Set) else node.left
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        yield key.value


def rows(house: House, tests: Path) -> Iterator[Row]:
    rooms = house.rooms
    folders = [room for room in rooms if room.endswith("/")]
    files = [room for room in rooms if not room.endswith("/")]
    lines = {module: house.lines(module) for module in house.paths}
    largest = max(lines, key=lines.__getitem__)
    path, module_circles, room_circles = longest_path(house.imports), circles(house.imports), circles(rooms)
    long, readers = list(long_signatures(house)), list(row_readers(house))
    mutual = [f"{room} {other}" for room in rooms for other in rooms[room] if room < other and room in rooms[other]]
    yield "files at the top level", len(files), files
    yield "rooms: folders and top-level modules", f"{len(rooms)}: {len(folders)} + {len(files)}", folders
    yield "modules", len(house.paths), []
    yield "import arrows between modules", sum(map(len, house.imports.values())), []
    yield "import arrows between rooms", sum(map(len, rooms.values())), []
    yield "floors: modules on the longest path of imports", len(path), map(shown, path)
    yield "circles between modules", len(module_circles), module_circles
    yield "circles between rooms", len(room_circles), room_circles
    yield "rooms in circles", sum(len(circle.split()) for circle in room_circles), []
    yield "pairs of rooms that import each other", len(mutual), sorted(mutual)
    yield f"functions with more than {MOST_PARAMETERS} parameters", len(long), long
    yield "modules that read table rows by key", len(readers), readers
    yield "lines of a module, median", f"{median(lines.values()):g}", []
    yield "lines of a module, most", lines[largest], [shown(largest)]
    yield "lines of the package", sum(lines.values()), []
    yield "lines of the tests", sum(map(count_lines, tests.rglob("*.py"))), []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="folder that contains streamlap/ and tests/")
    parser.add_argument("--names", action="store_true", help="a third column: what was counted")
    options = parser.parse_args()
    if not (options.checkout / ROOT / "__init__.py").is_file():
        parser.error(f"{options.checkout} contains no {ROOT}/__init__.py")
    columns = ["what", "count", "which"][: 2 + options.names]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for what, count, names in rows(House(options.checkout), options.checkout / "tests"):
        cells = [what, str(count), "; ".join(names)][: len(columns)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
