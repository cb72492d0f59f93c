"""Bytes: what is written is what the safetensors library reads, and the reverse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamlap.store.header import DTYPES, read_header
from streamlap.store.hidden import DiskBank, HiddenStates, RamBank
from streamlap.store.sink import ShardFolder
from streamlap.store.source import SafetensorsFolder

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "full": torch.randn(2, 3, 4),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 4),
    "sliced": torch.randn(6, 6)[:, ::2],
    "counts": torch.arange(5),
    "byte": torch.arange(3, dtype=torch.uint8),
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
    monkeypatch.setattr("streamlap.store.source.CHUNK_BYTES", 7)
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


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_bank_gives_back_what_it_was_given(tmp_path: Path, kind: str, batch: int) -> None:
    x_NLD = torch.randn(8, 4, 6).bfloat16()
    disk = DiskBank(tmp_path, (8, 4, 6), torch.bfloat16, batch)
    bank: HiddenStates = RamBank() if kind == "ram" else disk
    bank.write(2, x_NLD.split(batch))
    batches = list(bank.read(2))
    assert [len(x_BLD) for x_BLD in batches] == [len(x_BLD) for x_BLD in x_NLD.split(batch)]
    assert torch.equal(torch.cat(batches), x_NLD)
    bank.drop(2)
    assert not list(tmp_path.iterdir())


def test_a_generation_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def batches():
        yield torch.zeros(1, 4, 6)
        raise RuntimeError("layer died")

    bank = DiskBank(tmp_path, (8, 4, 6), torch.float32, 1)
    with pytest.raises(RuntimeError, match="layer died"):
        bank.write(0, batches())
    assert not list(tmp_path.iterdir())
