"""vllm_plugin.py beside a vLLM that is not there: what it refuses. What ran in vLLM itself stands in docs/engines.md."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

PLUGIN = "streamlap.loader.vllm_plugin"
LINEAR = "vllm.model_executor.layers.linear"
QUANTIZATION = "vllm.model_executor.layers.quantization"
ROWS = {"model.layers.0.attn.q_proj": {"rank": 3}, "model.layers.1.mlp.up_proj": {"out": 4}}


class Base:
    """Whatever vLLM's classes do that the plugin leaves to them."""

    packed_modules_mapping: dict[str, list[str]] = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.processed = True


class Linear(nn.Module):
    """As vLLM builds one: it asks for its method, then the method for its weights."""

    tp_size, has_bias, skip_bias_add = 1, False, False

    def __init__(self, config: Any, prefix: str, outputs: list[int]) -> None:
        super().__init__()
        self.register_parameter("bias", None)
        self.method = config.get_quant_method(self, prefix)
        if hasattr(self.method, "create_weights"):
            self.method.create_weights(self, 8, outputs, 8, sum(outputs), torch.float32)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported beside the double; `stages` of it is how many processes the layers are divided between."""
    stages = SimpleNamespace(world_size=1)
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {"get_pp_group": lambda: stages},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        LINEAR: {name: type(name, (Base,), {}) for name in ("LinearMethodBase", "UnquantizedLinearMethod")}
        | {"LinearBase": Linear},
        QUANTIZATION: {"register_quantization_config": lambda name: lambda kind: kind},
        f"{QUANTIZATION}.base_config": {"QuantizationConfig": type("QuantizationConfig", (Base,), {})},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    made: Any = importlib.import_module(PLUGIN)
    yield SimpleNamespace(config=made.Compressed(dict(ROWS)), stages=stages, module=made)
    sys.modules.pop(PLUGIN, None)


def build(config: Any, layers: int, up: str = "up_proj") -> list[Linear]:
    outputs = {"attn.qkv_proj": [12, 4, 4], f"mlp.{up}": [6], "mlp.down_proj": [6]}
    return [
        Linear(config, f"model.layers.{index}.{name}", sizes)
        for index in range(layers)
        for name, sizes in outputs.items()
    ]


def test_rows_that_are_all_met_pass(plugin: Any) -> None:
    linears = build(plugin.config, 2)
    assert [type(linear.method).__name__ for linear in linears] == [
        "CompressedLinear", "PlainLinear", "PlainLinear", "PlainLinear", "CompressedLinear", "PlainLinear",
    ]  # fmt: skip
    linears[1].method.process_weights_after_loading(linears[1])
    assert linears[1].processed, "as vLLM does without the plugin"
    assert list(linears[4].load_weights([("weight", torch.zeros(4, 8))])) == ["compressed.parts.0.weight"]
    linears[4].method.process_weights_after_loading(linears[4])


@pytest.mark.parametrize(
    ("layers", "up", "seen"),
    [(2, "upward_proj", "'model.layers.1.mlp.up_proj'"), (0, "up_proj", "q_proj'.*2 of 2 rows")],
)
def test_a_row_that_no_linear_has_is_refused(plugin: Any, layers: int, up: str, seen: str) -> None:
    linears = [*build(plugin.config, layers, up), Linear(plugin.config, "lm_head", [6])]
    match = f"streamlap module .*{seen}.*wanted all"
    for linear in linears:
        with pytest.raises(ValueError, match=match):
            linear.method.process_weights_after_loading(linear)
        if hasattr(linear, "load_weights"):
            with pytest.raises(ValueError, match=match):
                list(linear.load_weights([("weight", torch.zeros(1))]))


def test_layers_of_another_process_are_not_missed(plugin: Any) -> None:
    plugin.stages.world_size = 2
    build(plugin.config, 1)
    plugin.config.check()
    plugin.config.modules["model.layers.0.mlp.gone_proj"] = {"rank": 1}
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.gone_proj': .* \(1 of 3 rows\)"):
        plugin.config.check()


def test_what_vllm_divides_or_has_no_linear_for_is_refused(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "tp_size", 2)
    with pytest.raises(ValueError, match="seen tensor_parallel_size = 2; wanted 1"):
        build(plugin.config, 1)
    with pytest.raises(ValueError, match="seen in a Identity of vLLM; wanted in a linear layer"):
        plugin.config.get_quant_method(nn.Identity(), "model.layers.1.mlp")
    table = {"quant_method": "streamlap", "format_version": 1, "modules": {"a": {"parts": 2}}}
    with pytest.raises(ValueError, match="linears that share a matrix"):
        plugin.module.Compressed.from_config(table)
