"""LoRA of peft on compressed folders: on the parts of a matrix, and on whole matrices by the names of their modules."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import FAMILIES, MIXED, TOKENS_BL, Case, all_kinds, logits, make_case
from outside import run_outside
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamlap.loader.forms import Pivoted, form_of
from streamlap.loader.linears import StoredLinear

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION_0 = "model.layers.0.self_attn"


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def lora(**options: Any) -> LoraConfig:
    """Adapters that change the model at once; by name and on every linear unless `options` say otherwise."""
    defaults = {"r": 2, "target_modules": NAMES, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return LoraConfig(**defaults | options)


def tuned(folder: Path, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(load(folder), lora(**options)).eval()


def step(model: PeftModel, steps: int = 1) -> list[float]:
    """The loss before each of a few steps of training."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(TOKENS_BL, labels=TOKENS_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """qwen2, tied, biases on q, k and v. Shared: a test must not write into its folder."""
    return make_case(tmp_path_factory.mktemp("mixed"), FAMILIES["qwen2-tied"](), MIXED)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same model with every kind of row."""
    return make_case(tmp_path_factory.mktemp("kinds"), FAMILIES["qwen2-tied"](), all_kinds(8))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("untied"), FAMILIES["llama"](), all_kinds(8))


@pytest.fixture(params=["mixed", "kinds"])
def case(request: pytest.FixtureRequest) -> Case:
    """Each of the two."""
    found: Case = request.getfixturevalue(request.param)
    return found


def test_lora_on_all_linears_trains_and_merges(case: Case, tmp_path: Path) -> None:
    model = get_peft_model(load(case.folder), LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    linears = {path for path, part in case.reference.named_modules() if isinstance(part, nn.Linear)} - {"lm_head"}
    assert {path.partition(".lora_")[0] for path in adapters} == {f"base_model.model.{path}" for path in linears}
    assert {name.rpartition(".layers.")[2] for name in adapters if "layers.0.self_attn.q_proj." in name} == {
        f"0.self_attn.q_proj.{part}.lora_{side}.default.weight"
        for part in ("base.rest" if "order" in "".join(case.tensors) else "up.down").split(".")
        for side in "AB"
    }
    step(model)
    assert all(p.abs().sum() > 0 for name, p in adapters.items() if "lora_B" in name)
    tuned_BLV = logits(model.eval())
    assert not torch.allclose(tuned_BLV, logits(case.reference), atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(case.folder), tmp_path / "adapter")
    assert torch.equal(logits(again), tuned_BLV)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), tuned_BLV, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


# --- by name -------------------------------------------------------------------------------------------------------------


def test_a_name_means_the_whole_matrix(case: Case) -> None:
    """One A [r, in] and one B [out, r] for each module that the dense model has, in parallel to whatever it became."""
    model = tuned(case.folder, use_rslora=True, lora_alpha=6)
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    wanted = {}
    for path, module in case.reference.named_modules():
        if path.rpartition(".")[2] in NAMES:
            wanted[f"base_model.model.{path}.lora_A.default.weight"] = (2, module.in_features)
            wanted[f"base_model.model.{path}.lora_B.default.weight"] = (module.out_features, 2)
            adapted = model.base_model.model.get_submodule(path)
            a_SI, b_OS = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
            x_BLI = torch.randn(2, 3, module.in_features)
            torch.testing.assert_close(adapted(x_BLI), module(x_BLI) + x_BLI @ a_SI.T @ b_OS.T * 6 / 2**0.5)
    assert found == wanted


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_by_name_trains_and_loads_again_in_both_ways(case: Case, tmp_path: Path, checkpointing: bool) -> None:
    base = load(case.folder)
    if checkpointing:
        base = prepare_model_for_kbit_training(base)
        new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # of transformers
        getattr(base, new if hasattr(base, new) else old)()
        base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(logits(model), logits(case.reference))
    first, *_, last = step(model.train(), 6)
    assert last < first
    wanted_BLV = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(case.folder), tmp_path)), wanted_BLV)
    own = load(case.folder)
    own.load_adapter(tmp_path)
    assert torch.equal(logits(own), wanted_BLV)


