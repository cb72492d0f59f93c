"""A plan is a value: what it says is what a run does, and nothing is decided again once it is made."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeModel

import streamlap
from streamlap.cli.show import describe_plan
from streamlap.errors import BudgetError, Interrupted
from streamlap.families.linears import SUBLAYERS
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES
from streamlap.loader.forms import Form, read_row
from streamlap.methods import METHODS
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.groups import AttentionGroups
from streamlap.methods.base import Layouts, Method, Natives, ParameterBudget
from streamlap.pipeline import compress as compressing
from streamlap.pipeline import survey as surveying
from streamlap.planning import preview
from streamlap.planning.forecast import LayerPlan
from streamlap.planning.layouts import possible_layouts
from streamlap.planning.plan import SLACK
from streamlap.planning.survey_file import Point, Survey, model_digest
from streamlap.recipe import AUTO
from streamlap.system import disk_speed
from streamlap.system.meters import bytes_moved

FIELDS = {
    "fits", "ratio", "output_bytes", "peak_ram_bytes", "peak_vram_bytes", "disk_bytes", "read_bytes", "write_bytes",
    "upload_bytes", "download_bytes", "flops", "flops_by_dtype", "eigen_problems", "generation_bytes", "generations_read",
    "generations_written", "seconds_low", "seconds_high", "survey_seconds_low", "survey_left_out", "disk_measured", "advice",
    "calibration_tokens", "redrawn", "calibration", "overlap", "hidden_states", "forward_tokens", "machine", "layers",
}  # fmt: skip
LAYER_FIELDS = {
    "index", "output_bytes", "read_bytes", "write_bytes", "upload_bytes", "download_bytes", "flops", "seconds_low",
}  # fmt: skip


# --- what becomes of the layers ------------------------------------------------------------------------------------------


def planned_and_made(
    source: Path, out: Path, tokens: Path, **settings: Any
) -> Iterator[tuple[LayerPlan, dict[str, Form]]]:
    """Of every layer its plan, and the forms of the linears that are edited in the finished folder, as config.json has them."""
    plan = streamlap.plan(source, files=(str(tokens),), **settings)
    streamlap.compress(source, out, files=(str(tokens),), **settings)
    table = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    dense = ModelStream(source)
    assert [layer.index for layer in plan.layers] == list(range(dense.depth))
    for layer in plan.layers:
        natives = dense.natives(layer.index)
        rows = {role: table.pop(dense.linear_name(layer.index, role), None) for role in natives}
        yield layer, {role: read_row(role, row, natives[role]) for role, row in rows.items() if row is not None}
    assert table == dense.joined


@pytest.fixture
def surveyed(tmp_path: Path) -> Callable[[Path], str]:
    """A survey file by which late layers matter more."""

    def write(source: Path) -> str:
        stream, path = ModelStream(source), tmp_path / "survey.json"
        layers = tuple(
            {name: (Point(keep=0.5, kl=0.01 * (index + 1), error=0.1),) for name in stream.family.sublayers}
            for index in range(stream.depth)
        )
        found = Survey(model=model_digest(stream), calibration="", compute="", layers=layers)
        path.write_text(json.dumps(found.to_json()))
        return str(path)

    return write


@pytest.mark.parametrize(("family", "ratio"), [("llama", 0.2), *((family, 0.5) for family in FAMILIES)])
def test_one_pass_layers_become_what_the_plan_says(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, ratio: float
) -> None:
    for layer, made in planned_and_made(pico(family), tmp_path / "out", tokens, preset="lorap", ratio=ratio):
        assert list(possible_layouts(layer.candidates)) == [layer.layout] == [made]


SETTINGS: dict[str, dict[str, Any]] = {
    "a fifth": {"ratio": 0.2},
    "half": {"ratio": 0.5},
    "trained": {"ratio": 0.4, "refine": 1},
    "factors": {
        "ratio": 0.4,
        "methods": (AttentionAnchored(storage="factors"), FfnAnchored(storage="factors", shares=(0.0, 0.5, 1.0))),
    },
    "whole heads": {"ratio": 0.4, "methods": (AttentionGroups(), FfnAnchored(shares=(0.25, 1.0)))},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "ernie4_5"])
def test_a_layer_beside_the_dense_model_becomes_one_of_what_the_plan_says(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, settings: str
) -> None:
    """Attention may become one thing; the FFN one of as many as there are shares."""
    for layer, made in planned_and_made(pico(family), tmp_path / "out", tokens, **SETTINGS[settings]):
        assert_one_of(layer, made)


def test_a_survey_goes_through_the_plan_into_the_run(
    pico: MakeModel, tokens: Path, tmp_path: Path, surveyed: Callable[[Path], str]
) -> None:
    source = pico("llama")
    rows = list(planned_and_made(source, tmp_path / "out", tokens, ratio=0.4, survey=surveyed(source)))
    for layer, made in rows:
        assert_one_of(layer, made)
    ranks = [made["q"].rank for _, made in rows]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


def assert_one_of(layer: LayerPlan, made: dict[str, Form]) -> None:
    for name, part in SUBLAYERS.items():
        layouts = [layout for found in layer.candidates[name] for layout in found.layouts.values()]
        assert len(layouts) == 1 or name == "ffn"
        assert {role: made[role] for role in part.roles if role in made} in layouts


# --- who decides it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each time that a plan is decided or made, and for each time that a method is asked for its layouts."""
    words: list[str] = []

    def spy(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            words.append(f"{name} begins")
            result = real(*args, **kwargs)
            words.append(f"{name} ends")
            return result

        monkeypatch.setattr(owner, name, call)

    def spy_layouts(kind: type[Method]) -> None:
        real = kind.layouts

        def layouts(method: Method, natives: Natives, budget: ParameterBudget) -> Layouts:
            words.append("layouts")
            return real(method, natives, budget)

        monkeypatch.setattr(kind, "layouts", layouts)

    for module in (preview, compressing):
        spy(module, "decide")
        spy(module, "make_plan")
    spy(surveying, "plan_survey")
    for kind in METHODS.values():
        spy_layouts(kind)
    return words


DECIDED = ["decide begins", "layouts", "decide ends", "make_plan begins", "make_plan ends"]


def in_short(words: list[str]) -> list[str]:
    """Without repetitions."""
    return [word for word, _ in itertools.groupby(words)]


@pytest.mark.parametrize("wish", [{"ratio": 0.4}, {"target_params": "0.032M"}, {"ratio": 0.4, "refine": 1}])
def test_methods_are_asked_once_what_a_layer_becomes(
    pico: MakeModel, tokens: Path, tmp_path: Path, asked: list[str], wish: dict[str, Any]
) -> None:
    """Not while the plan is made of it, and not by the run."""
    streamlap.plan(pico("llama"), files=(str(tokens),), **wish)
    assert in_short(asked) == DECIDED
    asked.clear()
    streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),), **wish)
    assert in_short(asked) == DECIDED


