"""A survey measures what it says, goes on where it died, keeps to its memory, and shares out exactly what there is."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from crashes import crash_after, keep_on_disk
from faults import Crash
from picos import VOCABULARY
from torch import nn
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import BudgetError, Interrupted, RecipeError, ResumeMismatch, UnsupportedModel
from streamlap.families import stream as streaming
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.stream import ModelStream, batch_of
from streamlap.linalg.allocation import LEAST, MOST
from streamlap.linalg.moments import held_sequences
from streamlap.loader.forms import Form
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.base import Cost, Solved
from streamlap.output.inspect import count_parameters
from streamlap.pipeline import survey as surveying
from streamlap.planning import schedule as scheduling
from streamlap.planning import survey as planning
from streamlap.planning.allocate import layer_parameters
from streamlap.planning.cuts import CUTS
from streamlap.planning.decide import decide
from streamlap.planning.layouts import dense_parameters, largest_layout
from streamlap.planning.schedule import make_schedule, peak
from streamlap.planning.survey import plan_survey, survey_workload
from streamlap.planning.survey_file import Point, Survey, model_digest, read_survey
from streamlap.planning.workload import Workload
from streamlap.recipe import Recipe
from streamlap.settings import RunSettings
from streamlap.store.journal import Journal

DEPTH = 3
Measure = Callable[..., Survey]


@pytest.fixture(scope="session")
def source(pico: MakeModel) -> Path:
    return pico("qwen2", num_hidden_layers=DEPTH)


@pytest.fixture(scope="session")
def measure(source: Path, tokens: Path) -> Measure:
    def run(file: Path, **changes: Any) -> Survey:
        return streamlap.survey(changes.pop("model", source), file, files=(str(tokens),), **changes)

    return run


@pytest.fixture(scope="session")
def whole(measure: Measure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an unbroken run."""
    file = tmp_path_factory.mktemp("whole") / "survey.json"
    measure(file)
    return file


def state_of(file: Path) -> Path:
    return file.with_name(file.name + ".streamlap")


# --- what is measured --------------------------------------------------------------------------------------------------


def test_the_file_holds_every_cut(whole: Path) -> None:
    found = Survey.read(whole)
    assert len(found.layers) == DEPTH
    for layer in found.layers:
        assert list(layer) == ["attention", "ffn"]
        for name, points in layer.items():
            assert tuple(point.keep for point in points) == (LEVELS[name],)
    assert json.loads(json.dumps(found.to_json())) == json.loads(whole.read_text())
    assert not state_of(whole).exists()


