"""README.md and docs/*.md tell the truth: every block of commands and code runs, on a pico model, offline.

The blocks of a page run from top to bottom in one folder that holds `my-model` and `text.txt`:

- ```python runs, and all such blocks of a page share their names;
- ```bash: each `streamlap` or `python -m streamlap` line runs through that entry point and must end with exit code 0, or with
  the one that its comment names (`# exit code 3`). `# Ctrl-C here; exit code 75` interrupts it after the first layer. Of
  `scripts/...` lines only the script's existence is checked. Any other command is an error, so that none goes untested;
- ```yaml is written to the file that its first line names;
- ```json after a command with --json, or under `<!-- file: PATH [KEY | line N] -->`, must have the fields of the real thing, or
  some of them under `<!-- part of file: PATH -->`;
- ```text is left alone.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from conftest import MakeModel

import streamlap
from streamlap import cli, errors
from streamlap.families.table import FAMILIES
from streamlap.methods import METHODS
from streamlap.store.journal import Journal

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "CHANGELOG.md"]}

BLOCK = re.compile(
    r"^(?:<!-- (?P<part>part of )?file: (?P<file>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
FREE_KEYS = {"modules", "sites", "shards", "fingerprint", "recipe", "errors", "ffn", "attention"}
"""Objects of which a page may show a part."""


@dataclass(frozen=True, kw_only=True)
class Block:
    language: str
    code: str
    line: int
    file: str | None
    part: bool

    @classmethod
    def all_of(cls, page: str) -> list[Block]:
        text = TEXTS[page]
        return [
            cls(
                language=match["language"],
                code=match["code"],
                line=text.count("\n", 0, match.start("code")) + 1,
                file=match["file"],
                part=match["part"] is not None,
            )
            for match in BLOCK.finditer(text)
        ]


@pytest.fixture
def folder_of_page(tmp_path: Path, pico: MakeModel, text: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with `my-model` and `text.txt`; the bundled model and text are these two, which is quick."""
    shutil.copytree(pico("llama", tokenizer=True), tmp_path / "my-model")
    for name in ("text.txt", "calibration.txt", "validation.txt"):
        shutil.copy(text, tmp_path / name)
    bundled = {"model": tmp_path / "my-model"}
    monkeypatch.setattr("streamlap.demo.bundled", lambda name: bundled.get(name, tmp_path / name))
    monkeypatch.setattr("streamlap.data.calibration.bundled_text", lambda purpose: (str(tmp_path / f"{purpose}.txt"),))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [(table, dict(table)) for table in (FAMILIES, METHODS)]
    yield tmp_path
    for table, before in tables:  # pages add rows to them
        table.clear()
        table.update(before)


@pytest.mark.parametrize("page", [page for page in TEXTS if Block.all_of(page)])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_blocks_run(
    page: str, folder_of_page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    printed = ""
    for block in Block.all_of(page):
        where = f"{page}:{block.line}"
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
            exec(code, module.__dict__)
        elif block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                printed = run_line(line, where, monkeypatch, capsys)
        elif block.language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block.code)
            assert name, f"{where}: the first line of a yaml block names its file"
            (folder_of_page / name[1]).write_text(block.code)
        elif block.language == "json":
            actual = read_part(block.file) if block.file else json.loads(printed)
            compare(json.loads(block.code), actual, where, block.part)
        else:
            assert block.language == "text", f"{where}: {block.language or 'no language'}; wanted one that is tested"