def test_layers_of_one_shape_share_what_they_become(
    pico: MakeModel, tokens: Path, tmp_path: Path, asked: list[str], surveyed: Callable[[Path], str]
) -> None:
    """One asking for each method, or where a survey gives each layer its own, one for each layer too."""
    source = pico("llama")
    streamlap.compress(source, tmp_path / "out", files=(str(tokens),), preset="lorap")
    assert in_short(asked) == DECIDED
    assert asked.count("layouts") == 2
    asked.clear()
    streamlap.plan(source, files=(str(tokens),), survey=surveyed(source))
    assert asked.count("layouts") == 2 * 3


def test_a_resumed_run_decides_again_what_it_had_decided(
    pico: MakeModel, tokens: Path, tmp_path: Path, asked: list[str]
) -> None:
    """From the recipe in its journal, of which the ratio is all that is left of a target."""
    wish = {"target_params": "0.032M", "files": (str(tokens),)}
    with pytest.raises(Interrupted):
        streamlap.compress(pico("llama"), tmp_path / "out", stop_after=1e-9, **wish)
    assert in_short(asked) == DECIDED
    asked.clear()
    resumed = streamlap.resume(tmp_path / "out")
    assert in_short(asked) == DECIDED
    assert asked.count("layouts") == 2
    assert isinstance(resumed, streamlap.Report)
    assert resumed.shards == streamlap.compress(pico("llama"), tmp_path / "at once", **wish).shards


def test_a_survey_has_a_plan_of_its_own(pico: MakeModel, tokens: Path, tmp_path: Path, asked: list[str]) -> None:
    streamlap.survey(pico("llama"), tmp_path / "survey.json", files=(str(tokens),))
    assert in_short(asked) == ["plan_survey begins", "layouts", "plan_survey ends"]


