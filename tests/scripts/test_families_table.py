"""The page of families says what the rows say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_script_makes_of_the_rows() -> None:
    made = subprocess.run([sys.executable, ROOT / "scripts" / "families_table.py"], capture_output=True, check=True)
    assert made.stdout.decode() == (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
