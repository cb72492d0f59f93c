"""Statistics that say little or nothing: singular, empty, constant ones; dead inputs; factors that their dtype cannot hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from picos import VOCABULARY
from safetensors.torch import load_file, save_file

import streamlap
from streamlap.errors import CheckpointError, NumericalError
from streamlap.linalg.anchor import anchored, root
from streamlap.linalg.gram import DAMPING, MOST_DAMPING, Gram
from streamlap.linalg.lowrank import eigh
from streamlap.linalg.moments import Moments
from streamlap.linalg.obs import removals
from streamlap.linalg.storage import as_stored, balanced
from streamlap.linalg.subspace import refit, subspace, two_factors
from streamlap.methods import AttentionAnchored, AttentionGroups, FfnAnchored
from streamlap.recipe import Recipe

SIZE = 24


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def indefinite(least: float) -> torch.Tensor:
    """A symmetric matrix of mean diagonal 1 with an eigenvalue `least`."""
    basis_II, _ = torch.linalg.qr(normal(SIZE, SIZE))
    values_I = torch.full((SIZE,), (SIZE - least) / (SIZE - 1), dtype=torch.float64)
    values_I[0] = least
    return (basis_II * values_I) @ basis_II.T


def rows(kind: str) -> torch.Tensor:
    """Tokens [T, I] of which a Gram is made."""
    return {
        "few": normal(5, SIZE),
        "one": normal(1, SIZE),
        "none": torch.zeros(3, SIZE, dtype=torch.float64),
        "equal": normal(1, SIZE).expand(200, SIZE),
        "one huge direction": normal(200, SIZE) + 1e6 * normal(200, 1, seed=1) * normal(1, SIZE, seed=2),
        "dead inputs": normal(200, SIZE) * (torch.arange(SIZE) % 3 > 0),
    }[kind]


KINDS = ["few", "one", "none", "equal", "one huge direction", "dead inputs"]


def gram(kind: str) -> torch.Tensor:
    """Summed as runs sum it: products in float32."""
    moments = Moments()
    x_TI = rows(kind).float()
    moments.update(x_TI, x_TI[:, :0])
    return moments.finish()[0].dense()


def factor(gram_II: torch.Tensor) -> torch.Tensor:
    return Gram.of(gram_II).cholesky().value.dense(gram_II.dtype)


# --- damping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("least", "used"), [(1e-2, DAMPING), (-5e-3, 1e-2), (-5e-2, 1e-1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_grows_tenfold_until_it_is_enough(least: float, used: float, dtype: torch.dtype) -> None:
    gram_II = indefinite(least).to(dtype)
    found = Gram.of(gram_II).cholesky()
    factor_II = found.value.dense(dtype)
    damped_II = gram_II + used * torch.eye(SIZE, dtype=dtype)
    torch.testing.assert_close(factor_II @ factor_II.T, damped_II, rtol=1e-4, atol=1e-4)
    grown = (f"damping {used:g} where 0.001 was not enough for a Gram of size {SIZE}",)
    assert found.notes == (() if used == DAMPING else grown)


def test_a_gram_that_is_less_than_nothing_by_rounding_is_damped_as_an_empty_one() -> None:
    for gram_II in (torch.zeros(3, 3), -1e-12 * torch.eye(3)):
        torch.testing.assert_close(factor(gram_II.double()), DAMPING**0.5 * torch.eye(3).double())


def test_damping_has_an_end() -> None:
    for solve in (Gram.cholesky, root):
        with pytest.raises(NumericalError, match=rf"not positive definite after damping of {MOST_DAMPING:g};"):
            solve(Gram.of(indefinite(-0.2)))


@pytest.mark.parametrize("least", [1e-2, -5e-3, -5e-2])
def test_what_is_right_already_stays_however_much_it_is_damped(least: float) -> None:
    """W is pulled to itself with the damping that was used, not with that which was asked for."""
    gram_II, w_OI = indefinite(least), normal(6, SIZE, seed=3)
    torch.testing.assert_close(anchored(w_OI, Gram.of(gram_II), gram_II @ w_OI.T).value, w_OI, rtol=1e-9, atol=1e-9)


def test_a_gram_slightly_askew_is_one_all_the_same() -> None:
    gram_II = indefinite(0.1)
    askew_II = gram_II + 1e-9 * normal(SIZE, SIZE, seed=4)
    torch.testing.assert_close(factor(askew_II), factor(gram_II), rtol=1e-6, atol=1e-6)
    t_OI = normal(6, SIZE, seed=3)
    found, wanted = (subspace(t_OI, Gram.of(g), 3).value for g in (askew_II, gram_II))
    torch.testing.assert_close(found.basis_OR @ found.map_RI, wanted.basis_OR @ wanted.map_RI, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_on_a_singular_gram_is_right_where_tokens_went(kind: str) -> None:
    """And keeps W where none went."""
    gram_II, x_TI = gram(kind), rows(kind)
    w_OI, t_OI = normal(6, SIZE, seed=3), normal(6, SIZE, seed=5)
    moved_OI = anchored(w_OI, Gram.of(gram_II), gram_II @ t_OI.T, 1e-6).value
    wanted_TO = x_TI @ t_OI.T
    assert (x_TI @ moved_OI.T - wanted_TO).norm() <= 2e-2 * wanted_TO.norm()
    _, _, vh_II = torch.linalg.svd(x_TI, full_matrices=True)
    nowhere_IN = vh_II[torch.linalg.matrix_rank(x_TI) :].T
    torch.testing.assert_close(
        moved_OI @ nowhere_IN, w_OI @ nowhere_IN, rtol=0, atol=2e-2 * float(w_OI.abs().max()) * 10
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4, 13])
def test_a_refit_on_a_singular_gram_is_exact_on_the_span(kind: str, rank: int) -> None:
    base_RI, c_NR = normal(rank, SIZE, seed=6), normal(7, rank, seed=7)
    fitted_NR = refit(c_NR @ base_RI, base_RI, Gram.of(gram(kind))).value
    wanted_TN = rows(kind) @ (c_NR @ base_RI).T
    assert bool(torch.isfinite(fitted_NR).all())
    assert (rows(kind) @ (fitted_NR @ base_RI).T - wanted_TN).norm() <= 1e-2 * wanted_TN.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, SIZE), (60, SIZE)])
def test_low_rank_on_a_singular_gram_is_finite(kind: str, shape: tuple[int, int]) -> None:
    t_OI, gram_II = normal(*shape, seed=8), gram(kind)
    for rank in (1, 5, 8):
        found = subspace(t_OI, Gram.of(gram_II), rank).value
        up_OR, down_RI = two_factors(found, Gram.of(gram_II), t_OI, torch.float16).value
        assert bool(torch.isfinite(up_OR).all())
        assert bool(torch.isfinite(down_RI).all())


def test_equal_tokens_have_a_refit_to_rows_that_see_nothing_of_them() -> None:
    """S is indefinite by the rounding of float32, and on rows across the one direction that it has this is all there is."""
    gram_II = gram("equal") - 1e-4 * float(gram("equal").diagonal().mean()) * torch.eye(SIZE)
    base_RI = normal(5, SIZE, seed=6)
    across = rows("equal")[0] / rows("equal")[0].norm()
    base_RI -= (base_RI @ across)[:, None] * across
    fitted = refit(normal(7, 5, seed=7) @ base_RI, base_RI, Gram.of(gram_II))
    assert bool(torch.isfinite(fitted.value).all())
    assert fitted.notes[-1].startswith("pull 1e-03 where 1e-06 was not enough")
    torch.testing.assert_close(fitted.value, normal(7, 5, seed=7), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_decomposition_of_bad_numbers_is_an_error_of_ours(bad: float) -> None:
    with pytest.raises(NumericalError, match="size 3 has no eigenvalues"):
        eigh(torch.full((3, 3), bad))


# --- dead inputs ----------------------------------------------------------------------------------------


def test_dead_inputs_go_first_and_weigh_nothing() -> None:
    gram_II, w_OI = gram("dead inputs"), normal(6, SIZE, seed=3)
    dead = {channel for channel in range(SIZE) if channel % 3 == 0}
    found = removals(w_OI, Gram.of(gram_II), [SIZE - 3, SIZE - len(dead), SIZE - len(dead) - 4])
    assert set(range(SIZE)) - set(next(found).value.kept_K.tolist()) < dead
    second = next(found)
    alive_K = second.value.kept_K
    assert set(alive_K.tolist()) == set(range(SIZE)) - dead
    assert second.error == 0
    torch.testing.assert_close(second.value.w_OF[:, alive_K], w_OI[:, alive_K], rtol=1e-9, atol=1e-9)
    assert next(found).error > 0


# --- what a dtype can hold ------------------------------------------------------------------------------


def test_factors_share_what_one_of_them_cannot_hold() -> None:
    """By powers of two, so that nothing is lost; ranks that fit stay as they are."""
    up_OR, down_RI = normal(6, 3).float().double(), normal(3, 8, seed=1).half().double()
    up_OR = up_OR.half().double()
    down_RI[1] *= 2.0**18
    up_OR[:, 1] *= 2.0**-10
    found = balanced(up_OR, down_RI, torch.float16, "mlp.down_proj")
    found_OR, found_RI = found.value
    assert found_OR.dtype == found_RI.dtype == torch.float16
    assert torch.equal(found_OR.double() @ found_RI.double(), up_OR @ down_RI)
    for rank in (0, 2):
        assert torch.equal(found_RI[rank].double(), down_RI[rank])
    assert found.notes == ("mlp.down_proj: 1 ranks balanced for torch.float16",)
    assert float(found_RI[1].abs().max()) < 16 * float(found_OR[:, 1].abs().max())


def test_factors_that_fit_are_only_rounded() -> None:
    up_OR, down_RI = normal(6, 3) * 1e4, normal(3, 8, seed=1)
    found = balanced(up_OR, down_RI, torch.float16, "o")
    assert all(torch.equal(*pair) for pair in zip(found.value, (up_OR.half(), down_RI.half()), strict=True))
    assert not found.notes


def test_what_no_balance_can_mend_is_named_with_its_size() -> None:
    with pytest.raises(
        NumericalError, match=r"o: the largest number is 4.*e\+\d+; wanted at most 65504, as torch.float16"
    ):
        balanced(torch.full((2, 1), 4e10), torch.full((1, 2), 4e10), torch.float16, "o")
    with pytest.raises(NumericalError, match=r"q: the largest number is 7e\+04; wanted at most 65504"):
        as_stored(torch.tensor([7e4, 1.0]), torch.float16, "q")
    assert as_stored(torch.tensor([1e-9, 1.0]), torch.float16, "q").tolist() == [0, 1]


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_was_not_finite_before_is_not_called_too_large(number: float) -> None:
    with pytest.raises(NumericalError, match=r"q: it has numbers that are NaN or infinite before it is stored; wanted"):
        as_stored(torch.tensor([number, 1.0]), torch.float32, "q")


# --- weights that are not finite ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", ["q_proj.bias", "down.weight", "rest.weight", "down_proj.weight", "embed_tokens.weight"]
)
def test_whatever_reads_a_checkpoint_names_what_is_not_finite_in_it(
    pico: MakeModel, tokens: Path, tmp_path: Path, ending: str
) -> None:
    """Biases too, and a folder that is compressed already."""
    folder = tmp_path / "source"
    if ending == "q_proj.bias":
        shutil.copytree(pico("qwen2"), folder)
    else:
        preset = "best" if ending == "rest.weight" else "lorap"
        streamlap.compress(pico("qwen2"), folder, preset=preset, ratio=0.4, files=(str(tokens),))
    name, file = next(
        (name, path)
        for path in sorted(folder.glob("*.safetensors"))
        for name in load_file(path)
        if name.endswith(ending)
    )
    weights = load_file(file)
    weights[name].view(-1)[1] = torch.nan
    save_file(weights, file, {"format": "pt"})
    np.save(tmp_path / "all.npy", np.arange(VOCABULARY).reshape(12, 25).astype(np.uint16))
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' in {file.name} has 1 NaN or infinite"):
        streamlap.evaluate(folder, tmp_path / "all.npy")


# --- whole runs -----------------------------------------------------------------------------------------

Weights = dict[str, torch.Tensor]


def at(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], None]:
    """The weights whose names end so, changed."""

    def apply(weights: Weights) -> None:
        for name in weights:
            if name.endswith(ending + ".weight"):
                weights[name] = change(weights[name])

    return apply


def some_zero(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(weight[: len(weight) * 2 // 3]), weight[len(weight) * 2 // 3 :]])


def loud_channel(weight: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(weight.shape[1]) == 3, 3e4, weight).to(weight)


ODD: dict[str, tuple[Callable[[Weights], None], list[str]]] = {
    "linears of zeros": (at("proj", torch.zeros_like), ["32 dead inputs of self_attn.o_proj", "48 dead inputs of mlp"]),
    "linears of one number": (at("proj", lambda w: torch.full_like(w, 0.05)), []),
    "tiny linears": (at("proj", lambda w: w * 1e-4), []),
    "halves that add nothing": (
        lambda w: [at(name, torch.zeros_like)(w) for name in ("o_proj", "down_proj")] and None,
        [],
    ),
    "values of zeros": (at("v_proj", torch.zeros_like), ["32 dead inputs of self_attn.o_proj"]),
    "dead channels": (at("gate_proj", some_zero), ["32 dead inputs of mlp.down_proj"]),
    "dead inputs": (
        at("layernorm", some_zero),
        ["21 dead inputs of self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"],
    ),
    "equal embeddings": (at("embed_tokens", lambda w: torch.full_like(w, 0.1)), []),
    "embeddings of zeros": (at("embed_tokens", torch.zeros_like), ["32 dead inputs of self_attn.q_proj"]),
    "a loud channel": (at("embed_tokens", loud_channel), []),
}
IDS_NL = np.random.default_rng(0).integers(0, VOCABULARY, (12, 16))
TEXTS = {
    "one token": np.full((12, 16), 7),
    "one token but for another": np.where(np.arange(192).reshape(12, 16) == 100, 8, 7),
    "a token a window": np.repeat(IDS_NL[:, :1], 16, axis=1),
    "one window": IDS_NL[:1],
    "two windows": IDS_NL[:2],
    "three tokens": IDS_NL[:1, :3],
}
EVERY = (
    AttentionGroups(), AttentionAnchored(storage="factors", input_step=None),
    FfnAnchored(shares=(0.5,), storage="factors", input_step=None), FfnAnchored(shares=(0.5,), output="low_rank"),
    FfnAnchored(shares=(0.0,)), FfnAnchored(shares=(1.0,)),
)  # fmt: skip
RECIPES: dict[str, Recipe] = {
    "lorap": Recipe.from_dict({"preset": "lorap"}), "best": Recipe(),
    "refined": Recipe().override(refine=1), "every method": Recipe(preset="custom", methods=EVERY),
}  # fmt: skip


def run_odd(folder: Path, weights: str | None, text: str | None, recipe: str, dtype: str, source: Path) -> list[Any]:
    """Compress; all that is written is finite, and no method of a preset failed. Gives the layers' notes."""
    shutil.copytree(source, folder / "source")
    if weights:
        tensors = load_file(folder / "source" / "model.safetensors")
        ODD[weights][0](tensors)
        save_file(tensors, folder / "source" / "model.safetensors", {"format": "pt"})
    np.save(folder / "ids.npy", (TEXTS[text] if text else IDS_NL).astype(np.uint16))
    out = folder / "out"
    report = streamlap.compress(
        folder / "source", out, RECIPES[recipe], ratio=0.3, files=(str(folder / "ids.npy"),), dtype=dtype
    )
    for path in out.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), name
    json.dumps(report.to_json(), allow_nan=False)
    notes = [layer.numerics for layer in report.layers]
    if recipe != "every method":  # of many some may be passed over
        assert not any("failed" in text for layer in notes for text in layer)
        tried = 0 if recipe == "lorap" else 1 + len(FfnAnchored().shares)
        assert all(sum(map(len, layer.errors.values())) == tried for layer in report.layers)
    assert not any(layer.excluded_tokens for layer in report.layers)
    return notes


