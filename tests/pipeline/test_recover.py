"""Recovery: LoRA on a compressed model, merged into what it stores, kept where held-out loss falls."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from folders import edit_config
from picos import VOCABULARY, random_pico
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import streamlap
from streamlap.cli import app
from streamlap.errors import BudgetError, Interrupted, NumericalError, RecipeError, ResumeMismatch
from streamlap.families.stream import ModelStream
from streamlap.linalg.moments import held_sequences
from streamlap.methods.trained.recovery import Likely, Recovery, divergence, prediction_losses
from streamlap.output.card import bare_card
from streamlap.pipeline import adapt
from streamlap.pipeline.adapt import Adapting, RecoveryJob
from streamlap.pipeline.teacher import predictions
from streamlap.planning.recovery import recovery_needs
from streamlap.store.sink import STATE_FOLDER
from streamlap.system.signals import Stops

KNOBS: dict[str, Any] = {"epochs": 2, "rank": 3, "learning_rate": 0.02, "batch": 4, "top": 8}


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids [16, 16] that have a rule to learn: each is three more than the one before."""
    path = tmp_path_factory.mktemp("lesson") / "lesson.npy"
    starts_N = np.random.default_rng(0).integers(0, VOCABULARY, (16, 1))
    np.save(path, ((starts_N + 3 * np.arange(16)) % VOCABULARY).astype(np.uint16))
    return path


@pytest.fixture(scope="module")
def source(pico: MakeModel) -> Path:
    return pico("qwen2", tokenizer=True, num_hidden_layers=2)