def test_an_adapter_of_the_dense_model_fits(mixed: Case, tmp_path: Path) -> None:
    torch.manual_seed(1)
    dense = AutoModelForCausalLM.from_config(FAMILIES["qwen2-tied"]())
    config = lora(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    given = get_peft_model(dense, config)
    given.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(mixed.folder), tmp_path)
    adapters = {name: p for name, p in given.named_parameters() if "lora_" in name}
    assert adapters
    assert all(torch.equal(model.get_parameter(name), p) for name, p in adapters.items())
    assert not torch.allclose(logits(model), logits(mixed.reference), atol=1e-3)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_by_name_it_saves_and_loads_the_same(case: Case, tmp_path: Path, safe: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load(case.folder, dtype=dtype), lora(init_lora_weights="gaussian")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    adapted_BLV = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    atol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(merged), adapted_BLV, atol=atol, rtol=atol)
    assert not torch.allclose(logits(merged), logits(load(case.folder, dtype=dtype)), atol=5 * atol)
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    merged.save_pretrained(tmp_path)
    again, info = load(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again), logits(merged))
    rows = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    for path, row in all_kinds(8).items() if "order" in "".join(case.tensors) else MIXED.items():
        assert rows.get(path, {}) == merged_row(row, again.get_submodule(path), 2), path


def merged_row(row: dict[str, int], module: nn.Module, rank: int) -> dict[str, int]:
    """`row` after an adapter of `rank` was merged: the same form of a larger rank, or dense where that is no smaller."""
    kind, out, width = next(iter({"rank", "pivots"} & row.keys()), None), module.out_features, module.in_features
    others = {key: value for key, value in row.items() if key in ("out", "in", "bias")}
    if kind is None:
        return others
    total = row[kind] + rank
    numbers = total * (out + width - (total if kind == "pivots" else 0))
    return others | ({kind: total} if numbers < out * width and total < min(out, width) else {})


def test_a_merged_model_dequantizes(kinds: Case, tmp_path: Path) -> None:
    merged = tuned(kinds.folder).merge_and_unload()
    wanted_BLV = logits(merged)
    merged.dequantize()
    assert not any(isinstance(module, StoredLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), wanted_BLV, atol=1e-4, rtol=1e-4)


def test_a_rank_that_two_factors_do_not_pay_for_becomes_dense(mixed: Case, tmp_path: Path) -> None:
    merged = tuned(mixed.folder, r=12, target_modules=["q_proj"]).merge_and_unload()
    assert type(merged.get_submodule(f"{ATTENTION_0}.q_proj")) is nn.Linear  # rank 7 + 12 of 32 x 32
    merged.save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    assert f"{ATTENTION_0}.q_proj" not in modules
    assert modules[f"{ATTENTION_0}.k_proj"] == {"rank": 5}
    assert torch.equal(logits(load(tmp_path)), logits(merged))


COMPRESSED = [f"0.self_attn.{name}_proj" for name in "qkvo"]
"""All of them compressed in the folders above."""


def test_merging_in_place_is_undone_to_the_bit(kinds: Case) -> None:
    model = tuned(kinds.folder, target_modules=COMPRESSED)
    before_BLV = logits(model)
    forms = {path: form_of(module) for path, module in kinds.reference.named_modules() if path.endswith("_proj")}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before_BLV, atol=1e-5, rtol=1e-5)
    q_proj = model.base_model.model.get_submodule(f"{ATTENTION_0}.q_proj")
    assert form_of(q_proj.get_base_layer()) == Pivoted((32, 32), True, 9)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert form_of(q_proj.get_base_layer()) == Pivoted((32, 32), True, 7)
    assert torch.equal(logits(model), before_BLV)
    unloaded = model.unload()
    assert {path: form_of(unloaded.get_submodule(path)) for path in forms} == forms
    assert torch.equal(logits(unloaded), logits(kinds.reference))
    with pytest.warns(UserWarning, match="Already unmerged"):
        q_proj.unmerge()


