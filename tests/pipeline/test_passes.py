"""Passes over the streams of a layer that is rebuilt: how many there are, and what each of them leaves to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from outputs import contents

import streamlap
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.stream import ModelStream
from streamlap.linalg.moments import fitted_sequences, held_sequences
from streamlap.methods.anchored.attention import AttentionAnchored
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.base import Captured
from streamlap.pipeline import layers, observe
from streamlap.pipeline.next_inputs import InputSum
from streamlap.pipeline.observe import SublayerStatistics
from streamlap.planning import schedule as scheduling
from streamlap.planning.schedule import Schedule, make_schedule
from streamlap.planning.workload import Workload
from streamlap.store.hidden import HiddenBank

LAYERS, DIVISIONS = 3, 4


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(bank, generation, sequences) of every pass that reads from one; 0 is all of them."""
    seen: list[tuple[str, int, int]] = []
    real = HiddenBank.read

    def read(bank: HiddenBank, generation: int, numbers: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        seen.append((bank._name, generation, len(numbers or ())))
        return real(bank, generation, numbers)

    monkeypatch.setattr(HiddenBank, "read", read)
    return seen


def test_a_layer_reads_six_generations_and_the_first_one_more(
    pico: MakeModel, tokens: Path, tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    """x and x^, x^ again, x^ between the sub-layers and the next x, x^ between again: see `pipeline.sublayers`."""
    streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),), redraw=False)
    held = len(held_sequences(12, 16))
    one = [("dense", 0, 0), ("hidden", 0, 0), ("hidden", 0, 0), *[("dense", 1, held), ("between", 0, held)] * DIVISIONS]
    one += [("dense", 1, 0), ("between", 0, 0), ("between", 0, 0)]
    layers = [[(name, generation + index, count) for name, generation, count in one] for index in range(LAYERS)]
    wanted = [("hidden", 0, 0), *layers[0], *layers[1], *layers[2]]
    assert reads[: len(wanted)] == wanted
    assert set(reads[len(wanted) :]) == {("dense", 3, held), ("hidden", 3, held)}, "what the final gain is fitted to"
    plan = streamlap.plan(pico("llama"), files=(str(tokens),), redraw=False)
    for layer, planned in zip(layers, plan.layers, strict=True):
        between = sum((count or 12) / 12 for name, _, count in layer if name == "between")
        others = sum((count or 12) / 12 for name, _, count in layer if name != "between")
        assert planned.between_read == pytest.approx(between)
        assert planned.generations_read == pytest.approx(others + (planned.index == 0))


