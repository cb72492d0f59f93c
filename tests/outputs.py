"""What an output folder holds, in a form that two runs can be compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STATE = ".streamlap"
REPORT = "streamlap_report.json"
MEASURED = {"seconds", "peak_ram_bytes", "peak_vram_bytes", "baseline_ram_bytes", "bytes_read", "bytes_written"}


def contents(out: Path) -> dict[str, Any]:
    """Every file of the finished `out`: its bytes, or for the report its values without what was measured."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return {name: unmeasured(json.loads(data)) if name == REPORT else data for name, data in files.items()}


def unmeasured(value: Any) -> Any:
    if isinstance(value, list):
        return [unmeasured(entry) for entry in value]
    if isinstance(value, dict):
        return {key: unmeasured(entry) for key, entry in value.items() if key not in MEASURED}
    return value


def is_begun(out: Path) -> bool:
    return (out / STATE / "journal.jsonl").is_file()
