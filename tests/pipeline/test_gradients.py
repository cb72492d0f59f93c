"""The streamed gradient of the dense model's loss: that it is the whole model's, and that a run killed in it goes on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from crashes import dies_at, keep_on_disk
from outputs import STATE, contents
from transformers import AutoModel, AutoModelForCausalLM

import streamlap
from streamlap.errors import Interrupted, RecipeError
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.loader.forms import Dense
from streamlap.methods.trained.groups import LINES
from streamlap.methods.trained.loraprune import LoraPrune, Pruning
from streamlap.pipeline import compress as compressing
from streamlap.pipeline import gradients
from streamlap.pipeline.gradients import pulled, window_gradient
from streamlap.planning.decide import decide
from streamlap.recipe import Recipe
from streamlap.store.hidden import HiddenBank

WINDOWS, LENGTH, WIDTH = 12, 16, 32
KNOBS = LoraPrune(epochs=1, rank=4, every=2, noise=0.0, importance="model")
RECIPE = Recipe(ratio=0.5, methods=(KNOBS,), preset="custom", dtype="float32")

Prune = Callable[[Path], streamlap.Report]


@pytest.fixture(scope="module")
def source(pico: MakeModel) -> Path:
    return pico("llama")


@pytest.fixture(scope="module")
def prune(source: Path, tokens: Path) -> Prune:
    return lambda out: streamlap.compress(source, out, RECIPE, files=(str(tokens),))


@pytest.fixture(scope="module")
def unbroken(prune: Prune, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gradients") / "out"
    prune(out)
    return contents(out)


# --- what it is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_it_is_that_of_the_whole_model(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool
) -> None:
    """Behind every layer, as autograd has it; and what is pruned by it is a model."""
    source, out = pico(family, tied=tied), tmp_path / "out"
    dies_at(
        compressing, "compress_layers", monkeypatch,
        lambda: streamlap.compress(source, out, RECIPE, files=(str(tokens),)),
    )  # fmt: skip
    tokens_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda _, __, y, index=index: kept(found, index, y))
    loss = model(tokens_NL, labels=tokens_NL).loss
    for index, wanted_NLD in enumerate(torch.autograd.grad(loss, list(found.values()))):
        file = out / STATE / "hidden" / f"gradient-{index + 1:05d}.bin"
        seen_NLD = torch.from_numpy(np.fromfile(file, dtype=np.float32)).view(WINDOWS, LENGTH, WIDTH)
        mean_NLD = seen_NLD / (WINDOWS * (LENGTH - 1))
        assert float((mean_NLD - wanted_NLD).norm()) < 1e-5 * float(wanted_NLD.norm()), index
    assert not list((out / STATE / "hidden").glob("input-*"))
    streamlap.resume(out)
    assert streamlap.verify(out)["ok"]
    assert not (out / STATE).exists()


def kept(found: dict[int, torch.Tensor], index: int, y: torch.Tensor) -> None:
    found[index] = y


def test_tokens_that_are_out_count_for_nothing(source: Path) -> None:
    """Neither their own predictions, nor what others would tell them."""
    stream = ModelStream(source, dtype="float32")
    layer = stream.layer(1, stream.layer_kwargs(LENGTH)[1])
    torch.manual_seed(0)
    x_BLD, g_BLD = torch.randn(2, 1, LENGTH, WIDTH).unbind()
    x_BLD[0, -1] = g_BLD[0, -1] = torch.nan  # nothing looks at the last token
    values = {name: tensor.float() for name, tensor in layer.module.named_parameters()}
    made_BLD = pulled(layer, values, x_BLD, g_BLD)
    shorter = stream.layer(1, stream.layer_kwargs(LENGTH - 1)[1])
    wanted_BLD = pulled(shorter, values, x_BLD[:, :-1], g_BLD[:, :-1])
    assert torch.allclose(made_BLD[:, :-1], wanted_BLD, atol=1e-6)
    assert made_BLD[:, -1].isnan().all()
    tokens_L = torch.arange(LENGTH)
    row_LD = window_gradient(stream.head(), x_BLD[0].roll(3, dims=0), tokens_L)
    assert row_LD.isnan().any(dim=-1).tolist() == [place == 2 for place in range(LENGTH)]
    assert (row_LD[-1] == 0).all()


# --- what goes by it -----------------------------------------------------------------------------------------------------


def pruning(layer: StreamLayer, index: int) -> Pruning:
    """The training of a layer that loses half of its groups."""
    layout = {
        role: Dense((shape[0] // 2, shape[1]) if LINES[role] == 0 else (shape[0], shape[1] // 2), bias=False)
        for role, shape in ((role, layer.native(role).shape) for role in layer.family.roles)
    }
    return KNOBS.start(layer, index, layout, lambda _: pytest.fail("nothing is fitted"), steps=4)


def test_the_first_layer_needs_no_noise(source: Path) -> None:
    stream = ModelStream(source, dtype="float32")
    layer = stream.layer(0, stream.layer_kwargs(LENGTH)[0])
    x_BLD = next(stream.embed(torch.randint(stream.vocabulary, (1, LENGTH))))
    taught = x_BLD, layer(x_BLD), x_BLD
    training = pruning(layer, 0)
    training.begin(training.measure([(*taught, x_BLD)]))
    training.step(0, (*taught, torch.randn_like(x_BLD)))
    assert all(len(scores_G.unique()) > 1 for scores_G in training.scores.values())
    before = {name: scores_G.clone() for name, scores_G in training.scores.items()}
    training.step(1, (*taught, torch.zeros_like(x_BLD)))  # of which one learns nothing
    for name, scores_G in training.scores.items():
        torch.testing.assert_close(scores_G, KNOBS.smoothing * before[name])


def test_importance_is_the_first_order_change_of_the_models_loss(source: Path) -> None:
    """g_A and g_B that importance is made of, against those of the loss of the whole model with the adapters in it."""
    stream = ModelStream(source, dtype="float32")
    last = stream.depth - 1
    layer, head = stream.layer(last, stream.layer_kwargs(LENGTH)[last]), stream.head()
    torch.manual_seed(0)
    x_BLD, tokens_L = torch.randn(1, LENGTH, WIDTH), torch.randint(stream.vocabulary, (LENGTH,))
    training = pruning(layer, last)
    gradient_BLD = window_gradient(head, layer(x_BLD)[0], tokens_L)[None]
    found: list[torch.Tensor] = []
    training._observe = lambda: found.extend(a.gradient.b_OR.clone() for a in training.adapted.adapters.values())  # type: ignore[method-assign]
    training.begin(1.0)
    training.step(0, (x_BLD, x_BLD, x_BLD, gradient_BLD))
    fresh = pruning(layer, last)
    logits_TV = head(fresh.adapted(x_BLD)[0, :-1])
    torch.nn.functional.cross_entropy(logits_TV, tokens_L[1:]).backward()  # type: ignore[no-untyped-call]
    for seen_OR, adapter in zip(found, fresh.adapted.adapters.values(), strict=True):
        assert torch.allclose(seen_OR, adapter.gradient.b_OR, rtol=1e-4, atol=1e-7)


# --- a run that dies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["forward", "head", "back", "layer"])
def test_a_run_that_dies_goes_on_to_the_same_bytes(
    prune: Prune, unbroken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """With hidden states on the disk, and no thread beside the loop, where the unbroken run had them in memory."""
    out, write, seen = tmp_path / "out", HiddenBank.write, list[str]()
    dies = {"forward": "input 2", "head": "gradient 3", "back": "gradient 1", "layer": "hidden 2"}[at]

    def watched(bank: HiddenBank, generation: int, *rest: Any) -> None:
        seen.append(f"{bank._name} {generation}")
        if seen[-1] == dies and not killed:
            killed.append(1)
            raise ZeroDivisionError
        write(bank, generation, *rest)

    killed: list[int] = []
    keep_on_disk(monkeypatch)
    monkeypatch.setattr(HiddenBank, "write", watched)
    with pytest.raises(ZeroDivisionError):
        prune(out)
    before = seen[:-1]
    seen.clear()
    streamlap.resume(out)
    again = {name for name in seen if name in before and name.split()[0] in ("input", "gradient")}
    assert not again, "what was done is not done again"
    assert contents(out) == unbroken


def test_it_stops_on_both_ways_where_it_is_asked_to(
    prune: Prune, unbroken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, stop = tmp_path / "out", gradients.Sweeps.stop
    for way in ("layer 1 of 3 of the dense model", "layer 1 of 3 on the way back"):

        def asked(sweeps: gradients.Sweeps, index: int, where: str, moved: bool, way: str = way) -> None:
            if way.endswith(where) and index == 1:
                sweeps.session.stops.asked.append(signal.SIGTERM)
            stop(sweeps, index, where, moved)

        with monkeypatch.context() as patch:
            patch.setattr(gradients.Sweeps, "stop", asked)
            with pytest.raises(Interrupted, match=f"stopped at {way}, before the first one is compressed; go on with"):
                prune(out)
    prune(out)
    assert contents(out) == unbroken


def test_what_another_run_has_left_is_not_taken_up(
    source: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is gone, and what it had in the working folder is still there."""
    out, work = tmp_path / "out", tmp_path / "work"
    np.save(tmp_path / "others.npy", np.load(tokens)[::-1])

    def prune(out: Path, file: Path) -> streamlap.Report:
        return streamlap.compress(source, out, RECIPE, files=(str(file),), work=work)

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "pull_layer", lambda *rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(out, tmp_path / "others.npy")
    assert list(work.rglob("*.bin"))
    shutil.rmtree(out)
    prune(out, tokens)
    prune(tmp_path / "clean", tokens)
    assert contents(out) == contents(tmp_path / "clean")


