"""The floors of the code: imports go down or stay, never up and never in a circle, and only the command line talks or exits.

docs/how-it-works.md draws the floors; a new module needs a floor here and there.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "streamlap"

FLOORS = {
    4: {"", "cli", "cli.__main__", "cli.jobs", "cli.options", "cli.results", "cli.wording"},
    3: {
        "pipeline", "editing", "recovery", "halves", "views",
        "allocate", "survey", "sweep", "job", "cuts", "divergence", "preflight", "evaluate", "engine", "forecast", "sizing",
        "workload", "plan",
        "inventory", "verification", "loading", "report", "resuming", "target", "export", "export.dense",
        "export.folder", "demo",
    },
    2: {
        "methods", "methods.base", "methods.attention_anchored", "methods.attention_heads", "methods.attention_groups",
        "methods.ffn_anchored", "methods.ffn_shares", "methods.refine_block", "methods.fitting", "methods.knobs",
        "methods.costs", "methods.attention_awsvd", "methods.ffn_lorap", "recipe", "calibration", "tokenizer",
    },
    1: {
        "store", "store.confine", "store.header", "store.hidden", "store.hub", "store.journal", "store.lock",
        "store.npy", "store.sink",
        "store.source", "store.staging", "store.transfer", "store.worker",
        "families", "families.bounds", "families.layer", "families.shell", "families.stream",
    },
    0: {
        "linalg", "linalg.allocation", "linalg.anchor", "linalg.budget", "linalg.channels", "linalg.heads", "linalg.lowrank",
        "linalg.moments", "linalg.notes", "linalg.obs", "linalg.pivot", "linalg.products", "linalg.ranks", "linalg.rows",
        "linalg.statistics", "linalg.storage", "linalg.subspace",
        "linears", "modules", "memory", "cgroups", "meters", "heap", "machine", "progress", "errors", "hf_plugin",
        "modeling_streamlap", "shim", "stopping", "strictjson", "strictyaml", "version",
    },
}  # fmt: skip
"""Modules by their names inside the package; "" is the package root."""
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}

COPIED = {"linears", "modules", "hf_plugin", "modeling_streamlap"}
"""Files that go into every output folder, so that they must stand alone."""

TALKERS = {"print", "input", "exit", "quit", "sys.exit", "os._exit", "logging.basicConfig", "typer.echo", "click.echo"}

DISTRIBUTIONS = {"yaml": "pyyaml"}
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


def test_every_module_has_a_floor() -> None:
    assert set(SOURCES) == set(FLOOR_OF)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    up = {other: FLOOR_OF[other] for other in inside(module) if FLOOR_OF[other] > FLOOR_OF[module]}
    assert not up, f"{module or 'streamlap'} on floor {FLOOR_OF[module]} imports from above: {up}"


def test_no_import_cycles() -> None:
    cycle: list[str] = []
    try:
        TopologicalSorter({module: inside(module) for module in SOURCES}).prepare()
    except CycleError as error:
        cycle = error.args[1]
    assert not cycle, " -> ".join(cycle)


@pytest.mark.parametrize("module", [module for module in SOURCES if module.split(".")[0] == "linalg"])
def test_linalg_is_torch_only(module: str) -> None:
    assert outside(module) <= {"torch"}
    assert all(other.split(".")[0] in ("linalg", "errors") for other in inside(module))


@pytest.mark.parametrize("module", sorted(COPIED))
def test_copied_files_stand_alone(module: str) -> None:
    assert inside(module) <= COPIED
    assert outside(module) <= ({"torch"} if module in ("linears", "modules") else {"torch", "transformers"})


def test_only_the_command_line_talks_or_exits() -> None:
    found = {
        f"{module}:{node.lineno}: {ast.unparse(node.func)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in TALKERS | {"SystemExit"}
        and module.split(".")[0] != "cli"
    }
    assert not found


def test_what_is_imported_is_declared() -> None:
    """Nothing is used that another package merely happens to bring along."""
    declared = {re.match(r"[\w-]+", row)[0].lower() for row in metadata.requires("streamlap") or ()}  # type: ignore[index]
    for module in SOURCES:
        for name in outside(module):
            assert DISTRIBUTIONS.get(name, name).lower() in declared, f"{module} imports {name}"


def test_the_picture_of_the_floors_is_this_one() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    drawn = {
        int(floor): set(re.findall(r"`(\w+)`", cell)) | ({""} if "package root" in cell else set())
        for floor, cell in re.findall(r"^\| (\d) \| (.+?) \|", page, re.M)
    }
    assert drawn == {floor: {module.split(".")[0] for module in modules} for floor, modules in FLOORS.items()}
