"""forms.py: a form, its row and its module say the same, whichever way one goes; what no form can be is refused."""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from streamlap.loader.forms import (
    FORMS,
    MODULES,
    Dense,
    Form,
    LowRank,
    Pivoted,
    Removed,
    form_of,
    index_parameters,
    kind_of,
    read_row,
)
from streamlap.loader.linears import LowRankLinear, PivotedLinear, StoredLinear

PATH = "mlp.gate"
NATIVE = Dense((12, 8))
ROWS: dict[str, tuple[dict[str, int], Form]] = {
    "other output": ({"out": 9}, Dense((9, 8))),
    "other input": ({"in": 5}, Dense((12, 5))),
    "both narrower": ({"out": 9, "in": 5}, Dense((9, 5))),
    "factors": ({"rank": 3}, LowRank((12, 8), False, 3)),
    "narrow factors": ({"rank": 3, "out": 9, "in": 5}, LowRank((9, 5), False, 3)),
    "ordered": ({"pivots": 4}, Pivoted((12, 8), False, 4)),
    "narrow ordered": ({"pivots": 4, "out": 9, "in": 5}, Pivoted((9, 5), False, 4)),
    "folded": ({"pivots": 4, "groups": 1}, Pivoted((12, 8), False, 4, 1)),
    "folded in groups": ({"pivots": 4, "groups": 2}, Pivoted((12, 8), False, 4, 2)),
    "narrow, in groups": ({"pivots": 3, "groups": 3, "out": 9, "in": 5}, Pivoted((9, 5), False, 3, 3)),
}
"""A row in place of `NATIVE` and the form that it is, neither with a bias."""
every_row = pytest.mark.parametrize(("row", "form"), ROWS.values(), ids=ROWS)
every_form = pytest.mark.parametrize("form", [NATIVE, *(form for _, form in ROWS.values())], ids=["native", *ROWS])


def test_no_form_is_left_out() -> None:
    """A new one needs its rows above."""
    assert {type(form) for _, form in ROWS.values()} | {Removed} == {Dense, *FORMS} == set(Form.__subclasses__())
    assert set(MODULES) == set(StoredLinear.__subclasses__())
    assert set(MODULES.values()) == set(FORMS)


@every_row
@pytest.mark.parametrize(("native_bias", "added"), [(False, False), (True, False), (False, True)])
def test_from_row_to_form_and_back(row: dict[str, int], form: Form, native_bias: bool, added: bool) -> None:
    native, row = replace(NATIVE, bias=native_bias), row | ({"bias": 1} if added else {})
    found = read_row(PATH, row, native)
    assert found == replace(form, bias=native_bias or added)
    assert found.row(native) == row


def test_a_bias_alone_is_a_row_and_the_native_form_is_none() -> None:
    assert read_row(PATH, {"bias": 1}, NATIVE) == replace(NATIVE, bias=True)
    assert replace(NATIVE, bias=True).row(NATIVE) == {"bias": 1}
    assert NATIVE.row(NATIVE) == replace(NATIVE, bias=True).row(replace(NATIVE, bias=True)) == {}
    assert read_row(PATH, {"out": 12, "in": 8}, NATIVE) == NATIVE


@every_form
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_form_to_module_and_back(form: Form, bias: bool, dtype: torch.dtype) -> None:
    form = replace(form, bias=bias)
    for device in ("meta", "cpu"):
        module = form.build(device, dtype)
        assert form_of(module) == form
        assert {(tensor.device.type, tensor.dtype) for tensor in module.parameters()} == {(device, dtype)}
    assert module(torch.zeros(2, form.shape[1], dtype=dtype)).shape == (2, form.shape[0])
    assert form_of(copy.deepcopy(module)) == form


def test_a_module_made_of_parts_has_its_form() -> None:
    base_RI, rest_NR, bias_O = torch.zeros(4, 8), torch.zeros(8, 4), torch.zeros(12)
    assert form_of(LowRankLinear.from_factors(rest_NR, base_RI, None)) == LowRank((8, 8), False, 4)
    assert form_of(PivotedLinear.from_parts(base_RI, rest_NR, bias_O, torch.arange(12))) == Pivoted((12, 8), True, 4)
    assert form_of(PivotedLinear.from_parts(base_RI, rest_NR, None, groups=2)) == Pivoted((12, 8), False, 4, 2)


