"""A checkpoint whose linears are dense, as one GGUF file for llama.cpp and what is built on it, a tensor at a time.

A llama whose layers differ is written as the architecture `deci`, which has a width and a number of heads for each layer;
others as what they are. Needs the package `gguf`. Format: the GGUF specification of ggml, and gguf's own constants.

Shape suffixes: O out, I in, P pairs of a head.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from streamlap.errors import CheckpointError, NumericalError, RecipeError, StreamlapError, UnsupportedModel, shown
from streamlap.families.cache import window_of
from streamlap.families.stream import ModelStream
from streamlap.loader.forms import Dense, Form, Removed
from streamlap.output.depth import left
from streamlap.output.gguf_vocabulary import add_vocabulary
from streamlap.output.nas import FAMILIES as LLAMAS
from streamlap.output.nas import check_shapes
from streamlap.store.sink import disk_error, fsync_folder
from streamlap.store.source import require_finite

TYPES = ("f32", "f16", "bf16", "q8_0")
"""What matrices may be stored in. Vectors are float32; a matrix whose rows are no multiple of 32 is f16 in place of q8_0."""
OTHERS = {"qwen2": "qwen2", "qwen3": "qwen3"}
"""Further model_type -> architecture, where all layers are alike and see all that went before."""
BIASED = {"qwen2": ("q", "k", "v"), "qwen3": ()}
"""Which of their linears have a bias in llama.cpp."""
BLOCK = 32
"""Numbers of a row that q8_0 stores together."""
F16_MOST = 65504.0


def library() -> Any:
    """The package gguf. Raises StreamlapError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise StreamlapError(
            "gguf is not installed, and writes that format; run pip install 'streamlap[gguf]'."
        ) from error
    return gguf


def check_type(kind: str | None, stream: ModelStream) -> str:
    """The type to store matrices in; None is the checkpoint's own."""
    stored = stream.source.info(f"{stream.family.embedding}.weight").dtype
    own = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(stored, "f32")
    if kind is not None and kind not in TYPES:
        raise RecipeError(f"type is {shown(kind)}; wanted one of {', '.join(TYPES)}.")
    return kind or own


def architecture(stream: ModelStream, layers: Sequence[Mapping[str, Form]]) -> str:
    """What llama.cpp calls it. Raises UnsupportedModel for what it cannot hold, or what this writer does not know."""
    for index, row in enumerate(layers):
        for role, form in row.items():
            if not isinstance(form, Dense | Removed):
                raise UnsupportedModel(
                    f"{stream.linear_name(index, role)} is {form.kind}, and GGUF holds dense linears alone; wanted a folder of "
                    "the format stock or nas, or of their shapes."
                )
    family, kept = stream.family.model_type, [layers[index] for index in left(layers)]
    alike = all(
        isinstance(form, Dense) and role in kept[0] and form.shape == kept[0][role].shape
        for row in kept
        for role, form in row.items()
    )
    windows = any(window_of(stream, index) for index in range(stream.depth))
    # Of a qwen2 llama.cpp takes q to have as many rows as the hidden size; as a llama it is the same with any number of rows.
    square = family != "qwen2" or kept[0]["q"].shape[0] == stream.width
    own = alike and family in OTHERS and square
    if windows or not (own or family in LLAMAS):
        what = family if alike and not windows else f"{family} with layers that differ or windows"
        raise UnsupportedModel(
            f"a {what} is not written as GGUF; wanted a llama, mistral, qwen2 or qwen3. Write the format stock, and give that "
            "folder to llama.cpp's own converter."
        )
    if stream.config.hidden_act != "silu":
        raise UnsupportedModel(
            f"hidden_act is {stream.config.hidden_act!r}, and llama.cpp computes silu there; wanted silu. Run this model with "
            "transformers."
        )
    if own:
        check_own(stream, layers)
        return OTHERS[family]
    way_out = "Export to dense, and that folder to GGUF: it has the size of the original."
    check_shapes(stream, layers, "GGUF", way_out)
    return "llama" if alike else "deci"


def check_own(stream: ModelStream, layers: Sequence[Mapping[str, Form]]) -> None:
    """Raise UnsupportedModel for what llama.cpp does not compute in one of `OTHERS`."""
    family = stream.family.model_type
    if rope_of(stream)["rope_type"] == "llama3":
        raise UnsupportedModel(
            f"rope_type is 'llama3', which llama.cpp does not read of a {family}; wanted default or linear. Run this model "
            "with transformers."
        )
    for index in left(layers):
        for role, form in layers[index].items():
            if form.bias and role not in BIASED[family]:
                raise UnsupportedModel(
                    f"{stream.linear_name(index, role)} has a bias, which llama.cpp does not read of a {family}; wanted none "
                    "there. Run this model with transformers."
                )


