"""What two runs have written, side by side. No command itself."""

from __future__ import annotations

import json
from pathlib import Path

from streamlap.store.journal import STATE_FOLDER

REPORT = "streamlap_report.json"
MEASURED = ("seconds", "peak_ram_bytes", "peak_vram_bytes", "baseline_ram_bytes", "bytes_read", "bytes_written")


def contents(out: Path) -> dict[str, bytes]:
    """Files and their bytes, without what a death in the last instant leaves of the state."""
    paths = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    files = {str(path.relative_to(out)): path.read_bytes() for path in paths if STATE_FOLDER not in path.parts}
    if REPORT in files:
        report = json.loads(files[REPORT], object_hook=lambda t: {k: v for k, v in t.items() if k not in MEASURED})
        files[REPORT] = json.dumps(report | {"out": ""}).encode()
    return files


def differing_bytes(left: dict[str, bytes], right: dict[str, bytes]) -> int:
    pairs = [(left.get(name, b""), right.get(name, b"")) for name in left.keys() | right.keys()]
    missing = len(left.keys() ^ right.keys())
    return missing + sum(
        abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False)) for a, b in pairs if a != b
    )
