"""Each kind of model that is served, through all that is done with one: what comes out is whole, and opens everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from crashes import crash_after, keep_on_disk
from outputs import contents
from picos import EVERY_KIND, random_pico

import streamlap
from streamlap.families.stream import ModelStream
from streamlap.methods.trained.loraprune import LoraPrune
from streamlap.methods.trained.pclora import PcLora
from streamlap.output.folder import loader_of

Make = Callable[[str], Path]
Best = Callable[[str, Path], streamlap.Report]
RATIO = 0.3
TRAINED = {"loraprune": LoraPrune(epochs=1, rank=4, every=2), "pclora": PcLora(epochs=1)}


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids [12, 16] as .npy, none of which stands for an image."""
    path = tmp_path_factory.mktemp("lesson") / "lesson.npy"
    np.save(path, np.random.default_rng(0).integers(0, 290, (12, 16)))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """source(kind) -> its pico model; shared, so do not change it."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            random_pico(kind).save_pretrained(made[kind])
            make_tokenizer().save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="module")
def result(best: Best, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """result(kind) -> what `best` makes of it; shared."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "out"
            best(kind, made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="module")
def best(source: Make, lesson: Path, tmp_path_factory: pytest.TempPathFactory) -> Best:
    """best(kind, out): shares by a survey, each layer rebuilt, and trained once that is done."""
    surveys: dict[str, Path] = {}

    def run(kind: str, out: Path) -> streamlap.Report:
        if kind not in surveys:
            surveys[kind] = tmp_path_factory.mktemp(kind) / "survey.json"
            streamlap.survey(source(kind), surveys[kind], files=(str(lesson),))
        return streamlap.compress(
            source(kind), out, ratio=RATIO, preset="best", survey=str(surveys[kind]), refine=1, files=(str(lesson),)
        )

    return run


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


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_run_that_dies_with_little_memory_ends_in_the_same_bytes(
    best: Best, result: Make, lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Hidden states go by the disk, and the run dies behind the first layer."""
    check(result(kind), lesson)
    keep_on_disk(monkeypatch)
    crash_after(1, monkeypatch, lambda: best(kind, tmp_path / "out"))
    streamlap.resume(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(result(kind))


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_methods_that_train(source: Make, lesson: Path, tmp_path: Path, kind: str, method: str) -> None:
    out = tmp_path / "out"
    report = streamlap.compress(source(kind), out, ratio=RATIO, methods=(TRAINED[method],), files=(str(lesson),))
    assert report.parameters.ratio_decoder == pytest.approx(RATIO, abs=0.06)
    check(out, lesson)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_an_export_is_the_same_model(result: Make, lesson: Path, tmp_path: Path, kind: str) -> None:
    streamlap.export(result(kind), tmp_path / "dense")
    check(tmp_path / "dense", lesson)
    assert nll(tmp_path / "dense", lesson) == pytest.approx(nll(result(kind), lesson), abs=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_result_learns_by_lora(result: Make, lesson: Path, tmp_path: Path, kind: str) -> None:
    """In one step; the adapter, saved, gives the same on a model opened anew."""
    peft = pytest.importorskip("peft")
    family = ModelStream(result(kind)).family
    paths = "|".join(re.escape(family.path(role)) for role in ("o", "down"))
    config = peft.LoraConfig(r=2, target_modules=rf"{re.escape(family.layers)}\.\d+\.({paths})")
    torch.manual_seed(0)
    model = peft.get_peft_model(opened(result(kind)), config).eval()
    optimizer = torch.optim.AdamW((part for part in model.parameters() if part.requires_grad), lr=1e-2)
    before = model(input_ids=ids(lesson), labels=ids(lesson)).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(input_ids=ids(lesson), labels=ids(lesson))
        assert after.loss < before
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(opened(result(kind)), tmp_path / "adapter")
        assert torch.equal(again(input_ids=ids(lesson)).logits, after.logits)


OUTSIDE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "streamlap":
            raise ModuleNotFoundError("No module named 'streamlap'")

sys.meta_path.insert(0, Blocker())
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
def test_a_result_opens_where_streamlap_is_not(result: Make, tmp_path: Path) -> None:
    """By the code in its folder; all in one process, so that they do not get into each other's way."""
    folders = {result(kind): loader_of(ModelStream(result(kind))) for kind in EVERY_KIND}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, tmp_path / "logits.pt", *(f"{path}={name}" for path, name in folders.items())],
        check=True, cwd=tmp_path, env=environment | {"HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    found = torch.load(tmp_path / "logits.pt")
    assert len(found) == len(EVERY_KIND)
    for folder in folders:
        with torch.no_grad():
            assert torch.equal(found[str(folder)], opened(folder)(torch.arange(8)[None]).logits), folder
