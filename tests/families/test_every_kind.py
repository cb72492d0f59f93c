"""Each kind of model that is served, through all that is done with one: what comes out is whole, and opens everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from crashes import crash_after, keep_on_disk
from outputs import contents
from outside import run_outside
from picos import EVERY_KIND, random_pico
from safetensors.torch import load_file

import streamlap
from streamlap.families.stream import ModelStream
from streamlap.methods.trained.loraprune import LoraPrune
from streamlap.methods.trained.pclora import PcLora
from streamlap.output.folder import loader_of

Best = Callable[[Path], streamlap.Report]
RATIO = 0.3
TRAINED = {"loraprune": LoraPrune(epochs=1, rank=4, every=2), "pclora": PcLora(epochs=1)}


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids [12, 16] as .npy, none of which stands for an image; each is three more than the one before."""
    path = tmp_path_factory.mktemp("lesson") / "lesson.npy"
    np.save(path, (np.random.default_rng(0).integers(0, 290, (12, 1)) + 3 * np.arange(16)) % 290)
    return path


@pytest.fixture(scope="module", params=EVERY_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    """One after another: all tests of a kind share what was made for it."""
    return str(request.param)


@pytest.fixture(scope="module")
def source(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pico model; do not change it."""
    return make_source(kind, tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def best(source: Path, lesson: Path, tmp_path_factory: pytest.TempPathFactory) -> Best:
    """best(out): shares by a survey, each layer rebuilt, and trained once that is done."""
    survey = tmp_path_factory.mktemp("survey") / "survey.json"
    streamlap.survey(source, survey, files=(str(lesson),))
    return lambda out: streamlap.compress(
        source, out, ratio=RATIO, preset="best", survey=str(survey), refine=1, files=(str(lesson),)
    )


@pytest.fixture(scope="module")
def result(best: Best, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What that makes of it; do not change it."""
    out = tmp_path_factory.mktemp("result") / "out"
    best(out)
    return out


def make_source(kind: str, folder: Path) -> Path:
    random_pico(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def opened(folder: Path) -> Any:
    return streamlap.load(folder, dtype=torch.float32).eval()


def ids(lesson: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(lesson))


@torch.no_grad()
def nll(folder: Path, lesson: Path) -> float:
    """As transformers has it, of the model that the folder opens as."""
    logits_NLV = opened(folder)(input_ids=ids(lesson)).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_NLV.flatten(0, 1), ids(lesson)[:, 1:].flatten()).item()


def check(folder: Path, lesson: Path) -> None:
    """It is whole, and its loss by layers is that of the model that transformers opens."""
    assert streamlap.verify(folder) == {"ok": True, "faults": []}
    assert streamlap.evaluate(folder, lesson, dtype="float32").nll == pytest.approx(nll(folder, lesson), abs=1e-5)


def test_a_run_that_dies_with_little_memory_ends_in_the_same_bytes(
    best: Best, result: Path, lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states go by the disk, and the run dies behind the first layer."""
    check(result, lesson)
    keep_on_disk(monkeypatch)
    crash_after(1, monkeypatch, lambda: best(tmp_path / "out"))
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(result)


@pytest.mark.parametrize("method", TRAINED)
def test_methods_that_train(source: Path, lesson: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    report = streamlap.compress(source, out, ratio=RATIO, methods=(TRAINED[method],), files=(str(lesson),))
    assert report.parameters.ratio_decoder == pytest.approx(RATIO, abs=0.06)
    check(out, lesson)


def test_an_export_is_the_same_model(result: Path, lesson: Path, tmp_path: Path) -> None:
    streamlap.export(result, tmp_path / "dense")
    check(tmp_path / "dense", lesson)
    assert nll(tmp_path / "dense", lesson) == pytest.approx(nll(result, lesson), abs=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
@pytest.mark.filterwarnings("ignore:target_parameters=:RuntimeWarning")  # to peft all FFNs of a qwen3_next are experts
def test_a_result_learns_by_lora(result: Path, lesson: Path, tmp_path: Path) -> None:
    """In one step; the adapter, saved, gives the same on a model opened anew."""
    peft = pytest.importorskip("peft")
    family = ModelStream(result).family
    paths = "|".join(re.escape(family.path(role)) for role in ("o", "down"))
    config = peft.LoraConfig(r=2, target_modules=rf"{re.escape(family.layers)}\.\d+\.({paths})")
    torch.manual_seed(0)
    model = peft.get_peft_model(opened(result), config).eval()
    optimizer = torch.optim.AdamW((part for part in model.parameters() if part.requires_grad), lr=1e-2)
    before = model(input_ids=ids(lesson), labels=ids(lesson)).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(input_ids=ids(lesson), labels=ids(lesson))
        assert after.loss < before
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(opened(result), tmp_path / "adapter")
        assert torch.equal(again(input_ids=ids(lesson)).logits, after.logits)


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the decoder layers, by their names on the disk; not what stands for one that is stored in parts."""
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    layers = ModelStream(folder).family.layers
    names = [name for name in found if name.startswith(layers) and "norm" not in name]
    return {name: found[name] for name in names if found[name].dim() == 2 < found[name].numel()}


def test_a_result_recovers(result: Path, lesson: Path, tmp_path: Path) -> None:
    """Every linear of it, on a text of few words."""
    pytest.importorskip("peft")
    better, more = tmp_path / "better", tmp_path / "more.npy"
    np.save(more, (np.load(lesson).repeat(3, axis=0) + np.arange(36)[:, None]) % 30)
    assert streamlap.recover(result, better, more, epochs=1, rank=4, learning_rate=1e-2, batch=4).kept
    check(better, lesson)
    before, after = matrices(result), matrices(better)
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]


OUTSIDE = """
import torch
import transformers

saved, *folders = sys.argv[1:]
found = {}
for folder in folders:
    path, loader = folder.split("=")
    model = getattr(transformers, loader).from_pretrained(path, trust_remote_code=True)
    with torch.no_grad():
        found[path] = model(torch.arange(8)[None]).logits
torch.save(found, saved)
"""


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_results_open_where_streamlap_is_not(lesson: Path, tmp_path: Path) -> None:
    """By the code in their folders; all in one process, so that none gets into the way of another."""
    loaders = {}
    for name in EVERY_KIND:
        streamlap.compress(
            make_source(name, tmp_path / name), tmp_path / f"{name}-out", ratio=RATIO, files=(str(lesson),)
        )
        loaders[tmp_path / f"{name}-out"] = loader_of(ModelStream(tmp_path / name).raw_config)
    named = (f"{path}={name}" for path, name in loaders.items())
    run_outside(OUTSIDE, tmp_path, tmp_path / "logits.pt", *named)
    found = torch.load(tmp_path / "logits.pt")
    assert len(found) == len(EVERY_KIND)
    for folder in loaders:
        with torch.no_grad():  # its threads may be others than ours
            torch.testing.assert_close(
                found[str(folder)], opened(folder)(torch.arange(8)[None]).logits, rtol=1e-5, atol=1e-5
            )
