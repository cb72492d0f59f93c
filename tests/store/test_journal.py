"""The journal of a run: a torn line never happened, any other damage is refused, and nobody but the run itself touches it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Compress
from crashes import crash_after
from outputs import STATE, contents

import streamlap
from streamlap.errors import ResumeMismatch
from streamlap.store.lock import OutputLock

JOURNAL = f"{STATE}/journal.jsonl"


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99, -1])
def test_a_torn_last_line_never_happened(
    broken: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kept: float
) -> None:
    """Nor does it spoil the line that takes its place, which a second death shows."""
    raw = (broken / JOURNAL).read_bytes()
    start = raw.index(b"\n") + 1
    length = len(raw) - start
    (broken / JOURNAL).write_bytes(raw[: start + (length - 1 if kept < 0 else int(kept * length))])
    crash_after(1, monkeypatch, lambda: streamlap.resume(broken))
    streamlap.resume(broken)
    assert contents(broken) == whole


def test_a_refused_resume_does_not_touch_the_journal(broken: Path) -> None:
    """The line that looks torn may be one that the running process is just writing."""
    torn = (broken / JOURNAL).read_bytes()[:-9]
    (broken / JOURNAL).write_bytes(torn)
    with OutputLock(broken), pytest.raises(ResumeMismatch, match="being written by process"):
        streamlap.resume(broken)
    assert (broken / JOURNAL).read_bytes() == torn


def edit_line(number: int, change: Callable[[bytes], bytes]) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [change(line) if place == number else line for place, line in enumerate(lines)]


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "first line cut": edit_line(0, lambda line: line[:40] + b"\n"),
    "first line of another kind": edit_line(0, lambda line: b"[1]\n"),
    "middle line cut": edit_line(1, lambda line: line[:40] + b"\n"),
    "middle line not text": edit_line(1, lambda line: b"\xff\xfe\n"),
    "middle line gone": lambda lines: [lines[0], lines[2]],
    "a line twice": lambda lines: [lines[0], lines[1], lines[1]],
    "first line gone": lambda lines: lines[1:],
    "empty": lambda lines: [],
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("again", ["resume", "compress"])
def test_a_damaged_journal_is_refused(broken: Path, compress: Compress, case: str, again: str) -> None:
    lines = (broken / JOURNAL).read_bytes().splitlines(keepends=True)
    second = lines[1].replace(b'"index": 0', b'"index": 1')
    (broken / JOURNAL).write_bytes(b"".join(DAMAGE[case]([*lines, second])))
    with pytest.raises(
        ResumeMismatch, match=r"journal.jsonl is damaged .* Delete .*out and give the first command again"
    ):
        streamlap.resume(broken) if again == "resume" else compress(broken)


@pytest.mark.parametrize("data", [None, b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_damaged_tokens_are_made_anew_by_compress(
    broken: Path, compress: Compress, whole: dict[str, Any], data: bytes | None
) -> None:
    path = broken / STATE / "tokens.npy"
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ResumeMismatch, match=r"tokens.npy cannot be read .* first command again"):
        streamlap.resume(broken)
    compress(broken)
    assert contents(broken) == whole
