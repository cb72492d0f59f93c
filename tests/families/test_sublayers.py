"""Sub-layers, run by the layer's own code: what they are, and how a row that does not describe a layer is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from torch import nn

from streamlap.errors import UnsupportedModel
from streamlap.families import standins
from streamlap.families.checks import difference
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.linears import ROLES, SUBLAYERS
from streamlap.families.stream import ModelStream
from streamlap.families.table import FAMILIES, Family
from streamlap.loader.forms import Dense, LowRank
from streamlap.loader.linears import LowRankLinear

LENGTH = 16


def layer_of(folder: Path, index: int = 1, dtype: str = "float32") -> StreamLayer:
    stream = ModelStream(folder, dtype=dtype)
    return stream.layer(index, stream.layer_kwargs(LENGTH)[index])


def states(batch: int = 2, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, LENGTH, width, generator=torch.Generator().manual_seed(0))


class Seen:
    """A collector that keeps what it is shown."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def update(self, x_TI: torch.Tensor) -> None:
        self.rows.append(x_TI.clone())


# --- roles -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_row_names_every_linear_of_a_layer_once(pico: MakeModel, family: Family) -> None:
    layer = layer_of(pico(family.model_type))
    linears = {path for path, module in layer.module.named_modules() if isinstance(module, nn.Linear)}
    assert set(family.paths) == linears
    assert len(family.paths) == len(linears)
    assert [family.role(family.path(role)) for role in family.roles] == list(family.roles)
    in_sublayers = [role for part in family.sublayers.values() for role in part.roles]
    assert in_sublayers == list(family.roles)
    assert [role for role in ROLES if role in family.roles] == in_sublayers
    assert set(ROLES) - set(in_sublayers) <= {"gate"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_bias_flag_gives_the_biases_that_it_says(pico: MakeModel, family: Family) -> None:
    config = ModelStream(pico(family.model_type)).config
    flags = {key for key, value in vars(config).items() if "bias" in key and isinstance(value, bool)}
    assert set(family.bias_flags.values()) == flags
    off = dict.fromkeys(flags, False)
    always = biased(ModelStream(pico(family.model_type, **off)))
    for flag in flags:
        said = {
            path
            for path in family.paths
            for start, name in family.bias_flags.items()
            if path.startswith(start) and name == flag
        }
        assert biased(ModelStream(pico(family.model_type, **off | {flag: True}))) - always == said


def biased(stream: ModelStream) -> set[str]:
    """Paths of the linears with a bias."""
    natives = [found for index in range(3) for found in stream.natives(index).items()]
    return {stream.family.path(role) for role, native in natives if native.bias}


def test_linears_that_read_the_same_have_their_dead_inputs_together() -> None:
    family = FAMILIES["llama"]
    assert family.readers("k") == ("q", "k", "v")
    assert family.readers("o") == ("o",)
    assert family.readers("gate") == ("gate", "up")
    assert family.dead_inputs("v", 1) == "1 dead input of self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
    assert family.dead_inputs("down", 3) == "3 dead inputs of mlp.down_proj"


# --- sub-layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_one_after_another_are_the_layer(pico: MakeModel, family: str, index: int) -> None:
    layer, x_BLD = layer_of(pico(family), index), states()
    modules = dict(layer.module.named_modules())
    between_BLD = x_BLD if layer.parallel else layer.run_sublayer("attention", x_BLD)
    if layer.parallel:
        torch.testing.assert_close(layer.in_sequence(x_BLD), layer(x_BLD), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(layer.run_sublayer("ffn", between_BLD), layer.in_sequence(x_BLD))
        assert torch.equal(layer.in_sequence(x_BLD), layer(x_BLD))
    for name, given_BLD in (("attention", x_BLD), ("ffn", between_BLD)):
        part = layer.family.sublayers[name]
        if not part.roles:
            continue
        input_BLD, middle_BLI = layer.sublayer_input(name, given_BLD), layer.sublayer_middle(name, given_BLD)
        sum_BLD = given_BLD + layer.added(name, layer.linear(part.writes)(middle_BLI))
        assert torch.equal(sum_BLD, layer.run_sublayer(name, given_BLD))
        collectors = {role: Seen() for role in part.roles}
        with layer.observed(collectors.items()):
            layer.run_sublayer(name, given_BLD)
        for role in part.reads:
            assert torch.equal(torch.stack(collectors[role].rows), input_BLD)
        assert torch.equal(torch.stack(collectors[part.writes].rows), middle_BLI)
    assert dict(layer.module.named_modules()) == modules


def test_a_sublayer_that_is_not_asked_for_is_not_run(pico: MakeModel) -> None:
    layer = layer_of(pico("llama"))
    collectors = {role: Seen() for role in layer.family.roles}
    with layer.observed(collectors.items()):
        layer.run_sublayer("ffn", states())
        layer.sublayer_input("attention", states())
    assert [role for role, seen in collectors.items() if seen.rows] == ["gate", "up", "down"]


def test_collectors_see_no_row_that_is_out(pico: MakeModel) -> None:
    layer, x_BLD, seen = layer_of(pico("llama")), states(), Seen()
    x_BLD[1, 3] = torch.nan
    with layer.observed([("gate", seen)]):
        y_BLD = layer.run_sublayer("ffn", x_BLD)
    assert [len(x_TI) for x_TI in seen.rows] == [LENGTH, LENGTH - 1]
    assert torch.equal(y_BLD.isnan().all(dim=-1), x_BLD.isnan().any(dim=-1))


def test_modules_are_put_back_where_a_forward_fails(pico: MakeModel) -> None:
    layer, x_BLD = layer_of(pico("llama")), states(width=31)
    modules = dict(layer.module.named_modules())
    for run in (layer.run_sublayer, layer.sublayer_input, layer.sublayer_middle):
        with pytest.raises(RuntimeError):
            run("ffn", x_BLD)
    assert dict(layer.module.named_modules()) == modules


def test_an_edit_says_its_role_and_form(pico: MakeModel) -> None:
    layer, x_BLD = layer_of(pico("llama", attention_bias=True)), states()
    native, dense = layer.native("v"), layer.linear("v")
    assert native == Dense((16, 32), bias=True) == layer.natives(("v", "o"))["v"]
    module = LowRankLinear.from_factors(torch.ones(16, 3), torch.ones(3, 32), torch.ones(16))
    edit = Edit(role="v", module=module, native=native, error=0.0)
    assert edit.form == LowRank((16, 32), bias=True, rank=3)
    before_BLD = layer(x_BLD)
    with layer.tried([edit]):
        tried_BLD = layer(x_BLD)
    assert layer.linear("v") is dense
    assert torch.equal(layer(x_BLD), before_BLD)
    layer.apply([edit])
    assert torch.equal(layer(x_BLD), tried_BLD)
    assert not torch.equal(tried_BLD, before_BLD)
    assert layer.native("v") == native


# --- rows that do not describe a layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_describes_its_layers(pico: MakeModel, family: str, dtype: str) -> None:
    for index in range(3):
        layer_of(pico(family), index, dtype).check_sublayers(states(), writes=True)


@pytest.mark.parametrize(
    ("model_type", "settings", "sequence", "sums"),
    [
        ("cohere2", {}, False, False),
        ("granite", {"residual_multiplier": 0.22}, True, False),
        ("granite", {"residual_multiplier": 1.0}, True, True),
        ("olmo2", {}, True, False),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_does_not_describe_its_layers_is_found_out(
    pico: MakeModel, monkeypatch: pytest.MonkeyPatch, model_type: str, settings: dict[str, object],
    sequence: bool, sums: bool, dtype: str,
) -> None:  # fmt: skip
    """A block whose sub-layers read the same input; a multiplier, and a norm, behind the last linear."""
    monkeypatch.setitem(FAMILIES, model_type, Family(model_type=model_type))
    layer = layer_of(pico(model_type, **settings), dtype=dtype)
    for writes, passes in ((False, sequence), (True, sums)):
        if passes:
            layer.check_sublayers(states(), writes)
            continue
        with pytest.raises(
            UnsupportedModel, match=rf"in {model_type}, .* differ by up to \d.*; wanted .* [Tt]ake "
        ) as caught:
            layer.check_sublayers(states(), writes)
        assert ("self_attn.o_proj" in str(caught.value)) == sequence


@pytest.mark.parametrize(
    "returns", [{"attention": lambda y_BLD: y_BLD}, {"ffn": lambda y_BLD: (y_BLD, None)}], ids=["attention", "ffn"]
)
def test_a_stand_in_of_another_shape_is_found_out(
    pico: MakeModel, monkeypatch: pytest.MonkeyPatch, returns: dict[str, Callable[[torch.Tensor], object]]
) -> None:
    monkeypatch.setattr(standins, "RETURNS", standins.RETURNS | returns)
    layer = layer_of(pico("llama"))
    with pytest.raises(
        UnsupportedModel, match=r"the layer of llama does not run while one .*Error: .*; wanted sub-layers"
    ):
        layer.check_sublayers(states(batch=3), writes=False)  # a tensor of two sequences unpacks as a pair


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no"), RuntimeError("CUDA error")])
def test_a_machine_that_fails_says_nothing_of_the_row(
    pico: MakeModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    layer = layer_of(pico("llama"))

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(layer.module, "forward", fail)
    with pytest.raises(type(error)) as caught:
        layer.check_sublayers(states(), writes=False)
    assert caught.value is error


def test_rows_that_are_out_prove_nothing(pico: MakeModel) -> None:
    layer, x_BLD = layer_of(pico("llama")), states()
    x_BLD[0, 3] = torch.nan
    layer.check_sublayers(x_BLD, writes=True)


def test_a_row_with_its_sublayers_in_another_order_is_found_out(
    pico: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = {name: SUBLAYERS[name] for name in ("ffn", "attention")}
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], sublayers=swapped))
    with pytest.raises(UnsupportedModel, match="ffn and attention one after another"):
        layer_of(pico("llama")).check_sublayers(states(), writes=False)


def test_a_row_with_another_last_linear_is_found_out(pico: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """gate in the place of down: what it is given has another width."""
    roles = ROLES | {"down": ROLES["gate"], "gate": ROLES["down"]}
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], roles=roles))
    with pytest.raises(UnsupportedModel):
        layer_of(pico("llama")).check_sublayers(states(), writes=True)


def test_a_difference_counts_beside_huge_channels() -> None:
    """And numbers that are NaN on one side only differ."""
    x_BLD = states().bfloat16()
    x_BLD[..., 0] = 3000.0
    other_BLD = x_BLD.clone()
    assert difference(other_BLD, x_BLD, x_BLD) is None
    other_BLD[0, 2, 5] += 40.0
    found = difference(other_BLD, x_BLD, x_BLD)
    assert found is not None
    assert found.reach == 3008.0 or found.reach == 3000.0
    assert 30.0 < found.largest < 50.0
    other_BLD = x_BLD.clone()
    other_BLD[0, 2] = torch.nan
    assert difference(other_BLD, x_BLD, x_BLD) is not None
    assert difference(other_BLD, other_BLD, x_BLD) is None
