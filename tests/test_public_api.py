"""The public surface: what is documented is what there is, and importing it has no effect but the loader's registration."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamlap

ROOT = Path(__file__).parent.parent

IMPORT = """
import logging, signal, socket, threading

def refuse(*_, **__):
    raise AssertionError("the import asks for the network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

import torch, transformers
handlers, filters = list(logging.getLogger().handlers), signal.getsignal(signal.SIGINT)
threads, state = threading.active_count(), torch.get_rng_state()

import streamlap

assert not torch.cuda.is_initialized()
assert torch.equal(torch.get_rng_state(), state)
assert logging.getLogger().handlers == handlers and signal.getsignal(signal.SIGINT) is filters
assert threading.active_count() == threads
assert "streamlap.cli" not in __import__("sys").modules
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "streamlap" in AUTO_QUANTIZER_MAPPING
"""


def public_functions() -> list[str]:
    return [name for name in streamlap.__all__ if inspect.isfunction(getattr(streamlap, name))]


def test_all_is_the_documented_surface() -> None:
    page = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", page.split("\n## Python\n")[1], re.M)
    documented = [name for row in rows for name in re.findall(r"`(\w+)(?:\(.*?\))?`", row)]
    assert sorted(documented) == sorted(streamlap.__all__)


def test_all_is_what_is_there() -> None:
    assert sorted(set(streamlap.__all__)) == sorted(streamlap.__all__)
    for name in streamlap.__all__:
        assert hasattr(streamlap, name), name


@pytest.mark.parametrize("name", public_functions())
def test_documented_parameters_are_the_real_ones(name: str) -> None:
    page = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{name}\((.*?)\)`", page, re.M)
    assert row, name
    documented = [part.strip(" *").partition("=") for part in row[1].split(",")]
    parameters = inspect.signature(getattr(streamlap, name)).parameters
    assert [part for part, _, _ in documented if part] == list(parameters)
    for part, equals, default in documented:
        if part:
            assert parameters[part].default == (ast.literal_eval(default) if equals else inspect.Parameter.empty), part


def test_documented_settings_are_the_real_ones() -> None:
    """Those that stand behind `**options`."""
    page = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
    row = re.search(r"^\| `RunSettings` \| (.*) \|$", page, re.M)
    assert row
    assert re.findall(r"`(\w+)`", row[1]) == [entry.name for entry in dataclasses.fields(streamlap.RunSettings)]


@pytest.mark.parametrize("name", public_functions())
def test_public_functions_are_typed_and_described(name: str) -> None:
    function = getattr(streamlap, name)
    assert inspect.getdoc(function), name
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())


def test_every_module_says_what_it_is() -> None:
    for path in (ROOT / "streamlap").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 1:
            assert ast.get_docstring(ast.parse(text)), path.name


def test_import_has_no_effect_but_the_registration(tmp_path: Path) -> None:
    """Nothing printed, no warning, no file, no network, no CUDA, no thread, no handler, no random number drawn."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
