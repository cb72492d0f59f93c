"""Every run checks, on one sequence, that the sub-layers of the first layer are that layer, before it writes anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from crashes import crash_after
from outputs import contents

import streamlap
from streamlap.errors import BudgetError, UnsupportedModel
from streamlap.families.layer import StreamLayer
from streamlap.families.table import FAMILIES, Family

Look = tuple[str, tuple[int, ...], bool]
"""Of one check: the layer, the shape of the batch, and whether it also asked for what the last linears write."""

SCALED = {"residual_multiplier": 0.22}
SUM = (
    r"^model.layers.0: in {}, what attention adds to the hidden states and what self_attn.o_proj gives differ by up to"
)
SEQUENCE = r"^model.layers.0: in {}, attention and ffn one after another and the whole layer differ by up to"
REFUSED = {
    "granite by best": ("granite", SCALED, "best", SUM),
    "granite by survey": ("granite", SCALED, "survey", SUM),
    "olmo2 by best": ("olmo2", {}, "best", SUM),
    "olmo2 by survey": ("olmo2", {}, "survey", SUM),
    "cohere2 by best": ("cohere2", {}, "best", SEQUENCE),
    "cohere2 by lorap": ("cohere2", {}, "lorap", SEQUENCE),
    "cohere2 by survey": ("cohere2", {}, "survey", SEQUENCE),
}


def begin(model: Path, out: Path, tokens: Path, way: str, overwrite: bool = False) -> Any:
    """A compression by a preset, or a survey."""
    if way == "survey":
        return streamlap.survey(model, out, files=(str(tokens),), overwrite=overwrite)
    return streamlap.compress(model, out, preset=way, ratio=0.4, files=(str(tokens),), overwrite=overwrite)


def state_of(out: Path, way: str) -> Path:
    return out.with_name(out.name + ".streamlap") if way == "survey" else out


@pytest.fixture
def new_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that streamlap does not have, with the plainest row there is."""
    for name in ("granite", "cohere2", "olmo2"):
        monkeypatch.setitem(FAMILIES, name, Family(model_type=name))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Look]:
    """Every check of a layer."""
    seen: list[Look] = []
    check = StreamLayer.check_sublayers

    def note(layer: StreamLayer, x_BLD: torch.Tensor, writes: bool) -> None:
        seen.append((layer.prefix, tuple(x_BLD.shape), writes))
        check(layer, x_BLD, writes)

    monkeypatch.setattr(StreamLayer, "check_sublayers", note)
    return seen


@pytest.mark.usefixtures("new_rows")
@pytest.mark.parametrize("case", REFUSED)
def test_a_family_whose_sub_layers_are_not_its_layer_is_refused_before_anything_is_written(
    pico: MakeModel, tokens: Path, tmp_path: Path, case: str
) -> None:
    """A block whose sub-layers read the same input; a multiplier, or a norm, behind the last linear."""
    family, settings, way, words = REFUSED[case]
    out = tmp_path / "out"
    with pytest.raises(UnsupportedModel, match=words.format(family)) as refusal:
        begin(pico(family, **settings), out, tokens, way)
    assert refusal.value.exit_code == 3
    assert not out.exists()
    assert not state_of(out, way).exists()


def misunderstood() -> dict[str, Family]:
    """Each row that names what most layers have not, with one such thing taken away."""
    rows: dict[str, Family] = {}
    for name, row in FAMILIES.items():
        for part, sublayer in row.sublayers.items():
            for what in ("norm", "multiplier"):
                if getattr(sublayer, what):
                    without = row.sublayers | {part: replace(sublayer, **{what: None})}
                    rows[f"{name} without the {what} of {part}"] = replace(row, sublayers=without)
        if row.parallel:
            rows[f"{name} in sequence"] = replace(row, parallel=False)
    return rows


@pytest.mark.parametrize("case", misunderstood())
def test_a_row_with_one_thing_missing_is_refused(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    row = misunderstood()[case]
    monkeypatch.setitem(FAMILIES, row.model_type, row)
    with pytest.raises(UnsupportedModel, match=rf"layers.0: in {row.model_type}, .* differ by up to"):
        begin(pico(row.model_type), tmp_path / "out", tokens, "best")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("new_rows")
@pytest.mark.parametrize(("family", "settings"), [("granite", SCALED), ("olmo2", {})])
def test_what_stands_behind_the_last_linear_does_not_matter_to_methods_that_look_once(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    begin(pico(family, **settings), tmp_path / "out", tokens, "lorap")
    assert streamlap.verify(tmp_path / "out") == {"ok": True, "faults": []}
    dense, lean = (streamlap.evaluate(model, tokens) for model in (pico(family, **settings), tmp_path / "out"))
    assert lean.nll == pytest.approx(dense.nll, rel=0.1)


@pytest.mark.parametrize(("way", "writes"), [("lorap", False), ("best", True), ("survey", True)])
def test_every_run_looks_at_one_sequence_of_its_first_layer(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: list[Look], way: str,
    writes: bool,
) -> None:  # fmt: skip
    """Before it begins: one that goes on is of the same model, by its fingerprint."""
    out = tmp_path / "out"
    crash_after(1, monkeypatch, lambda: begin(pico("qwen2"), out, tokens, way))
    streamlap.resume(out)
    assert looks == [("model.layers.0", (1, 16, 32), writes)]


@pytest.mark.parametrize("way", ["best", "survey"])
def test_a_refused_model_leaves_an_earlier_result_as_it_was(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    out = tmp_path / "out"
    begin(pico("qwen2"), out, tokens, way)
    before = contents(out) if out.is_dir() else {"": out.read_bytes()}
    run = StreamLayer.run_sublayer
    monkeypatch.setattr(StreamLayer, "run_sublayer", lambda layer, name, x_BLD: 2 * run(layer, name, x_BLD))
    with pytest.raises(UnsupportedModel, match=r"^model.layers.0: in qwen2, attention and ffn one after another"):
        begin(pico("qwen2"), out, tokens, way, overwrite=True)
    assert (contents(out) if out.is_dir() else {"": out.read_bytes()}) == before


def test_memory_that_runs_out_in_the_check_is_an_error_of_the_budget(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(StreamLayer, "check_sublayers", run_out)
    with pytest.raises(BudgetError, match="out of memory"):
        begin(pico("qwen2"), tmp_path / "out", tokens, "best")
    assert not (tmp_path / "out").exists()
