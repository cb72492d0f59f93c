"""The main job on pico models: what is written, from which statistics, and that it is always the same."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamlap
from streamlap.errors import Interrupted, NumericalError, RecipeError
from streamlap.families.stream import ModelStream
from streamlap.linalg.budget import lorap_pair_ranks, lorap_removal
from streamlap.linalg.channels import kept_channels, lorap_scores
from streamlap.linalg.lowrank import awsvd
from streamlap.linalg.solution import Solution
from streamlap.methods import METHODS, PRESETS
from streamlap.methods.lorap import attention as lorap_attention
from streamlap.store.journal import Journal


def compressed(pico: MakeModel, tokens: Path, out: Path, family: str = "llama", **settings: object) -> streamlap.Report:
    return streamlap.compress(pico(family), out, files=(str(tokens),), **({"ratio": 0.4} | settings))


def linear_inputs(model: torch.nn.Module, tokens_NL: torch.Tensor, path: str) -> torch.Tensor:
    """All inputs x_TI of one linear while the whole model runs in memory."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=tokens_NL)
    hook.remove()
    return torch.cat(seen)


def scale_of(x_TI: torch.Tensor) -> torch.Tensor:
    return x_TI.double().square().mean(0).sqrt()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_layer_is_edited_from_the_compressed_prefix(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str
) -> None:
    """An independent LoRAP in memory: layer by layer, on a whole model whose earlier layers are already replaced."""
    report = compressed(pico, tokens, tmp_path / "out", family, ratio=0.4, preset="lorap")
    tokens_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(pico(family), dtype=torch.float32)
    written = ModelStream(tmp_path / "out").source
    kept_of = json.loads((tmp_path / "out" / report.kept_channels).read_text())
    for index in range(3):
        base = f"model.layers.{index}"
        scales = {
            role: scale_of(linear_inputs(model, tokens_NL, f"{base}.{path}"))
            for role, path in {
                "q": "self_attn.q_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj",
            }.items()
        }  # fmt: skip
        for weak, strong in (("q", "o"), ("k", "v")):
            shape = model.get_submodule(f"{base}.self_attn.{weak}_proj").weight.shape
            for name, rank in zip((weak, strong), lorap_pair_ranks(*shape, 0.4, 3.0), strict=True):
                linear = model.get_submodule(f"{base}.self_attn.{name}_proj")
                up, down = awsvd(linear.weight.detach(), scales["o" if name == "o" else "q"], rank).value
                mine = (
                    written.read(f"{base}.self_attn.{name}_proj.weight").double()
                    @ written.read(f"{base}.self_attn.{name}_proj.down.weight").double()
                )
                torch.testing.assert_close(mine, up @ down, rtol=1e-4, atol=1e-5)
                linear.weight.data = mine.float()
        mlp = model.get_submodule(f"{base}.mlp")
        weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        score_F = lorap_scores(weights[:2], weights[2], scales["gate"], scales["down"])
        kept = kept_channels(score_F, lorap_removal(48, 0.4, 0.01))
        assert kept_of[f"{index}.mlp.down_proj"] == kept.tolist()
        gone = torch.ones(48, dtype=torch.bool).index_fill(0, kept, False)
        mlp.down_proj.weight.data[:, gone] = 0


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_runs_give_equal_bytes(pico: MakeModel, tokens: Path, tmp_path: Path, preset: str) -> None:
    for name in ("a", "b"):
        compressed(pico, tokens, tmp_path / name, preset=preset)
    for path in sorted((tmp_path / "a").iterdir()):
        if path.name != "streamlap_report.json":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_folder_holds_what_a_model_folder_holds(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source = pico("llama", tokenizer=True, dtype=torch.bfloat16, seed=3)
    out = tmp_path / "out"
    old = os.umask(0o022)
    try:
        streamlap.compress(source, out, ratio=0.4, files=(str(tokens),))
    finally:
        os.umask(old)
    names = {path.name for path in out.iterdir()}
    shards = {f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)}
    assert shards | {"config.json", "model.safetensors.index.json", "README.md", "tokenizer.json"} <= names
    assert {"streamlap_recipe.yaml", "streamlap_report.json", "generation_config.json"} <= names
    assert ".streamlap" not in names
    assert not [name for name in names if name.endswith(".tmp")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}
    for shard in shards:
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    before, after = json.loads((source / "config.json").read_text()), json.loads((out / "config.json").read_text())
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {"auto_map", "quantization_config"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {name: shard for shard in shards for name in load_file(out / shard)}
    assert index["weight_map"] == stored
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert "base_model_relation: quantized" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(("preset", "linears"), [("lorap", ("v_proj",)), ("best", ())])
def test_untouched_tensors_are_copied_as_bytes(
    pico: MakeModel, tokens: Path, tmp_path: Path, preset: str, linears: tuple[str, ...]
) -> None:
    """Also where the layer ran in another dtype than it is stored in."""
    source = pico("qwen3", dtype=torch.float32)
    streamlap.compress(source, tmp_path / "out", ratio=0.2, preset=preset, files=(str(tokens),), dtype="bfloat16")
    before, after = ModelStream(source).source, ModelStream(tmp_path / "out").source
    same = [name for name in before.names() if any(part in name for part in ("norm", "embed", *linears))]
    assert len(same) == 3 * (4 + len(linears)) + 2
    for name in same:
        if (name, preset) != ("model.norm.weight", "best"):  # which gets a gain
            assert torch.equal(before.read(name), after.read(name)), name


def test_the_report_counts_what_is_stored(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = compressed(pico, tokens, out, ratio=0.3, preset="lorap")
    source = ModelStream(out).source
    stored = [source.info(name) for name in source.names()]
    assert report.parameters.total_after == sum(info.numel for info in stored)
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert report.parameters.decoder_after == sum(i.numel for i in stored if any(part in i.name for part in linears))
    assert report.parameters.ratio_decoder == pytest.approx(0.3, abs=0.03)
    saved = json.loads((out / "streamlap_report.json").read_text())
    assert saved == json.loads(json.dumps(report.to_json()))
    assert set(saved["layers"][0]["seconds"]) == {"read", "capture", "solve", "write", "propagate"}
    inspected = streamlap.inspect(out)
    assert inspected["parameters"] == saved["parameters"]
    q_proj = inspected["layers"][0]["sites"]["self_attn.q_proj"]
    assert (q_proj["kind"], q_proj["shape"], q_proj["width"]) == ("low_rank", [32, 32], None)
    assert q_proj["parameters"] == q_proj["rank"] * 64
    assert 0 < q_proj["relative_error"] < 1
    down = inspected["layers"][0]["sites"]["mlp.down_proj"]
    assert (down["kind"], down["shape"], down["width"], down["parameters"]) == ("pruned", [32, 34], 34, 32 * 34)


def test_inspect_of_an_original_finds_nothing_removed(pico: MakeModel) -> None:
    table = streamlap.inspect(pico("qwen2"))
    assert table["parameters"]["ratio_decoder"] == table["parameters"]["ratio_total"] == 0
    sites = table["layers"][2]["sites"]
    assert {site["kind"] for site in sites.values()} == {"dense"}
    assert sites["self_attn.q_proj"]["parameters"] == 32 * 32 + 32


def test_methods_may_be_chosen_one_by_one(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    report = compressed(pico, tokens, tmp_path / "out", methods=(METHODS["attention_awsvd"](),))
    assert {edit.path.split(".")[0] for layer in report.layers for edit in layer.edits} == {"self_attn"}
    assert report.recipe["preset"] == "custom"


def spoilt(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def dead_channels(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"][:20] = 0
    weights["model.layers.1.input_layernorm.weight"][:8] = 0
    weights["model.layers.1.self_attn.v_proj.weight"][:2] = 0


@pytest.mark.parametrize("preset", ["best", "lorap"])
def test_a_layer_with_dead_channels_is_compressed(pico: MakeModel, tokens: Path, tmp_path: Path, preset: str) -> None:
    """And the report says which; two heads of o read what a dead row of v writes."""
    source, out = spoilt(pico("llama"), tmp_path / "source", dead_channels), tmp_path / "out"
    report = streamlap.compress(source, out, ratio=0.4, preset=preset, files=(str(tokens),))
    assert streamlap.verify(out) == {"ok": True, "faults": []}
    first, second = ("ffn: ", "attention: ") if preset == "best" else ("", "")
    assert [layer.numerics for layer in report.layers] == [
        (f"{first}20 dead inputs of mlp.down_proj",),
        (
            f"{second}8 dead inputs of self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
            f"{second}4 dead inputs of self_attn.o_proj",
        ),
        (),
    ]
    saved = json.loads((out / "streamlap_report.json").read_text())
    assert [tuple(layer["numerics"]) for layer in saved["layers"]] == [layer.numerics for layer in report.layers]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dense_export_is_a_plain_model_with_the_same_logits(
    pico: MakeModel, tokens: Path, tmp_path: Path, family: str
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    compressed(pico, tokens, out, family)
    streamlap.export_dense(out, dense)
    config = json.loads((dense / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & set(config)
    tokens_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, dense)]
    assert type(models[1].model.layers[0].self_attn.q_proj) is torch.nn.Linear
    with torch.no_grad():
        first, second = (model(input_ids=tokens_NL).logits for model in models)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert streamlap.verify(dense)["ok"]


def tiny_inputs_of_large_weights(pico: MakeModel, folder: Path) -> Path:
    """In the last layer, whose output nobody looks at: the inputs of o are tiny, its weights near the end of float16."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.2.self_attn.v_proj.weight"][:] = 6e-8
        weights["model.layers.2.self_attn.o_proj.weight"] *= 20000

    return spoilt(pico("llama", dtype=torch.float16), folder, change)


def test_what_the_storage_dtype_cannot_hold_is_refused(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """Rows of a matrix are stored as they are: no other factor can take from them."""
    source, out = tiny_inputs_of_large_weights(pico, tmp_path / "source"), tmp_path / "out"
    words = r"model.layers.2 attention: self_attn.o_proj: the largest number is 1\.\d+e\+05; wanted at most 65504"
    with pytest.raises(NumericalError, match=words):
        streamlap.compress(source, out, ratio=0.4, files=(str(tokens),), redraw=False)
    assert not (out / "config.json").exists()


def test_factors_that_the_storage_dtype_cannot_hold_are_balanced(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source, out = tiny_inputs_of_large_weights(pico, tmp_path / "source"), tmp_path / "out"
    report = streamlap.compress(source, out, ratio=0.4, preset="lorap", files=(str(tokens),))
    assert [layer.numerics for layer in report.layers[:2]] == [(), ()]
    assert report.layers[2].numerics == ("self_attn.o_proj: 13 ranks balanced for torch.float16",)
    assert streamlap.verify(out)["ok"]


def test_an_edit_that_is_not_finite_is_refused(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a method of one's own may do."""
    monkeypatch.setattr(
        lorap_attention, "balanced", lambda up_OR, down_RI, *_: Solution((up_OR.float(), down_RI.float() / 0))
    )
    with pytest.raises(
        NumericalError, match=r"model.layers.0.self_attn.q_proj: down.weight is not finite in torch.float32"
    ):
        compressed(pico, tokens, tmp_path / "out", preset="lorap")


def test_calibration_files_may_be_spelt_otherwise_on_resume(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens count; the recipe that is kept is the one that began the folder."""
    out, append = tmp_path / "out", Journal.append

    def stop(journal: Journal, line: dict[str, object]) -> None:
        append(journal, line)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        with pytest.raises(Interrupted):
            compressed(pico, tokens, out)
    monkeypatch.chdir(tokens.parent)
    streamlap.compress(pico("llama"), out, ratio=0.4, files=(tokens.name,))
    assert streamlap.Recipe.from_yaml(out / "streamlap_recipe.yaml").calibration.files == (str(tokens),)


def test_a_dense_export_stays_apart_from_its_source(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    compressed(pico, tokens, tmp_path / "out")
    with pytest.raises(RecipeError, match="apart"):
        streamlap.export_dense(tmp_path / "out", tmp_path / "out" / "dense")
    assert streamlap.verify(tmp_path / "out")["ok"]
