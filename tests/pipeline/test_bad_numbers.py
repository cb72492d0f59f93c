"""Numbers that go bad on the way: tokens are left out and counted, methods passed over, and what is written is finite."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from crashes import crash_after
from outputs import contents
from safetensors.torch import load_file, save_file

import streamlap
from streamlap.cli import main
from streamlap.cli.show import describe_report
from streamlap.errors import NumericalError
from streamlap.families import stream as families_stream
from streamlap.families.layer import StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.linalg.rows import MOST_OUT, any_out, blanked, carried, marked, paired, require_few, rows_out, struck
from streamlap.linalg.statistics import Energy
from streamlap.methods import AttentionAnchored, FfnAnchored
from streamlap.methods.base import Solved
from streamlap.methods.trained.steps import distances
from streamlap.output.report import LayerReport
from streamlap.pipeline.distil import stored_loss
from streamlap.pipeline.divergence import divergence, mean_divergence
from streamlap.pipeline.observe import SublayerStatistics
from streamlap.planning.survey import Perturbation
from streamlap.recipe import Recipe
from streamlap.store.hidden import HiddenBank
from streamlap.store.journal import Journal

BAD_ID = 299
LOUD = 5  # a channel of the stream that only the bad token uses
SHAPE_NL = (12, 16)
PLACES = [(0, 0), (0, 7), (1, 15), (3, 4), (3, 5), (7, 0), (7, 9), (10, 2), (11, 15)]
"""Window and position of the bad tokens: first and last ones, neighbours, and in window 7, which is held out."""
PRESETS: dict[str, dict[str, Any]] = {"lorap": {"preset": "lorap"}, "best": {}, "refined": {"refine": 1}}


def windows(places: list[tuple[int, int]], folder: Path) -> Path:
    """Token ids with the bad one at `places` and nowhere else."""
    ids_NL = np.random.default_rng(1).integers(0, BAD_ID, SHAPE_NL).astype(np.uint16)
    for place in places:
        ids_NL[place] = BAD_ID
    np.save(folder / "windows.npy", ids_NL)
    return folder / "windows.npy"


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def too_large(weights: dict[str, torch.Tensor]) -> None:
    """The embedding of the bad token is finite in float32, and is not in float16."""
    weights["model.embed_tokens.weight"][BAD_ID, 3] = 1e6


def overflows_inside(weights: dict[str, torch.Tensor]) -> None:
    """Layer 1 makes the channel so loud that gate times up is more than float16 holds, behind the norm of the FFN."""
    weights["model.embed_tokens.weight"][:, LOUD] = 0
    weights["model.embed_tokens.weight"][BAD_ID, LOUD] = 100
    for name, w_OI in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            w_OI[LOUD] = 0
    weights["model.layers.1.post_attention_layernorm.weight"][LOUD] = 3000


INJECTIONS = {"embedding": (too_large, [9, 9, 9]), "inside": (overflows_inside, [0, 9, 9])}
"""What is done to the weights, and how many tokens are out after each layer."""


@pytest.fixture(scope="module")
def sources(pico: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("injected")
    return {
        name: changed(pico("llama", tokenizer=True), folder / name, change) for name, (change, _) in INJECTIONS.items()
    }


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return windows(PLACES, tmp_path)


def compress(source: Path, out: Path, tokens: Path, **settings: Any) -> streamlap.Report:
    """With the windows as given, so that bad tokens are where a test puts them."""
    settings = {"ratio": 0.4, "dtype": "float16", "redraw": False} | settings
    return streamlap.compress(source, out, files=(str(tokens),), **settings)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_finite(out: Path) -> None:
    for name, tensor in tensors(out).items():
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), name
    assert streamlap.verify(out)["ok"]


# --- rows ------------------------------------------------------------------------------------------------------------------


def hidden_states(bad: float = math.inf) -> torch.Tensor:
    """[3, 16, 32] in which two tokens have one bad number each."""
    x_BLD = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    x_BLD[0, 4, 9] = x_BLD[2, 0, 31] = bad
    return x_BLD


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_takes_its_row_out(bad: float) -> None:
    x_BLD = hidden_states(bad)
    out_BL = rows_out(marked(x_BLD))
    assert out_BL.nonzero().tolist() == [[0, 4], [2, 0]]
    assert bool(marked(x_BLD)[out_BL].isnan().all())
    assert torch.equal(marked(x_BLD)[~out_BL], x_BLD[~out_BL])


def test_what_is_finite_is_not_copied() -> None:
    x_BLD = torch.randn(3, 16, 32)
    assert marked(x_BLD) is x_BLD
    assert any_out(x_BLD) is None
    assert blanked(x_BLD, None) is x_BLD
    assert paired(x_BLD, x_BLD)[1] is x_BLD


def test_a_row_that_is_out_stays_so_and_no_other_hears_of_it() -> None:
    x_BLD = marked(hidden_states())
    out_BL = any_out(x_BLD)
    assert out_BL is not None
    y_BLD = carried(lambda x: x.cumsum(dim=1), x_BLD, out_BL)  # every token hears of those before it
    assert torch.equal(rows_out(y_BLD), out_BL)
    assert torch.equal(y_BLD[~out_BL], blanked(x_BLD, out_BL).cumsum(dim=1)[~out_BL])


def test_a_row_that_goes_bad_is_out_behind_it() -> None:
    x_BLD = torch.ones(1, 4, 2)
    x_BLD[0, 2] = 300
    y_BLD = carried(lambda x: (x.half() * 300).float(), x_BLD, any_out(x_BLD))
    assert rows_out(y_BLD).tolist() == [[False, False, True, False]]


def test_how_many_may_be_out() -> None:
    out_NL = torch.zeros(10, 10, dtype=torch.bool)
    out_NL.view(-1)[: int(100 * MOST_OUT)] = True
    require_few(out_NL, MOST_OUT, "here")
    out_NL[9, 9] = True
    with pytest.raises(
        NumericalError, match=r"here: the numbers of 11 of 100 tokens \(11.0%\) .* at most 10%\. Take dtype"
    ):
        require_few(out_NL, MOST_OUT, "here")
    with pytest.raises(NumericalError, match="wanted none"):
        require_few(out_NL, 0.0, "here")


@pytest.mark.parametrize("part", ["attention", "ffn", "whole"])
def test_a_layer_leaves_other_tokens_as_they_are(pico: MakeModel, part: str) -> None:
    stream = ModelStream(pico("llama"))
    layer = stream.layer(1, stream.layer_kwargs(16)[1])
    x_BLD = marked(hidden_states())
    out_BL = rows_out(x_BLD)
    run = layer if part == "whole" else functools.partial(layer.run_sublayer, part)
    y_BLD = run(x_BLD)
    assert torch.equal(rows_out(y_BLD), out_BL)
    assert torch.equal(y_BLD[~out_BL], run(blanked(x_BLD, out_BL))[~out_BL])
    assert torch.equal(y_BLD[1], run(x_BLD[1:2])[0])
    assert torch.equal(y_BLD[0, :4], run(x_BLD[1:2].clone().copy_(x_BLD[0:1].nan_to_num(7.0)))[0, :4])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_statistics_are_those_of_the_good_rows(pico: MakeModel, batch: int) -> None:
    stream = ModelStream(pico("llama"))
    layer = stream.layer(1, stream.layer_kwargs(16)[1])
    x_BLD = marked(hidden_states())
    out_BL = rows_out(x_BLD)
    seen, wanted = Energy(), Energy()
    with layer.observed([("gate", seen)]):
        for part in x_BLD.split(batch):
            layer(part)
    inputs_BLD = layer.sublayer_input("ffn", layer.run_sublayer("attention", blanked(x_BLD, out_BL)))
    for x_LD, out_L in zip(inputs_BLD, out_BL, strict=True):
        wanted.update(x_LD[~out_L])
    assert seen.tokens == wanted.tokens == 46
    assert torch.equal(seen.scale(), wanted.scale())


def test_a_careful_look_leaves_out_what_is_bad_at_the_linear(sources: dict[str, Path]) -> None:
    stream = ModelStream(sources["inside"], dtype="float16")
    layer = stream.layer(1, stream.layer_kwargs(16)[1])
    x_BLD = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)).half()
    x_BLD[..., LOUD] = 0
    x_BLD[1, 3, LOUD] = 100
    hasty, careful, wanted = Energy(), Energy(), Energy()
    for energy, look in ((hasty, False), (careful, True)):
        with layer.observed([("down", energy)], careful=look):
            assert rows_out(layer(x_BLD)).nonzero().tolist() == [[1, 3]]
    middle_BLF = layer.sublayer_middle("ffn", layer.run_sublayer("attention", x_BLD))
    wanted.update(middle_BLF[0])
    wanted.update(torch.cat([middle_BLF[1, :3], middle_BLF[1, 4:]]))
    assert not hasty.finite
    assert careful.tokens == 31
    assert torch.equal(careful.scale(), wanted.scale())


def test_a_loss_is_that_of_the_good_tokens() -> None:
    x_BLD, target_BLD = torch.randn(2, 16, 32), marked(hidden_states())[:2]
    x_BLD[1, 8] = math.nan
    blank_BLD, struck_BLD = paired(x_BLD, target_BLD)
    assert bool(torch.isfinite(blank_BLD).all())
    good_BL = ~(rows_out(x_BLD) | rows_out(target_BLD))
    found_T = distances(struck_BLD, blank_BLD)
    assert len(found_T) == 2 * 15 - 2
    wanted_T = ((target_BLD - x_BLD).square().mean(-1) / target_BLD.square().mean(-1))[:, 1:][good_BL[:, 1:]]
    torch.testing.assert_close(found_T, wanted_T)


# --- runs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("injection", INJECTIONS)
def test_tokens_that_go_bad_are_left_out_and_counted(
    sources: dict[str, Path], few: Path, tmp_path: Path, injection: str, preset: str
) -> None:
    """So many as there are tokens of that id: those after them in a window stay."""
    report = compress(sources[injection], tmp_path / "out", few, **PRESETS[preset])
    assert [layer.excluded_tokens for layer in report.layers] == INJECTIONS[injection][1]
    assert_finite(tmp_path / "out")
    assert any("up to 9 of 192 calibration tokens" in line for line in describe_report(report))
    saved = json.loads((tmp_path / "out" / "streamlap_report.json").read_text())
    assert [layer["excluded_tokens"] for layer in saved["layers"]] == INJECTIONS[injection][1]
    assert not any("NaN" in json.dumps(layer["errors"]) for layer in saved["layers"])


@pytest.mark.parametrize("sublayer", ["attention", "ffn"])
def test_what_is_bad_inside_alone_is_left_out_of_that_layer_only(
    pico: MakeModel, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sublayer: str
) -> None:
    """In the compressed stream the linear before the last one overflows for one token, and the stream goes on."""
    middle, sums, seen = StreamLayer.sublayer_middle, SublayerStatistics._sums, list[tuple[int, bool]]()

    def overflow(layer: StreamLayer, name: str, x_BLD: torch.Tensor) -> torch.Tensor:
        y_BLI = middle(layer, name, x_BLD)
        if layer.prefix.endswith(".1") and name == sublayer and len(y_BLI) == SHAPE_NL[0]:
            y_BLI[2, 3, 4] = math.inf
        return y_BLI

    def count(*args: Any) -> Any:
        found = sums(*args)
        for each in found:
            if each.out_NL.any() and each.held.limit:
                seen.append((each.moments.tokens + each.held.tokens, each.finite))
        return found

    monkeypatch.setattr(StreamLayer, "sublayer_middle", overflow)
    monkeypatch.setattr(SublayerStatistics, "_sums", count)
    report = compress(pico("llama"), tmp_path / "out", few, dtype="float32")
    assert [layer.excluded_tokens for layer in report.layers] == [0, 1, 0]
    assert set(seen) == {(191, True)}
    assert_finite(tmp_path / "out")


@pytest.mark.parametrize("preset", ["lorap", "best"])
def test_how_bad_a_token_is_makes_no_difference(
    sources: dict[str, Path], few: Path, tmp_path: Path, preset: str
) -> None:
    """Nothing of it is in any weight."""

    def worse(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][BAD_ID] = -3e38

    other = changed(sources["embedding"], tmp_path / "worse", worse)
    for source, out in ((sources["embedding"], "out"), (other, "other")):
        compress(source, tmp_path / out, few, **PRESETS[preset])
    found, wanted = (tensors(tmp_path / out) for out in ("out", "other"))
    assert all(torch.equal(found[name], wanted[name]) for name in found if ".layers." in name)


@pytest.mark.parametrize(("injection", "preset"), [("inside", "lorap"), ("embedding", "best"), ("inside", "best")])
def test_batches_make_no_difference(
    sources: dict[str, Path], few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, injection: str, preset: str
) -> None:
    """One sequence at a time, five, all: the same tokens are out, the same bytes come out."""
    found = []
    for batch in (1, 5, 12):
        monkeypatch.setattr(families_stream, "BATCH_TOKENS", batch * SHAPE_NL[1])
        out = tmp_path / str(batch)
        report = compress(sources[injection], out, few, preset=preset)
        assert [layer.excluded_tokens for layer in report.layers] == INJECTIONS[injection][1]
        found.append({name: tensor for name, tensor in tensors(out).items() if ".layers." in name})
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("preset", ["lorap", "refined"])
def test_a_run_that_died_goes_on_without_them(
    sources: dict[str, Path], few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    source, settings = sources["inside"], PRESETS[preset]
    compress(source, tmp_path / "whole", few, **settings)
    out = tmp_path / "out"
    crash_after(2, monkeypatch, lambda: compress(source, out, few, **settings))
    streamlap.resume(out)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("preset", ["lorap", "best"])
def test_too_many_are_an_error(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    preset: str,
) -> None:  # fmt: skip
    """Exit code 6, and what was committed before is kept."""
    many = windows([(n, at) for n in range(5) for at in range(0, 10, 2)], tmp_path)
    monkeypatch.setattr("sys.argv", [
        "streamlap", "compress", str(sources["inside"]), str(tmp_path / "out"), "--calibration", str(many),
        "--dtype", "float16", "--preset", preset, "--ratio", "0.4", "--no-survey", "--no-redraw",
    ])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 6
    said = capsys.readouterr().err
    for part in ("model.layers.1", "25 of 192 tokens (13.0%)", "at most 10%", "float32 or bfloat16"):
        assert part in said
    assert Journal.load(tmp_path / "out").next_layer == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_too_many_from_the_start(sources: dict[str, Path], tmp_path: Path) -> None:
    many = windows([(n, at) for n in range(5) for at in range(0, 10, 2)], tmp_path)
    with pytest.raises(NumericalError, match=r"model.embed_tokens: the numbers of 25 of 192"):
        compress(sources["embedding"], tmp_path / "out", many)


def test_held_out_windows_may_not_all_be_out(sources: dict[str, Path], tmp_path: Path) -> None:
    held = windows([(7, at) for at in range(16)], tmp_path)  # the only one of twelve that is held out
    with pytest.raises(NumericalError, match=r"model.layers.0 attention: no token of the windows that are held out"):
        compress(sources["embedding"], tmp_path / "out", held)


@pytest.mark.parametrize(("injection", "where"), [("embedding", "model.embed_tokens"), ("inside", "model.layers.1")])
def test_a_perplexity_leaves_none_out(sources: dict[str, Path], few: Path, injection: str, where: str) -> None:
    with pytest.raises(NumericalError, match=rf"^{where}: the numbers of 9 of 192 tokens .* wanted none"):
        streamlap.evaluate(sources[injection], few, dtype="float16")


@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_survey_leaves_them_out(sources: dict[str, Path], few: Path, tmp_path: Path, injection: str) -> None:
    found = streamlap.survey(sources[injection], tmp_path / "survey.json", files=(str(few),), dtype="float16")
    for layer in found.layers:
        for (probe,) in layer.values():
            assert math.inf > probe.kl > 0


def test_held_out_tokens_that_overflow_in_a_written_layer_are_left_out() -> None:
    x_BLD, target_BLD = hidden_states(0.0), torch.randn(3, 16, 32)

    def lost(out_BL: torch.Tensor) -> float:
        lessons = SimpleNamespace(held=[0], pairs=lambda _: [(x_BLD, target_BLD)])
        return stored_loss(lambda x_BLD: struck(x_BLD / 2, out_BL), lessons)

    out_BL = rows_out(marked(hidden_states()))
    missed, wanted = (distances(target_BLD, y_BLD)[~out_BL[:, 1:]].mean() for y_BLD in (x_BLD / 2, x_BLD))
    assert lost(out_BL) == pytest.approx(float(missed / wanted), rel=1e-6)
    with pytest.raises(NumericalError, match="no token of the windows that are held out has finite numbers behind it"):
        lost(torch.ones_like(out_BL))


def test_a_divergence_is_the_mean_of_the_good_tokens(pico: MakeModel) -> None:
    stream = ModelStream(pico("llama"))
    dense_NLD, copy_NLD = marked(hidden_states()), torch.randn(3, 16, 32)
    copy_NLD[1, 8] = math.nan
    scored_NL = ~(rows_out(dense_NLD) | rows_out(copy_NLD))
    banks = []
    for x_NLD in (torch.cat([hidden_states()[:1], dense_NLD]), copy_NLD):
        bank = HiddenBank((len(x_NLD), 16, 32), torch.float32, 2)
        bank.write(stream.depth, x_NLD.split(2))
        banks.append(bank)
    cut, head = Perturbation(index=0, sublayer="ffn", keep=0.8), stream.head()
    wanted = divergence(head(dense_NLD[scored_NL]), head(copy_NLD[scored_NL])) / int(scored_NL.sum())
    assert mean_divergence(stream, stream.head(), *banks, cut, range(1, 4)) == pytest.approx(wanted, rel=1e-6)
    copy_NLD[2] = math.nan  # a third, of which the cut alone is to blame
    banks[1].write(stream.depth, copy_NLD.split(2))
    with pytest.raises(
        NumericalError, match=r"layer 0 ffn: its cut made 1[67] of 4. tokens NaN or infinite; wanted at most 10%"
    ):
        mean_divergence(stream, stream.head(), *banks, cut, range(1, 4))
    banks[1].write(stream.depth, torch.full_like(copy_NLD, math.nan).split(2))
    with pytest.raises(NumericalError, match="layer 0 ffn: divergence nan over 0 tokens"):
        mean_divergence(stream, stream.head(), *banks, cut, range(1, 4))


def test_a_divergence_that_is_nan_is_not_zero(pico: MakeModel) -> None:
    """max(0.0, nan) is 0.0."""
    stream = ModelStream(pico("llama"))
    bank = HiddenBank((3, 16, 32), torch.float32, 3)
    bank.write(stream.depth, torch.randn(3, 16, 32).split(3))
    stream.head = lambda: lambda x_TD: torch.full((len(x_TD), 4), math.inf)  # type: ignore[method-assign]
    with pytest.raises(NumericalError, match="divergence nan over 48 tokens"):
        mean_divergence(stream, stream.head(), bank, bank, Perturbation(index=0, sublayer="ffn", keep=0.8), range(3))


# --- what a method is compared by -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_an_error_that_is_no_number_loses(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Whichever comes first: NaN is less than nothing and nothing is less than NaN. What it took is noted all the same."""
    solve = AttentionAnchored.solve

    def spoilt(method: AttentionAnchored, *args: Any) -> Solved:
        solved = solve(method, *args)
        return replace(solved, error=math.nan, notes=("care",)) if method.storage == "factors" else solved

    monkeypatch.setattr(AttentionAnchored, "solve", spoilt)
    attention = [AttentionAnchored(storage="factors"), AttentionAnchored()]
    methods = (*(attention if first else attention[::-1]), FfnAnchored(shares=(1.0,)))
    recipe = Recipe(preset="custom", methods=methods, ratio=0.4)
    report = streamlap.compress(pico("llama"), tmp_path / "out", recipe, files=(str(tokens),))
    name = f"attention_anchored {int(not first)}"
    for layer in report.layers:
        assert "pivots" in layer.edits[0].row
        assert len(layer.errors["attention"]) == 1
        failed = f"attention: {name} failed: its error on held-out tokens is nan"
        assert layer.numerics == ("attention: care", failed)
    assert any("special care in 3 layers" in line for line in describe_report(report))


def test_no_method_left_is_an_error(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttentionAnchored, "solve", lambda *_: Solved(edits=[], error=math.inf))
    with pytest.raises(NumericalError, match=r"^model.layers.0 attention: its error on held-out tokens is inf; wanted"):
        streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),))


def test_a_journal_from_before_is_read() -> None:
    line = {"index": 0, "edits": [], "seconds": {}, "peak_ram_bytes": 1, "peak_vram_bytes": 0, "baseline_ram_bytes": 1,
            "ladder": []}  # fmt: skip
    assert LayerReport.from_json(line) == LayerReport.from_json(line | {"numerics": [], "excluded_tokens": 0})
