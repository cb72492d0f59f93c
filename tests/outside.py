"""A process in which streamlap is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "streamlap":
            raise ModuleNotFoundError("No module named 'streamlap'")

sys.meta_path.insert(0, Blocker())
"""


def run_outside(code: str, folder: Path, *words: str | Path, timeout: float | None = None) -> str:
    """What the code prints, run in `folder` with these words as its arguments."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCKED + code, *words], capture_output=True, text=True, timeout=timeout, cwd=folder,
        env=environment | {"HF_HOME": str(folder / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