def run_line(line: str, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run one line of a bash block; gives what it printed on stdout."""
    words = shlex.split(line, comments=True)
    if not words:
        return ""
    if words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), f"{where}: {words[0]} is not an executable script"
        return ""
    as_module = words[:3] == ["python", "-m", "streamlap"]
    assert as_module or words[0] == "streamlap", f"{where}: {line!r} is not tested; wanted streamlap or scripts/..."
    wanted = int(found[1]) if (found := re.search(r"# .*exit code (\d+)", line)) else 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words[2:] if as_module else words)
        if "Ctrl-C" in line:
            patch.setattr(Journal, "append", append_and_interrupt)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("streamlap", run_name="__main__") if as_module else cli.main()
    output = capsys.readouterr()
    assert (ended.value.code or 0) == wanted, f"{where}: {line}\n{output.out}{output.err}"
    return output.out


def append_and_interrupt(journal: Journal, layer: dict[str, Any], append: Any = Journal.append) -> None:
    append(journal, layer)
    if journal.next_layer == 1:
        signal.raise_signal(signal.SIGINT)


def read_part(reference: str) -> Any:
    """`PATH`, `PATH KEY` or `PATH line N` -> the JSON value there."""
    path, *part = reference.split()
    text = Path(path).read_text(encoding="utf-8")
    if part[:1] == ["line"]:
        return json.loads(text.splitlines()[int(part[1]) - 1])
    value = json.loads(text)
    return value[part[0]] if part else value


def compare(shown: Any, actual: Any, where: str, partial: bool = False) -> None:
    """The same fields, of the same types; where `partial`, below `FREE_KEYS` and of lists the page may show some only."""
    assert type(shown) is type(actual), f"{where}: shows {shown!r}, and it is {actual!r}"
    if isinstance(shown, dict):
        assert shown.keys() <= actual.keys(), f"{where}: {shown.keys() - actual.keys()} are not there"
        assert partial or shown.keys() == actual.keys(), f"{where}: {actual.keys() - shown.keys()} are not shown"
        for key, value in shown.items():
            compare(value, actual[key], f"{where}: {key}", partial=key in FREE_KEYS)
    elif isinstance(shown, list):
        for one, other in zip(shown, actual, strict=False):
            compare(one, other, where)


HELP = {"-h", "--help"}


def options() -> dict[str, set[str]]:
    """Command -> its flags, as the command line itself knows them."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    return {name: HELP | flags_of(command) for name, command in commands.items()}


def flags_of(command: Any) -> set[str]:
    return {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("page", TEXTS)
def test_commands_and_flags_exist(page: str) -> None:
    known, own = options(), HELP | flags_of(typer.main.get_command(cli.app))
    lines = [line for block in Block.all_of(page) for line in block.code.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", BLOCK.sub("", TEXTS[page]))
    for span in lines + spans:
        words = span.split("#")[0].removeprefix("python -m ").split()
        if words[:1] == ["streamlap"] and len(words) > 1:
            assert words[1] in known or words[1] in own, f"{page}: {span!r} is no command"
            flags = known.get(words[1], own)
        elif words and words[0] in known and any(word.startswith("--") for word in words):
            flags = known[words[0]]
        elif words and words[0].startswith("--"):
            flags = own.union(*known.values())
        else:
            continue
        unknown = {word for word in words if word.startswith("-")} - flags
        assert not unknown, f"{page}: {span!r} has {unknown}; wanted some of {sorted(flags)}"


def test_readme_names_every_command() -> None:
    section = TEXTS["README.md"].split("## Commands")[1].split("\n## ")[0]
    assert re.findall(r"^\| `streamlap (\w+)", section, re.M) == list(options())


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md"])
def test_exit_codes_are_those_of_the_errors(page: str) -> None:
    section = TEXTS[page].split("## Exit codes")[1].split("\n## ")[0]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.M)} == {
        0,
        *(kind.exit_code for kind in kinds),
    }
    for code, cell in re.findall(r"^\| (\d+) \| ([`\w, ]*) \|", section, re.M):
        for name in re.findall(r"`(\w+)`", cell):
            assert getattr(errors, name).exit_code == int(code), name


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {target}"


HISTORY = {"CHANGELOG.md", "docs/experiments.md"}
"""Pages that tell of earlier versions, whose modules and tests had other places."""


def test_files_named_in_the_pages_exist() -> None:
    """By whole paths; modules and tests also by the ends of theirs, like `loader/forms.py` and `test_resume.py`."""
    folders = ("streamlap", "tests", "scripts", "docs")
    files = [f"/{path.relative_to(ROOT).as_posix()}" for folder in folders for path in (ROOT / folder).rglob("*.*")]
    for page, text in TEXTS.items():
        kept = folders[2:] if page in HISTORY else folders
        names = re.findall(rf"(?<![\w/.])((?:{'|'.join(kept)})/[\w/.-]+\.\w+)", text)
        names += [] if page in HISTORY else re.findall(r"`([\w/]*\w\.py)`", text)
        for name in names:
            if "ffn_energy" not in name:  # the file that add-a-method.md tells to write
                assert any(file.endswith(f"/{name}") for file in files), f"{page}: {name}"


def test_index_lists_every_page() -> None:
    listed = re.findall(r"^\| \[([\w-]+\.md)\]", TEXTS["docs/index.md"], re.M)
    assert sorted([*listed, "index.md"]) == [page.name for page in PAGES[1:]]


def test_changelog_begins_with_this_version() -> None:
    version, date = re.findall(r"^## \[(.+?)\] - (\S+)$", TEXTS["CHANGELOG.md"], re.M)[0]
    assert version == streamlap.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
