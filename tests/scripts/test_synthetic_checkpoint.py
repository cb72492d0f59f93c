"""Made-up checkpoints: true shapes, names a loader takes, weights that behave, little memory."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from streamlap import plan
from streamlap.families.stream import ModelStream
from streamlap.store.source import SafetensorsFolder

SHAPES = (
    "llama-2-7b", "llama-3-8b", "llama-2-13b", "phi-4", "mistral-small-3", "gemma-3-27b", "olmo-2-32b", "qwen2.5-32b",
    "qwen3-32b", "llama-3-70b", "llama-3-405b",
)  # fmt: skip
NEW_KINDS = ("phi-4", "mistral-small-3", "gemma-3-27b", "olmo-2-32b", "qwen3-32b")
TIED = ("gemma-3-27b",)
SMALL = 64

# hidden, FFN, layers, heads, key-value heads, vocabulary, context, rope theta, rms eps, billions of parameters
PUBLISHED = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, 4096, 1e4, 1e-5, 6.74),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 8192, 5e5, 1e-5, 8.03),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000, 4096, 1e4, 1e-5, 13.0),
    "phi-4": (5120, 17920, 40, 40, 10, 100352, 16384, 2.5e5, 1e-5, 14.66),
    "mistral-small-3": (5120, 32768, 40, 32, 8, 131072, 32768, 1e8, 1e-5, 23.57),
    "gemma-3-27b": (5376, 21504, 62, 32, 16, 262208, 131072, 1e6, 1e-6, 27.0),
    "olmo-2-32b": (5120, 27648, 64, 40, 8, 100352, 4096, 5e5, 1e-6, 32.23),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, 131072, 1e6, 1e-5, 32.8),
    "qwen3-32b": (5120, 25600, 64, 64, 8, 151936, 40960, 1e6, 1e-6, 32.76),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256, 8192, 5e5, 1e-5, 70.6),
    "llama-3-405b": (16384, 53248, 126, 128, 8, 128256, 8192, 5e5, 1e-5, 405.9),
}
KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rope_theta", "rms_norm_eps",
)  # fmt: skip

Make = Callable[..., Path]


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "make_synthetic_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_synthetic_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


script = _load()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """small(shape, layers=..., ...) -> folder of a scaled-down checkpoint; equal calls share one, so do not change it."""
    made: dict[str, Path] = {}

    def make(shape: str, **settings: Any) -> Path:
        key = f"{shape} {sorted(settings.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("small") / shape
            script.make(made[key], shape, scale_down=SMALL, **settings)
        return made[key]

    return make


def _residual_rms(folder: Path) -> list[torch.Tensor]:
    """For random tokens in bfloat16: the rms of each token's hidden state before every layer and after the last."""
    stream = ModelStream(folder, dtype="bfloat16")
    tokens_NL = torch.randint(stream.vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))
    (x_BLD,) = stream.embed(tokens_NL)
    states = [x_BLD]
    for index, kwargs in enumerate(stream.layer_kwargs(64)):
        states.append(stream.layer(index, kwargs)(states[-1]))
    return [x_BLD.float().square().mean(-1).sqrt() for x_BLD in states]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_config_and_the_parameter_count_are_the_published_ones(shape: str) -> None:
    config = script.SHAPES[shape]
    *numbers, billions = PUBLISHED[shape]
    assert [config[key] for key in KEYS] == numbers
    assert config["tie_word_embeddings"] == (shape in TIED)
    assert script.parameters(script.tensor_shapes(config)) == pytest.approx(billions * 1e9, rel=0.01)


def test_every_shape_is_in_the_table() -> None:
    assert set(script.SHAPES) == set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_one_streams_and_loads_whole(shape: str, small: Make) -> None:
    folder = small(shape, layers=2)
    assert ModelStream(folder).depth == 2
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    rope = model.config.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == script.SHAPES[shape]["rope_theta"]
    with torch.no_grad():
        states = model(torch.arange(48)[None], output_hidden_states=True).hidden_states
    assert all(torch.isfinite(x_BLD).all() for x_BLD in states)
    assert all(0.005 < float(x_BLD.float().square().mean().sqrt()) < 10 for x_BLD in states)


