"""linears.py and modules.py: what stands in place of a linear, swapping by a table and back, names on disk."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from streamlap.loader.forms import Dense, form_of
from streamlap.loader.linears import LowRankLinear, PivotedLinear, StoredLinear
from streamlap.loader.modules import carriers, dense_linear, disk_name, merge_modules, swap_modules


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), 8 -> 12 -> 8, with a bias on down as the hard case for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 12, bias=False)
        self.up = nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8, bias=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


@pytest.fixture
def mlp() -> GatedMLP:
    torch.manual_seed(0)
    return GatedMLP().double()


@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_linear_is_its_merged_matrix(bias: bool) -> None:
    torch.manual_seed(0)
    up_OR, down_RI, bias_O = (torch.randn(shape, dtype=torch.float64) for shape in [(7, 3), (3, 5), (7,)])
    module = LowRankLinear.from_factors(up_OR, down_RI, bias_O if bias else None)
    x_BLI = torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x_BLI), x_BLI @ (up_OR @ down_RI).T + (bias_O if bias else 0))
    assert module.up.weight.data_ptr() == up_OR.data_ptr()
    assert module.down.weight.data_ptr() == down_RI.data_ptr()
    assert (module.in_features, module.out_features, module.rank) == (5, 7, 3)
    assert sorted(module.state_dict()) == ["down.weight", *(["up.bias"] if bias else []), "up.weight"]


def test_merged_rounds_once() -> None:
    torch.manual_seed(0)
    up_OR, down_RI = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(LowRankLinear.from_factors(up_OR, down_RI, None).merged(), up_OR @ down_RI)
    up_OR, down_RI = up_OR.bfloat16(), down_RI.bfloat16()
    half = LowRankLinear.from_factors(up_OR, down_RI, None)
    assert torch.equal(half.merged(torch.float32), up_OR.float() @ down_RI.float())
    assert torch.equal(half.merged(), (up_OR.float() @ down_RI.float()).bfloat16())


def pivoted(
    order: bool = True, groups: int = 1, bias: bool = True, dtype: torch.dtype = torch.float64
) -> PivotedLinear:
    """4 of 10 rows, 6 columns."""
    torch.manual_seed(0)
    base_RI, rest_NR, bias_O = (torch.randn(shape, dtype=dtype) for shape in [(4, 6), (6, 4), (10,)])
    return PivotedLinear.from_parts(
        base_RI, rest_NR, bias_O if bias else None, torch.randperm(10) if order else None, groups
    )


def made(row: dict[str, int], bias: bool = False, dtype: torch.dtype = torch.float64) -> StoredLinear:
    """What a row makes of a linear 12 -> 10 with random numbers."""
    torch.manual_seed(0)
    root = nn.ModuleDict({"q": nn.Linear(12, 10, bias)})
    swap_modules(root, {"q": row})
    module = root["q"].to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        for buffer in module.buffers():
            buffer.copy_(torch.randperm(10))
    assert isinstance(module, StoredLinear)
    return module


ROWS: dict[str, dict[str, int]] = {
    "factors": {"rank": 3},
    "ordered": {"pivots": 4},
    "folded": {"pivots": 4, "groups": 1},
    "folded in groups": {"pivots": 4, "groups": 2},
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


@pytest.mark.parametrize("groups", [1, 2])
def test_pivoted_rows_come_group_by_group(groups: int) -> None:
    module = pivoted(order=False, groups=groups, bias=False)
    base_RI, rest_NR = module.base.weight, module.rest.weight
    others_NI = rest_NR @ base_RI
    wanted = {1: [base_RI, others_NI], 2: [base_RI[:2], others_NI[:3], base_RI[2:], others_NI[3:]]}[groups]
    torch.testing.assert_close(module.merged(), torch.cat(wanted))
    assert module.base.weight.data_ptr() == base_RI.data_ptr()
    assert sorted(module.state_dict()) == ["base.weight", "rest.weight"]


def test_a_stored_order_says_where_each_output_comes_from() -> None:
    module = pivoted()
    assert module.order is not None
    assert module.order.dtype == torch.int32
    z_OI = torch.cat([module.base.weight, module.rest.weight @ module.base.weight])
    for output, source in enumerate(module.order.tolist()):
        torch.testing.assert_close(module.merged()[output], z_OI[source])
    x_TI = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x_TI), x_TI @ module.merged().T + module.bias)


@pytest.mark.parametrize(
    ("order_O", "groups"), [(None, 3), (torch.arange(10), 2), (torch.zeros(10), 1), (torch.arange(9), 1)]
)
def test_parts_that_do_not_fit_are_refused(order_O: torch.Tensor | None, groups: int) -> None:
    with pytest.raises(ValueError, match=r"seen base \(4, 6\), rest \(6, 4\).*wanted"):
        PivotedLinear.from_parts(torch.zeros(4, 6), torch.zeros(6, 4), None, order_O, groups)


@every_row
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_is_its_dense_linear(row: dict[str, int], bias: bool) -> None:
    module = made(row, bias)
    dense = dense_linear(module, Dense((10, 12), bias))
    assert (dense.bias is not None) == bias
    x_BLI = torch.randn(2, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x_BLI), dense(x_BLI))
    assert (module.out_features, module.in_features) == (10, 12)
    assert form_of(module).row(Dense((10, 12), bias)) == row
    assert form_of(module).row(Dense((11, 13), bias)) == {**row, "out": 10, "in": 12}
    assert dense_linear(module, Dense((10, 12), bias), torch.float32).weight.dtype == torch.float32


@every_row
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_takes_a_product_and_keeps_its_kind(row: dict[str, int], rank: int, bias: bool) -> None:
    module = made(row, bias)
    left_OS, right_SI, bias_O = (torch.randn(size, dtype=torch.float64) for size in [(10, rank), (rank, 12), (10,)])
    new = module.plus(left_OS, right_SI, bias_O if bias else None)
    assert type(new) is type(module)
    assert form_of(new).rank == module.rank + rank
    x_BLI = torch.randn(2, 4, 12, dtype=torch.float64)
    wanted_BLO = x_BLI @ (module.merged() + left_OS @ right_SI).T + (bias_O if bias else 0)
    torch.testing.assert_close(new(x_BLI), wanted_BLO)
    assert not any(parameter.requires_grad for parameter in new.parameters())
    form_of(new).check("q")


@every_row
def test_a_product_that_does_not_pay_in_a_form_makes_it_dense(row: dict[str, int]) -> None:
    module = made(row, bias=True, dtype=torch.float32)
    left_OS, right_SI, bias_O = torch.randn(10, 6), torch.randn(6, 12), torch.randn(10)
    new = module.plus(left_OS, right_SI, bias_O)
    assert type(new) is nn.Linear
    torch.testing.assert_close(new.weight, nn.Parameter(module.merged() + left_OS @ right_SI), atol=1e-5, rtol=1e-5)
    assert torch.equal(new.bias, bias_O)


def test_a_pivoted_matrix_takes_in_only_rows_that_its_pivots_lack() -> None:
    """Nothing, a product inside the span of its pivots, and one of two columns of which one is a multiple of the other."""
    module = made({"pivots": 4})
    assert isinstance(module, PivotedLinear)
    right_SI, column_O1 = torch.randn(2, 12, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)
    inside_OS = module.merged() @ torch.linalg.pinv(module.base.weight)[:, :2]
    for left_OS, added in [
        (torch.zeros(10, 2, dtype=torch.float64), 0),
        (inside_OS.detach(), 0),
        (torch.cat((column_O1, 3 * column_O1), 1), 1),
    ]:
        new = module.plus(left_OS, right_SI, None)
        assert form_of(new).own == {"pivots": 4 + added}
        torch.testing.assert_close(new.merged(), module.merged() + left_OS @ right_SI)


@every_row
def test_every_kind_compiles_exports_and_runs_narrow(row: dict[str, int]) -> None:
    module = made(row, bias=True, dtype=torch.float32)
    x_BLI = torch.randn(2, 4, 12)
    wanted = module(x_BLI)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x_BLI), wanted)
    torch.testing.assert_close(torch.export.export(module, (x_BLI,)).module()(x_BLI), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = module(x_BLI)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wanted, atol=0.2, rtol=0.05)


@every_row
def test_gradients_of_every_kind(row: dict[str, int]) -> None:
    module = made(row, bias=True).requires_grad_()
    x_TI = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x_TI,))
    module(x_TI).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_an_order_outlives_every_cast() -> None:
    module = pivoted(dtype=torch.float32)
    wanted = module.order
    assert wanted is not None
    for cast in (module.half(), module.to(torch.bfloat16), module.double(), copy.deepcopy(module)):
        assert cast.order is not None
        assert cast.order.dtype == torch.int32
        assert torch.equal(cast.order, wanted)


@every_row
def test_load_state_dict_takes_both_sets_of_names(row: dict[str, int]) -> None:
    source = nn.ModuleDict({"q": made(row, bias=True)})
    own = source.state_dict()
    renamed = {disk_name(name, carriers(source)): tensor for name, tensor in own.items()}
    assert {"q.weight", "q.bias"} <= renamed.keys()
    for tensors in (own, renamed):
        root = nn.ModuleDict({"q": nn.Linear(12, 10, dtype=torch.float64)})
        swap_modules(root, {"q": row})
        module, given = root, dict(tensors)
        module.load_state_dict(given)
        assert given.keys() == tensors.keys()
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in own.items())


def test_swap_modules_builds_what_the_table_says(mlp: GatedMLP) -> None:
    gate, down = mlp.gate, mlp.down
    mlp.bfloat16().to("meta")
    replaced = swap_modules(mlp, {"gate": {"rank": 3, "out": 9}, "up": {"out": 9}, "down": {"in": 9, "rank": 4}})
    assert list(replaced) == ["gate", "up", "down"]
    assert (replaced["gate"], replaced["down"]) == (gate, down)
    shapes = {name: tuple(tensor.shape) for name, tensor in mlp.state_dict().items() if "norm" not in name}
    assert shapes == {
        "gate.down.weight": (3, 8),
        "gate.up.weight": (9, 3),
        "up.weight": (9, 8),
        "down.down.weight": (4, 9),
        "down.up.weight": (8, 4),
        "down.up.bias": (8,),
    }
    assert {(str(t.device), t.dtype) for t in mlp.state_dict().values()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"gate.inner": {"rank": 2}}, "'gate.inner'.*no such module"),
        ({"norm": {"rank": 2}}, "'norm'.*LayerNorm"),
        ({"gate": {}}, "'gate'.*wanted at most one of 'rank' and 'pivots'"),
        ({"gate": {"rank": 2, "pivots": 2}}, "'gate'.*wanted at most one of"),
        ({"gate": {"groups": 2}}, "'gate'.*wanted at most one of"),
        ({"gate": {"rank": 2, "groups": 2}}, "'gate'.*wanted at most one of"),
        ({"gate": {"groups": 2, "out": 4}}, "'gate'.*wanted at most one of"),
        ({"gate": {"pivots": 9}}, r"pivots = 9.*1\.\.8"),
        ({"down": {"pivots": 8}}, r"pivots = 8.*1\.\.7"),
        ({"gate": {"pivots": 6, "groups": 4}}, "groups = 4.*divisor of 6 and 6"),
        ({"gate": {"pivots": 6, "groups": 0}}, r"groups = 0.*1\.\.6"),
        ({"gate": {"bias": 2}}, r"bias = 2.*1\.\.1"),
        ({"gate": {"bias": True}}, "bias = True.*integer"),
        ({"down": {"bias": 1}}, "'down'.*seen a bias.*has its own"),
        ({"gate": {"rnk": 2}}, "'gate'.*rnk"),
        ({"gate": {"rank": 0}}, r"rank = 0.*1\.\.7"),
        ({"gate": {"rank": 8}}, r"rank = 8.*1\.\.7"),
        ({"gate": {"rank": 2.0}}, r"rank = 2\.0.*integer"),
        ({"gate": {"rank": True}}, "rank = True.*integer"),
        ({"gate": {"rank": "2"}}, "rank = '2'.*integer"),
        ({"gate": {"out": 13}}, r"out = 13.*1\.\.12"),
        ({"down": {"in": 13}}, r"in = 13.*1\.\.12"),
        ({"down": {"in": 6, "rank": 6}}, r"rank = 6.*1\.\.5"),
        ({"down": {"in": "6", "rank": 2}}, "in = '6'.*integer"),
    ],
)
def test_swap_modules_refuses_and_leaves_the_model_alone(
    mlp: GatedMLP, table: dict[str, Mapping[str, int]], words: str
) -> None:
    before = dict(mlp.named_modules())
    with pytest.raises(ValueError, match=words):
        swap_modules(mlp, {"up": {"out": 4}, **table})
    assert dict(mlp.named_modules()) == before


def test_merge_modules_is_the_way_back(mlp: GatedMLP) -> None:
    dense_shapes = {"gate": (12, 8), "up": (12, 8), "down": (8, 12)}
    natives = {path: Dense(shape) for path, shape in dense_shapes.items()}
    swap_modules(mlp, {"gate": {"rank": 3, "out": 9}, "up": {"out": 9}, "down": {"in": 9}})
    x_TI = torch.randn(5, 8, dtype=torch.float64)
    narrow_TI = mlp(x_TI)
    merged = copy.deepcopy(mlp)
    merge_modules(merged, natives)
    assert {path: tuple(merged.get_submodule(path).weight.shape) for path in dense_shapes} == dense_shapes
    assert not any(isinstance(module, LowRankLinear) for module in merged.modules())
    torch.testing.assert_close(merged(x_TI), narrow_TI)
    merge_modules(mlp, natives, torch.float32)
    assert {mlp.get_submodule(path).weight.dtype for path in dense_shapes} == {torch.float32}


def test_new_biases_and_narrow_outputs_merge_too() -> None:
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)).double()
    shapes = {"0": (12, 8), "1": (8, 12)}
    swap_modules(root, {"0": {"pivots": 3, "out": 8}, "1": {"in": 8, "bias": 1}})
    x_TI = torch.randn(5, 8, dtype=torch.float64)
    wanted_TO = root(x_TI)
    merge_modules(root, {path: Dense(shape) for path, shape in shapes.items()})
    assert {path: tuple(root.get_submodule(path).weight.shape) for path in shapes} == shapes
    assert root[1].bias is not None
    torch.testing.assert_close(root(x_TI), wanted_TO)


def test_disk_name_touches_the_carrier_of_listed_paths_only() -> None:
    low_rank = {"layers.1.q_proj": "up", "layers.1.o_proj": "base"}
    renamed = {"layers.1.q_proj.up.weight": "layers.1.q_proj.weight", "layers.1.q_proj.up.bias": "layers.1.q_proj.bias"}
    renamed["layers.1.o_proj.base.weight"] = "layers.1.o_proj.weight"
    kept = ["layers.1.q_proj.down.weight", "layers.11.q_proj.up.weight", "layers.1.k_proj.up.weight", "up.weight"]
    kept += [
        "layers.1.o_proj.rest.weight",
        "layers.1.o_proj.order",
        "layers.1.o_proj.bias",
        "layers.1.o_proj.up.weight",
    ]
    assert {name: disk_name(name, low_rank) for name in renamed} == renamed
    assert [disk_name(name, low_rank) for name in kept] == kept