def test_a_deeper_cut_moves_the_predictions_more(
    whole: Path, measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = {name: (keep - 0.3, method) for name, (keep, method) in CUTS["free"].items()}
    monkeypatch.setitem(CUTS, "free", cuts)
    deeper = measure(tmp_path / "survey.json")
    for layer, deep in zip(Survey.read(whole).layers, deeper.layers, strict=True):
        for name, (point,) in layer.items():
            assert deep[name][0].kl > point.kl > 0
            assert deep[name][0].error > point.error > 0


class Silence:
    """A method whose sub-layer adds nothing, or, with `keeps`, is what it was."""

    needs: tuple[str, ...] = ()
    moves_inputs = False

    def __init__(self, last: str, keeps: bool = False) -> None:
        self.last, self.keeps = last, keeps

    def layouts(self, *_: Any) -> dict[str, dict[str, Form]]:
        return {"": {}}

    def cost(self, *_: Any) -> Cost:
        return Cost(workspace_bytes=1 << 20, capture_bytes=1 << 20)

    def solve(self, view: Any, _: dict[str, Any]) -> Solved:
        native = view.layer.native(self.last)
        module = nn.Linear(*reversed(native.shape), bias=False)
        nn.init.zeros_(module.weight)
        edit = Edit(role=self.last, module=module, native=native, error=1.0)
        return Solved(edits=[] if self.keeps else [edit], error=1.0)


LASTS = {"attention": "o", "ffn": "down"}
LEVELS = {name: keep for name, (keep, _) in CUTS["free"].items()}


def silence(monkeypatch: pytest.MonkeyPatch, keeps: bool = False) -> None:
    """In place of what cuts sub-layers."""
    cutters = {sublayer: (0.5, Silence(last, keeps)) for sublayer, last in LASTS.items()}
    monkeypatch.setitem(CUTS, "free", cutters)


def test_ids_in_one_piece_are_cut_into_few_short_windows(source: Path, tokens: Path, tmp_path: Path) -> None:
    """Ids in rows are windows already."""
    ids_NL = np.resize(np.load(tokens), (40, 64))
    for name, ids, wanted in (("flat", ids_NL.reshape(-1), "[32, 64]"), ("rows", ids_NL, "[40, 64]")):
        np.save(tmp_path / f"{name}.npy", ids)
        found = streamlap.survey(source, tmp_path / f"{name}.json", files=(str(tmp_path / f"{name}.npy"),))
        assert found.calibration.startswith(wanted)


def test_a_copy_without_a_cut_does_not_diverge(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence(monkeypatch, keeps=True)
    found = measure(tmp_path / "survey.json")
    assert {point.kl for layer in found.layers for points in layer.values() for point in points} == {0.0}


def test_divergences_are_those_of_the_whole_model(
    measure: Measure, source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers, with the same sub-layer of the same layer silenced."""
    silence(monkeypatch)
    found = measure(tmp_path / "survey.json")
    ids_NL = torch.from_numpy(np.load(tokens).astype(np.int64))[list(held_sequences(12, 16))]

    def log_probabilities(silent: str | None) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            if silent:
                model.get_submodule(silent).weight.zero_()
            return model(ids_NL).logits.double().log_softmax(-1)

    p_NLV = log_probabilities(None)
    for index, layer in enumerate(found.layers):
        for sublayer, points in layer.items():
            q_NLV = log_probabilities(ModelStream(source).linear_name(index, LASTS[sublayer]))
            wanted = float((p_NLV.exp() * (p_NLV - q_NLV)).sum(-1).mean())
            assert wanted > 1e-4
            assert [point.kl for point in points] == pytest.approx([wanted], rel=1e-3)


# --- stop and resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("layers", range(DEPTH))
def test_a_killed_run_ends_in_the_same_file(
    measure: Measure, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, overlap: bool
) -> None:
    file = tmp_path / "survey.json"
    if not overlap:  # and hidden states are read from the disk
        keep_on_disk(monkeypatch)
    crash_after(layers, monkeypatch, lambda: measure(file, overlap=overlap))
    assert not file.exists()
    assert Journal.load(state_of(file)).next_layer == layers
    measure(file, overlap=overlap)
    assert file.read_bytes() == whole.read_bytes()
    assert not state_of(file).exists()


def test_a_run_killed_at_the_head_ends_in_the_same_file(
    measure: Measure, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "survey.json"

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(surveying, "write_durably", crash)
        with pytest.raises(Crash):
            measure(file)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", crash)
        with pytest.raises(Crash):
            measure(file)
    assert file.exists()
    measure(file)
    assert file.read_bytes() == whole.read_bytes()
    assert not state_of(file).exists()


def test_a_stop_on_request_is_honoured_after_the_layer(
    measure: Measure, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Journal.append

    def append_and_stop(journal: Journal, line: dict[str, Any]) -> None:
        append(journal, line)
        signal.raise_signal(signal.SIGTERM)

    file = tmp_path / "survey.json"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append_and_stop)
        with pytest.raises(Interrupted, match="layer 1 of 3") as stopped:
            measure(file)
    assert stopped.value.exit_code == 75
    assert Journal.load(state_of(file)).next_layer == 1
    measure(file)
    assert file.read_bytes() == whole.read_bytes()


def test_hidden_states_go_where_they_are_told(
    measure: Measure, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, work = tmp_path / "survey.json", tmp_path / "work"
    crash_after(1, monkeypatch, lambda: measure(file, work=work))
    assert len(list(work.rglob("*-00001.bin"))) == 1 + len(LEVELS)
    measure(file, work=work)
    assert file.read_bytes() == whole.read_bytes()
    assert not list(work.iterdir())


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox", "stablelm"])
def test_it_does_not_matter_where_hidden_states_are(
    pico: MakeModel, measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Of several batches; also where both sub-layers read the input of the layer."""
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 5 * 16)
    measure(tmp_path / "ram.json", model=pico(family))
    keep_on_disk(monkeypatch)
    measure(tmp_path / "disk.json", model=pico(family))
    assert (tmp_path / "ram.json").read_bytes() == (tmp_path / "disk.json").read_bytes()


def test_what_a_death_after_the_commit_left_goes(
    measure: Measure, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, append = tmp_path / "survey.json", Journal.append

    def append_and_die(journal: Journal, line: dict[str, Any]) -> None:
        append(journal, line)
        raise Crash

    def generations() -> set[str]:
        return {path.stem[-5:] for path in state_of(file).rglob("*.bin")}

    for wanted in ({"00000", "00001"}, {"00001", "00002"}):
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", append_and_die)
            with pytest.raises(Crash):
                measure(file)
        assert generations() == wanted
    measure(file)
    assert file.read_bytes() == whole.read_bytes()


def test_a_run_of_other_tokens_does_not_go_on(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "survey.json"
    crash_after(1, monkeypatch, lambda: measure(file))
    with pytest.raises(ResumeMismatch, match="calibration tokens"):
        measure(file, samples=5)
    measure(file, samples=5, overwrite=True)
    assert "[5, 16]" in Survey.read(file).calibration


def test_a_file_that_is_there_is_left_alone(measure: Measure, whole: Path, tmp_path: Path, source: Path) -> None:
    file = Path(shutil.copy(whole, tmp_path))
    with pytest.raises(RecipeError, match="there already"):
        measure(file)
    measure(file, overwrite=True)
    assert file.read_bytes() == whole.read_bytes()
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(RecipeError, match="no survey file"):
        measure(other, overwrite=True)
    with pytest.raises(RecipeError, match="inside the input"):
        measure(source / "survey.json")


def test_a_folder_that_only_looks_like_the_state_of_a_survey_is_left_alone(measure: Measure, tmp_path: Path) -> None:
    """Whoever has named a folder so finds everything in it afterwards."""
    state_of(tmp_path / "mine").mkdir()
    (state_of(tmp_path / "mine") / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(
            RecipeError, match=r"mine\.streamlap holds notes\.txt; wanted the state of survey .*mine alone"
        ):
            measure(tmp_path / "mine", overwrite=overwrite)
    assert [path.name for path in state_of(tmp_path / "mine").iterdir()] == ["notes.txt"]


# --- memory ------------------------------------------------------------------------------------------------------------


def workload(stream: ModelStream) -> Workload:
    """Of a survey on the tokens of these tests."""
    return survey_workload(stream, plan_survey(stream, (12, 16), RunSettings(), "free").perturbations, 12, 16)


def test_the_claims_hold_every_stream(source: Path) -> None:
    stream = ModelStream(source)
    work = workload(stream)
    assert (work.streams, work.partial, work.partial_sequences) == (2, 2 * DEPTH, 1)
    in_ram, on_disk = (make_schedule(work, True, tier, 12) for tier in ("ram", "disk"))
    assert in_ram.ram["layers"]["hidden states"] == 2 * work.generation + 2 * DEPTH * work.generation // 12
    assert "hidden states" not in on_disk.ram["layers"]
    assert on_disk.ram["propagate"]["edits"] == work.edits > 0
    assert work.solve > work.edits
    assert in_ram.ram["head"]["head"] > 2 * 12 * 16 * stream.vocabulary * 4


def test_the_claims_hold_what_is_fitted_and_stays_dense(
    measure: Measure, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As o does, where the cut is small."""
    monkeypatch.setitem(CUTS, "free", CUTS["free"] | {"attention": (0.9, AttentionAnchored())})
    real, seen = StreamLayer.tried, dict[str, int]()

    def tried(layer: StreamLayer, edits: Sequence[Edit]) -> Any:
        tensors = [tensor for edit in edits for tensor in edit.module.state_dict().values()]
        seen.update((edit.role, sum(tensor.nbytes for tensor in tensors)) for edit in edits[-1:])
        return real(layer, edits)

    monkeypatch.setattr(StreamLayer, "tried", tried)
    measure(tmp_path / "survey.json")
    stream = ModelStream(source)
    for perturbed, found in plan_survey(stream, (12, 16), RunSettings(), "free").perturbations.items():
        made = seen[LASTS[perturbed.sublayer]]
        assert made <= planning.edit_bytes(stream, perturbed, found) <= 1.05 * made


def test_a_cap_that_is_too_small_is_refused_first(measure: Measure, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="--max-ram"):
        measure(tmp_path / "survey.json", max_ram="1MB")
    assert not list(tmp_path.iterdir())


def test_a_cap_below_all_streams_keeps_them_on_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte less than the fastest schedule takes, and nothing else is free."""
    np.save(tmp_path / "many.npy", np.random.default_rng(0).integers(0, VOCABULARY, (2048, 16)))

    def measure(file: Path, **options: Any) -> None:
        streamlap.survey(source, file, files=(str(tmp_path / "many.npy"),), **options)

    measure(tmp_path / "whole.json")
    stream = ModelStream(source)
    planned = plan_survey(stream, (2048, 16), RunSettings(), "free")
    work = survey_workload(stream, planned.perturbations, 2048, 16)
    seen: list[str] = []
    monkeypatch.setattr(scheduling, "ram_bytes", lambda: 0)
    cap = scheduling.RUNTIME_BYTES + peak(make_schedule(work, True, "ram", batch_of(16)).ram) - 1
    fit = scheduling.fit

    def note(*arguments: Any) -> Any:
        choice = fit(*arguments)
        seen.append(choice.schedule.tier)
        return choice

    monkeypatch.setattr(planning, "fit", note)
    monkeypatch.setattr("streamlap.pipeline.runner.LayerRunner.require_baseline", lambda *_: None)
    measure(tmp_path / "survey.json", max_ram=cap)
    assert seen == ["disk"]
    assert (tmp_path / "survey.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


# --- what compress makes of it -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wide(pico: MakeModel) -> Path:
    """Wide enough for whole ranks and channels to come near a ratio."""
    return pico(
        "llama", hidden_size=128, intermediate_size=320, num_attention_heads=4, head_dim=32, num_hidden_layers=4
    )


def written(model: Path, file: Path, kls: Callable[[int, str], float]) -> str:
    """A survey file of `model` with the divergences of a formula."""
    stream = ModelStream(model)
    layers = tuple(
        {
            name: (Point(keep=LEVELS[name], kl=kls(index, name) * (1 - LEVELS[name]) ** 2, error=0.1),)
            for name in stream.family.sublayers
        }
        for index in range(stream.depth)
    )
    found = Survey(model=model_digest(stream), calibration="", compute="", layers=layers)
    file.write_text(json.dumps(found.to_json()))
    return str(file)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.3, 0.5, 0.7])
def test_the_ratio_is_met_over_all_layers(wide: Path, tmp_path: Path, ratio: float) -> None:
    survey = written(wide, tmp_path / "survey.json", lambda index, name: (1 + 3 * index) * (2 if name == "ffn" else 1))
    stream = ModelStream(wide)
    candidates = decide(stream, Recipe(ratio=ratio, survey=survey)).candidates
    layouts = [largest_layout(stream, index, found) for index, found in enumerate(candidates)]
    rows = {
        stream.linear_name(index, role): form.row(stream.native(index, role))
        for index, layout in enumerate(layouts)
        for role, form in layout.items()
    }
    found = count_parameters(stream, rows)
    assert found.ratio_decoder == pytest.approx(ratio, abs=0.002)
    assert found.ratio_decoder >= ratio
    assert len({str(sorted(layout.items())) for layout in layouts}) > 1


def test_sub_layers_that_lose_more_keep_more(wide: Path, tmp_path: Path) -> None:
    survey = written(wide, tmp_path / "survey.json", lambda index, name: 9.0 if (index, name) == (2, "ffn") else 1.0)
    stream = ModelStream(wide)
    keeps = {
        (index, name): count / dense_parameters(stream, index, name)
        for index, counts in enumerate(
            layer_parameters(stream, Recipe(ratio=0.4), read_survey(stream, Path(survey), "free"))
        )
        for name, count in counts.items()
    }
    assert max(keeps, key=lambda place: keeps[place]) == (2, "ffn")
    assert min(keeps.values()) >= LEAST * 0.6 - 1e-3
    assert max(keeps.values()) <= MOST * 0.6 + 1e-3


def test_without_a_survey_all_keep_the_same(wide: Path) -> None:
    stream = ModelStream(wide)
    given = layer_parameters(stream, Recipe(ratio=0.3), None)
    assert len(given) == stream.depth
    for index, counts in enumerate(given):
        assert counts == {name: int(0.7 * dense_parameters(stream, index, name)) for name in ("attention", "ffn")}


def test_compress_goes_by_it(source: Path, whole: Path, tokens: Path, tmp_path: Path) -> None:
    uniform, surveyed = (
        streamlap.compress(source, tmp_path / name, ratio=0.3, files=(str(tokens),), survey=survey)
        for name, survey in (("uniform", None), ("surveyed", str(whole)))
    )
    assert surveyed.parameters.decoder_after <= 0.7 * surveyed.parameters.decoder_before
    assert surveyed.parameters.decoder_after != uniform.parameters.decoder_after
    assert streamlap.verify(tmp_path / "surveyed")["ok"]
    assert surveyed.recipe["survey"] == "streamlap_survey.json"
    assert (tmp_path / "surveyed" / "streamlap_survey.json").read_bytes() == whole.read_bytes()


def test_another_models_survey_is_refused(pico: MakeModel, whole: Path, tokens: Path, tmp_path: Path) -> None:
    other = pico("llama")
    with pytest.raises(RecipeError, match="of another model"):
        streamlap.compress(other, tmp_path / "out", files=(str(tokens),), survey=str(whole))
    with pytest.raises(RecipeError, match="of another model"):
        streamlap.plan(other, files=(str(tokens),), survey=str(whole))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table.update(format_version=2),
        lambda table: table.pop("model"),
        lambda table: table.update(more=1),
        lambda table: table["layers"][0].update(ffn=[]),
        lambda table: table["layers"][0]["ffn"][0].update(keep=1.0),
        lambda table: table["layers"][0]["ffn"][0].update(kl="much"),
        lambda table: table["layers"][0]["ffn"][0].update(kl=float("nan")),
        lambda table: table["layers"][0].pop("ffn"),
        lambda table: table["layers"].pop(),
        lambda table: table.update(layers=3),
    ],
)
def test_a_damaged_survey_is_refused(
    source: Path, whole: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], object]
) -> None:
    table = json.loads(whole.read_text())
    damage(table)
    file = tmp_path / "survey.json"
    file.write_text(json.dumps(table))
    with pytest.raises(RecipeError, match="survey"):
        read_survey(ModelStream(source), file, "free")


def test_a_survey_that_is_no_file_is_refused(source: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            read_survey(ModelStream(source), path, "free")


def test_one_pass_methods_take_no_survey() -> None:
    with pytest.raises(RecipeError, match="anchored methods"):
        Recipe().override(preset="lorap", survey="survey.json")
    with pytest.raises(RecipeError, match="survey is 3"):
        replace(Recipe(), survey=3)


def test_a_compressed_model_is_not_surveyed(source: Path, measure: Measure, tokens: Path, tmp_path: Path) -> None:
    streamlap.compress(source, tmp_path / "out", files=(str(tokens),), ratio=0.3)
    with pytest.raises(UnsupportedModel, match="already compressed"):
        measure(tmp_path / "survey.json", model=tmp_path / "out")


def test_resume_goes_by_the_same_survey(
    source: Path, whole: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may lie elsewhere, but not say something else."""
    file = Path(shutil.copy(whole, tmp_path))

    def compress() -> object:
        return streamlap.compress(source, tmp_path / "out", files=(str(tokens),), survey=str(file))

    crash_after(1, monkeypatch, compress)
    text = file.read_text()
    file.write_text(text.replace('"calibration": "', '"calibration": "x'))
    with pytest.raises(ResumeMismatch, match="survey: the folder has"):
        compress()
    file.write_text(text)
    streamlap.resume(tmp_path / "out")
