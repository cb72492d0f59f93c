"""What a cut costs in each family: a random cut is one of `lorap` but for its choices, and the figures reach the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from picos import EVERY_KIND, pico_model
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_families
import compare_transformers
import families_table
import family_seconds
from random_cut import RandomAttention, RandomChannels

import streamlap

SMALL = {
    "CALIBRATION": 12,
    "HELD_OUT": 12,
    "LOGITS": 2,
    "LENGTH": 16,
    "DRAWS": 2,
    "SIZES": {"max_position_embeddings": 64},
}


def random_cut(source: Path, out: Path, tokens: Path, seed: int) -> dict[str, torch.Tensor]:
    methods = (RandomAttention(seed=seed), RandomChannels(seed=seed))
    streamlap.compress(source, out, ratio=0.4, methods=methods, files=(str(tokens),))
    return load_tensors(out)


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_chance_has_the_layouts_of_lorap_and_its_own_choices(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source = pico("llama")
    streamlap.compress(source, tmp_path / "lorap", ratio=0.4, preset="lorap", files=(str(tokens),))
    first = random_cut(source, tmp_path / "first", tokens, 0)
    shapes = {name: tensor.shape for name, tensor in load_tensors(tmp_path / "lorap").items()}
    assert {name: tensor.shape for name, tensor in first.items()} == shapes

    again, other = (random_cut(source, tmp_path / name, tokens, seed) for name, seed in (("again", 0), ("other", 1)))
    assert all(torch.equal(again[name], first[name]) for name in first)
    changed = {name for name in first if not torch.equal(other[name], first[name])}
    assert changed == {name for name in first if "layers" in name and "norm" not in name}
    kept = json.loads((tmp_path / "first" / "streamlap_kept_channels.json").read_text())
    assert len({json.dumps(channels) for channels in kept.values()}) == 3, "other channels in each layer"


def test_a_random_subspace_is_seen_as_it_was(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """On the subspace that is left, the matrix is the one that was there."""
    source, name = pico("llama"), "model.layers.1.self_attn.q_proj"
    cut, before_OI = random_cut(source, tmp_path / "out", tokens, 0), load_tensors(source)[f"{name}.weight"]
    up_OR, down_RI = cut[f"{name}.weight"], cut[f"{name}.down.weight"]
    inside_II = torch.linalg.pinv(down_RI) @ down_RI
    torch.testing.assert_close(up_OR @ down_RI @ inside_II, before_OI @ inside_II, atol=1e-5, rtol=1e-5)


def test_every_family_has_a_model() -> None:
    assert EVERY_KIND == families_table.KINDS
    for kind in EVERY_KIND:
        with torch.device("meta"):
            model = pico_model(kind, **bench_families.SIZES, **bench_families.OWN.get(kind, {}))
        assert model.config.get_text_config().hidden_size == bench_families.SIZES["hidden_size"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_a_family_is_measured_once_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(bench_families, name, value)
    out, threads = tmp_path / "families.json", torch.get_num_threads()
    words = ["--only", "qwen3", "--seconds", "0.5", "--out", str(out), "--work", str(tmp_path / "work"), "--table"]
    monkeypatch.setattr(sys, "argv", ["bench_families.py", *words])
    bench_families.main()
    row = json.loads(out.read_text())["families"]["qwen3"]
    assert row["logits"] == {"source": 0.0, "best": 0.0}
    assert row["whole"]
    assert row["reloads"]
    assert row["step"]["learns"] == (row["step"]["after"] < row["step"]["before"])
    for cut in row["cuts"].values():
        assert cut["random"]["loss"] == pytest.approx(sum(cut["random"]["draws"]) / 2)
        assert cut["random"]["parameters"] == cut["lorap"]["parameters"] < row["trained"]["parameters"]["decoder"]
    assert row["ordered"] == all(map(bench_families.ordered, row["cuts"].values()))
    capsys.readouterr()

    monkeypatch.setattr(bench_families, "measure", lambda *args: pytest.fail("it is there already"))
    bench_families.main()
    torch.set_num_threads(threads)
    shown = " | ".join(families_table.losses(row))
    assert f"| {row['dense']:.3f} | {shown} |" in capsys.readouterr().out

    lines = families_table.costs(out)["costs"].splitlines()
    assert f"| `qwen3` | {row['dense']:.3f} | {shown} |" in lines
    assert f"| `glm4` |  |{' not measured |' * 6}" in lines


def test_seconds_of_tests_go_to_the_families_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        ("test_a[opt]", 1.25),
        ("test_a[bfloat16-opt]", 2),
        ("test_b[gpt2-lorap]", 4),
        ("test_c[option]", 8),
        ("test_d", 16),
    ]
    lines = "".join(f'<testcase name="{name}" time="{seconds}"/>' for name, seconds in cases)
    xml, figures = tmp_path / "tests.xml", tmp_path / "families.json"
    xml.write_text(f"<testsuites><testsuite>{lines}</testsuite></testsuites>")
    figures.write_text('{"families": {}}')
    monkeypatch.setattr(sys, "argv", ["family_seconds.py", str(xml), "--figures", str(figures)])
    family_seconds.main()
    found = json.loads(figures.read_text())
    assert found["families"] == {}
    assert found["tests"]["families"]["opt"] == {"tests": 2, "seconds": 3.2}
    assert found["tests"]["families"]["gpt2"] == {"tests": 1, "seconds": 4.0}
    shown = families_table.holds(figures)["holds"].splitlines()
    assert f"| `opt` |{' not measured |' * 5} 2 | 3 |" in shown
    xml.write_text(xml.read_text().replace('"16"/>', '"16"><failure/></testcase>'))
    with pytest.raises(SystemExit, match="test_d has not passed"):
        family_seconds.main()


@pytest.mark.parametrize(
    ("losses", "order"), [((3, 2, 1), True), ((2, 3, 1), False), ((3, 1, 2), False), ((3, 2, 2), False)]
)
def test_order(losses: tuple[float, ...], order: bool) -> None:
    ways = ("random", "lorap", "best")
    assert bench_families.ordered({way: {"loss": loss} for way, loss in zip(ways, losses, strict=True)}) == order


@pytest.mark.nightly
def test_one_release_of_transformers_gives_its_own_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = [sys.executable, "--only", "glm4", "--work", tmp_path]
    monkeypatch.setattr(sys, "argv", ["compare_transformers.py", *map(str, words)])
    assert compare_transformers.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["here"] == found["other"]
    assert found["differences"] == dict.fromkeys([f"glm4-{way}" for way in ("source", "lorap", "best", "dense")], 0.0)


@pytest.mark.parametrize(
    ("refused", "model", "best", "passed"),
    [
        ([], 0.0, 0.0, True),
        ([], 0.0, 1e-5, False),
        ([], 1e-5, 2e-5, True),
        (["opt-best"], 0.0, 0.0, False),
        (["opt-best", "opt-source"], 0.0, 0.0, True),
    ],
)
def test_a_result_may_do_what_the_model_does(refused: list[str], model: float, best: float, passed: bool) -> None:
    result = {"here": {"refused": {}}, "other": {"refused": dict.fromkeys(refused, "why")}}
    differences = {"glm4-source": model, "glm4-best": best}
    assert compare_transformers.passes(result | {"differences": differences}) == passed
