"""Whatever bytes the five parsers of foreign files are given: a StreamlapError or none, little memory, no other file opened.

`scripts/fuzz.py` searches further with the same targets; what it found lies in tests/corpus and is replayed here.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import SIZES, TARGETS, WORDS, check, home
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parents[1] / "corpus"
SEEDS = sorted(path for path in CORPUS.rglob("*") if path.is_file())

STEADY = settings(
    derandomize=True, database=None, deadline=None, max_examples=50, suppress_health_check=list(HealthCheck)
)

BASE, FACTOR = 24 << 20, 200
"""Bytes that a parser may have taken at its peak: some, and so many for each byte it was given."""

NUMBERS = [0, 1, 2, -1, 3, 8, 10**6, 2**31, 2**63, 10**30, 0.5, 1e308, True, None]

words = st.sampled_from(WORDS) | st.text(max_size=8)
plain = st.sampled_from([[], {}, [1], {"a": 1}])
tables = st.recursive(
    st.sampled_from(NUMBERS) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


def mutated(target: str) -> st.SearchStrategy[bytes]:
    """A seed with pieces cut out, doubled or replaced."""
    pieces = st.binary(max_size=6) | tables.map(lambda value: json.dumps(value).encode())
    edits = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 40), pieces), min_size=1, max_size=4)

    def apply(seed: Path, changes: list[tuple[int, int, bytes]]) -> bytes:
        raw = seed.read_bytes()
        for place, length, piece in changes:
            place %= len(raw) + 1
            raw = raw[:place] + piece + raw[place + length :]
        return raw

    return st.builds(apply, st.sampled_from([seed for seed in SEEDS if seed.parent.name == target]), edits)


def framed(table: Any) -> bytes:
    """A table as a header of a shard with 64 bytes of data."""
    raw = json.dumps(table).encode()
    return len(raw).to_bytes(8, "little") + raw + b"\0" * 64


def check_memory(target: str, raw: bytes) -> str:
    """`check`, and that the parser has taken little memory."""
    tracemalloc.start()
    try:
        message = check(target, raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= BASE + FACTOR * len(raw), f"{peak:,} bytes of memory for {len(raw):,} bytes"
    return message


def holds(target: str) -> Callable[[bytes], None]:
    def test(raw: bytes) -> None:
        check_memory(target, raw)

    return test


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What Python imports at the first call is not what a file makes it take."""
    for target in TARGETS:
        for seed in SEEDS:
            if seed.parent.name == target:
                check(target, seed.read_bytes())


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"{seed.parent.name}-{seed.name}")
def test_a_seed_is_accepted_or_refused(seed: Path) -> None:
    message = check_memory(seed.parent.name, seed.read_bytes())
    assert bool(message) is not seed.name.startswith("good")


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_seeds_of_both_kinds(target: str) -> None:
    names = [seed.name for seed in SEEDS if seed.parent.name == target]
    assert [name for name in names if name.startswith("good")]
    assert [name for name in names if not name.startswith("good")]


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_that_were_changed(target: str) -> None:
    STEADY(given(mutated(target))(holds(target)))()


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_and_tables_of_any_kind(target: str) -> None:
    frame = framed if target == "header" else lambda table: json.dumps(table).encode() + b"\n"
    raws = st.binary(max_size=64) | tables.map(frame) | st.lists(tables, max_size=3).map(frame)
    STEADY(given(raws)(holds(target)))()


@given(
    st.dictionaries(
        st.sampled_from([*SIZES, "rope_theta", "layer_types", "hidden_act"]), st.sampled_from(NUMBERS) | words
    )
)
@STEADY
def test_configs_of_a_known_model(fields: dict[str, Any]) -> None:
    good = json.loads((CORPUS / "config" / "good-llama.json").read_bytes())
    check_memory("config", json.dumps(good | fields).encode())


@pytest.mark.parametrize("part", ["arguments", "settings", "recipe"])
def test_journals_of_a_known_run(part: str) -> None:
    start = json.loads((CORPUS / "journal" / "good-begun.jsonl").read_bytes())
    tables = {"arguments": start["arguments"]} | start["arguments"]
    names = st.sampled_from([*tables[part], "refine", "samples"])

    def holds_with(fields: dict[str, Any], without: str) -> None:
        changed = {key: value for key, value in (tables[part] | fields).items() if key != without}
        arguments = changed if part == "arguments" else start["arguments"] | {part: changed}
        check_memory("journal", json.dumps(start | {"arguments": arguments}).encode() + b"\n")

    STEADY(given(st.dictionaries(names, st.sampled_from(NUMBERS) | words | plain, max_size=3), names)(holds_with))()


def test_the_watch_sees_what_is_opened_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The guard itself: a parser that looks elsewhere fails the check."""
    (tmp_path / "other").write_text("x")
    monkeypatch.setitem(TARGETS, "recipe", lambda raw: (tmp_path / "other").read_text())
    with pytest.raises(AssertionError, match="opened outside"):
        check("recipe", b"")
    assert home().is_dir()
