"""The rooms of the code: each folder of the package, and each file at its top. Imports between rooms go down, never up or in a
circle, and only the command line talks or exits.

docs/how-it-works.md draws the floors; a new room needs a floor here and there.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

from streamlap.loader.shim import NAS_FILES, SHIM_FILES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "streamlap"

FLOORS = {
    11: {"__main__"},
    10: {"cli"},
    9: {"", "demo"},
    8: {"pipeline"},
    7: {"planning"},
    6: {"data"},
    5: {"recipe"},
    4: {"methods", "output"},
    3: {"families", "settings"},
    2: {"store", "system"},
    1: {"accelerator", "linalg", "untrusted"},
    0: {"errors", "loader", "version"},
}
"""Rooms by their names inside the package; "" is the package root."""
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

MOST_AT_THE_TOP = 8
"""Files beside the rooms that are folders."""

COPIED = {f"loader.{name.removesuffix('.py')}" for name in (*SHIM_FILES, *NAS_FILES)}
"""Files that go into every output folder, so that they must stand alone."""
NEEDED_BY_COPIED = {
    "loader.linears": {"torch"},
    "loader.forms": {"torch"},
    "loader.modules": {"torch"},
    "loader.adapters": {"torch", "peft"},
    "loader.configuration_nas": {"transformers"},
}
"""What a copied file may import from elsewhere, where that is not torch and transformers."""

STATELESS = {"linalg", "methods", "planning", "pipeline"}
"""Rooms in which nothing outlives a run, and nothing is handed on behind the arguments."""

CACHES = {"cache", "lru_cache", "functools.cache", "functools.lru_cache"}

NO_ROOMS = {"corpus", "scripts"}
"""Folders of tests that belong to no room."""

TALKERS = {"print", "input", "exit", "quit", "sys.exit", "os._exit", "logging.basicConfig", "typer.echo", "click.echo"}

HOSTS = {"vllm": "loader.vllm_plugin"}
"""Packages that load a module of ours where they are installed, so that nothing declares them -> that module."""

DISTRIBUTIONS = {"lm_eval": "lm-eval", "yaml": "pyyaml"}
"""Import name -> name in pyproject.toml where they differ."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}


def imports(module: str) -> Iterator[str]:
    """Full dotted names of everything that `module` imports, wherever in the file, `from x import y` as x.y."""
    package = ["streamlap", *(module.split(".") if module else [])]
    if SOURCES[module].name != "__init__.py":
        package.pop()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(module: str) -> set[str]:
    """Modules of the package that `module` imports."""
    found = set()
    for name in imports(module):
        if name.split(".")[0] == "streamlap":
            inner = name.removeprefix("streamlap").removeprefix(".")
            while inner not in SOURCES:  # a class or function: the module that holds it
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found - {module}


def outside(module: str) -> set[str]:
    """Top-level packages from elsewhere that `module` imports, without the standard library."""
    return {name.split(".")[0] for name in imports(module)} - {"streamlap", *sys.stdlib_module_names}


def room(module: str) -> str:
    return module.split(".")[0]


ROOMS = sorted({room(module) for module in SOURCES})
FOLDERS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}


def other_rooms(name: str) -> dict[str, set[str]]:
    """Room -> the imports from it, of all that a room imports from elsewhere."""
    found: dict[str, set[str]] = {}
    for module in SOURCES:
        for other in inside(module) if room(module) == name else ():
            if room(other) != name:
                found.setdefault(room(other), set()).add(f"{module} -> {other}")
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Nodes that lead back to the first; none where there is no way back."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_a_floor() -> None:
    assert set(ROOMS) == set(FLOOR_OF)
    assert sum(map(len, FLOORS.values())) == len(ROOMS), "one floor each"


@pytest.mark.parametrize("name", ROOMS)
def test_imports_between_rooms_point_down(name: str) -> None:
    up = {other: words for other, words in other_rooms(name).items() if FLOOR_OF[other] >= FLOOR_OF[name]}
    assert not up, f"{name or 'streamlap'} is on floor {FLOOR_OF[name]}"


def test_there_is_no_circle_of_rooms_and_none_of_modules() -> None:
    rooms, modules = {name: set(other_rooms(name)) for name in ROOMS}, {module: inside(module) for module in SOURCES}
    for graph in (rooms, modules):
        assert not circle(graph), " -> ".join(circle(graph))


def test_few_files_lie_beside_the_rooms() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_AT_THE_TOP


def test_tests_lie_in_rooms_as_the_code_does() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders - NO_ROOMS == FOLDERS


@pytest.mark.parametrize("module", [module for module in SOURCES if room(module) == "linalg"])
def test_linalg_is_torch_only(module: str) -> None:
    assert outside(module) <= {"torch"}
    assert all(room(other) in ("linalg", "errors") for other in inside(module))


@pytest.mark.parametrize("module", sorted(COPIED))
def test_copied_files_stand_alone(module: str) -> None:
    assert inside(module) <= COPIED
    assert outside(module) <= NEEDED_BY_COPIED.get(module, {"torch", "transformers"})


@pytest.mark.parametrize("module", [module for module in SOURCES if room(module) in STATELESS])
def test_no_state_of_a_run_lives_in_a_module(module: str) -> None:
    """No variable of a context, no `global`, and no cache but inside a call."""
    tree = TREES[module]
    assert "contextvars" not in {name.split(".")[0] for name in imports(module)}
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))
    named = {node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}
    caches = {node for node in named if ast.unparse(node) in CACHES}
    within = {node for call in functions(tree) for part in call.body for node in ast.walk(part)}
    assert not caches - within, [node.lineno for node in caches - within]


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_only_the_command_line_talks_or_exits() -> None:
    found = {
        f"{module}:{node.lineno}: {ast.unparse(node.func)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in TALKERS | {"SystemExit"} and room(module) != "cli"
    }
    assert not found


def test_what_is_imported_is_declared() -> None:
    """Nothing is used that another package merely happens to bring along."""
    declared = {re.match(r"[\w-]+", row)[0].lower() for row in metadata.requires("streamlap") or ()}  # type: ignore[index]
    for module in SOURCES:
        for name in outside(module) - {host for host, plugin in HOSTS.items() if plugin == module}:
            assert DISTRIBUTIONS.get(name, name).lower() in declared, f"{module} imports {name}"


def test_an_engine_alone_loads_its_plugin() -> None:
    needed = {f"{module} -> {other}" for module in SOURCES for other in inside(module) if other in HOSTS.values()}
    assert not needed
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    for group, plugins in points.items():
        for module, name in (target.split(":") for target in plugins.values()):
            plugin = HOSTS[group.split(".")[0]]
            assert module == f"streamlap.{plugin}"
            assert name in {function.name for function in functions(TREES[plugin])}


def test_the_picture_of_the_floors_is_this_one() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    drawn = {
        int(floor): set(re.findall(r"`(\w+)`", cell)) | ({""} if "package root" in cell else set())
        for floor, cell in re.findall(r"^\| (\d+) \| (.+?) \|", page, re.M)
    }
    assert drawn == FLOORS
