"""A layer's tensors as views of a buffer that is filled one layer ahead."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamlap.accelerator.devices import Cpu
from streamlap.errors import CheckpointError
from streamlap.store import staging
from streamlap.store.header import TensorInfo
from streamlap.store.source import SafetensorsFolder
from streamlap.store.staging import ALIGNMENT, Staging, staged_bytes
from streamlap.store.worker import Worker

CPU = Cpu(torch.device("cpu"))

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker(True) as worker:
        yield worker


def layers_in(folder: Path, *layers: dict[str, torch.Tensor]) -> list[dict[str, TensorInfo]]:
    """One file a layer. For each layer: name in the module -> place."""
    tables = []
    for index, tensors in enumerate(layers):
        place = folder / str(index)
        place.mkdir(parents=True)
        save_file({f"layers.{index}.{name}": tensor for name, tensor in tensors.items()}, place / "model.safetensors")
        source = SafetensorsFolder(place)
        tables.append({name: source.info(f"layers.{index}.{name}") for name in tensors})
    return tables


def make_staging(tables: Sequence[dict[str, TensorInfo]], buffers: int, worker: Worker) -> Staging:
    """On the host, for the largest of the layers."""
    size = max(staged_bytes(table.values()) for table in tables)
    return Staging([torch.empty(size, dtype=torch.uint8) for _ in range(buffers)], CPU, worker)


def random_layer(seed: int, size: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(size, size, generator=generator).bfloat16(),
        "b": torch.randn(size, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 4),
    }


def assert_same(views: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    assert list(views) == list(tensors)
    for name, tensor in tensors.items():
        assert (views[name].dtype, views[name].shape) == (tensor.dtype, tensor.shape), name
        assert views[name].tolist() == tensor.tolist(), name


@pytest.mark.parametrize("overlap", [True, False])
def test_views_are_what_the_source_reads_in_every_dtype(tmp_path: Path, overlap: bool) -> None:
    tensors = {str(dtype): (torch.arange(35) % 2).to(dtype).reshape(5, 7) for dtype in DTYPES}
    (table,) = layers_in(tmp_path, tensors)
    source = SafetensorsFolder(tmp_path / "0")
    with Worker(overlap) as worker:
        views = make_staging([table], 1, worker).take(table)
    for name, info in table.items():
        read = source.read(info.name)
        assert (views[name].dtype, views[name].shape) == (read.dtype, read.shape)
        assert torch.equal(views[name].view(torch.uint8), read.view(torch.uint8)), name
        assert views[name].float().tolist() == tensors[name].float().tolist()


def test_scalars_and_empty_tensors_have_their_place(tmp_path: Path, worker: Worker) -> None:
    tensors = random_layer(0)
    (table,) = layers_in(tmp_path, tensors)
    assert_same(make_staging([table], 1, worker).take(table), tensors)


def test_every_tensor_begins_aligned_and_nothing_is_copied(tmp_path: Path, worker: Worker) -> None:
    (table,) = layers_in(tmp_path, random_layer(0))
    assert (ALIGNMENT, staged_bytes(table.values())) == (256, 3328 + 256 + 256 + 0)
    views = make_staging([table], 1, worker).take(table)
    for name, view in views.items():
        assert view.storage_offset() * view.element_size() % ALIGNMENT == 0, name
    assert len({view.untyped_storage().data_ptr() for view in views.values() if view.numel()}) == 1


def test_a_layer_stays_whole_while_the_next_is_read_into_the_other_buffer(tmp_path: Path, worker: Worker) -> None:
    layers = [random_layer(seed) for seed in range(4)]
    tables = layers_in(tmp_path, *layers)
    buffers = make_staging(tables, 2, worker)
    places = []
    for table, layer, following in zip(tables, layers, [*tables[1:], None], strict=True):
        views = buffers.take(table)
        if following is not None:
            buffers.prefetch(following)
            worker.submit(lambda: None).result()  # the next layer is in memory now
        assert_same(views, layer)
        places.append(views["w"].data_ptr())
    assert places[0] == places[2] != places[1] == places[3]


def test_a_layer_is_read_once_and_ahead(tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = layers_in(tmp_path, random_layer(0), random_layer(1))
    read: list[str] = []
    fill = staging.read_into
    monkeypatch.setattr(staging, "read_into", lambda info, view: (read.append(info.name), fill(info, view)))
    buffers = make_staging([first], 2, worker)
    buffers.take(first)
    buffers.prefetch(second)
    worker.submit(lambda: None).result()
    assert read == [info.name for table in (first, second) for info in table.values()]
    assert_same(buffers.take(second), random_layer(1))
    assert len(read) == 2 * len(first)


def test_without_overlap_one_buffer_does_and_nothing_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [random_layer(seed) for seed in range(3)]
    tables = layers_in(tmp_path, *layers)
    read: list[str] = []
    fill = staging.read_into
    monkeypatch.setattr(staging, "read_into", lambda info, view: (read.append(info.name), fill(info, view)))
    buffers = make_staging([tables[0]], 1, Worker(False))
    places = set()
    for index, (table, layer) in enumerate(zip(tables, layers, strict=True)):
        views = buffers.take(table)
        assert_same(views, layer)
        places.add(views["w"].data_ptr())
        buffers.prefetch(tables[(index + 1) % 3])
        assert len(read) == (index + 1) * len(table)
    assert len(places) == 1


def test_another_layer_than_the_one_read_ahead_may_be_taken(tmp_path: Path, worker: Worker) -> None:
    first, second = layers_in(tmp_path, random_layer(0), random_layer(1))
    buffers = make_staging([first], 2, worker)
    buffers.prefetch(first)
    assert_same(buffers.take(second), random_layer(1))
    buffers.prefetch(first)
    buffers.settle()
    assert_same(buffers.take(first), random_layer(0))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_numbers_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, worker: Worker, ahead: bool, value: float, dtype: torch.dtype
) -> None:
    bad = torch.ones(6, 6)
    bad[4, 2] = value
    (table,) = layers_in(tmp_path, {"good": torch.ones(3), "bad": bad.to(dtype)})
    buffers = make_staging([table], 1, worker)
    if ahead:
        buffers.prefetch(table)
    with pytest.raises(
        CheckpointError, match=r"tensor 'layers\.0\.bad' in model\.safetensors has 1 NaN or infinite entries of 36"
    ):
        buffers.take(table)


@pytest.mark.parametrize("change", ["gone", "cut"])
def test_a_file_that_changes_before_its_turn_is_one_clear_error(tmp_path: Path, worker: Worker, change: str) -> None:
    """Between prefetch and take: the reader is held up until the file is gone, or cut inside its last tensor."""
    first, second = layers_in(tmp_path, random_layer(0), {"w": torch.ones(50, 50)})
    buffers = make_staging([first, second], 2, worker)
    buffers.take(first)
    changed, path = threading.Event(), second["w"].path
    worker.submit(changed.wait, 30)
    buffers.prefetch(second)
    path.unlink() if change == "gone" else os.truncate(path, second["w"].end - 1)
    changed.set()
    words = "No such file or directory while reading" if change == "gone" else "was changed while in use, before"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.* {words} tensor 'layers\.1\.w'"):
        buffers.take(second)
