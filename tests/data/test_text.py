"""Every kind of text file gives its text, and what is none ends in one error."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import TEXT

from streamlap.data import rows as rows_module
from streamlap.data.rows import JsonValues
from streamlap.data.text import PIECE_BYTES, ZstdFile, check_file, decode, read_text
from streamlap.errors import RecipeError

ROWS = TEXT.split("\n")
SAID = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The whale."}]
TOLD = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "The whale."}]


def lines(*values: Any) -> bytes:
    return "\n".join(map(json.dumps, values)).encode()


def text_rows(end: str = "\n") -> bytes:
    return end.join(json.dumps({"text": row}) for row in ROWS).encode()


WHOLE: dict[str, tuple[str, bytes]] = {
    "txt": ("a.txt", TEXT.encode()),
    "text": ("a.text", TEXT.encode()),
    "md": ("a.md", TEXT.encode()),
    "upper case": ("A.TXT", TEXT.encode()),
    "line ends of Windows": ("a.txt", TEXT.replace("\n", "\r\n").encode()),
    "byte order mark": ("a.txt", b"\xef\xbb\xbf" + TEXT.encode()),
    "jsonl": ("a.jsonl", text_rows()),
    "ndjson in upper case": ("a.NDJSON", text_rows()),
    "jsonl with blank lines": ("a.jsonl", text_rows("\n\n") + b"\n\n"),
    "jsonl with line ends of Windows": ("a.jsonl", text_rows("\r\n")),
    "jsonl with a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + text_rows()),
    "jsonl with null rows": ("a.jsonl", lines({"text": None}, *({"text": row} for row in ROWS), {"text": None}, None)),
    "jsonl of strings": ("a.jsonl", lines(*ROWS)),
    "jsonl that is a list": ("a.jsonl", lines([{"text": row} for row in ROWS])),
    "json that is lines": ("a.json", text_rows()),
    "json list": ("a.json", lines([{"text": row} for row in ROWS])),
    "json list over lines": ("a.json", json.dumps([{"text": row, "n": [1, {}]} for row in ROWS], indent=2).encode()),
    "json list of strings": ("a.json", lines(ROWS)),
    "json list in an object": ("a.json", lines({"version": "1", "data": [{"text": row} for row in ROWS], "n": 2})),
    "txt.gz": ("a.txt.gz", gzip.compress(TEXT.encode())),
    "two members": ("a.TXT.GZ", gzip.compress(TEXT[:99].encode()) + gzip.compress(TEXT[99:].encode())),
    "jsonl.gz": ("a.jsonl.gz", gzip.compress(text_rows())),
    "other columns": ("a.jsonl", lines(*({"id": 7, "text": row, "meta": {"x": [1]}} for row in ROWS))),
}


@pytest.mark.parametrize("case", WHOLE)
def test_the_whole_text(tmp_path: Path, case: str) -> None:
    name, raw = WHOLE[case]
    (tmp_path / name).write_bytes(raw)
    check_file(tmp_path / name)
    assert "".join(read_text(tmp_path / name)) == TEXT


ROW: dict[str, tuple[Any, str]] = {
    "messages": ({"messages": SAID}, "Who?\nThe whale."),
    "messages beside null": ({"messages": SAID, "system": None}, "Who?\nThe whale."),
    "conversations": ({"conversations": TOLD}, "Who?\nThe whale."),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}, SAID[1]]},
        "Who?\nThe whale.",
    ),
    "a call of a tool": ({"messages": [SAID[0], {"role": "assistant", "content": None}, SAID[1]]}, "Who?\nThe whale."),
    "prompt and completion": ({"prompt": "Who?", "completion": "The whale."}, "Who?\nThe whale."),
    "instruction": ({"instruction": "Say who", "input": "", "output": "The whale."}, "Say who\nThe whale."),
    "instruction and input": ({"instruction": "Say", "input": "who", "output": "I"}, "Say\nwho\nI"),
    "instruction without input": ({"instruction": "Say who", "output": "The whale."}, "Say who\nThe whale."),
    "conversation": ({"conversation": SAID, "model": "x"}, "Who?\nThe whale."),
    "prompt and response": ({"prompt": "Who?", "response": "The whale."}, "Who?\nThe whale."),
    "instruction and context": (
        {"instruction": "Say", "context": "who", "response": "I", "category": "qa"},
        "Say\nwho\nI",
    ),
    "instruction and response": ({"instruction": "Say who", "response": "The whale."}, "Say who\nThe whale."),
    "question and answer": ({"question": "Who?", "answer": "The whale."}, "Who?\nThe whale."),
    "a character of two escapes": ({"text": "\U0001f40b"}, "\U0001f40b"),
    "text before messages": ({"messages": SAID, "text": "this"}, "this"),
    "empty": ({"text": ""}, ""),
}


@pytest.mark.parametrize("case", ROW)
def test_the_text_of_a_row(tmp_path: Path, case: str) -> None:
    row, wanted = ROW[case]
    (tmp_path / "a.jsonl").write_bytes(lines(row, row))
    assert "".join(read_text(tmp_path / "a.jsonl")) == f"{wanted}\n{wanted}"


def test_a_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "no", "body": "yes"}, {"body": None}, {"body": SAID}))
    assert "".join(read_text(tmp_path / "a.jsonl", "body")) == "yes\nWho?\nThe whale."
    (tmp_path / "a.json").write_bytes(lines({"data": [{"role": "user", "content": "Who?"}]}))
    assert "".join(read_text(tmp_path / "a.json", "data")) == "Who?"


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table(columns), path, row_group_size=50)
    return path


def test_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=[None, *ROWS, None], other=[1] * (len(ROWS) + 2))
    assert "".join(read_text(path)) == TEXT
    chats = parquet(tmp_path / "b.PARQUET", messages=[SAID, None, SAID], text_2=["x", "y", None])
    assert "".join(read_text(chats)) == "Who?\nThe whale.\nWho?\nThe whale."
    assert "".join(read_text(chats, "text_2")) == "x\ny"
    with pytest.raises(RecipeError, match=r"has the columns words, n; wanted text.*--text-column NAME"):
        "".join(read_text(parquet(tmp_path / "c.parquet", words=["a"], n=[1])))
    with pytest.raises(RecipeError, match=r"has 7 as the text of row 1"):
        "".join(read_text(parquet(tmp_path / "d.parquet", text=[7])))
    (tmp_path / "e.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RecipeError, match=r"e.parquet is not a parquet file"):
        "".join(read_text(tmp_path / "e.parquet"))


def test_zstd(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    pack: Callable[[bytes], bytes] = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(text_rows()[:99]) + pack(text_rows()[99:]))
    assert "".join(read_text(tmp_path / "a.jsonl.zst")) == TEXT
    (tmp_path / "b.txt.zst").write_bytes(TEXT.encode())
    with pytest.raises(RecipeError, match=r"b.txt.zst cannot be unpacked .*wanted a whole zstd file"):
        "".join(read_text(tmp_path / "b.txt.zst"))
    skipped = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"xyz"
    (tmp_path / "c.txt.zst").write_bytes(skipped + pack(TEXT.encode()) + skipped)
    assert "".join(read_text(tmp_path / "c.txt.zst")) == TEXT


@pytest.mark.parametrize("size", [1000, 5 * PIECE_BYTES])
def test_a_zstd_file_that_was_cut_is_not_taken_for_a_whole_one(tmp_path: Path, size: int) -> None:
    """Where the cut is in the last block, all blocks before it can be read."""
    zstandard = pytest.importorskip("zstandard")
    path, noise = tmp_path / "a.txt.zst", Random(0)
    packed: bytes = zstandard.ZstdCompressor().compress("".join(noise.choices("abcdefgh ", k=size)).encode())
    for kept in (len(packed) - 1, len(packed) // 2, 3):
        path.write_bytes(packed[:kept])
        with pytest.raises(RecipeError, match=r"a.txt.zst cannot be unpacked \(it ends inside a frame\)"):
            "".join(read_text(path))


def test_zstd_is_unpacked_a_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor(level=19).compress(b"a" * (64 << 20)))
    found: list[int] = []
    feed = ZstdFile._feed

    def watched(file: ZstdFile) -> bool:
        more = feed(file)
        found.append(len(file._found))
        return more

    monkeypatch.setattr(ZstdFile, "_feed", watched)
    assert sum(map(len, read_text(tmp_path / "a.txt.zst"))) == 64 << 20
    assert max(found) <= 16 << 20


def test_zstd_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(RecipeError, match=r"needs zstandard: pip install 'streamlap\[zstd\]'"):
        "".join(read_text(tmp_path / "a.txt.zst"))


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("a.txt", TEXT.encode("utf-16"), r"a.txt is not UTF-8 text but UTF-16 \(byte 0\)"),
    "UTF-32": ("a.txt", TEXT.encode("utf-32"), r"a.txt is not UTF-8 text but UTF-32 \(byte 0\)"),
    "half of a character": (
        "a.jsonl",
        lines("a", "b\ud83d"),
        r"has '\\ud83d' in row 2, half of a character; wanted whole",
    ),
    "latin-1 far behind": ("a.txt", b"a" * 99_999 + b"caf\xe9", r"not UTF-8 text \(byte 100002\)"),
    "latin-1 behind a mark": ("a.txt", b"\xef\xbb\xbfcaf\xe9 x", r"not UTF-8 text \(byte 6\)"),
    "cut inside a letter": ("a.txt", "é".encode()[:1], r"not UTF-8 text \(byte 0\)"),
    "NUL far behind": ("a.txt", b"a" * 99_999 + b"\0", "character 99999 is NUL"),
    "a mark and nothing": ("a.txt", b"\xef\xbb\xbf", "holds no text"),
    "no rows": ("a.jsonl", b"\n \n", "holds no text"),
    "an empty list": ("a.json", b"[]", "holds no text"),
    "null rows": ("a.jsonl", lines({"text": None}, {"text": None}), "holds no text"),
    "other columns": (
        "a.jsonl",
        lines({"text": "a"}, {"id": 1, "body": "b"}),
        r"row 2 the columns id, body; wanted text",
    ),
    "no columns": ("a.jsonl", b"{}", r"row 1 the columns none; wanted text"),
    "half a pair": ("a.jsonl", lines({"prompt": "a", "chosen": "b"}), "columns prompt, chosen"),
    "a list as text": ("a.jsonl", lines({"text": ["a"]}), "as the text of row 1; wanted a string"),
    "turns of another kind": ("a.jsonl", lines({"messages": [{"who": "a"}]}), r"\{'who': 'a'\} as a turn in row 1"),
    "a number": ("a.jsonl", b"17\n", "has 17 as row 1"),
    "a torn line": ("a.jsonl", b'{"text": "a"}\n{"text": "b\n{"text": "c"}\n', r"not JSON \(line 2: Invalid control"),
    "a torn end": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b', r"not JSON \(line 3: Unterminated string"),
    "a list that ends early": ("a.json", b'[{"text": "a"},\n{"text": "b"}', r"not JSON \(line 2: Expecting ','"),
    "more behind the list": ("a.json", b'[{"text": "a"}]\n[]', r"not JSON \(line 2: something behind the list"),
    "no comma": ("a.json", b'["a" "b"]', r"not JSON \(line 1: Expecting ','"),
    "an object without a name": ("a.json", b'{1: "b"}', r"not JSON \(line 1: a name that is no string"),
    "a number of many digits": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"not JSON \(line 1: "),
    "deep brackets": ("a.jsonl", b'{"text": ' + b"[" * 99_999, r"not JSON \(line 1: "),
    "no gzip": ("a.txt.gz", TEXT.encode(), r"a.txt.gz cannot be unpacked .*wanted a whole gzip file"),
    "half a gzip": ("a.txt.gz", gzip.compress(TEXT.encode())[:-99], "a.txt.gz cannot be unpacked"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text(tmp_path: Path, case: str) -> None:
    name, raw, words = REFUSED[case]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(RecipeError, match=words) as caught:
        "".join(read_text(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.pdf", r"ends in '.pdf'; wanted text \(.txt.*gz or .zst\) or token ids \(.npy\)"),
        ("a.gz", r"ends in '.gz'; wanted text"),
        ("a.tar.gz", r"ends in '.tar.gz'; wanted text"),
        ("a.parquet.gz", r"is packed.*wanted .parquet. Unpack it first"),
        ("a.npy.zst", r"is packed.*wanted .npy. Unpack it first"),
        ("folder", r"is a folder, not a file; wanted .*Name its files one by one"),
        ("none.txt", r"none.txt is not a file; wanted .*, or a data set of the hub: org/name\["),
        ("empty.txt", r"empty.txt is empty"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    if name not in ("folder", "none.txt"):
        (tmp_path / name).write_bytes(b"" if name == "empty.txt" else b"x")
    with pytest.raises(RecipeError, match=words):
        check_file(tmp_path / name)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(RecipeError, match=r"a.txt is a pipe or a device, and a run that goes on reads its text again"):
        check_file(tmp_path / "a.txt")
    with pytest.raises(RecipeError, match=r"/dev/null is a pipe or a device"):
        check_file(Path("/dev/null"))


class Counted(io.BytesIO):
    """A file that counts what is read of it."""

    read_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        raw = super().read(size)
        self.read_bytes += len(raw)
        return raw


def test_no_more_is_read_than_is_asked_for() -> None:
    file = Counted(b"word " * PIECE_BYTES)
    pieces = decode(file)
    next(pieces)
    assert file.read_bytes == PIECE_BYTES
    file = Counted(b"[" + b'{"text": "a word"},' * PIECE_BYTES)
    rows = rows_module.json_rows(decode(file), None, holder=True)
    assert [next(rows), next(rows)] == ["a word", "a word"]
    assert file.read_bytes == PIECE_BYTES


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_values_come_whole_however_the_text_is_cut(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "PIECE_CHARACTERS", 1)
    values = [{"text": 'a "b" \\ \u00e9\U0001f40b\n', "n": [1.5e3, -2, True, None, {}]}, "c", {"d": ""}]
    raw = "\n".join(json.dumps(value, ensure_ascii=place % 2 == 0) for place, value in enumerate(values * 2))
    found = JsonValues(raw[start : start + size] for start in range(0, len(raw), size))
    assert [found.value() for _ in range(6)] == values * 2
    assert found.next_mark() == ""


@pytest.mark.parametrize("number", ["1234567", "-12.5e+3", "7"])
def test_a_number_is_whole_wherever_the_text_is_cut(tmp_path: Path, number: str) -> None:
    path = tmp_path / "a.json"
    for short in range(len(number) + 1):
        name = "x" * (PIECE_BYTES - len('{"version": "", "n": ') - short)
        path.write_text(f'{{"version": "{name}", "n": {number}, "data": [{{"text": "a word"}}]}}')
        assert "".join(read_text(path)) == "a word"
    found = JsonValues(iter(number))
    assert (found.value(), found.next_mark()) == (float(number), "")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_row_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(rows_module, "MOST_CHARACTERS", 1000)
    monkeypatch.setattr(rows_module, "PIECE_CHARACTERS", 100)
    path, rows = tmp_path / name, ["a" * 900, "b" * 200_000]
    if name == "a.parquet":
        parquet(path, text=rows)
    else:
        path.write_bytes(lines(*({"text": row} for row in rows)) if name == "a.jsonl" else lines(rows))
    with pytest.raises(RecipeError, match=r"characters in .*row.*wanted at most .*Cut it into rows"):
        "".join(read_text(path))