# --- before the run ------------------------------------------------------------------------------------------------------


def test_the_plan_counts_it(source: Path, tokens: Path) -> None:
    model, block = (
        streamlap.plan(source, RECIPE.override(methods=(LoraPrune(epochs=1, importance=name),)), files=(str(tokens),))
        for name in ("model", "block")
    )
    assert model.disk_bytes - block.disk_bytes == 3 * model.generation_bytes
    assert model.first_flops > 3 * 2 * sum(3 * 32 * 48 for _ in model.layers) * WINDOWS * LENGTH
    assert model.flops > 1.5 * block.flops
    assert model.read_bytes > block.read_bytes + sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert model.write_bytes == block.write_bytes + 7 * model.generation_bytes
    assert model.fit.schedule.ram["head"]["head"] >= 300 * 15 * 4 * 8
    assert model.seconds_low > block.seconds_low


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"importance": "whole"}, "loraprune: importance is 'whole'; wanted one of block, model"),
        (
            {"importance": "model", "metric": "random"},
            "importance is model and metric random, which asks for no gradient",
        ),
    ],
)
def test_knobs_that_mean_nothing_are_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        LoraPrune(**knobs)


def test_a_model_without_a_head_has_no_such_loss(pico: MakeModel, tmp_path: Path) -> None:
    AutoModel.from_pretrained(pico("mistral")).save_pretrained(tmp_path / "source")
    with pytest.raises(RecipeError, match=r"importance is model, and .* has no language-model head"):
        decide(ModelStream(tmp_path / "source"), RECIPE)