@pytest.mark.parametrize("shape", NEW_KINDS)
def test_two_layers_of_full_size_are_planned_from_their_headers(shape: str, tmp_path: Path) -> None:
    script.make_headers(tmp_path / "model", shape, layers=2)
    np.save(tmp_path / "tokens.npy", np.arange(16 * 2048, dtype=np.uint32).reshape(16, 2048))
    found = plan(tmp_path / "model", ratio=0.3, files=(str(tmp_path / "tokens.npy"),), survey=None)
    assert [layer.index for layer in found.layers] == [0, 1]
    config, stream = script.SHAPES[shape], ModelStream(tmp_path / "model")
    dense = sum(native.parameters(2) for index in (0, 1) for native in stream.natives(index).values())
    becomes = [stream.natives(layer.index) | dict(layer.layout) for layer in found.layers]
    kept = sum(form.parameters(2) for forms in becomes for form in forms.values())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    assert dense == 2 * config["hidden_size"] * (heads * head + 3 * config["intermediate_size"])
    assert 0.68 < kept / dense <= 0.7


@pytest.mark.parametrize("factor", [2, 3, 5, 8, 16, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_down_heads_still_fit_together(shape: str, factor: int) -> None:
    full, config = script.SHAPES[shape], script.scaled_down(script.SHAPES[shape], factor)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads * full["num_key_value_heads"] == kv_heads * full["num_attention_heads"]
    assert config["hidden_size"] % (8 * heads) == 0
    if factor <= 16:
        assert config["hidden_size"] == pytest.approx(full["hidden_size"] / factor, rel=0.3)


def test_the_residual_stream_of_eighty_layers_stays_sane(small: Make) -> None:
    rms = _residual_rms(small("llama-3-70b"))
    assert len(rms) == 81
    assert all(0.01 < float(x_BL.square().mean().sqrt()) < 10 for x_BL in rms)
    assert all(torch.isfinite(x_BL).all() for x_BL in rms)


@pytest.mark.parametrize("shape", ["llama-2-7b", "qwen2.5-32b"])
def test_a_layer_does_not_depend_on_the_depth_or_the_shards(shape: str, small: Make) -> None:
    short = SafetensorsFolder(small(shape, layers=2))
    long = SafetensorsFolder(small(shape, layers=3, shard_bytes=100_000))
    assert len(short.headers) == 1
    assert len(long.headers) > 3
    for name in short.names():
        assert torch.equal(short.read(name), long.read(name)), name


def test_layers_straddle_shards_in_module_order(small: Make) -> None:
    folder = small("llama-2-7b", layers=3, shard_bytes=100_000)
    source = SafetensorsFolder(folder)
    shards: dict[str, set[str]] = {}
    for name in source.names():
        shards.setdefault(".".join(name.split(".")[:3]), set()).add(source.info(name).path.name)
    assert any(len(names) > 1 for layer, names in shards.items() if layer.startswith("model.layers."))
    order = sorted(source.names(), key=lambda name: (source.info(name).path.name, source.info(name).begin))
    config = json.loads((folder / "config.json").read_text())
    assert order == list(script.tensor_shapes(config))


def test_the_same_arguments_give_the_same_bytes_and_another_seed_gives_others(small: Make, tmp_path: Path) -> None:
    first = small("llama-3-8b", layers=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        script.make(tmp_path / "again", "llama-3-8b", layers=2, scale_down=SMALL)
    finally:
        torch.set_num_threads(threads)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((first / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    other = SafetensorsFolder(small("llama-3-8b", layers=2, seed=1))
    mine = SafetensorsFolder(first)
    assert not any(torch.equal(mine.read(name), other.read(name)) for name in mine.names())


def test_no_two_tensors_are_alike(small: Make) -> None:
    source = SafetensorsFolder(small("llama-2-7b", layers=2))
    tensors = [source.read(name).float().flatten() for name in source.names()]
    for shape in {tensor.shape for tensor in tensors}:
        alike = torch.stack([tensor - tensor.mean() for tensor in tensors if tensor.shape == shape])
        if len(alike) > 1 and shape[0] > 1000:
            assert (torch.corrcoef(alike) - torch.eye(len(alike))).abs().max() < 0.3


def test_matrices_are_worth_cutting_at_a_low_rank(small: Make) -> None:
    """A quarter of the singular values holds nine tenths of the energy; of Gaussian noise it would be six tenths."""
    for shape, quarter, half in (("llama-2-7b", 0.90, 0.97), ("qwen2.5-32b", 0.90, 0.97)):
        w_OI = SafetensorsFolder(small(shape, layers=2)).read("model.layers.0.self_attn.q_proj.weight").float()
        energy = torch.linalg.svdvals(w_OI).square()
        share = energy.cumsum(0) / energy.sum()
        assert share[len(energy) // 4 - 1] > quarter
        assert share[len(energy) // 2 - 1] > half


def test_channels_are_of_unequal_size_and_a_few_stand_out(small: Make) -> None:
    source = SafetensorsFolder(small("llama-3-70b"))
    embedding_VD = source.read("model.embed_tokens.weight").float()
    assert embedding_VD.square().mean().sqrt() == pytest.approx(0.02, rel=0.1)
    channels_D = embedding_VD.square().mean(0).sqrt()
    assert channels_D.max() > 5 * channels_D.median()
    assert channels_D.max() == channels_D[source.read("model.norm.weight").argmin()]
    gate_FD, up_FD = (source.read(f"model.layers.5.mlp.{name}_proj.weight").float() for name in ("gate", "up"))
    sizes = torch.stack([gate_FD.norm(dim=1), up_FD.norm(dim=1)])
    assert torch.corrcoef(sizes)[0, 1] > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_no_block_of_a_full_size_tensor_is_large(shape: str) -> None:
    config = script.SHAPES[shape]
    assert max(sizes[-1] for sizes in script.tensor_shapes(config).values()) <= script.BLOCK
    weights = script.Weights(config["hidden_size"], config["num_hidden_layers"], 0, torch.bfloat16)
    for name in ("model.embed_tokens.weight", "model.layers.7.mlp.down_proj.weight"):
        block = next(weights.blocks(name, script.tensor_shapes(config)[name]))
        assert script.BLOCK - block.shape[1] < block.numel() <= script.BLOCK


def test_a_tensor_of_half_a_gigabyte_takes_a_tenth_of_that() -> None:
    weights = script.Weights(4096, 32, 0, torch.bfloat16)
    process = psutil.Process()
    next(weights.blocks("model.embed_tokens.weight", (4096, 4096)))  # whatever the first product takes for good
    before, high, rows = process.memory_info().rss, 0, 0
    for block in weights.blocks("model.embed_tokens.weight", (64128, 4096)):
        rows += len(block)
        high = max(high, process.memory_info().rss)
    assert rows == 64128
    assert high - before < 50 << 20


def test_a_finished_folder_is_left_and_another_is_refused(small: Make, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small("llama-3-8b", layers=2), folder)
    shard = folder / "model-00001-of-00001.safetensors"
    stamp = shard.stat().st_mtime_ns
    script.make(folder, "llama-3-8b", layers=2, scale_down=SMALL)
    assert shard.stat().st_mtime_ns == stamp
    for other in ({"layers": 3}, {"layers": 2, "seed": 1}, {"layers": 2, "dtype": "float16"}):
        with pytest.raises(SystemExit, match="delete it or choose another"):
            script.make(folder, "llama-3-8b", scale_down=SMALL, **other)
    (folder / "config.json").unlink()
    with pytest.raises(SystemExit, match="part of a checkpoint"):
        script.make(folder, "llama-3-8b", layers=2, scale_down=SMALL)


def test_a_small_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(SystemExit, match=r"141,107,\d+,\d+ bytes, and 1,000,000,000 are free"):
        script.make(tmp_path / "out", "llama-3-70b")
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "llama-2-7b", "--layers", "1", "--scale-down", "64", "--dtype", "float16"]
    words += ["--shard-size", "200KB"]
    monkeypatch.setattr(sys, "argv", ["make_synthetic_checkpoint.py", str(tmp_path / "out"), *words])
    script.main()
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'out'}  112,832 parameters  22")
    assert printed.endswith(" s\n")
    assert ModelStream(tmp_path / "out").source.info("lm_head.weight").dtype == torch.float16


@pytest.mark.parametrize(("text", "nbytes"), [("4GB", 4 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), ("7", 7)])
def test_sizes_are_read_as_hugging_face_writes_them(text: str, nbytes: int) -> None:
    assert script.size(text) == nbytes


def test_headers_alone_are_those_of_the_whole_checkpoint_and_take_no_disk(tmp_path: Path) -> None:
    """All a plan reads is there: the shapes of every layer, at the published depth."""
    count, total = script.make_headers(tmp_path / "out", "llama-3-8b")
    assert count == pytest.approx(8.03e9, rel=0.01)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in shards) == total > 16e9
    assert sum(path.stat().st_blocks * 512 for path in shards) < 1 << 20
    stream = ModelStream(tmp_path / "out")
    assert (stream.depth, stream.width) == (32, 4096)
    whole = SafetensorsFolder(tmp_path / "out")
    assert whole.info("model.layers.31.mlp.down_proj.weight").shape == (4096, 14336)
    before = {path.name: path.stat().st_mtime_ns for path in shards}
    assert script.make_headers(tmp_path / "out", "llama-3-8b") == (count, total)
    assert {path.name: path.stat().st_mtime_ns for path in shards} == before, "a finished one stays"
    with pytest.raises(SystemExit, match="holds something else"):
        script.make_headers(tmp_path / "out", "llama-2-7b")
