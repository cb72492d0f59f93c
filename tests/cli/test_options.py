"""Every option has one place, every command the options that it always had, and the program says which one it is."""

from __future__ import annotations

import ast
import collections
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import streamlap
from streamlap.cli import app

CLI = Path(streamlap.__file__).parent / "cli"

TEXT = {"calibration", "text-column", "samples", "length", "seed", "dtype"}
CAPS = {"max-ram", "max-vram"}
RUN = CAPS | {"device", "work", "overlap", "no-overlap", "trust-remote-code"}
RECIPE = TEXT | {"ratio", "target-size", "target-params", "preset", "recipe", "refine", "survey"}
RECIPE |= {"no-survey", "redraw", "no-redraw", "shape", "format", "multiple", "context", "batch"}

OPTIONS: dict[str, set[str]] = {
    "compress": RECIPE | RUN | {"stop-after", "overwrite"},
    "plan": RECIPE | RUN | {"machine"},
    "survey": TEXT | RUN | {"shape", "stop-after", "overwrite"},
    "recover": RUN | (TEXT - {"calibration"}) | {"text", "dense", "epochs", "rank", "learning-rate", "stop-after"},
    "resume": CAPS | {"stop-after"},
    "eval": RUN | {"text", "tasks", "text-column", "length", "stride", "limit", "dtype"},
    "inspect": set(),
    "verify": set(),
    "export": {"to", "type", "stop-after"},
    "demo": {"ratio"},
}
"""Beside --json, which all of them have. As in version 0.4, and --text-column and --machine."""

ARGUMENTS = {
    "compress": ["MODEL", "OUT"],
    "plan": ["MODEL"],
    "survey": ["MODEL", "FILE"],
    "recover": ["OUT", "DEST"],
    "resume": ["OUT"],
    "eval": ["MODEL"],
    "inspect": ["PATH"],
    "verify": ["OUT"],
    "export": ["OUT", "DEST"],
    "demo": ["OUT"],
}

REQUIRED = {"export": [["--to"]], "recover": [["--text"]]}

CALLS = {
    "the console script": [str(Path(sys.executable).with_name("streamlap"))],
    "the package": [sys.executable, "-m", "streamlap"],
    "its command line": [sys.executable, "-m", "streamlap.cli"],
}


def parameters(command: str | None = None) -> list[Any]:
    """Of a command, or of the program itself."""
    program: Any = typer.main.get_command(app)
    return list(program.params if command is None else program.commands[command].params)


def is_option(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option")


@pytest.mark.parametrize("command", OPTIONS)
def test_a_command_takes_the_options_that_it_always_took(command: str) -> None:
    options = list(filter(is_option, parameters(command)))
    names = {word.removeprefix("--") for option in options for word in (*option.opts, *option.secondary_opts)}
    assert names == OPTIONS[command] | {"json"}
    assert [option.opts for option in options if option.required] == REQUIRED.get(command, [])
    assert [place.metavar for place in parameters(command) if not is_option(place)] == ARGUMENTS[command]


def test_there_are_no_other_commands() -> None:
    program: Any = typer.main.get_command(app)
    assert list(program.commands) == list(OPTIONS)


def test_every_option_stands_once() -> None:
    """As many places in the source as names; and what one name says is the same in all commands."""
    said: dict[str, set[object]] = collections.defaultdict(set)
    for command in (None, *OPTIONS):
        for option in filter(is_option, parameters(command)):
            said[option.opts[0]].add((option.help, tuple(option.secondary_opts), option.metavar))
    assert {name: words for name, words in said.items() if len(words) > 1} == {}
    written = [
        node
        for path in CLI.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option"
    ]
    assert len(written) == len(said)


@pytest.mark.parametrize("call", CALLS)
def test_the_program_says_its_version(call: str) -> None:
    done = subprocess.run([*CALLS[call], "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"streamlap {streamlap.__version__}\n", "")


@pytest.mark.parametrize("words", [(), ("compress",), ("demo",)])
def test_h_is_help(words: tuple[str, ...]) -> None:
    short, long = (CliRunner().invoke(app, [*words, flag], prog_name="streamlap") for flag in ("-h", "--help"))
    assert (short.exit_code, short.stdout, short.stderr) == (0, long.stdout, "")
    assert short.stdout.startswith(f"Usage: streamlap {' '.join(words)}".rstrip())
    assert all(f"--{name}" in short.stdout for name in (OPTIONS[words[0]] if words else {"version"}))
