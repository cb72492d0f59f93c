"""side_by_side.py: what an engine computes as one, from names and rows on disk. What ran in vLLM stands in docs/engines.md."""

import pytest
import torch
from torch import nn

from streamlap.loader.forms import Dense, LowRank, Pivoted, Removed, form_of
from streamlap.loader.modules import carriers, disk_name
from streamlap.loader.side_by_side import SideBySide, forms_at, paths_of

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
PATHS = ["layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.0.attn.v_proj"]
ROWS = {PATHS[0]: {"rank": 3}, PATHS[1]: {"pivots": 2}}


def test_a_merged_linear_has_the_paths_of_its_parts() -> None:
    assert paths_of("layers.0.attn.qkv_proj", MERGED) == PATHS
    assert paths_of("layers.0.attn.o_proj", MERGED) == ["layers.0.attn.o_proj"]
    assert paths_of("qkv_proj", MERGED) == ["q_proj", "k_proj", "v_proj"]


def test_each_part_has_the_form_of_its_row() -> None:
    forms = forms_at(PATHS, {**ROWS, "another": {"rank": 1}}, 8, [12, 4, 4], bias=True)
    assert forms == [LowRank((12, 8), True, 3), Pivoted((4, 8), True, 2), Dense((4, 8), True)]
    assert forms_at(["fused"], {"fused": {"rank": 3}}, 8, [6, 6], bias=False) == [LowRank((12, 8), False, 3)]
    assert forms_at(["a", "b"], {"a": {"out": 4}, "b": {"out": 4}}, 8, [6, 6], bias=False) == 2 * [Dense((4, 8))]
    assert forms_at(["o"], {"o": {"removed": 1}}, 8, [6], bias=False) == [Removed((6, 8))]


@pytest.mark.parametrize(
    ("paths", "rows", "outputs", "wanted"),
    [
        (["a", "b"], {"a": {"out": 4}}, [6, 6], r"seen outputs of \[4, 6\]; wanted \[6, 6\], or equal ones"),
        (["a", "b"], {"a": {"out": 4}, "b": {"out": 4}}, [6, 8], r"seen outputs of \[4, 4\]; wanted \[6, 8\]$"),
        (
            ["q", "k", "v"],
            {name: {"out": 4} for name in "qkv"},
            [8, 8, 8],
            r"seen outputs of \[4, 4, 4\]; wanted \[8, 8, 8\]$",
        ),
        (["fused"], {"fused": {"out": 5}}, [6, 6], r"seen outputs of \[5\]"),
        (["a", "b"], {}, [6, 6, 6], "seen 2; wanted one for each"),
        (["a"], {"a": {"rotated": 1}}, [6], "streamlap module 'a': seen {'rotated': 1}"),
    ],
)
def test_what_the_engine_would_cut_wrongly_is_refused(
    paths: list[str], rows: dict[str, dict[str, int]], outputs: list[int], wanted: str
) -> None:
    with pytest.raises(ValueError, match=wanted):
        forms_at(paths, rows, 8, outputs, bias=False)


def pair() -> tuple[nn.ModuleList, SideBySide]:
    """The linears of `ROWS` and a dense one with random weights, and what is to be loaded from them."""
    torch.manual_seed(0)
    forms = forms_at(PATHS, ROWS, 8, [12, 4, 4], bias=True)
    return nn.ModuleList(form.build() for form in forms), SideBySide(PATHS, forms, "cpu", torch.float32)


def on_disk(part: nn.Module) -> dict[str, torch.Tensor]:
    names = carriers(nn.ModuleDict({"part": part}))
    return {disk_name(f"part.{name}", names).removeprefix("part."): t for name, t in part.state_dict().items()}


@pytest.mark.parametrize("shards", [("q", "k", "v"), (0, 1, 2)])
def test_what_is_loaded_by_names_on_disk_computes_the_same(shards: tuple[str | int, ...]) -> None:
    source, target = pair()
    filled = set()
    for shard, part in reversed(list(zip(shards, source, strict=True))):
        filled |= {target.load(leaf, shard, tensor) for leaf, tensor in on_disk(part).items()}
    target.check()
    assert filled == set(target.state_dict())
    assert [form_of(part) for part in target.parts] == [form_of(part) for part in source]
    x_BI = torch.randn(5, 8)
    torch.testing.assert_close(target(x_BI), torch.cat([part(x_BI) for part in source], -1), rtol=0, atol=0)


def test_a_tensor_that_is_missing_wrong_or_nowhere_is_refused() -> None:
    source, target = pair()
    tensors = on_disk(source[0])
    with pytest.raises(ValueError, match=r"seen weight of shape \(2, 2\) in the folder; wanted \(12, 3\)"):
        target.load("weight", "q", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="seen 'scale' in the folder"):
        target.load("scale", "q", torch.zeros(1))
    for shard in (None, "x", 3):
        with pytest.raises(ValueError, match="wanted one of each"):
            target.load("weight", shard, tensors["weight"])
    target.load("weight", "q", tensors["weight"])
    with pytest.raises(ValueError, match=r"seen no parts.0.down.weight, .*parts.1.order"):
        target.check()
    for shard, part in zip("qkv", source, strict=True):
        for leaf, tensor in on_disk(part).items():
            target.load(leaf, shard, torch.zeros_like(tensor) if leaf == "order" else tensor)
    with pytest.raises(ValueError, match="no permutation"):
        target.check()
