"""The table of plans: a row for each model and memory, made of headers alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from streamlap.recipe import Recipe


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "plan_table.py"
    spec = importlib.util.spec_from_file_location("plan_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_says_whether_it_fits_or_the_least_that_would_do(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = script.synthetic.SHAPES["llama-3-8b"]
    monkeypatch.setitem(script.synthetic.SHAPES, "llama-3-8b", published | {"num_hidden_layers": 2})
    monkeypatch.setattr(script, "VRAM", (2, 80))
    rows = [
        dict(zip(script.COLUMNS, row, strict=True))
        for row in script.rows(tmp_path, "llama-3-8b", Recipe(ratio=0.3), (128, 2048))
    ]
    assert [(row["VRAM"], row["RAM"]) for row in rows] == [
        ("2 GiB", "16 GiB"), ("2 GiB", "64 GiB"), ("80 GiB", "16 GiB"), ("80 GiB", "64 GiB"),
    ]  # fmt: skip
    small, large = rows[0], rows[-1]
    assert small["fits"].startswith("no: ")
    assert small["fits"].endswith("GiB of VRAM")
    assert [small[gpu] for gpu in script.GPUS] == ["", "", ""]
    assert (large["fits"], large["hidden states"]) == ("yes", "vram")
    assert all(" to " in large[gpu] for gpu in script.GPUS)
    least = float(small["fits"].removeprefix("no: ").removesuffix("GiB of VRAM"))
    assert 2 < least < 80