def test_two_adapters_merge_one_after_the_other(mixed: Case) -> None:
    model = tuned(mixed.folder, target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", lora(target_modules=["q_proj", "o_proj"], r=1))
    model.base_model.set_adapter(["default", "second"])
    wanted_BLV = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(mixed.reference))
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    torch.testing.assert_close(logits(model), wanted_BLV, atol=1e-5, rtol=1e-5)
    q_proj = model.base_model.model.get_submodule(f"{ATTENTION_0}.q_proj")
    assert q_proj.get_base_layer().rank == 7 + 2 + 1
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(mixed.reference), atol=1e-6, rtol=1e-5)


def test_adapters_have_the_dtype_of_the_matrix_unless_peft_widens_them(kinds: Case) -> None:
    for widen, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = load(kinds.folder, dtype=torch.bfloat16)
        model = get_peft_model(base, lora(target_modules=COMPRESSED), autocast_adapter_dtype=widen)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert model(TOKENS_BL).logits.dtype == torch.bfloat16


def test_a_bias_beside_a_pivoted_matrix_may_be_trained_alone(kinds: Case, tmp_path: Path) -> None:
    model = get_peft_model(load(kinds.folder), lora(target_modules=[f"{ATTENTION_0}.q_proj"], bias="lora_only"))
    step(model)
    q_proj = model.base_model.model.get_submodule(f"{ATTENTION_0}.q_proj")
    assert not torch.equal(q_proj.bias, kinds.reference.get_submodule(f"{ATTENTION_0}.q_proj").bias)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(kinds.folder), tmp_path)), logits(model.eval()))


@pytest.mark.parametrize("bias", ["all", "none"])
def test_biases_and_modules_to_save_are_trained_and_kept(untied: Case, tmp_path: Path, bias: str) -> None:
    model = get_peft_model(load(untied.folder), lora(bias=bias, modules_to_save=["lm_head"]))
    step(model)
    o_proj = model.base_model.model.get_submodule(f"{ATTENTION_0}.o_proj")
    changed = not torch.equal(o_proj.bias, untied.reference.get_submodule(f"{ATTENTION_0}.o_proj").bias)
    assert changed == (bias == "all")
    wanted_BLV = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(untied.folder), tmp_path / "adapter")
    assert torch.equal(logits(again), wanted_BLV)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted_BLV, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_the_adapter_is_merged(untied: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    """Also where the matrix has none: the format knows biases that the architecture does not. Adapters are float32."""
    torch.manual_seed(0)
    model = get_peft_model(load(untied.folder, dtype=dtype), lora(target_modules=COMPRESSED, lora_bias=True)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            nn.init.normal_(parameter)
    wanted_BLV = logits(model)
    merged = model.merge_and_unload()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(merged), wanted_BLV, atol=tolerance, rtol=tolerance)
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    merged.save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    assert modules[f"{ATTENTION_0}.v_proj"]["bias"] == 1
    assert torch.equal(logits(load(tmp_path)), logits(merged))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "seen use_dora; wanted plain LoRA, or adapters on the parts"),
        ({"init_lora_weights": "pissa"}, "seen init_lora_weights = 'pissa'; wanted one of"),
        ({"init_lora_weights": "olora"}, "seen init_lora_weights = 'olora'; wanted one of"),
        ({"bias": "lora_only"}, "seen bias = 'lora_only', which would not be saved; wanted 'none' or 'all'"),
    ],
)
def test_what_a_compressed_matrix_cannot_have_is_refused(mixed: Case, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"'{ATTENTION_0}\.q_proj', a compressed matrix: {words}"):
        tuned(mixed.folder, target_modules=["q_proj"], **options)