@pytest.fixture(scope="module")
def small(source: Path, lesson: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` at half its size: low-rank and pivoted matrices, narrowed FFNs, biases."""
    out = tmp_path_factory.mktemp("small") / "out"
    streamlap.compress(source, out, files=(str(lesson),), ratio=0.5)
    return out


@pytest.fixture(scope="module")
def recovered(source: Path, small: Path, lesson: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Distilled from `source`."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    return out, streamlap.recover(small, out, lesson, dense=source, **KNOBS)


def held_loss(folder: Path, lesson: Path) -> float:
    """Cross-entropy on held-out windows, by transformers alone."""
    tokens_NL = torch.from_numpy(np.load(lesson).astype(np.int64))
    tokens_NL = tokens_NL[list(held_sequences(*tokens_NL.shape))]
    with torch.no_grad():
        return float(AutoModelForCausalLM.from_pretrained(folder)(tokens_NL, labels=tokens_NL).loss)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_recovered_folder_loses_what_was_measured(small: Path, lesson: Path, tmp_path: Path) -> None:
    found = streamlap.recover(small, tmp_path / "out", lesson, **KNOBS | {"epochs": 8})
    assert found.kept
    assert found.after < found.before - 0.05
    assert not found.distilled
    assert found.before == pytest.approx(held_loss(small, lesson), abs=1e-5)
    assert found.after == pytest.approx(held_loss(tmp_path / "out", lesson), abs=1e-5)


def test_ranks_and_widths_stay(small: Path, recovered: tuple[Path, Any]) -> None:
    out, found = recovered
    sites = [[{key: table["layers"][index]["sites"][path][key] for key in ("kind", "shape", "rank", "width", "parameters")}
              for index in range(2) for path in table["layers"][index]["sites"]]
             for table in (streamlap.inspect(small), streamlap.inspect(out))]  # fmt: skip
    assert sites[0] == sites[1]
    assert streamlap.verify(out)["ok"]
    assert (out / "config.json").read_text() == (small / "config.json").read_text()
    assert json.loads((out / "streamlap_report.json").read_text())["recovery"] == found.to_json()
    assert f"{found.after:.4f} after" in (out / "README.md").read_text()
    changed = [name for name, data in weights(out).items() if data != weights(small)[name]]
    assert changed == ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]  # not the embeddings


def make_job(source: Path, small: Path, lesson: Path, **knobs: Any) -> RecoveryJob:
    tokens_NL, stream, recovery = (
        torch.from_numpy(np.load(lesson).astype(np.int64)),
        ModelStream(small),
        Recovery(**KNOBS | knobs),
    )
    return RecoveryJob(
        stream=stream, dense=None, teacher_fit=None, knobs=recovery, tokens_NL=tokens_NL, thrifty=False,
        needs=recovery_needs(stream, recovery, *tokens_NL.shape, distilled=False),
    )  # fmt: skip


def trained(job: RecoveryJob, steps: int = 3) -> Adapting:
    adapting = Adapting(job.stream, job.knobs, None, job.steps * job.knobs.epochs, job.thrifty)
    for step in range(steps):
        adapting.step(job.batch(step), job.tokens_NL)
    return adapting


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("float16", 0.02)])
def test_small_gradients_are_those_of_the_mean_loss(lesson: Path, tmp_path: Path, dtype: str, most: float) -> None:
    """The final norm makes them so small that float16 would lose a fifth of those of the mean."""
    model = random_pico("llama", num_hidden_layers=2)
    model.model.norm.weight.data.mul_(1e-4)
    model.save_pretrained(tmp_path)
    job = make_job(tmp_path, tmp_path, lesson)
    whole, other = (
        Adapting(ModelStream(tmp_path, dtype=name), job.knobs, None, 8, False) for name in ("float32", dtype)
    )
    torch.stack([whole._losses(number, job.tokens_NL).mean() for number in job.batch(0)]).mean().backward()
    other.step(job.batch(0), job.tokens_NL)
    for (name, wanted), found in zip(whole._parameters.items(), other._parameters.values(), strict=True):
        assert (found.grad - wanted.grad).norm() <= most * wanted.grad.norm(), name


def test_a_gradient_that_is_no_number_ends_the_run(
    source: Path, small: Path, lesson: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every adapter would be NaN from there on, and nothing gained."""
    monkeypatch.setattr(adapt, "prediction_losses", lambda *_: prediction_losses(*_) * math.inf)
    with pytest.raises(
        NumericalError, match=r"gradients of step 1 of 8 have the norm (nan|inf); wanted a number. Take dtype"
    ):
        trained(make_job(source, small, lesson))


def test_a_folder_that_transformers_saved_names_its_code_again(small: Path, lesson: Path, tmp_path: Path) -> None:
    streamlap.load(small).save_pretrained(tmp_path / "saved")
    assert streamlap.recover(tmp_path / "saved", tmp_path / "out", lesson, **KNOBS | {"epochs": 8}).kept
    saved, found, wanted = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "saved", tmp_path / "out", small)
    )
    assert "auto_map" not in saved
    assert found["auto_map"] == wanted["auto_map"]
    assert all((tmp_path / "out" / f"{name.partition('.')[0]}.py").is_file() for name in found["auto_map"].values())


def test_merging_changes_no_logit(source: Path, small: Path, lesson: Path) -> None:
    job = make_job(source, small, lesson)
    adapting, tokens_BL = trained(job), job.tokens_NL[:2]
    with torch.no_grad():
        start = adapting.model.eval()(tokens_BL).logits
        adapting.merge(adapting.adapters(), job.stream)
        assert not adapting.model(tokens_BL).logits.equal(start)
        assert adapting.model(tokens_BL).logits.sub(start).abs().max() < 1e-5


def test_layers_that_run_again_on_the_way_back_give_the_same(source: Path, small: Path, lesson: Path) -> None:
    job = make_job(source, small, lesson)
    plain, thrifty = (trained(replace(job, thrifty=value)).adapters() for value in (False, True))
    assert all(torch.equal(plain[name], thrifty[name]) for name in plain)


def test_every_window_is_seen_once_in_an_epoch(source: Path, small: Path, lesson: Path) -> None:
    job = make_job(source, small, lesson)
    epochs = [
        [number for step in range(job.steps) for number in job.batch(epoch * job.steps + step)] for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == job.train
    assert epochs[0] != epochs[1]
    assert not set(job.train) & set(job.held)


def test_the_divergence_is_that_of_all_words_where_all_are_kept() -> None:
    torch.manual_seed(0)
    dense_TV, log_TV = torch.randn(5, 40), torch.randn(5, 40).log_softmax(-1)
    whole_T = (dense_TV.softmax(-1) * (dense_TV.log_softmax(-1) - log_TV)).sum(-1)
    assert torch.allclose(divergence(Likely.of(dense_TV, 40), log_TV), whole_T, atol=2e-3)  # float16
    some_T = divergence(Likely.of(dense_TV, 8), log_TV)
    assert (some_T <= whole_T + 2e-3).all()
    assert (some_T > 0).all()
    assert torch.allclose(divergence(Likely.of(dense_TV, 8), dense_TV.log_softmax(-1)), torch.zeros(5), atol=2e-3)


def test_the_loss_is_cross_entropy_and_divergence_in_their_shares() -> None:
    torch.manual_seed(0)
    logits_TV, next_T, likely = torch.randn(5, 40), torch.arange(5), Likely.of(torch.randn(5, 40), 8)
    alone_T = torch.nn.functional.cross_entropy(logits_TV, next_T, reduction="none")
    towards_T = divergence(likely, logits_TV.log_softmax(-1))
    assert torch.allclose(prediction_losses(logits_TV, next_T, None, 0.3), alone_T)
    assert torch.allclose(prediction_losses(logits_TV, next_T, likely, 0.3), 0.7 * alone_T + 0.3 * towards_T)


def test_the_teacher_predicts_what_the_dense_model_predicts(source: Path, lesson: Path) -> None:
    tokens_NL = torch.from_numpy(np.load(lesson).astype(np.int64))[:3]
    model = AutoModelForCausalLM.from_pretrained(source)
    stream = ModelStream(source)
    with torch.no_grad():
        found = predictions(stream, [model.model.layers and behind_layers(model, tokens_NL)], 5)
        log_NLK, words_NLK = model(tokens_NL).logits.log_softmax(-1)[:, :-1].topk(5)
    assert torch.equal(found.words_NPK, words_NLK.to(torch.int32))
    assert torch.allclose(found.log_NPK.float(), log_NLK, atol=1e-2)


def behind_layers(model: Any, tokens_NL: torch.Tensor) -> torch.Tensor:
    """The hidden states that the final norm reads."""
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens_NL)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("where", ["teacher", "training", "shards"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    where: str, source: Path, small: Path, lesson: Path, recovered: tuple[Path, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, asked = tmp_path / "out", 0

    def due(stops: Stops, moved: bool = True) -> bool:
        nonlocal asked
        asked += 1
        return asked == {"teacher": 2, "training": 5}.get(where)

    with monkeypatch.context() as patch:
        patch.setattr(Stops, "due", due)
        error: type[BaseException] = Interrupted
        if where == "shards":
            patch.setattr("streamlap.pipeline.recover.finish_recovered", fail)
            error = OSError
        with pytest.raises(error):
            streamlap.recover(small, out, lesson, dense=source, **KNOBS)
    assert not (out / "config.json").exists()
    assert streamlap.resume(out) == recovered[1]
    assert weights(out) == weights(recovered[0])
    assert not (out / STATE_FOLDER).exists()


def fail(*_: Any) -> None:
    raise OSError("gone")


def test_what_gains_nothing_is_not_written(small: Path, lesson: Path, tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "out"
    command = ["recover", str(small), str(out), "--text", str(lesson), "--learning-rate", "1e-12", "--epochs", "1"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0
    assert "nothing is written" in result.stdout
    assert not out.exists()


def other_vocabulary(pico: MakeModel) -> dict[str, Any]:
    return {"dense": pico("qwen2", vocab_size=VOCABULARY + 1)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (other_vocabulary, RecipeError, "wanted the model that it was made of"),
        (lambda pico: {"rank": 0}, RecipeError, "rank is 0; wanted a whole number"),
        (lambda pico: {"learning_rate": 2.0}, RecipeError, "learning_rate is 2.0"),
        (lambda pico: {"speed": 1}, RecipeError, "no options 'speed'"),
        (lambda pico: {"samples": 1, "length": 16}, RecipeError, "wanted two"),
        (lambda pico: {"samples": 0}, RecipeError, "samples is 0; wanted"),
        (lambda pico: {"length": False}, RecipeError, "length is False; wanted"),
        (lambda pico: {"max_ram": "1MiB"}, BudgetError, "0.0 MiB are left"),
        (lambda pico: {"text": []}, RecipeError, r"text is \[\]; wanted a file, or a list of one or more"),
        (lambda pico: {"text": None}, RecipeError, r"text is None; wanted a file"),
        (lambda pico: {"speed": 1}, RecipeError, "wanted some of dense, samples, .*, rank, .*, max_ram, "),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(
    options: Callable[[MakeModel], dict[str, Any]], error: type[Exception], message: str, pico: MakeModel, small: Path,
    lesson: Path, tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        streamlap.recover(small, tmp_path / "out", **{"text": lesson, **options(pico)})
    assert not (tmp_path / "out").exists()


def test_the_cap_that_is_named_does(small: Path, lesson: Path, tmp_path: Path) -> None:
    """The process counts into it: a cap of less than that alone helps nobody."""
    with pytest.raises(BudgetError, match=r"the process \d.*Give --max-ram") as found:
        streamlap.recover(small, tmp_path / "out", lesson, max_ram="100MB", **KNOBS)
    cap = str(found.value).partition("--max-ram ")[2].partition(",")[0]
    assert streamlap.recover(small, tmp_path / "out", lesson, max_ram=cap, **KNOBS).kept


def test_other_knobs_are_another_run(
    small: Path, lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adapt, "train_adapters", fail)
        patch.setattr("streamlap.pipeline.recover.train_adapters", fail)
        with pytest.raises(OSError, match="gone"):
            streamlap.recover(small, tmp_path / "out", lesson, **KNOBS)
    with pytest.raises(ResumeMismatch, match="rank"):
        streamlap.recover(small, tmp_path / "out", lesson, **KNOBS | {"rank": 4})


def test_the_needs_are_those_of_what_is_held(source: Path, small: Path, lesson: Path) -> None:
    job = make_job(source, small, lesson)
    needs = recovery_needs(job.stream, job.knobs, 16, 16, distilled=True)
    adapting = Adapting(job.stream, job.knobs, None, 1, thrifty=False)
    numbers = sum(tensor.numel() for tensor in adapting.adapters().values())
    assert needs.adapters == 20 * numbers
    trained_numbers = sum(tensor.numel() for tensor in adapting.model.parameters() if tensor.requires_grad)
    assert trained_numbers == numbers, "nothing else has a gradient, not the embeddings or the head either"
    stored = {name: tensor for name, tensor in adapting.model.state_dict().items() if "lora" not in name}
    assert needs.model == sum(tensor.numel() * 4 for tensor in stored.values())
    assert needs.teacher == 16 * 15 * 8 * 6


def test_a_nas_folder_stays_one(pico: MakeModel, lesson: Path, tmp_path: Path) -> None:
    streamlap.compress(
        pico("llama", tokenizer=True), tmp_path / "nas", files=(str(lesson),), ratio=0.3, format="nas", multiple=4
    )
    found = streamlap.recover(tmp_path / "nas", tmp_path / "out", lesson, **KNOBS)
    assert found.kept
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "nemotron-nas"
    assert found.after == pytest.approx(held_loss(tmp_path / "out", lesson), abs=1e-5)
    assert streamlap.verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize(("family", "settings"), [("mistral", {"sliding_window": None}), ("qwen2", {})])
def test_a_nas_folder_has_the_teacher_that_it_was_made_of(
    pico: MakeModel, lesson: Path, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    source, nas = pico(family, tokenizer=True, num_hidden_layers=2, **settings), tmp_path / "nas"
    streamlap.compress(source, nas, files=(str(lesson),), ratio=0.3, format="nas", multiple=4)
    found = streamlap.recover(nas, tmp_path / "out", lesson, dense=source, **KNOBS)
    assert found.kept
    assert found.distilled
    with pytest.raises(RecipeError, match=r"is a qwen3 .* a llama or mistral or qwen2 with 300"):
        streamlap.recover(nas, tmp_path / "other", lesson, dense=pico("qwen3", num_hidden_layers=2), **KNOBS)


def test_a_folder_without_a_sign_of_streamlap_gets_one(pico: MakeModel, lesson: Path, tmp_path: Path) -> None:
    """A card, by which people know it, and a report, by which `compress --overwrite` does."""
    source, out = pico("llama", tokenizer=True, num_hidden_layers=2), tmp_path / "out"
    assert streamlap.recover(source, out, lesson, **KNOBS).kept
    card = (out / "README.md").read_text()
    assert f"# {source.name}, recovered by streamlap\n" in card
    assert "Recovered by LoRA of rank 3 on " in card
    assert " tokens, 2 epochs, towards the text; merged" in card
    with pytest.raises(RecipeError, match="holds a finished model"):
        streamlap.compress(source, out, files=(str(lesson),))
    (out / "notes.txt").write_text("mine")
    streamlap.compress(source, out, files=(str(lesson),), overwrite=True)
    assert ", compressed by streamlap\n" in (out / "README.md").read_text()
    assert (out / "notes.txt").read_text() == "mine"


def test_a_stranger_s_card_and_code_are_not_taken_over(pico: MakeModel, lesson: Path, tmp_path: Path) -> None:
    source, out = shutil.copytree(pico("llama", num_hidden_layers=2), tmp_path / "tune"), tmp_path / "out"
    edit_config(source, auto_map={"AutoConfig": "own.Config"})
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\nx: y\n---\n# Mine\n<script>\n")
    assert streamlap.recover(source, out, lesson, **KNOBS).kept
    card = (out / "README.md").read_text()
    assert card.startswith(bare_card("tune", {"license": "mit"}) + "\n\nRecovered by LoRA")
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


@pytest.mark.parametrize("report", ["{}", "[", '{"recovery": {}'])
def test_a_report_of_something_else_is_no_result(pico: MakeModel, lesson: Path, tmp_path: Path, report: str) -> None:
    (tmp_path / "streamlap_report.json").write_text(report)
    with pytest.raises(RecipeError, match="holds no result of compress or recover to replace"):
        streamlap.compress(pico("llama"), tmp_path, files=(str(lesson),), overwrite=True)


def test_adapters_are_float32_and_no_forward_is_random(pico: MakeModel, lesson: Path) -> None:
    source = pico("opt", dropout=0.3, attention_dropout=0.2, layerdrop=0.5)
    job = make_job(source, source, lesson)
    job = replace(job, stream=ModelStream(source, dtype="bfloat16"))
    adapters = [trained(job, 2).adapters() for _ in range(2)]
    assert {tensor.dtype for tensor in adapters[0].values()} == {torch.float32}
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_rows_of_ids_are_windows_and_other_ids_are_cut(small: Path, lesson: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat.npy"
    np.save(flat, np.load(lesson).reshape(-1))
    assert streamlap.recover(small, tmp_path / "rows", lesson, samples=8, **KNOBS).held_tokens == 16
    assert streamlap.recover(small, tmp_path / "flat", flat, length=32, **KNOBS).held_tokens == 32