def write_gguf(stream: ModelStream, layers: Sequence[Mapping[str, Form]], path: Path, kind: str, name: str) -> int:
    """Write the file, which has its name only once it is whole; gives its size.

    Args: kind, one of TYPES; name, of the model, for people. Raises UnsupportedModel for what the format cannot hold, before
    anything is written.
    """
    gguf, arch = library(), architecture(stream, layers)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with contextlib.closing(gguf.GGUFWriter(temporary, arch)) as writer:
            add_settings(writer, stream, layers, kind, name)
            add_vocabulary(writer, stream.folder, stream.vocabulary)
            planned = list(tensors(stream, layers, arch, kind))
            for place in planned:
                place.announce(writer)
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for place in planned:
                writer.write_tensor_data(place.data())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path, resumes=False) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def add_settings(writer: Any, stream: ModelStream, layers: Sequence[Mapping[str, Form]], kind: str, name: str) -> None:
    gguf, config, kept = library(), stream.config, [layers[index] for index in left(layers)]
    widths = [row["down"].shape[1] for row in kept]
    heads, groups = (
        [0 if isinstance(row[role], Removed) else row[role].shape[0] // stream.head_dim for row in kept]
        for role in ("q", "k")
    )
    writer.add_name(name)
    writer.add_context_length(stream.context)
    writer.add_embedding_length(stream.width)
    writer.add_block_count(len(kept))
    writer.add_feed_forward_length(one_or_all(widths))
    writer.add_head_count(one_or_all(heads))
    writer.add_head_count_kv(one_or_all(groups))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(stream.head_dim)
    writer.add_vocab_size(stream.vocabulary)
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rope = rope_of(stream)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def one_or_all(counts: Sequence[int]) -> int | list[int]:
    """One number where all layers have the same."""
    return counts[0] if len(set(counts)) == 1 else list(counts)


def rope_of(stream: ModelStream) -> dict[str, Any]:
    """How positions turn. Raises UnsupportedModel for a way that this writer does not know."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0} | dict(
        getattr(stream.config, "rope_parameters", None) or {}
    )
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UnsupportedModel(
            f"rope_type is {shown(rope['rope_type'])}; wanted default, linear or llama3. Write the format stock, and give that "
            "folder to llama.cpp's own converter."
        )
    return rope


# --- tensors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One tensor of the file: what is said of it before its turn, and its numbers then."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], torch.Tensor]

    def announce(self, writer: Any) -> None:
        gguf = library()
        kind = gguf.GGMLQuantizationType[self.kind.upper()]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            self.name, self.shape, numpy.dtype("float32"), math.prod(self.shape) // block * size, raw_dtype=kind
        )

    def data(self) -> Any:
        """As an array of numpy."""
        gguf, x = library(), self.read().float().contiguous()
        require_finite(x, self.name, "the checkpoint")
        if self.kind == "f16" and float(x.abs().max()) > F16_MOST:
            raise NumericalError(f"{self.name} has numbers that float16 cannot hold; wanted another --type, like bf16.")
        return gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[self.kind.upper()])


def tensors(stream: ModelStream, layers: Sequence[Mapping[str, Form]], arch: str, kind: str) -> Iterator[Planned]:
    """Every tensor of the file, in its order."""
    gguf, kept = library(), left(layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], len(kept))
    turned = () if arch in OTHERS.values() else tuple(f"{stream.family.path(role)}." for role in ("q", "k"))

    def planned(own: str, heads: int = 0, called: str | None = None) -> Planned:
        name, shape = names.get_name(called or own, try_suffixes=(".weight", ".bias")), stream.source.info(own).shape
        if name is None:
            raise CheckpointError(f"tensor {own!r} has no place in the architecture {arch}; wanted a plain {arch}.")
        narrow = kind == "q8_0" and len(shape) > 1 and shape[-1] % BLOCK
        stored = "f32" if len(shape) == 1 else "f16" if narrow else kind
        return Planned(name=name, shape=shape, kind=stored, read=lambda: in_pairs(stream.source.read(own), heads))

    if factors := rope_factors(stream):
        yield Planned(name="rope_freqs.weight", shape=(len(factors),), kind="f32", read=lambda: torch.tensor(factors))
    heads = f"{stream.family.head}.weight"
    for own in stream.outer_tensors():
        if own != heads or not stream.tied or stream.two_heads():
            yield planned(own)
    for place, index in enumerate(kept):
        gone = ("self_attn.", "input_layernorm.") if isinstance(layers[index]["q"], Removed) else ()
        for part, own in stream.layer_names(index).items():
            if part.startswith(gone):
                continue
            rows = stream.source.info(own).shape[0] if part.startswith(turned) else 0
            yield planned(own, rows // stream.head_dim, f"{stream.layer_name(place)}.{part}")


def in_pairs(w_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k (or their biases) so that the two numbers that are turned together are neighbours, as llama.cpp turns
    those of a llama; transformers has one in each half of a head. As it is without heads."""
    if not heads:
        return w_OI
    return torch.unflatten(w_OI, 0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rope_factors(stream: ModelStream) -> list[float]:
    """By what the frequencies of each pair are divided, where the way to turn scales them one by one."""
    rope = rope_of(stream)
    if rope["rope_type"] != "llama3":
        return []
    scaled_P, _ = ROPE_INIT_FUNCTIONS["llama3"](stream.config, torch.device("cpu"))
    steps_P = torch.arange(0, stream.head_dim, 2).double() / stream.head_dim
    return [float(factor) for factor in rope["rope_theta"] ** -steps_P / scaled_P.double()]