# --- what is shown of it -------------------------------------------------------------------------------------------------


def test_a_plan_shows_what_it_always_showed(pico: MakeModel, tokens: Path) -> None:
    plan = streamlap.plan(pico("llama"), files=(str(tokens),))
    table = plan.to_json()
    assert table.keys() == FIELDS
    assert json.loads(json.dumps(table)).keys() == FIELDS
    assert all(row.keys() == LAYER_FIELDS for row in table["layers"])
    assert plan.first_flops + sum(row["flops"] for row in table["layers"]) == table["flops"]
    assert table["output_bytes"] == plan.outer_bytes + sum(row["output_bytes"] for row in table["layers"])
    assert 0 < table["seconds_low"] < table["seconds_high"]
    assert (table["fits"], table["advice"]) == (True, ())


def test_a_plan_writes_nothing_where_it_stands_and_needs_no_place(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be written, the range of seconds is that of a fast disk to that of a slow one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(disk_speed, "DISK_BYTES", 1 << 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tokens))  # a file
    known = streamlap.plan(pico("llama"), files=(str(tokens),))
    assert known.disk_measured
    monkeypatch.setattr(disk_speed.tempfile, "TemporaryFile", refuse)
    blind = streamlap.plan(pico("llama"), files=(str(tokens),))
    assert (blind.disk_measured, blind.to_json()["disk_measured"]) == (False, False)
    moved = blind.read_bytes + blind.write_bytes
    assert blind.seconds_low >= moved / 5e9
    assert blind.seconds_high >= SLACK * moved / 1e8 * 0.9
    assert any("speed of the disk could not be measured" in line for line in describe_plan(blind))
    assert not any("could not be measured" in line for line in describe_plan(known))
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("preset", ["lorap", "best"])
def test_a_run_moves_the_bytes_of_its_plan(pico: MakeModel, tokens: Path, tmp_path: Path, preset: str) -> None:
    """With what is outside the layers, 10 MB here, which is read once to be copied, and the head again where it predicts."""
    source = pico("llama", vocab_size=40_000)
    settings: dict[str, Any] = {"files": (str(tokens),), "preset": preset}
    plan = streamlap.plan(source, **settings)
    streamlap.compress(source, tmp_path / "first", **settings)  # what is imported is read now
    before = bytes_moved()
    streamlap.compress(source, tmp_path / "out", **settings)
    read, written = (after - earlier for after, earlier in zip(bytes_moved(), before, strict=True))
    assert plan.read_bytes == pytest.approx(read, rel=0.05)
    assert plan.write_bytes == pytest.approx(written, rel=0.05)


def test_a_survey_moves_the_bytes_of_its_plan(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """Of streams, each of which is on the disk before the next layer: more than the run itself writes."""
    source = pico("llama", num_hidden_layers=8)
    ids = tmp_path / "ids.npy"
    np.save(ids, np.resize(np.load(tokens), (64, 64)))
    settings: dict[str, Any] = {"files": (str(ids),), "redraw": False}
    with_it, without = (streamlap.plan(source, survey=survey, **settings) for survey in (AUTO, None))
    assert with_it.survey is not None
    streamlap.compress(source, tmp_path / "first", survey=None, **settings)  # what is imported is read now
    written = []
    for name, survey in (("made", AUTO), ("none", None)):
        before = bytes_moved()[1]
        streamlap.compress(source, tmp_path / name, survey=survey, **settings)
        written.append(bytes_moved()[1] - before)
    assert with_it.write_bytes - without.write_bytes == pytest.approx(written[0] - written[1], rel=0.1)
    assert with_it.disk_bytes >= with_it.survey.disk_bytes


def refuse(**words: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_plan_that_does_not_fit_says_so_and_a_run_raises_it(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"files": (str(tokens),), "max_ram": "1MiB"}
    plan = streamlap.plan(pico("llama"), **settings)
    assert not plan.fits
    assert "--max-ram is 1.0 MiB" in plan.advice[0]
    with pytest.raises(BudgetError, match=r"--max-ram is 1\.0 MiB; the leanest way"):
        plan.require_fit()
    with pytest.raises(BudgetError, match=r"--max-ram is 1\.0 MiB; the leanest way"):
        streamlap.compress(pico("llama"), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
