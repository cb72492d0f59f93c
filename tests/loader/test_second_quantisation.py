"""A compressed folder and quantisation: refused while it loads, done after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import FAMILIES, Case, all_kinds, logits, make_case
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoRoundConfig,
    AwqConfig,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GPTQConfig,
    QuantoConfig,
)
from transformers.quantizers.auto import AutoHfQuantizer

import streamlap
from streamlap.loader.linears import StoredLinear


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("kinds"), FAMILIES["llama"](), all_kinds(8))


OTHERS = [
    BitsAndBytesConfig(load_in_4bit=True),
    QuantoConfig("int8"),
    GPTQConfig(bits=4),
    AwqConfig(bits=4),
    AutoRoundConfig(),
    FineGrainedFP8Config(),
    {"quant_method": "gptq", "bits": 4},
]


@pytest.mark.parametrize("given", OTHERS, ids=lambda given: type(given).__name__)
def test_another_quantization_config_is_refused_and_told_what_works(kinds: Case, given: Any) -> None:
    words = rf"seen a {type(given).__name__} for a compressed folder; wanted none.*torchao's quantize_\(model"
    for load in (AutoModelForCausalLM.from_pretrained, streamlap.load):
        with pytest.raises(ValueError, match=words):
            load(kinds.folder, quantization_config=given)


def test_other_folders_keep_transformers_own_rule() -> None:
    with pytest.raises(ValueError, match="quantized with QuantoConfig but you are passing a GPTQConfig"):
        AutoHfQuantizer.merge_quantization_configs({"quant_method": "quanto"}, GPTQConfig(bits=4))
    table = {"quant_method": "streamlap", "format_version": 2, "modules": {}}
    assert AutoHfQuantizer.merge_quantization_configs(table, None).modules == {}


def bytes_of(model: nn.Module) -> int:
    """What the parameters take, with what a quantised one consists of."""
    parts = (getattr(parameter, name) for parameter in model.parameters() for name in names_of(parameter))
    return sum(part.nbytes for part in parts)


def names_of(parameter: torch.Tensor) -> list[str]:
    flatten = getattr(parameter, "__tensor_flatten__", None)
    return flatten()[0] if flatten else ["data"]


def quantised(kinds: Case) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    model = AutoModelForCausalLM.from_pretrained(kinds.folder)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def test_torchao_quantises_the_parts_after_loading(kinds: Case) -> None:
    model = quantised(kinds)
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert sum(isinstance(part, StoredLinear) for part in model.modules()) == 8
    assert all(type(part.weight).__module__.startswith("torchao.") for part in linears)
    assert bytes_of(model) < 0.6 * bytes_of(kinds.reference)
    found_BLV, wanted_BLV = logits(model), logits(kinds.reference)
    assert not torch.equal(found_BLV, wanted_BLV)
    assert (found_BLV - wanted_BLV).norm() < 0.05 * wanted_BLV.norm()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
def test_lora_by_name_trains_on_a_quantised_model_and_is_not_merged_into_it(kinds: Case) -> None:
    names = [f"0.self_attn.{name}_proj" for name in "qkvo"]
    config = LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(quantised(kinds), config)
    tokens_BL = torch.arange(24).reshape(2, 12)
    model(tokens_BL, labels=tokens_BL).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"wanted plain numbers\. Merge before quantising"):
        model.merge_and_unload()


def test_a_model_quantised_after_loading_is_not_saved(kinds: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted plain numbers, as a streamlap folder holds no others\. Save before"):
        quantised(kinds).save_pretrained(tmp_path)