@pytest.mark.parametrize("form", [LowRank((12, 8), True, 3), Pivoted((12, 8), True, 4, 2), Dense((9, 8), True)])
def test_a_class_that_a_library_derives_has_the_form_of_its_parent(form: Form) -> None:
    """As torch's fully_shard and parametrize make them in place."""
    module = form.build()
    module.__class__ = type(f"Derived{type(module).__name__}", (type(module),), {})
    assert form_of(module) == form


@every_form
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_parameters_are_the_stored_numbers(form: Form, bias: bool, itemsize: int) -> None:
    form = replace(form, bias=bias)
    module = form.build("meta")
    stored = sum(parameter.numel() for parameter in module.parameters())
    order_bytes = sum(buffer.nbytes for buffer in module.buffers())
    assert order_bytes == (4 * form.shape[0] if isinstance(form, Pivoted) and form.groups is None else 0)
    whole, part = divmod(order_bytes, itemsize)
    assert form.parameters(itemsize) == stored + whole + (part > 0)


def test_an_order_counts_by_its_bytes_rounded_up() -> None:
    assert [index_parameters(9, itemsize) for itemsize in (1, 2, 4, 8)] == [36, 18, 9, 5]


@every_row
def test_kinds_as_inspect_calls_them(row: dict[str, int], form: Form) -> None:
    kind = "low_rank" if "rank" in row else "pivoted" if "pivots" in row else "pruned"
    assert kind_of(form, NATIVE) == kind
    assert kind_of(replace(form, bias=True), NATIVE) == kind
    assert kind_of(NATIVE, NATIVE) == kind_of(replace(NATIVE, bias=True), NATIVE) == "dense"


@pytest.mark.parametrize("native", [Dense((6, 4)), Dense((4, 6)), Dense((5, 5)), Dense((1, 1))])
def test_a_carrier_never_has_the_dense_shape(native: Dense) -> None:
    """Every number that might be in a row: either it is refused or what it makes cannot be loaded as the dense layer."""
    numbers, read = range(8), 0
    rows = [{"rank": rank, "out": out, "in": width} for rank in numbers for out in numbers for width in numbers]
    rows += [
        {"pivots": pivots, "out": out} | ({"groups": groups} if groups else {})
        for pivots, out, groups in itertools.product(numbers, numbers, (None, *numbers))
    ]
    for row in rows:
        try:
            form = read_row(PATH, row, native)
        except ValueError:
            continue
        module, read = form.build("meta"), read + 1
        assert isinstance(module, StoredLinear)
        carrier = module.get_parameter(f"{module.carrier}.weight")
        assert tuple(carrier.shape) not in (form.shape, native.shape), row
        assert module(torch.zeros(2, form.shape[1], device="meta")).shape == (2, form.shape[0]), row
    assert (read > 0) is (native.shape != (1, 1))


ANY = "at most one of 'rank' and 'pivots' (it may have 'groups'), and 'out', 'in' or 'bias'; or 'removed' alone."


