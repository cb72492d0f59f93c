"""modules.py: the factored linear, swapping modules by a table and back, names on disk."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from streamlap.modules import LowRankLinear, disk_name, merge_modules, swap_modules


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


def test_load_state_dict_takes_both_sets_of_names() -> None:
    source = nn.ModuleDict({"q": LowRankLinear(5, 7, 3, bias=True)})
    own = source.state_dict()
    for tensors in (own, {disk_name(name, ["q"]): tensor for name, tensor in own.items()}):
        module = nn.ModuleDict({"q": LowRankLinear(5, 7, 3, bias=True)})
        given = dict(tensors)
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
        ({"gate": {}}, "'gate'.*wanted 'rank', 'out' or 'in'"),
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
    swap_modules(mlp, {"gate": {"rank": 3, "out": 9}, "up": {"out": 9}, "down": {"in": 9}})
    x_TI = torch.randn(5, 8, dtype=torch.float64)
    narrow_TI = mlp(x_TI)
    merged = copy.deepcopy(mlp)
    merge_modules(merged, dense_shapes)
    assert {path: tuple(merged.get_submodule(path).weight.shape) for path in dense_shapes} == dense_shapes
    assert not any(isinstance(module, LowRankLinear) for module in merged.modules())
    torch.testing.assert_close(merged(x_TI), narrow_TI)
    merge_modules(mlp, dense_shapes, torch.float32)
    assert {mlp.get_submodule(path).weight.dtype for path in dense_shapes} == {torch.float32}


def test_disk_name_touches_the_up_factor_of_listed_paths_only() -> None:
    low_rank = ["layers.1.q_proj"]
    renamed = {"layers.1.q_proj.up.weight": "layers.1.q_proj.weight", "layers.1.q_proj.up.bias": "layers.1.q_proj.bias"}
    kept = ["layers.1.q_proj.down.weight", "layers.11.q_proj.up.weight", "layers.1.k_proj.up.weight", "up.weight"]
    assert {name: disk_name(name, low_rank) for name in renamed} == renamed
    assert [disk_name(name, low_rank) for name in kept] == kept