@pytest.mark.parametrize("recipe", ["lorap", "best"])
@pytest.mark.parametrize("weights", ODD)
def test_odd_weights_give_finite_ones(pico: MakeModel, tmp_path: Path, weights: str, recipe: str) -> None:
    source = pico("llama", dtype=torch.float16, num_hidden_layers=1)
    (notes,) = run_odd(tmp_path, weights, None, recipe, "float16", source)
    for words in ODD[weights][1]:
        assert any(words in text for text in notes)


@pytest.mark.parametrize("recipe", ["lorap", "best"])
@pytest.mark.parametrize("text", TEXTS)
def test_odd_texts_give_finite_weights(pico: MakeModel, tmp_path: Path, text: str, recipe: str) -> None:
    source = pico("llama", dtype=torch.float16, num_hidden_layers=1)
    run_odd(tmp_path, None, text, recipe, "float16", source)


@pytest.mark.parametrize("text", ["one token", "a token a window"])
def test_every_method_takes_inputs_that_do_not_vary(pico: MakeModel, tmp_path: Path, text: str) -> None:
    source = pico("llama", dtype=torch.float16, num_hidden_layers=1)
    run_odd(tmp_path, None, text, "every method", "float32", source)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("text", [None, *TEXTS])
@pytest.mark.parametrize("weights", [None, *ODD])
def test_odd_weights_and_texts_give_finite_weights(
    pico: MakeModel, tmp_path: Path, weights: str | None, text: str | None, recipe: str, dtype: str
) -> None:
    source = pico("qwen2", dtype=getattr(torch, dtype), num_hidden_layers=2)
    run_odd(tmp_path, weights, text, recipe, dtype, source)
