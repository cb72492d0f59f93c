"""Models that no machine here holds, planned from headers: what a consumer GPU, or the RAM of a desktop, is enough for."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import streamlap
from streamlap.planning.plan import Plan

LAYERS = 3
"""Peaks do not grow with them."""

Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """A plan for a 70B-class shape and 128 windows of 2048 tokens."""
    folder, script = (
        tmp_path_factory.mktemp("large"),
        Path(__file__).parents[2] / "scripts" / "make_synthetic_checkpoint.py",
    )
    spec = importlib.util.spec_from_file_location("checkpoints_of_headers", script)
    assert spec is not None
    assert spec.loader is not None
    synthetic = sys.modules["checkpoints_of_headers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    synthetic.make_headers(folder / "model", "llama-3-70b", layers=LAYERS)
    tokens_NL = np.random.default_rng(0).integers(0, 128256, (128, 2048), dtype=np.uint32)
    np.save(folder / "tokens.npy", tokens_NL)

    def plan(**options: object) -> Plan:
        settings: dict[str, object] = {"ratio": 0.3} | options
        return streamlap.plan(folder / "model", files=(str(folder / "tokens.npy"),), **settings)  # type: ignore[arg-type]

    return plan


GPU = {"machine": "rtx-4090", "max_ram": "16GiB"}

ENOUGH = {
    "best on a GPU": GPU | {"max_vram": "8GiB"},
    "best on a card of 8 GiB": {"machine": "rtx-4060-8gb", "max_ram": "16GiB"},
    "best on a GPU, 10 %": GPU | {"max_vram": "8.5GiB", "ratio": 0.1},
    "best on a GPU, 20 %": GPU | {"max_vram": "8GiB", "ratio": 0.2},
    "best on a GPU, 35 %": GPU | {"max_vram": "8GiB", "ratio": 0.35},
    "best on a GPU, 60 %": GPU | {"max_vram": "8GiB", "ratio": 0.6},
    "best on a CPU": {"machine": "rtx-4090", "device": "cpu", "max_ram": "16GiB"},
    "lorap on a GPU": GPU | {"preset": "lorap", "max_vram": "6GiB", "max_ram": "8GiB"},
    "best and refinement on a GPU": GPU | {"refine": 2, "max_vram": "23.5GiB"},
}


@pytest.mark.parametrize("case", ENOUGH)
def test_so_much_memory_is_enough(planned: Planned, case: str) -> None:
    found = planned(**ENOUGH[case])
    assert found.fits, found.advice


@pytest.mark.parametrize("case", ["best on a GPU", "best on a CPU", "best on a card of 8 GiB"])
def test_the_survey_of_the_default_preset_fits_there_too(planned: Planned, case: str) -> None:
    found = planned(**ENOUGH[case] | {"survey": "auto"})
    assert found.survey is not None
    assert found.survey.peak_vram <= found.fit.vram.cap
    assert found.survey.peak_ram <= found.fit.ram.cap


def test_on_a_gpu_hidden_states_are_read_four_times_from_the_disk_and_written_twice(planned: Planned) -> None:
    """What lies between the sub-layers stays in RAM; held-out windows are read again for each of four divisions."""
    found = planned(**ENOUGH["best on a GPU"])
    assert found.hidden_states == "disk"
    assert found.fit.schedule.between == "ram"
    assert 4 < found.generations_read < 4.1
    assert found.generations_written == 2


def test_where_no_memory_is_left_six_times_and_three(planned: Planned) -> None:
    found = planned(**ENOUGH["best on a GPU"] | {"max_ram": "12GiB"})
    assert (found.fits, found.fit.schedule.between) == (True, "")
    assert 6 < found.generations_read < 6.2
    assert found.generations_written == 3