@pytest.mark.parametrize(
    ("family", "banks"), [("olmo2", {"dense", "hidden", "between"}), ("cohere2", {"dense", "hidden"})]
)
def test_the_plan_knows_what_norms_and_parallel_layers_read_more(
    pico: MakeModel, tokens: Path, tmp_path: Path, reads: list[tuple[str, int, int]], family: str, banks: set[str]
) -> None:
    """The sizes that norms divide by; the dense stream through a parallel layer, between whose sub-layers nothing lies."""
    streamlap.compress(pico(family), tmp_path / "out", files=(str(tokens),), redraw=False)
    held = len(held_sequences(12, 16))
    in_layers = [read for read in reads if read not in (("dense", LAYERS, held), ("hidden", LAYERS, held))]
    in_layers += [("dense", LAYERS, held)] * DIVISIONS  # the last layer's, not those of the final gain
    assert {name for name, _, _ in in_layers} == banks
    plan = streamlap.plan(pico(family), files=(str(tokens),), redraw=False)
    planned = sum(layer.generations_read + layer.between_read for layer in plan.layers)
    assert sum((count or 12) / 12 for _, _, count in in_layers) == pytest.approx(planned)


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_what_leaves_a_pass_is_looked_at_as_few_sequences_at_a_time_as_it_was_made(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Memory is claimed for so many."""
    seen: list[int] = []

    def noted(look: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen.append(len(args[place]))
            return look(*args)

        return call

    def schedules(work: Workload, overlap: bool) -> list[Schedule]:
        return [make_schedule(work, overlap, "ram", 2)]

    monkeypatch.setattr(scheduling, "schedules", schedules)
    monkeypatch.setattr(observe, "evenly", noted(observe.evenly, 0))
    monkeypatch.setattr(InputSum, "see", noted(InputSum.see, 1))
    streamlap.compress(pico(family), tmp_path / "out", files=(str(tokens),), redraw=False, survey=None)
    assert max(seen) == 2


def test_inputs_that_are_summed_while_their_stream_is_made_are_those_of_a_pass_of_their_own(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for overlap in (True, False):
        streamlap.compress(
            pico("qwen2"), tmp_path / f"summed {overlap}", files=(str(tokens),), overlap=overlap, redraw=False
        )
    monkeypatch.setattr(layers, "next_inputs", lambda *_: None)
    streamlap.compress(pico("qwen2"), tmp_path / "read", files=(str(tokens),), redraw=False)
    wanted = contents(tmp_path / "read")
    assert contents(tmp_path / "summed True") == contents(tmp_path / "summed False") == wanted


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_frame_of_a_layer_reads_what_the_layer_does(pico: MakeModel, family: str) -> None:
    """Without the numbers of a single linear."""
    stream = ModelStream(pico(family))
    kwargs = stream.layer_kwargs(16)[1]
    frame, layer = stream.frame(1, kwargs), stream.layer(1, kwargs)
    assert all(frame.linear(role).weight.is_meta for role in stream.family.roles)
    x_BLD = torch.randn(3, 16, 32)
    assert torch.equal(frame.sublayer_input("attention", x_BLD), layer.sublayer_input("attention", x_BLD))


def test_summed_inputs_leave_out_what_is_held_out_and_what_is_bad(pico: MakeModel) -> None:
    stream = ModelStream(pico("llama"))
    layer = stream.layer(1, stream.layer_kwargs(16)[1])
    x_NLD = torch.randn(12, 16, 32)
    x_NLD[2, 5] = torch.nan
    seen = InputSum(layer, fitted_sequences(12, 16))
    for x_BLD in torch.split(x_NLD, 5):
        seen.see(x_BLD)
    (gram,) = seen.grams()
    rows = [layer.sublayer_input("attention", x_NLD[n : n + 1].nan_to_num())[0] for n in fitted_sequences(12, 16)]
    rows[2] = torch.cat([rows[2][:5], rows[2][6:]])
    x_TI = torch.cat(rows).double()
    torch.testing.assert_close(gram.dense(torch.float64), x_TI.T @ x_TI, rtol=1e-5, atol=1e-5)


def test_what_lies_between_stays_in_ram_where_the_rest_is_on_the_disk(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then only what lasts is a file, and the bytes are the same."""
    streamlap.compress(pico("llama"), tmp_path / "ram", files=(str(tokens),), redraw=False)
    real, names = scheduling.schedules, set[str]()
    create = HiddenBank._create

    def note(bank: HiddenBank, generation: int) -> object:
        names.add(bank._name)
        return create(bank, generation)

    def spilled(*args: object) -> Iterator[Schedule]:
        yield next(found for found in real(*args) if found.between)  # type: ignore[arg-type]

    monkeypatch.setattr(scheduling, "schedules", spilled)
    monkeypatch.setattr(HiddenBank, "_create", note)
    streamlap.compress(pico("llama"), tmp_path / "between", files=(str(tokens),), redraw=False)
    assert names == {"hidden", "dense"}
    assert contents(tmp_path / "between") == contents(tmp_path / "ram")


@pytest.mark.parametrize("step", [None, 0.5])
def test_inputs_of_the_ffn_are_moved_by_what_the_dense_attention_gives(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float | None
) -> None:
    """The attention as it was read is kept for that."""
    stream, x_BLD = ModelStream(pico("llama")), torch.randn(2, 16, 32)
    kwargs, real, seen = stream.layer_kwargs(16), SublayerStatistics.inputs, []

    def inputs(statistics: SublayerStatistics) -> Captured:
        part, index = statistics.dense.part, statistics.index
        if statistics.sublayer == "ffn":
            assert part is not None
            wanted_BLD = stream.layer(index, kwargs[index]).run_sublayer("attention", x_BLD)
            seen.append(torch.equal(part(x_BLD), wanted_BLD))
        return real(statistics)

    monkeypatch.setattr(SublayerStatistics, "inputs", inputs)
    methods = (AttentionAnchored(), FfnAnchored(input_step=step))
    streamlap.compress(pico("llama"), tmp_path / "out", files=(str(tokens),), methods=methods, ratio=0.3)
    assert seen == [True] * LAYERS


def test_what_is_stored_lies_in_one_piece(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix laid out otherwise would run with other bits than it does once it is read again."""
    real, pieces = StreamLayer.apply, list[bool]()

    def apply(layer: StreamLayer, edits: Sequence[Edit], keep_dense: bool = False) -> None:
        pieces.extend(tensor.is_contiguous() for edit in edits for tensor in edit.module.state_dict().values())
        real(layer, edits, keep_dense)

    monkeypatch.setattr(StreamLayer, "apply", apply)
    for storage in ("pivoted", "factors"):
        methods = (AttentionAnchored(storage=storage), FfnAnchored(storage=storage))
        streamlap.compress(pico("qwen2"), tmp_path / storage, files=(str(tokens),), methods=methods, ratio=0.4)
    assert len(pieces) > 50
    assert all(pieces)