# --- what it takes -------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from streamlap.families.stream import ModelStream
from streamlap.methods.trained.loraprune import LoraPrune
from streamlap.pipeline.gradients import pulled_batches, window_gradient
from streamlap.planning.decide import decide
from streamlap.planning.plan import make_plan
from streamlap.recipe import Recipe
from streamlap.settings import RunSettings
from streamlap.system.allocator import steady_heap
from streamlap.system.meters import peak_ram_bytes, ram_bytes, reset_peaks

torch.set_num_threads(1)
steady_heap()
stream = ModelStream(Path(sys.argv[1]), dtype=sys.argv[2])
recipe = Recipe(ratio=0.5, methods=(LoraPrune(importance="model"),), preset="custom", dtype=sys.argv[2])
work = make_plan(stream, decide(stream, recipe), (2, 1024), RunSettings(device="cpu")).fit.work
x_BLD, g_BLD = torch.randn(2, 1, 1024, 512, dtype=stream.dtype).unbind()
tokens_L = torch.arange(1024)

def head():
    window_gradient(stream.head(), x_BLD[0], tokens_L)

def back(layer=stream.layer(1, stream.layer_kwargs(1024)[1])):
    list(pulled_batches(layer, [(x_BLD, g_BLD)]))

for run, counted in ((head, work.head), (back, sum(work.refinement.values()))):
    for _ in range(2):  # the first time libraries set themselves up
        reset_peaks()
        before = ram_bytes()
        run()
        seen = peak_ram_bytes() - before
    print(counted, seen)
"""


@pytest.mark.nightly
@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gemma2", "float32")])
def test_what_is_counted_is_enough_for_a_medium_layer_and_its_head(pico: MakeModel, family: str, dtype: str) -> None:
    medium = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}
    settings = (
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]} if family == "gemma2" else {}
    )
    source = pico(
        family, dtype=torch.bfloat16, head_dim=64, max_position_embeddings=1024, vocab_size=32_000,
        **{"num_hidden_layers": 2, **settings}, **medium,
    )  # fmt: skip
    command = [sys.executable, "-c", MEASURE, str(source), dtype]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    head, back = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert 0.5 * head[0] <= head[1] <= head[0], head
    assert 8 << 20 < back[1] <= back[0], back
