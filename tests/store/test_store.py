"""Bytes: what is written is what the safetensors library reads, and the reverse."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamlap.errors import CheckpointError
from streamlap.store.header import DTYPES, read_header
from streamlap.store.sink import Joined, ShardFolder, durable, shard_bytes
from streamlap.store.source import SafetensorsFolder, read_rows, read_tensor

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "full": torch.randn(2, 3, 4),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 4),
    "sliced": torch.randn(6, 6)[:, ::2],
    "counts": torch.arange(5),
    "byte": torch.arange(3, dtype=torch.uint8),
    "rows": torch.randn(10, 3).bfloat16(),
}


def test_the_library_reads_what_the_sink_writes(tmp_path: Path) -> None:
    ShardFolder(tmp_path).write("shard.safetensors", TENSORS)
    read = load_file(tmp_path / "shard.safetensors")
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_the_source_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    assert set(source.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(source.read(name), tensor)


def test_tensors_are_aligned_and_the_bytes_do_not_depend_on_the_order_given(tmp_path: Path) -> None:
    sink = ShardFolder(tmp_path)
    first = sink.write("a.safetensors", TENSORS)
    second = sink.write("b.safetensors", dict(reversed(TENSORS.items())))
    assert first == second
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for info in read_header(tmp_path / "a.safetensors").tensors.values():
        assert info.begin % info.dtype.itemsize == 0


def test_a_tensor_given_by_its_place_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlap.store.source.CHUNK_BYTES", 40)  # 96 bytes in three pieces
    save_file({"w": TENSORS["full"]}, tmp_path / "model.safetensors")
    info = SafetensorsFolder(tmp_path).info("w")
    ShardFolder(tmp_path).write("copy.safetensors", {"w": info})
    assert torch.equal(load_file(tmp_path / "copy.safetensors")["w"], TENSORS["full"])


def test_every_known_dtype_has_the_size_it_takes(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        ShardFolder(tmp_path).write(f"{name}.safetensors", {"t": torch.zeros(4, dtype=dtype)})
        assert read_header(tmp_path / f"{name}.safetensors").tensors["t"].nbytes == 4 * dtype.itemsize


def test_no_file_stays_open_or_mapped(tmp_path: Path) -> None:
    save_file({"w": TENSORS["full"]}, tmp_path / "model.safetensors")
    source = SafetensorsFolder(tmp_path)
    kept = source.read("w")
    assert kept.shape == (2, 3, 4)
    maps = Path("/proc/self/maps").read_text()
    links = [link.resolve() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert str(tmp_path) not in maps
    assert tmp_path / "model.safetensors" not in links


def test_what_is_not_finite_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a file stay behind; the NaN is in the last of three pieces."""
    monkeypatch.setattr("streamlap.store.source.CHUNK_BYTES", 40)
    tensor = TENSORS["full"].clone()
    tensor[-1, -1, -1] = torch.nan
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    info = SafetensorsFolder(tmp_path).info("w")
    with pytest.raises(CheckpointError, match=r"tensor 'w' in model.safetensors has 1 NaN or infinite entries of 4"):
        ShardFolder(tmp_path).write("copy.safetensors", {"w": info})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    """Neighbours are read at once, so the ids have runs, gaps and steps back."""
    save_file({"w": TENSORS["rows"]}, tmp_path / "model.safetensors")
    info, rows = SafetensorsFolder(tmp_path).info("w"), [0, 1, 2, 9, 4, 5, 5, 3]
    assert torch.equal(read_rows(info, rows), TENSORS["rows"][rows])


def test_only_rows_that_are_read_must_be_finite(tmp_path: Path) -> None:
    tensor = TENSORS["rows"].clone()
    tensor[3, 1] = torch.inf
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    info = SafetensorsFolder(tmp_path).info("w")
    assert torch.equal(read_rows(info, [2, 4]), tensor[[2, 4]])
    with pytest.raises(CheckpointError, match=r"tensor 'w' .* has 1 NaN or infinite"):
        read_rows(info, [2, 3])


@pytest.mark.parametrize("rows", [[-1, 2], [2, 10]])
def test_rows_that_are_not_there_are_refused(tmp_path: Path, rows: list[int]) -> None:
    save_file({"w": TENSORS["rows"], "z": torch.zeros(40)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'w' has rows 0 to 9; asked for"):
        read_rows(SafetensorsFolder(tmp_path).info("w"), rows)


def test_rows_of_a_file_that_was_cut_are_refused(tmp_path: Path) -> None:
    save_file({"w": TENSORS["rows"]}, tmp_path / "model.safetensors")
    info = SafetensorsFolder(tmp_path).info("w")
    os.truncate(info.path, info.end - 1)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors was changed while in use, before tensor 'w' was read"
    ):
        read_rows(info, [8, 9])
    with pytest.raises(CheckpointError, match=r"model.safetensors ended inside tensor 'w'"):
        read_rows(replace(info, stamp=None), [8, 9])  # as where it is cut between the look at it and the reading


@pytest.mark.parametrize(("name", "state"), [("shard", ".streamlap"), ("survey.json", "survey.json.streamlap")])
def test_what_has_no_name_yet_lies_in_the_state_of_its_run(tmp_path: Path, name: str, state: str) -> None:
    (tmp_path / ".streamlap").mkdir()
    (tmp_path / state).mkdir(exist_ok=True)
    with durable(tmp_path / name) as file:
        file.write(b"whole")
        assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.tmp")] == [Path(state) / f"{name}.tmp"]
    assert (tmp_path / name).read_bytes() == b"whole"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_tensor_in_runs_is_read_and_copied_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other two of twelve rows; and back into their places between the others."""
    monkeypatch.setattr("streamlap.store.source.CHUNK_BYTES", 20)  # less than a run, and no divisor of it
    whole = torch.randn(12, 3)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    info = read_header(tmp_path / "model.safetensors").tensors["w"]
    parts = [
        replace(info, shape=(6, 3), begin=begin, end=begin + 5 * 24, run=24, step=48)
        for begin in (info.begin, info.begin + 24)
    ]
    wanted = [whole.reshape(3, 2, 2, 3)[:, part].reshape(6, 3) for part in (0, 1)]
    assert all(map(torch.equal, map(read_tensor, parts), wanted))
    assert torch.equal(read_rows(parts[1], [4, 1, 2]), wanted[1][[4, 1, 2]])
    entries = {"part": parts[0], "again": Joined((wanted[0], parts[1]), 2), "after": Joined((parts[1], wanted[0]))}
    ShardFolder(tmp_path).write("shard.safetensors", entries)
    copied = load_file(tmp_path / "shard.safetensors")
    assert torch.equal(copied["part"], wanted[0])
    assert torch.equal(copied["again"], whole)
    assert torch.equal(copied["after"], torch.cat((wanted[1], wanted[0])))
    assert shard_bytes(entries) == (tmp_path / "shard.safetensors").stat().st_size
