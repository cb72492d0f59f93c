"""A machine file is plain figures, or it is refused with the key, what was seen and what was wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from streamlap.errors import RecipeError
from streamlap.planning.machine_file import find_sheet, known_sheets, parse_sheet
from streamlap.planning.public_machines import PUBLIC
from streamlap.planning.sheets import SHARE
from streamlap.settings import RunSettings

CPU: dict[str, Any] = {"cores": 8, "float32": "1T", "float64": "0.5T"}
GPU: dict[str, Any] = {"memory": "24GiB", "pcie": "25GB", "bfloat16": "165T", "float32": "80T", "float64": "1.25T"}
WHOLE: dict[str, Any] = {"ram": "32GiB", "disk": {"read": "5GB", "write": "3GB"}, "cpu": CPU, "gpu": GPU}


@pytest.mark.parametrize("name", PUBLIC)
def test_known_machines_say_where_their_figures_are_from(name: str) -> None:
    sheet = find_sheet(name)
    assert sheet.source.startswith("data sheet: ")
    assert sheet in known_sheets()
    device = sheet.settled(RunSettings()).device
    assert device == ("cuda:0" if sheet.gpu else "cpu")
    assert sheet.machine(device, torch.float32).fastest.speed.matmul > 0


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(WHOLE | {"source": "my desktop", "share": 0.8}))
    sheet = find_sheet(path)
    assert (sheet.name, sheet.source, sheet.share, sheet.ram, sheet.vram) == (
        str(path), "my desktop", 0.8, 32 << 30, 24 << 30,
    )  # fmt: skip
    assert (sheet.disk.read, sheet.disk.write) == (5e9, 3e9)
    assert sheet.gpu
    assert sheet.cpu
    assert (sheet.gpu.pcie, sheet.gpu.flops) == (25e9, {"bfloat16": 165e12, "float32": 80e12, "float64": 1.25e12})
    assert sheet.cpu.flops == {"float32": 1e12, "float64": 0.5e12}
    assert sheet.cpu.eigen == pytest.approx((0.5e12 / 4 / 9, 0.8 * 0.5e12 / 4 / 9)), "two of eight cores"


@pytest.mark.parametrize("value", ["82.6T", "82.6 tflops", "82.6e12", 82.6e12, 82_600_000_000_000])
def test_rates_are_numbers_or_text(value: Any) -> None:
    sheet = parse_sheet("x", WHOLE | {"gpu": GPU | {"float32": value}})
    assert sheet.gpu
    assert sheet.gpu.flops["float32"] == pytest.approx(82.6e12)


def test_a_rate_of_decompositions_goes_before_what_is_derived() -> None:
    sheet = parse_sheet("x", WHOLE | {"gpu": GPU | {"eigen": "100G"}})
    assert sheet.gpu
    assert sheet.gpu.eigen == (100e9, SHARE * 100e9)


def test_a_file_may_be_like_a_known_machine() -> None:
    sheet, known = (
        parse_sheet("x", {"like": "rtx-4090", "ram": "128GiB", "disk": {"read": "7GB"}}),
        find_sheet("rtx-4090"),
    )
    assert (sheet.ram, sheet.disk.read, sheet.disk.write) == (128 << 30, 7e9, known.disk.write)
    assert (sheet.gpu, sheet.cpu) == (known.gpu, known.cpu)
    assert sheet.source == f"file; {known.source}"
    assert parse_sheet("x", {"like": "rtx-4090", "gpu": None}).gpu is None
    assert find_sheet("rtx-4090").ram == 64 << 30, "the table is as it was"


BAD: list[tuple[Any, str]] = [
    ([1], r"machine x is \[1\]; wanted a table with keys like like, source, ram"),
    (WHOLE | {"vram": "8GiB"}, "machine x has unknown keys vram; wanted some of like, source, ram, share, disk, cpu, gpu"),
    (WHOLE | {"gpu": GPU | {"tf32": "1T"}}, "machine x: gpu has unknown keys tf32; wanted some of memory, pcie"),
    ({"ram": "8GiB"}, "machine x has no disk, cpu or gpu; give it, or like: NAME"),
    (WHOLE | {"ram": None}, "machine x has no ram; give it"),
    (WHOLE | {"gpu": {}}, "machine x: gpu has no memory, pcie, float32, float64; give it"),
    (WHOLE | {"cpu": "fast"}, "machine x: cpu is 'fast'; wanted a table"),
    (WHOLE | {"ram": 64}, "machine x: ram is 64; wanted a size from 2GiB to 1000TiB, like 24GiB"),
    (WHOLE | {"ram": True}, "machine x: ram is True; wanted a size"),
    (WHOLE | {"ram": "-8GiB"}, "machine x: ram is '-8GiB'; wanted a size"),
    (WHOLE | {"ram": float("nan")}, "machine x: ram is nan; wanted a size"),
    (WHOLE | {"disk": {"read": "5 parsecs", "write": 1e9}}, "machine x: disk: read is '5 parsecs'; wanted bytes a second"),
    (WHOLE | {"disk": {"read": 0, "write": 1e9}}, "machine x: disk: read is 0; wanted bytes a second"),
    (WHOLE | {"gpu": GPU | {"float32": 82.6}}, "machine x: gpu: float32 is 82.6; wanted FLOP/s from 1G to 100P, like 82.6T"),
    (WHOLE | {"gpu": GPU | {"float32": "9e999"}}, "machine x: gpu: float32 is '9e999'; wanted FLOP/s"),
    (WHOLE | {"cpu": CPU | {"cores": 1.5}}, "machine x: cpu: cores is 1.5; wanted a whole number"),
    (WHOLE | {"share": 2}, "machine x: share is 2; wanted a fraction"),
    (WHOLE | {"share": True}, "machine x: share is True; wanted a fraction"),
    (WHOLE | {"ram": float("inf")}, "machine x: ram is inf; wanted a size"),
    (WHOLE | {7: 1}, "machine x has unknown keys 7; wanted some of like"),
    (WHOLE | {"source": ["a"]}, "machine x: source is .*; wanted a few words"),
    ({"like": "rtx-1"}, "machine x: like is 'rtx-1'; wanted one of rtx-3060-12gb"),
    ({"like": "rtx-4090", "gpu": "none"}, "machine x: gpu is 'none'; wanted a table"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "words"), BAD)
def test_a_bad_figure_is_named(table: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_sheet("x", table)


ODD: list[Any] = [
    None,
    True,
    [],
    {},
    [[]],
    "",
    " ",
    "x",
    "\n",
    -1,
    0,
    10**5000,
    1e400,
    -1e400,
    "9" * 5000,
    "1e999",
    "../x",
]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12] if not isinstance(value, int) else "number")
def test_whatever_stands_at_a_key_ends_in_a_machine_or_in_one_error(value: Any) -> None:
    tables = [WHOLE | {key: value} for key in (*WHOLE, "like", "source", "share", "other")]
    tables += [WHOLE | {group: WHOLE[group] | {key: value}} for group in ("disk", "cpu", "gpu") for key in WHOLE[group]]
    refused = []
    for table in tables:
        try:
            assert parse_sheet("x", table).ram == 32 << 30
        except RecipeError as error:
            refused.append(str(error))
    assert len(refused) > len(tables) // 2
    assert max(map(len, refused)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: &x 1", "cannot be read: .*anchor"), ("ram: 8GiB\nram: 8GiB", "stands twice"), ("\x00", "cannot be read: ")],
)
def test_a_file_that_is_no_plain_yaml_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        find_sheet(path)


def test_a_name_that_is_not_known_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"machine is 'rtx-9999'; wanted a YAML file, or one of rtx-3060-12gb, .*, h200"
    ):
        find_sheet("rtx-9999")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory; wanted a YAML file"):
        find_sheet(tmp_path)
