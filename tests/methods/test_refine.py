"""Refinement: the layer never ends above its start, what was trained is what is saved, and a run that dies goes on."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from faults import Crash
from outputs import STATE, contents
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import RecipeError, ResumeMismatch
from streamlap.families.stream import ModelStream
from streamlap.methods.trained.refine import Refine, Refining
from streamlap.methods.trained.steps import distances
from streamlap.pipeline import train as training_loop
from streamlap.planning.decide import decide
from streamlap.planning.forecast import compression_workload, forecast_layers, forward_flops
from streamlap.planning.schedule import make_schedule
from streamlap.recipe import Recipe
from streamlap.store.sink import ShardFolder

EPOCHS = 3
SHAPE_NL = (12, 16)

Compress = Callable[..., streamlap.Report]


@pytest.fixture(scope="module")
def source(pico: MakeModel) -> Path:
    return pico("qwen3", dtype=torch.bfloat16, tokenizer=True, num_hidden_layers=2)


@pytest.fixture(scope="module")
def compress(source: Path, tokens: Path) -> Compress:
    def run(out: Path, **changes: Any) -> streamlap.Report:
        settings = {"ratio": 0.4, "dtype": "float32", "files": (str(tokens),), "refine": EPOCHS, "redraw": False}
        return streamlap.compress(source, out, **(settings | changes))

    return run


@pytest.fixture(scope="module")
def refined(compress: Compress, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, streamlap.Report]:
    out = tmp_path_factory.mktemp("refined") / "out"
    return out, compress(out)


@pytest.fixture(scope="module")
def plain(compress: Compress, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    compress(out, refine=0)
    return out


def shards(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the decoder layers."""
    return {name: tensor for path in sorted(out.glob("model-*"))[1:] for name, tensor in load_file(path).items()}


# --- what comes out ------------------------------------------------------------------------------------------------------


def test_every_layer_ends_below_its_start(refined: tuple[Path, streamlap.Report]) -> None:
    for layer in refined[1].layers:
        assert layer.refinement is not None
        assert 0 < layer.refinement["best"] < layer.refinement["start"] < 1
        assert layer.refinement["epochs"] == EPOCHS


def test_what_is_reported_is_what_a_loaded_model_does(
    refined: tuple[Path, streamlap.Report], source: Path, tokens: Path
) -> None:
    """The loss of layer 0 on the sequence that was held out, from both models as transformers runs them."""
    held_BL = torch.from_numpy(np.load(tokens).astype(np.int64))[7:8]
    with torch.no_grad():
        states = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(held_BL, output_hidden_states=True)
            for path in (source, refined[0])
        ]
    dense, compressed = (found.hidden_states for found in states)
    loss = distances(dense[1], compressed[1]).sum() / distances(dense[1], compressed[0]).sum()
    assert refined[1].layers[0].refinement["best"] == pytest.approx(float(loss), rel=1e-4)  # type: ignore[index]


def test_a_refined_model_is_whole(refined: tuple[Path, streamlap.Report], tokens: Path) -> None:
    assert streamlap.verify(refined[0])["ok"]
    assert math.isfinite(streamlap.evaluate(refined[0], [str(tokens)]).perplexity)
    assert not (refined[0] / STATE).exists()


def test_everything_but_whole_numbers_is_refined(refined: tuple[Path, streamlap.Report], plain: Path) -> None:
    before, after = shards(plain), shards(refined[0])
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    first = {name for name in before if ".layers.0." in name}
    assert {name for name in first if before[name].is_floating_point()} == changed & first
    assert any(not before[name].is_floating_point() for name in first), "an order was there to be left alone"


def test_no_epochs_is_no_refinement(
    compress: Compress, plain: Path, source: Path, tokens: Path, tmp_path: Path
) -> None:
    streamlap.compress(source, tmp_path / "out", ratio=0.4, dtype="float32", files=(str(tokens),), redraw=False)
    assert contents(tmp_path / "out") == contents(plain)