def test_a_matrix_and_its_parts_are_not_adapted_at_once(mixed: Case) -> None:
    model = tuned(mixed.folder, target_modules=["q_proj.up"])
    with pytest.raises(ValueError, match="seen adapters on its parts; wanted"):
        model.add_adapter("second", lora(target_modules=["q_proj"]))


def test_numbers_that_are_not_finite_are_not_merged(mixed: Case) -> None:
    model = tuned(mixed.folder, target_modules=["q_proj"])
    with torch.no_grad():
        model.get_parameter(f"base_model.model.{ATTENTION_0}.q_proj.lora_A.default.weight")[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite after merging"):
        model.merge_and_unload(safe_merge=True)


def test_other_methods_take_the_parts(mixed: Case) -> None:
    model = load(mixed.folder)
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(model, IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    targets = [f"{name}_proj.up" for name in "qkvo"]
    model = get_peft_model(
        load(mixed.folder), IA3Config(target_modules=targets, feedforward_modules=[], task_type="CAUSAL_LM")
    )
    first, *_, last = step(model, 3)
    assert last < first


def test_transformers_own_saving_of_an_adapter(mixed: Case, tmp_path: Path) -> None:
    model = load(mixed.folder)
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = load(mixed.folder)
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert model.hf_quantizer.quantization_config.modules == MIXED


def test_a_peft_that_cannot_be_imported_is_said(
    mixed: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for absent, words in (("streamlap.loader.adapters", "cannot adapt compressed modules by name"), ("peft", "")):
        caplog.clear()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.delitem(sys.modules, "streamlap.loader.adapters")
            patch.setitem(sys.modules, absent, None)
            assert torch.equal(logits(load(mixed.folder)), logits(mixed.reference))
        assert words in caplog.text if words else not caplog.text


WITHOUT_STREAMLAP = """
import json

folder, adapter, out, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))
import torch
from transformers import AutoModelForCausalLM, QuantoConfig

tokens_BL = torch.arange(24).reshape(2, 12) * 7 % 96
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
seen = {"quanto": ""}
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, quantization_config=QuantoConfig("int8"))
except ValueError as error:
    seen["quanto"] = str(error)
if "peft" not in absent:
    from peft import PeftModel  # after the model
    by_its_own_name = AutoModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
    with torch.no_grad():
        torch.save(by_its_own_name(tokens_BL).logits, out + "/own.pt")
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(out + "/merged")
with torch.no_grad():
    torch.save(model(tokens_BL).logits, out + "/logits.pt")
if "peft" not in absent:
    again = AutoModelForCausalLM.from_pretrained(out + "/merged")
    with torch.no_grad():
        seen["same"] = torch.equal(again(tokens_BL).logits, model(tokens_BL).logits)
seen["streamlap"] = [name for name in sys.modules if name.split(".")[0] == "streamlap"]
print(json.dumps(seen))
"""


@pytest.mark.parametrize("absent", [[], ["peft"]], ids=["peft", "no-peft"])
def test_by_name_where_streamlap_is_not_installed(kinds: Case, tmp_path: Path, absent: list[str]) -> None:
    model = tuned(kinds.folder)
    model.save_pretrained(tmp_path / "adapter")
    printed = run_outside(
        WITHOUT_STREAMLAP, tmp_path, kinds.folder, tmp_path / "adapter", tmp_path, *absent, timeout=300
    )
    seen = json.loads(printed.splitlines()[-1])
    assert seen["streamlap"] == []
    assert "seen a QuantoConfig for a compressed folder; wanted none" in seen["quanto"]
    wanted_BLV = logits(kinds.reference) if absent else logits(model)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted_BLV, atol=1e-5, rtol=1e-5)
    if not absent:
        assert seen["same"]
        torch.testing.assert_close(torch.load(tmp_path / "own.pt"), wanted_BLV, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted_BLV, atol=1e-5, rtol=1e-5)
