"""Layouts of a checkpoint that transformers loads: the same loss from the source, from the result and from its dense twin."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import streamlap
from streamlap.cli.show import describe_inventory
from streamlap.errors import CheckpointError, NumericalError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES

Tensors = dict[str, torch.Tensor]

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def layout(
    source: Path, folder: Path, change: Callable[[Tensors], Tensors] = dict, drop: tuple[str, ...] = (), **config: Any
) -> Path:
    """A copy of `source` with other tensors and other keys in config.json."""
    shutil.copytree(source, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    table = json.loads((folder / "config.json").read_text())
    table = {key: value for key, value in table.items() if key not in drop} | config
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def transformers_nll(folder: Path, tokens: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    with torch.no_grad():
        logits_NLV = model(ids_NL).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_NLV.flatten(0, 1), ids_NL[:, 1:].flatten()).item()


def check_loss(folder: Path, tokens: Path, tmp_path: Path) -> None:
    """Source, result and dense twin have the loss that transformers has for them; the result's names are those of the model."""
    out, dense = tmp_path / "out", tmp_path / "dense"
    streamlap.compress(folder, out, ratio=0.3, dtype="float32", files=(str(tokens),))
    streamlap.export_dense(out, dense)
    assert streamlap.verify(out)["ok"]
    assert streamlap.verify(folder)["ok"]
    for place in (folder, out, dense):
        assert streamlap.evaluate(place, tokens).nll == pytest.approx(transformers_nll(place, tokens), abs=1e-5), place
    assert transformers_nll(dense, tokens) == pytest.approx(
        transformers_nll(out, tokens), abs=1e-3
    )  # rounded once more
    stored = {name for shard in out.glob("*.safetensors") for name in load_file(shard)}
    assert all(name.startswith(("model.", HEAD, "score.")) for name in stored)
    assert not [name for name in stored if name.startswith("model.model.")]


def bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def other_head(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(9)
    shape = tensors[EMBEDDING].shape
    return tensors | {HEAD: (torch.randn(shape, generator=generator) * 0.3).to(tensors[EMBEDDING].dtype)}


def leftovers(tensors: Tensors) -> Tensors:
    extra = {
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.1.mlp.up_proj.weight_old": torch.ones(4),
        "model.layers.1.mlp.up_proj.bias": torch.ones(48),
        "model.layers.3.eh_proj.weight": torch.ones(2, 2),
        "visual.blocks.0.attn.qkv.weight": torch.ones(2, 2).to(torch.float8_e5m2),
        "model.step": torch.tensor(7),
        "model.empty": torch.zeros(0, 4),
    }
    return tensors | extra


def doubled(tensors: Tensors, part: str) -> Tensors:
    return {name: tensor.double() if part in name else tensor for name, tensor in tensors.items()}


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[Tensors], Tensors]]] = {
    "bare names": ({"tied": True}, bare),
    "bare names and a head": ({}, bare),
    "some names bare": ({}, lambda t: {n.removeprefix("model.") if ".1." in n else n: x for n, x in t.items()}),
    "prefix twice, and before the head": ({}, lambda t: {f"model.{name}": tensor for name, tensor in t.items()}),
    "two heads": ({"tied": True}, other_head),
    "two heads, bare": ({"tied": True}, lambda t: bare(other_head(t))),
    "two heads in bfloat16": ({"tied": True, "dtype": torch.bfloat16}, other_head),
    "head and embedding equal": ({"tied": True}, lambda t: t | {HEAD: t[EMBEDDING]}),
    "equal in another dtype": ({"tied": True, "dtype": torch.bfloat16}, lambda t: t | {HEAD: t[EMBEDDING].float()}),
    "tied, the head alone is stored": ({"tied": True}, lambda t: {HEAD if n == EMBEDDING else n: x for n, x in t.items()}),
    "left-over tensors": ({}, leftovers),
    "norms in float64": ({"dtype": torch.bfloat16}, lambda t: doubled(t, "norm")),
    "linears in float64": ({}, lambda t: doubled(t, "proj")),
    "all in float64": ({}, lambda t: doubled(t, "")),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_has_the_loss_of_transformers(pico: MakeModel, tokens: Path, tmp_path: Path, kind: str) -> None:
    settings, change = LAYOUTS[kind]
    check_loss(layout(pico("qwen3", **settings), tmp_path / "source", change), tokens, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_may_be_stored_bare(pico: MakeModel, tokens: Path, tmp_path: Path, family: str) -> None:
    folder = layout(pico(family), tmp_path / "source", bare)
    assert streamlap.evaluate(folder, tokens).nll == pytest.approx(
        streamlap.evaluate(pico(family), tokens).nll, abs=1e-9
    )


def test_a_config_that_wants_tuples_changes_nothing(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    folder = layout(pico("llama"), tmp_path / "source", return_dict=False)
    assert streamlap.evaluate(folder, tokens).nll == streamlap.evaluate(pico("llama"), tokens).nll


def test_layers_beyond_the_depth_are_left_behind(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    check_loss(layout(pico("llama"), tmp_path / "source", num_hidden_layers=2), tokens, tmp_path)
    assert "model.layers.2.mlp.up_proj.weight" in streamlap.inspect(tmp_path / "source")["unused"]


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_result_with_two_heads_says_that_they_are_not_tied(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    for name, change, tied in (("two", other_head, False), ("equal", lambda t: t | {HEAD: t[EMBEDDING]}, True)):
        source = layout(pico("llama", tied=True), tmp_path / name, change)
        streamlap.compress(source, tmp_path / f"{name}-out", files=(str(tokens),))
        assert json.loads((tmp_path / f"{name}-out" / "config.json").read_text())["tie_word_embeddings"] is tied


def test_both_heads_count(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source, out = layout(pico("llama", tied=True), tmp_path / "source", other_head), tmp_path / "out"
    plain, two = (streamlap.inspect(folder)["parameters"] for folder in (pico("llama", tied=True), source))
    assert two["total_before"] - plain["total_before"] == 300 * 32
    report = streamlap.compress(source, out, preset="lorap", files=(str(tokens),))
    shards = list(out.glob("*.safetensors"))
    assert report.parameters.total_after == sum(t.numel() for shard in shards for t in load_file(shard).values())
    plan = streamlap.plan(source, preset="lorap", files=(str(tokens),))
    assert plan.output_bytes == sum(shard.stat().st_size for shard in shards)


def test_a_survey_measures_with_the_head_that_is_stored(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    tied = layout(pico("llama", tied=True), tmp_path / "tied", other_head)
    untied = layout(tied, tmp_path / "untied", tie_word_embeddings=False)
    found = [
        streamlap.survey(source, tmp_path / f"{source.name}.json", files=(str(tokens),)) for source in (tied, untied)
    ]
    assert found[0].layers == found[1].layers


# --- models without a language-model head ----------------------------------------------------------------------------

CLASSIFIER = ["LlamaForSequenceClassification"]


def classifier(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {n: t for n, t in tensors.items() if n != HEAD} | {"score.weight": torch.randn(3, 32, generator=generator)}


def test_a_classifier_keeps_its_head(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    labels = {str(number): f"label {number}" for number in range(3)}
    source = layout(pico("llama"), tmp_path / "source", classifier, architectures=CLASSIFIER, id2label=labels)
    out, dense = tmp_path / "out", tmp_path / "dense"
    report = streamlap.compress(source, out, ratio=0.3, files=(str(tokens),))
    streamlap.export_dense(out, dense)
    assert report.loader == "AutoModelForSequenceClassification"
    assert "model = AutoModelForSequenceClassification.from_pretrained(" in (out / "README.md").read_text()
    assert streamlap.verify(out)["ok"]
    ids_L = torch.from_numpy(np.load(tokens).astype(np.int64))[:1]
    logits = []
    for folder in (source, out, dense):
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            logits.append(model(ids_L).logits)
    assert torch.allclose(logits[1], logits[2], atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-5)


def test_a_decoder_alone_is_compressed(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """As AutoModel saves it: bare names and no head."""
    source, out, dense = (tmp_path / name for name in ("source", "out", "dense"))
    AutoModel.from_pretrained(pico("mistral")).save_pretrained(source)
    assert "layers.0.mlp.up_proj.weight" in load_file(source / "model.safetensors")
    assert streamlap.compress(source, out, ratio=0.3, files=(str(tokens),)).loader == "AutoModel"
    streamlap.export_dense(out, dense)
    ids_NL = torch.from_numpy(np.load(tokens).astype(np.int64))
    with torch.no_grad():
        one, other = (AutoModel.from_pretrained(folder)(ids_NL).last_hidden_state for folder in (out, dense))
    assert torch.allclose(one, other, atol=1e-5)


def test_what_has_no_head_is_not_measured(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    source = layout(pico("llama"), tmp_path / "source", classifier, architectures=CLASSIFIER)
    for measure in (
        lambda: streamlap.evaluate(source, tokens),
        lambda: streamlap.survey(source, tmp_path / "survey.json", files=(str(tokens),)),
    ):
        with pytest.raises(UnsupportedModel, match=r"no language-model head .*LlamaForSequenceClassification"):
            measure()
    assert not list(tmp_path.glob("survey*"))
    assert streamlap.plan(source, files=(str(tokens),)).fits


def test_a_language_model_without_its_head_is_broken(pico: MakeModel, tmp_path: Path) -> None:
    for number, change in enumerate(({}, {"drop": ("architectures",)})):
        source = layout(pico("llama"), tmp_path / str(number), classifier, **change)
        with pytest.raises(CheckpointError, match=r"'lm_head.weight' is missing"):
            ModelStream(source)


# --- what is said, and what is refused -------------------------------------------------------------------------------


def test_one_warning_names_what_is_left_behind(
    pico: MakeModel, tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = layout(pico("llama"), tmp_path / "source", leftovers)
    with caplog.at_level(logging.WARNING, "streamlap"):
        streamlap.compress(source, tmp_path / "out", preset="lorap", files=(str(tokens),))
    (record,) = [record.getMessage() for record in caplog.records if record.name.startswith("streamlap.families")]
    assert "tensors that the 3-layer llama of config.json has no place for are not read (7 in all): " in record
    assert "model.empty, model.layers.0.self_attn.k_scale, model.layers.1.mlp.up_proj.bias and 4 more" in record
    assert len(streamlap.inspect(source)["unused"]) == 7
    assert "unused" not in streamlap.inspect(tmp_path / "out")
    assert streamlap.plan(source, preset="lorap", files=(str(tokens),)).output_bytes == sum(
        shard.stat().st_size for shard in (tmp_path / "out").glob("*.safetensors")
    )


def test_old_rotary_buffers_are_left_behind_without_a_word(
    pico: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    with caplog.at_level(logging.WARNING, "streamlap"):
        assert "unused" not in streamlap.inspect(layout(pico("llama"), tmp_path / "source", lambda t: t | old))
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t | {"norm.weight": t[NORM]},
            "'model.norm.weight' stands twice, as 'model.norm.weight' and as 'norm.weight'",
        ),
        (
            lambda t: {n: x for n, x in t.items() if ".layers.1." not in n},
            "the last numbered 2, but not layer 1; wanted both",
        ),
        (
            lambda t: {n: x for n, x in t.items() if ".layers.2." not in n},
            "hold 2 decoder layers, the last numbered 1; wanted",
        ),
        (lambda t: {n: x for n, x in bare(t).items() if n != "norm.weight"}, "'model.norm.weight' is missing"),
        (lambda t: {f"language_model.{n}": x for n, x in t.items()}, "hold no model.layers.0, but 'language_model"),
        (lambda t: t | {HEAD: t[HEAD][:, :31]}, r"'lm_head.weight' .* has shape \[300, 31\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    pico: MakeModel, tmp_path: Path, change: Callable[[Tensors], Tensors], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        ModelStream(layout(pico("llama"), tmp_path / "source", change))


def test_layers_that_differ_are_refused_by_every_command(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    differ = {"1": {"intermediate_size": 24}}
    source = layout(pico("llama"), tmp_path / "source", per_layer_config=differ)
    streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),))
    table = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(table | {"per_layer_config": differ}))
    files = (str(tokens),)
    for act in (
        lambda: streamlap.evaluate(source, tokens),
        lambda: streamlap.compress(source, tmp_path / "new", files=files),
        lambda: streamlap.plan(source, files=files),
        lambda: streamlap.inspect(source),
        lambda: streamlap.survey(source, tmp_path / "survey.json", files=files),
        lambda: streamlap.export_dense(tmp_path / "out", tmp_path / "dense"),
    ):
        with pytest.raises(
            UnsupportedModel, match=r"per_layer_config \{'1': \{'intermediate_size': 24\}\}; wanted layers"
        ):
            act()
    for folder in (source, tmp_path / "out"):
        assert "per_layer_config" in streamlap.verify(folder)["faults"][0]["fault"]


@pytest.mark.parametrize("same", [{}, None])
def test_layers_that_do_not_differ_are_plain(pico: MakeModel, tokens: Path, tmp_path: Path, same: Any) -> None:
    check_loss(layout(pico("llama"), tmp_path / "source", per_layer_config=same), tokens, tmp_path)


def test_inspect_shows_in_words_what_is_not_read(pico: MakeModel, tmp_path: Path) -> None:
    found = streamlap.inspect(layout(pico("llama"), tmp_path / "source", leftovers))
    assert describe_inventory(found)[-1].startswith("tensors that are not read (7): model.empty, model.layers.0")


def test_an_adapter_beside_the_weights_is_refused(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    """transformers would put it onto them."""
    source = layout(pico("llama"), tmp_path / "source")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has an adapter_config.json; wanted a model alone"):
        streamlap.evaluate(source, tokens)


@pytest.mark.parametrize("layer_types", [["full_attention", "sliding_attention", "full_attention"], None])
def test_a_mistral_with_layer_types_is_a_ministral(
    pico: MakeModel, tokens: Path, tmp_path: Path, layer_types: list[str] | None
) -> None:
    """So transformers takes it; a mistral would slide in every layer."""
    folder = layout(pico("mistral", sliding_window=5), tmp_path / "m", layer_types=layer_types)
    check_loss(folder, tokens, tmp_path)
    assert streamlap.inspect(folder)["model_type"] == "ministral"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "transformer."])
def test_names_of_another_program_are_shown(pico: MakeModel, tmp_path: Path, prefix: str) -> None:
    folder = layout(pico("llama"), tmp_path / "m", lambda tensors: {prefix + name: t for name, t in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"hold no model.layers.0, but '{prefix}model.layers.0.*Rename"):
        streamlap.inspect(folder)


def test_a_head_that_is_not_there_may_be_tied(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    folder = layout(pico("llama", tied=True), tmp_path / "m", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is missing.* set tie_word_embeddings to true"):
        streamlap.evaluate(folder, tokens)
    check_loss(layout(folder, tmp_path / "tied", tie_word_embeddings=True), tokens, tmp_path)


def test_a_norm_that_float32_cannot_hold(pico: MakeModel, tokens: Path, tmp_path: Path) -> None:
    folder = layout(pico("llama"), tmp_path / "m", lambda t: t | {NORM: torch.full((32,), 1e300, dtype=torch.float64)})
    with pytest.raises(NumericalError, match=r"Some weight of norm or head is too large for float32"):
        streamlap.evaluate(folder, tokens)


def test_a_config_that_only_says_quantised_may_be_mended(pico: MakeModel, tmp_path: Path) -> None:
    method = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    folder = layout(pico("llama"), tmp_path / "m", quantization_config=method)
    with pytest.raises(UnsupportedModel, match="plain floats all the same, take quantization_config out"):
        streamlap.inspect(folder)