@pytest.mark.parametrize("rate", [0.0, 1e6])
def test_a_layer_that_does_not_gain_stays_as_it_was(
    compress: Compress, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    monkeypatch.setattr(Refine, "rate", lambda *_: rate)
    report = compress(tmp_path / "out", refine=2)
    assert all(layer.refinement["best"] == layer.refinement["start"] for layer in report.layers)  # type: ignore[index]
    before, after = shards(plain), shards(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_neither_caps_nor_overlap_move_a_bit(
    compress: Compress, refined: tuple[Path, streamlap.Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "streamlap.planning.schedule.schedules", lambda work, _: iter([make_schedule(work, False, "disk", 4)])
    )
    compress(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(refined[0])


# --- death between epochs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_a_run_that_dies_goes_on_with_the_next_epoch(
    compress: Compress,
    refined: tuple[Path, streamlap.Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layer: int,
) -> None:
    write, train, begun = ShardFolder.write, training_loop.train_epoch, []

    def die(folder: ShardFolder, shard: str, tensors: Any) -> str:
        digest = write(folder, shard, tensors)
        if shard == f"refine-{layer:05d}.safetensors" and len(tensors["held"]) == 3:
            raise Crash
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "write", die)
        with pytest.raises(Crash):
            compress(tmp_path / "out")

    def count(training: Any, lessons: training_loop.Lessons, take: Any, epochs: int) -> None:
        assert epochs == EPOCHS
        begun.append((lessons.hand.index, training.epoch))
        train(training, lessons, take, epochs)

    monkeypatch.setattr(training_loop, "train_epoch", count)
    assert (tmp_path / "out" / STATE / f"refine-{layer:05d}.safetensors").is_file()
    streamlap.resume(tmp_path / "out")
    assert begun == [(layer, 2)] + [(later, epoch) for later in range(layer + 1, 2) for epoch in range(EPOCHS)]
    assert contents(tmp_path / "out") == contents(refined[0])


def test_a_damaged_state_is_left_aside(
    compress: Compress, refined: tuple[Path, streamlap.Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardFolder.write

    def die(folder: ShardFolder, shard: str, tensors: Any) -> str:
        digest = write(folder, shard, tensors)
        if shard.startswith("refine"):
            raise Crash
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "write", die)
        with pytest.raises(Crash):
            compress(tmp_path / "out")
    path = tmp_path / "out" / STATE / "refine-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(refined[0])


def test_other_epochs_are_another_run(compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "train_epoch", die)
        with pytest.raises(Crash):
            compress(tmp_path / "out")
    with pytest.raises(
        ResumeMismatch, match=r"recipe methods: the folder has .*'epochs': 3.*, this run has .*'epochs': 4"
    ):
        compress(tmp_path / "out", refine=4)


# --- what it takes -------------------------------------------------------------------------------------------------------


def test_a_plan_counts_memory_operations_and_bytes(source: Path) -> None:
    stream = ModelStream(source, dtype="float32")
    recipes = [Recipe(ratio=0.4, dtype="float32").override(refine=epochs) for epochs in (0, EPOCHS)]
    without, within = (
        forecast_layers(stream, recipe, decide(stream, recipe).candidates, SHAPE_NL, 1) for recipe in recipes
    )
    before, after = (compression_workload(stream, layers, SHAPE_NL) for layers in (without, within))
    layer = {name: tensor for name, tensor in stream.layer_tensors(0).items() if tensor.dtype.is_floating_point}
    assert 0 < after.trained < sum(tensor.numel for tensor in layer.values())
    assert (before.trained, before.refinement, before.trained_state) == (0, {}, 0)
    assert after.refinement["refinement"] == 16 * after.trained
    assert after.edits == within[0].edits_bytes > without[0].edits_bytes, "what was copied is now made"
    assert within[0].copied_bytes == 0
    assert within[0].trained == after.trained
    assert after.disk_bytes - before.disk_bytes == 2 * (12 * after.trained + after.edits)
    schedule = make_schedule(after, False, "ram", 4)
    assert schedule.ram["refine"] == after.refinement
    forward = forward_flops(stream.natives(1), within[1].trained, SHAPE_NL)
    for refined, plain in zip(within, without, strict=True):
        again = refined.flops - plain.flops - 3 * EPOCHS * forward
        assert 0 < again < forward / 2, "through the attention that is trained too, to the next layer or to the head"
    assert within[0].state_bytes == EPOCHS * (12 * after.trained + after.edits)


def test_the_command_line_plans_it(source: Path, tokens: Path) -> None:
    plans = [streamlap.plan(source, ratio=0.4, files=(str(tokens),), refine=epochs) for epochs in (0, EPOCHS)]
    assert plans[1].flops > plans[0].flops
    assert plans[1].write_bytes > plans[0].write_bytes
    assert plans[1].disk_bytes > plans[0].disk_bytes


MEASURE = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from streamlap.families.stream import ModelStream
from streamlap.system.allocator import steady_heap
from streamlap.system.meters import peak_ram_bytes, ram_bytes, reset_peaks
from streamlap.methods.trained.refine import Refine
from streamlap.planning.workload import evaluation_workload

torch.set_num_threads(1)
steady_heap()
stream = ModelStream(Path(sys.argv[1]), dtype="float32")
layer = stream.layer(0, stream.layer_kwargs(1024)[0])
pair = torch.randn(1, 1024, 1024), torch.randn(1, 1024, 1024)
for _ in range(2):  # the first time libraries set themselves up
    reset_peaks()
    before = ram_bytes()
    training = Refine(epochs=2).start(layer.stored_parameters(), layer.with_parameters, 1)
    training.held.append(1e9)
    for _ in range(2):
        training.step(0, pair)
        training.close_epoch(training.measure([pair]))
    seen = peak_ram_bytes() - before
    parameters = sum(master.numel() for master in training.masters.values())
    del training
sizes = {"trained": parameters, "trained_bytes": 16 * parameters, "trained_state": 12 * parameters, "edits": 2 * parameters}
work = replace(evaluation_workload(stream, 1, 1024), **sizes)
print(sum(work.refinement.values()) - work.edits, seen)
"""


@pytest.mark.nightly
def test_what_is_counted_is_what_a_medium_layer_takes(pico: MakeModel) -> None:
    medium = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    settings = {"num_hidden_layers": 1, "head_dim": 64, "max_position_embeddings": 1024}
    source = pico("llama", dtype=torch.bfloat16, **settings, **medium)
    command = [sys.executable, "-c", MEASURE, str(source)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    counted, seen = map(int, done.stdout.split())
    assert seen > 128 << 20
    assert 0.95 * seen <= counted <= 1.4 * seen, (counted, seen)


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_only_what_is_rebuilt_beside_the_dense_model_is_refined() -> None:
    with pytest.raises(RecipeError, match="methods have refine, and preset lorap"):
        Recipe().override(refine=2).override(preset="lorap")


@pytest.mark.parametrize("epochs", [-1, 1.0, 0.0, True, False, None, 10**5])
def test_epochs_are_a_whole_number(epochs: object) -> None:
    with pytest.raises(RecipeError, match=f"refine: epochs is {epochs!r}; wanted a whole number of epochs"):
        Recipe.from_dict({"refine": epochs})
    with pytest.raises(RecipeError, match=f"refine: epochs is {epochs!r}; wanted a whole number"):
        Recipe.from_dict({"preset": "best", "methods": [{"method": "refine", "epochs": epochs}]})


@pytest.mark.parametrize("name", ["learning_rate", "warm_up", "patience"])
@pytest.mark.parametrize("value", [0, -0.1, 1.5, True, math.nan])
def test_shares_are_above_nothing_and_at_most_all(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"refine: {name} is {value!r}; wanted a number"):
        Refine(**{name: value})


# --- the training alone --------------------------------------------------------------------------------------------------


def toy(knobs: Refine, steps: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Refining, torch.Tensor, torch.Tensor]:
    """A layer of one matrix, its inputs and a target that it can reach."""
    torch.manual_seed(0)
    w_DD, x_BLD = torch.randn(6, 6), torch.randn(2, 9, 6)
    start = (w_DD + 0.2 * torch.randn(6, 6)).to(dtype)
    training = Refining(knobs, [("w", start)], lambda values, x: x @ values["w"], steps)
    return training, x_BLD, x_BLD @ w_DD


def test_the_first_token_does_not_count() -> None:
    training, x_BLD, target_BLD = toy(Refine(epochs=1), 1)
    loss = training.measure([(x_BLD, target_BLD)])
    target_BLD[:, 0] *= 1000
    assert training.measure([(x_BLD, target_BLD)]) == loss
    target_BLD[:, 1] *= 1000
    assert training.measure([(x_BLD, target_BLD)]) != loss


def test_a_token_counts_by_its_share_of_the_stream() -> None:
    _, x_BLD, target_BLD = toy(Refine(epochs=1), 1)
    scale_BL1 = torch.logspace(-2, 2, 9)[None, :, None]
    assert torch.allclose(distances(target_BLD, x_BLD), distances(target_BLD * scale_BL1, x_BLD * scale_BL1))


def test_the_loss_is_that_of_the_rounded_numbers_and_the_best_is_kept() -> None:
    training, x_BLD, target_BLD = toy(Refine(epochs=40, patience=1.0), 1)
    pair = (x_BLD, target_BLD)
    training.held.append(training.measure([pair]))
    while not training.ends:
        training.step(0, pair)
        training.close_epoch(training.measure([pair]))
    kept = training.best["w"]
    assert kept.dtype == torch.bfloat16
    found = distances(target_BLD, x_BLD @ kept.float()).sum() / distances(target_BLD, x_BLD).sum()
    assert min(training.held) == pytest.approx(float(found), rel=1e-6)
    assert min(training.held) < 0.5 * training.held[0]


def test_it_ends_when_nothing_is_gained_for_long() -> None:
    training, *_ = toy(Refine(epochs=40, patience=0.1), 1)
    training.held = [0.3]
    for loss in (0.4, 0.6, 0.4, 0.5):
        training.close_epoch(loss)
        assert not training.ends
    training.close_epoch(0.41)
    assert training.ends
    assert not training.best, "nothing was better than the start"
    training.held = [0.5, math.nan]
    assert training.ends


def test_a_state_goes_on_bit_by_bit_and_only_from_its_own_start() -> None:
    knobs = Refine(epochs=4)
    (whole, x_BLD, target_BLD), (later, *_), (other, *_) = (toy(knobs, 2) for _ in range(3))
    whole.held = [whole.measure([(x_BLD, target_BLD)])]
    later.held, other.held = [later.measure([(x_BLD, target_BLD)])], [0.123]
    for epoch in range(4):
        if epoch == 2:
            state = {name: tensor.clone() for name, tensor in whole.state().items()}
            later.load(state)
            other.load(state)
        for training in (whole, later)[: 1 + (epoch >= 2)]:
            for step in range(2):
                training.step(step, (x_BLD, target_BLD))
            training.close_epoch(training.measure([(x_BLD, target_BLD)]))
    assert later.held == whole.held
    assert torch.equal(later.best["w"], whole.best["w"])
    assert other.held == [0.123]


def test_the_rate_rises_and_falls() -> None:
    knobs = Refine(epochs=1, learning_rate=0.5, warm_up=0.25)
    rates = [knobs.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.5 / 25)
    assert max(rates) == rates[25] == 0.5
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert 0 < rates[-1] < 0.0025


def test_every_sequence_once_an_epoch_and_never_twice_in_one_order() -> None:
    (training, *_), (again, *_), numbers = toy(Refine(epochs=3), 1), toy(Refine(epochs=3), 1), list(range(40, 60))
    orders = []
    for epoch in range(3):
        training.held = again.held = [0.1] * (epoch + 1)
        orders += [tuple(training.order(layer, numbers)) for layer in range(2)]
    assert all(sorted(order) == numbers for order in orders)
    assert len(set(orders)) == 6
    assert tuple(again.order(1, numbers)) == orders[-1]
