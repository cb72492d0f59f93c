"""Machines by name, or from a YAML file like this one:

    like: rtx-4090                 # optional: the figures of a known machine, where this file has none
    source: my desktop             # optional
    share: 0.5                     # optional: of the rates, what is reached at the upper end of the range of seconds
    ram: 128GiB
    disk: {read: 7GB, write: 5GB}  # a second
    cpu: {cores: 16, bfloat16: 4T, float32: 2T, float64: 1T}
    gpu: {memory: 24GiB, pcie: 25GB, bfloat16: 165T, float32: 82.6T, float64: 1.29T}

Rates of dtypes are FLOP/s. A processor may have `eigen`, n^3 a second of an eigen-decomposition of n x n numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamlap.errors import RecipeError, few, one_line, shown
from streamlap.planning.public_machines import PUBLIC
from streamlap.planning.sheets import SHARE, Processor, Sheet
from streamlap.system.amounts import parse_amount
from streamlap.system.budget import UNITS
from streamlap.system.disk_speed import Disk
from streamlap.untrusted.yaml import read_yaml

FLOP_UNITS = {
    f"{letter}{ending}": 1000**power for power, letter in enumerate(("", *"KMGTP")) for ending in ("", "FLOPS")
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a figure may be: a number, or text with one of the units."""

    wanted: str
    least: float
    most: float
    units: Mapping[str, int]
    whole: bool = False


SIZE = Kind(wanted="a size from 2GiB to 1000TiB, like 24GiB", least=2 << 30, most=1000 << 40, units=UNITS, whole=True)
LINK = Kind(wanted="bytes a second from 1MB to 10TB, like 5GB", least=10**6, most=10**13, units=UNITS)
FLOPS = Kind(wanted="FLOP/s from 1G to 100P, like 82.6T", least=10**9, most=10**17, units=FLOP_UNITS)
EIGEN = Kind(wanted="n^3 a second from 1M to 1P, like 100G", least=10**6, most=10**15, units=FLOP_UNITS)
CORES = Kind(wanted="a whole number from 1 to 10000", least=1, most=10000, units={}, whole=True)
PART = Kind(wanted="a fraction from 0.01 to 1", least=0.01, most=1, units={})

DTYPES = ("bfloat16", "float16", "float32", "float64")
RATES = {**dict.fromkeys(DTYPES, FLOPS), "eigen": EIGEN}
GROUPS: dict[str, dict[str, Kind]] = {
    "disk": {"read": LINK, "write": LINK},
    "cpu": {"cores": CORES, **RATES},
    "gpu": {"memory": SIZE, "pcie": LINK, **RATES},
}
OPTIONAL = {"bfloat16", "float16", "eigen"}
SINGLE = {"ram": SIZE, "share": PART}
KEYS = ("like", "source", *SINGLE, *GROUPS)


def find_sheet(machine: str | Path) -> Sheet:
    """The machine of that name, or the one of a YAML file. Raises RecipeError."""
    name = str(machine)
    if name in PUBLIC:
        return parse_sheet(name, PUBLIC[name])
    try:
        table = read_yaml(Path(name))
    except FileNotFoundError as error:
        raise RecipeError(f"machine is {shown(name)}; wanted a YAML file, or one of {', '.join(PUBLIC)}.") from error
    except OSError as error:
        raise RecipeError(f"machine {name} cannot be read: {error.strerror}; wanted a YAML file.") from error
    except ValueError as error:
        raise RecipeError(f"machine {name} cannot be read: {error}; wanted plain YAML settings.") from error
    return parse_sheet(name, table)


def known_sheets() -> list[Sheet]:
    """Every machine that has a name."""
    return [parse_sheet(name, table) for name, table in PUBLIC.items()]


def parse_sheet(name: str, table: Any) -> Sheet:
    """Raises RecipeError that names the key, for one that is unknown or missing and for what is no such figure."""
    where = f"machine {name}"
    found = _like(where, _checked(where, table, KEYS))
    _require(where, found, ("ram", "disk", "cpu or gpu"))
    groups = {
        key: _figures(f"{where}: {key}", found[key], kinds)
        for key, kinds in GROUPS.items()
        if found.get(key) is not None
    }
    single = {key: _figure(f"{where}: {key}", found[key], kind) for key, kind in SINGLE.items() if key in found}
    share = single.get("share", SHARE)
    return Sheet(
        name=name, source=_source(where, found.get("source", "file")), share=share, ram=int(single["ram"]),
        disk=Disk(**groups["disk"]), cpu=_cpu(groups.get("cpu"), share), gpu=_gpu(groups.get("gpu"), share),
    )  # fmt: skip


def _like(where: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the figures of the machine that it is like where it has none."""
    if "like" not in table:
        return table
    if not isinstance(table["like"], str) or table["like"] not in PUBLIC:
        raise RecipeError(f"{where}: like is {shown(table['like'])}; wanted one of {', '.join(PUBLIC)}.")
    base = PUBLIC[table["like"]]
    joined = {key: {**base[key], **table[key]} for key in GROUPS if isinstance(table.get(key), Mapping) and key in base}
    return {**base, "source": f"file; {base['source']}", **table, **joined}


def _cpu(figures: Mapping[str, float] | None, share: float) -> Processor | None:
    if figures is None:
        return None
    return _decomposing(Processor.of_cpu(_flops(figures), int(figures["cores"]), share), figures, share)


def _gpu(figures: Mapping[str, float] | None, share: float) -> Processor | None:
    if figures is None:
        return None
    unit = Processor.of_gpu(_flops(figures), int(figures["memory"]), figures["pcie"], share)
    return _decomposing(unit, figures, share)


def _flops(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: figures[name] for name in DTYPES if name in figures}


def _decomposing(unit: Processor, figures: Mapping[str, float], share: float) -> Processor:
    """At the rate of the sheet, where it has one."""
    return replace(unit, eigen=(figures["eigen"], share * figures["eigen"])) if "eigen" in figures else unit


def _figures(where: str, table: Any, kinds: Mapping[str, Kind]) -> dict[str, float]:
    found = _checked(where, table, kinds)
    _require(where, found, [key for key in kinds if key not in OPTIONAL])
    return {key: _figure(f"{where}: {key}", value, kinds[key]) for key, value in found.items()}


def _figure(what: str, value: Any, kind: Kind) -> float:
    number = _amount(value, kind.units)
    if number is None or not kind.least <= number <= kind.most or (kind.whole and number != int(number)):
        raise RecipeError(f"{what} is {shown(value)}; wanted {kind.wanted}.")
    return number


def _amount(value: Any, units: Mapping[str, int]) -> float | None:
    """None for what is no number. YAML takes 1e12 for text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        return None
    if re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d{1,3}", value, re.ASCII):
        return float(value)
    return parse_amount(value, units)


def _source(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{where}: source is {shown(value)}; wanted a few words.")
    return one_line(value, 120)


def _checked(where: str, table: Any, keys: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where} is {shown(table)}; wanted a table with keys like {', '.join(keys)}.")
    if unknown := [key if isinstance(key, str) else shown(key) for key in table if key not in keys]:
        raise RecipeError(f"{where} has unknown keys {few(unknown)}; wanted some of {', '.join(keys)}.")
    return table


def _require(where: str, table: Mapping[str, Any], keys: Collection[str]) -> None:
    """Of keys joined by "or" one at least."""
    if missing := [key for key in keys if not any(table.get(part) is not None for part in key.split(" or "))]:
        raise RecipeError(f"{where} has no {', '.join(missing)}; give it, or like: NAME with a known machine.")