@pytest.mark.parametrize(
    ("row", "seen", "wanted"),
    [
        ({}, "{}", ANY),
        ({"rnk": 2}, "{'rnk': 2}", ANY),
        ({"rank": 2, "pivots": 2}, "{'pivots': 2, 'rank': 2}", ANY),
        ({"rank": 2, "groups": 2}, "{'groups': 2, 'rank': 2}", ANY),
        ({"groups": 2, "out": 4}, "{'groups': 2, 'out': 4}", ANY),
        ({"rank": None}, "rank = None", "an integer 1..7"),
        ({"rank": 0}, "rank = 0", "an integer 1..7"),
        ({"rank": 8}, "rank = 8", "an integer 1..7"),
        ({"rank": 5, "in": 5}, "rank = 5", "an integer 1..4"),
        ({"rank": 2.0}, "rank = 2.0", "an integer 1..7"),
        ({"rank": True}, "rank = True", "an integer 1..7"),
        ({"rank": "2"}, "rank = '2'", "an integer 1..7"),
        ({"rank": [2]}, "rank = [2]", "an integer 1..7"),
        ({"pivots": None}, "pivots = None", "an integer 1..8"),
        ({"pivots": 9}, "pivots = 9", "an integer 1..8"),
        ({"pivots": 8, "out": 8}, "pivots = 8", "an integer 1..7"),
        ({"pivots": -1}, "pivots = -1", "an integer 1..8"),
        ({"pivots": {}}, "pivots = {}", "an integer 1..8"),
        ({"pivots": 4, "groups": None}, "groups = None", "an integer 1..12"),
        ({"pivots": 4, "groups": 0}, "groups = 0", "an integer 1..4"),
        ({"pivots": 7, "groups": 6}, "groups = 6", "an integer 1..5"),
        ({"pivots": 4, "groups": 2.0}, "groups = 2.0", "an integer 1..4"),
        ({"pivots": 4, "groups": 3}, "groups = 3", "a divisor of 4 and 8"),
        ({"pivots": 6, "groups": 2, "out": 11}, "groups = 2", "a divisor of 6 and 5"),
        ({"out": None}, "out = None", "an integer 1..12"),
        ({"out": 13}, "out = 13", "an integer 1..12"),
        ({"out": 0, "rank": 2}, "out = 0", "an integer 1..12"),
        ({"in": None}, "in = None", "an integer 1..8"),
        ({"in": 9}, "in = 9", "an integer 1..8"),
        ({"in": "5", "rank": 2}, "in = '5'", "an integer 1..8"),
        ({"removed": 1, "out": 9}, "{'out': 9, 'removed': 1}", ANY),
        ({"removed": 1, "bias": 1}, "{'bias': 1, 'removed': 1}", ANY),
        ({"removed": 1, "rank": 2}, "{'rank': 2, 'removed': 1}", ANY),
        ({"removed": 0}, "removed = 0", "an integer 1..1"),
        ({"removed": True}, "removed = True", "an integer 1..1"),
        ({"bias": None}, "bias = None", "an integer 1..1"),
        ({"bias": 0}, "bias = 0", "an integer 1..1"),
        ({"bias": True}, "bias = True", "an integer 1..1"),
    ],
)
def test_what_no_form_can_be_is_refused(row: Mapping[str, int], seen: str, wanted: str) -> None:
    with pytest.raises(ValueError, match="streamlap module") as error:
        read_row(PATH, row, NATIVE)
    assert str(error.value) == f"streamlap module 'mlp.gate': seen {seen}; wanted {wanted}"


@every_row
def test_a_second_bias_is_refused(row: dict[str, int], form: Form) -> None:
    with pytest.raises(ValueError, match=r"'mlp.gate': seen a bias; wanted none, as the dense linear has its own"):
        read_row(PATH, row | {"bias": 1}, replace(NATIVE, bias=True))


@pytest.mark.parametrize(
    "row",
    [
        {"out_heads": 2, "head_dim": 3},
        {"in_heads": 4, "head_dim": 1, "bias": 1},
        {"out_heads": 2, "head_dim": 3, "out": 8},
        {"out_heads": 2, "head_dim": 3, "rank": 3},
    ],
)
def test_a_head_cut_of_version_0_4_is_refused(row: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="streamlap module") as error:
        read_row(PATH, row, NATIVE)
    seen = f"seen {dict(sorted(row.items()))}; wanted {ANY} Version 0.4 alone reads cuts of value heads."
    assert str(error.value) == f"streamlap module 'mlp.gate': {seen}"


@pytest.mark.parametrize("bias", [False, True])
def test_a_removed_linear_gives_zeros_and_stores_one_number(bias: bool) -> None:
    """A bias goes with it."""
    native = replace(NATIVE, bias=bias)
    form = read_row(PATH, {"removed": 1}, native)
    assert form == Removed((12, 8))
    assert form.row(native) == {"removed": 1}
    assert kind_of(form, native) == "removed"
    module = form.build(dtype=torch.bfloat16)
    assert form_of(copy.deepcopy(module)) == form
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == {"weight": (1, 1)}
    assert [form.parameters(itemsize) for itemsize in (1, 2, 4)] == [1, 1, 1]
    x_BLI = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(module(x_BLI), torch.zeros(2, 3, 12, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="seen a removed linear of one number"):
        read_row(PATH, {"removed": 1}, Dense((1, 1)))


def test_a_message_stays_short() -> None:
    for row in ({"k" * 9999: 1}, {"rank": "7" * 9999}, dict.fromkeys(map(str, range(9999)), 1), {"rank": 10**4000}):
        with pytest.raises(ValueError, match="streamlap module ") as error:
            read_row("p" * 9999, row, NATIVE)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_plain_linear_is_dense(device: str) -> None:
    assert form_of(nn.Linear(8, 12, device=device)) == Dense((12, 8), True)
    assert form_of(nn.Linear(8, 12, bias=False, device=device)) == Dense((12, 8))
