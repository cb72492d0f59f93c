"""The model without its layers' weights: what config.json describes, whether what is stored fits it, and what the model does
before its first layer and after its last one.

The model exists on the `meta` device only. A shell is a copy of it with stand-ins in place of the decoder layers, through which
its own forward runs. So no family has to say what it does to embeddings, masks, positions or logits.

Shape suffixes: B batch, L length, D hidden, T tokens, U different tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from streamlap.errors import CheckpointError, RecipeError, UnsupportedModel, one_line, shown
from streamlap.families.fused import as_stored_apart
from streamlap.families.table import Family
from streamlap.families.wrappers import DECODER, WRAPPERS
from streamlap.loader.linears import PivotedLinear
from streamlap.loader.modules import swap_modules
from streamlap.store.foreign import ADAPTER
from streamlap.store.header import TensorInfo
from streamlap.untrusted.paths import CONFIG_BYTES, read_object

COMPUTE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""What a layer may be computed in; "auto" is the checkpoint's dtype where the device is fast in it, else float32."""
SHORT_DTYPES = {
    "fp32": "float32", "f32": "float32", "float": "float32", "fp16": "float16", "f16": "float16", "half": "float16",
    "bf16": "bfloat16",
}  # fmt: skip
"""What else they are called."""
STORED_DTYPES = {*COMPUTE_DTYPES.values(), torch.float64}
"""What weights may be stored in. No device is fast in float64, so it is never computed in."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as transformers takes it: a mistral with `layer_types` is a ministral, whose layers heed them. A phi3 is what
    it is but for its fused matrices, and a gpt2 is an opt, see `fused`.

    Raises CheckpointError when there is none or it is not a JSON object.
    """
    raw = as_stored_apart(read_object(folder, "config.json", CONFIG_BYTES))
    alternating = raw.get("model_type") == "mistral" and "layer_types" in raw
    return raw | {"model_type": "ministral"} if alternating else raw


def check_alone(folder: Path) -> None:
    """Raise CheckpointError for a folder with an adapter, which transformers would put onto the weights."""
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder} has an {ADAPTER}; wanted a model alone. Merge the adapter with peft, or take its files away."
        )


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config`, without weights, of transformers' own classes; of a wrapper only what text goes through."""
    wrapper = config.model_type in WRAPPERS
    classes: Any = AutoModelForImageTextToText if wrapper else AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = classes.from_config(config, trust_remote_code=False)
    model.eval()  # type: ignore[no-untyped-call]
    if wrapper:
        base, _, decoder = DECODER.partition(".")
        whole = model.get_submodule(base)
        for name in [name for name, _ in whole.named_children() if name != decoder]:
            delattr(whole, name)
    return model


def head_dim_of(attention: Any) -> int:
    """Numbers in one head of an attention module."""
    return int(getattr(attention, "head_dim", None) or attention.head_size)


def joined_table(model: nn.Module, family: Family) -> dict[str, dict[str, int]]:
    """Path in the model of each matrix that holds several linears -> its row, see `loader.modules`."""
    table, attention = {}, family.sublayers["attention"].module
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for path, row in family.joined_rows.items():
            turns = {"head_dim": head_dim_of(layer.get_submodule(str(attention)))} if family.joined[path] else {}
            table[f"{family.layers}.{index}.{path}"] = row | turns
    return table


def module_table(
    raw: Mapping[str, Any], family: Family, depth: int, joined: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """quantization_config.modules of a folder that streamlap wrote, else nothing; linears of decoder layers alone, and either
    all matrices of `joined` or none."""
    rows = (raw.get("quantization_config") or {}).get("modules", {})
    known = {f"{family.layers}.{index}.{path}" for index in range(depth) for path in family.paths} | joined.keys()
    faulty = [path for path in rows if path not in known or not isinstance(rows[path], dict)] if rows else []
    faulty = faulty or [path for path in rows if "parts" in rows[path] and path not in joined]
    if isinstance(rows, dict) and not faulty and (given := rows.keys() & joined.keys()):
        faulty = [path for path in given if rows[path] != joined[path]]
        if lacking := sorted(joined.keys() - rows.keys()):
            raise CheckpointError(
                f"quantization_config.modules in config.json has no row for {lacking[0]}; wanted "
                f"{shown(dict(joined[lacking[0]]))} there, as for {min(given)}."
            )
    if not isinstance(rows, dict) or faulty:
        row = f" {shown(faulty[0])}: {shown(rows[faulty[0]])}" if isinstance(rows, dict) else f": {shown(rows)}"
        raise CheckpointError(
            f"quantization_config.modules in config.json has{row}; wanted linears of the {depth} decoder layers, with a "
            'row like {"rank": 7} for each.'
        )
    return rows


def parse_dtype(name: str | torch.dtype) -> str:
    """auto, or a compute dtype as people write it (bf16, BF16, torch.bfloat16) -> auto, or its key in COMPUTE_DTYPES.

    Raises RecipeError for any other.
    """
    word = str(name).strip().lower().removeprefix("torch.") if isinstance(name, str | torch.dtype) else ""
    word = SHORT_DTYPES.get(word, word)
    if word not in ("auto", *COMPUTE_DTYPES):
        raise RecipeError(
            f"dtype is {shown(name)}; wanted one of auto, {', '.join(COMPUTE_DTYPES)}, or short fp32, fp16, bf16."
        )
    return word


def swapped(model: nn.Module, rows: Mapping[str, Mapping[str, int]]) -> dict[str, nn.Linear]:
    """Put what an earlier compression made in its place; gives the linears that stood there, by path."""
    try:
        return swap_modules(model, rows)
    except (AttributeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"quantization_config.modules in config.json does not fit the model: {one_line(str(error))}"
        ) from error


def check_tensor(info: TensorInfo, wanted: torch.Tensor) -> None:
    """Whether a stored tensor is what the model on meta has in its place."""
    if info.shape != tuple(wanted.shape):
        raise CheckpointError(
            f"tensor {info.name!r} in {info.path.name} has shape {list(info.shape)}; config.json wants {list(wanted.shape)}."
        )
    if not wanted.is_floating_point():  # the order of a pivoted linear, and nothing else
        if info.dtype != wanted.dtype:
            raise UnsupportedModel(f"tensor {info.name!r} has dtype {info.dtype}; wanted {wanted.dtype}.")
    elif info.dtype not in STORED_DTYPES:
        raise UnsupportedModel(
            f"tensor {info.name!r} has dtype {info.dtype}; wanted float32, float16, bfloat16 or float64 weights."
        )


def check_orders(root: nn.Module, name: str) -> None:
    """Raise CheckpointError where a pivoted linear in `root`, which the checkpoint calls `name`, has no usable order."""
    for path, module in root.named_modules(prefix=name):
        if isinstance(module, PivotedLinear) and not module.has_permutation():
            raise CheckpointError(
                f"tensor '{path}.order' is no permutation of its numbers; wanted one. Copy its shard again."
            )


class Recorder(nn.Module):
    """Stands where the decoder layers stand: takes down what each is given, and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.calls.append((hidden_states, kwargs))
        return hidden_states


class Injector(nn.Module):
    """Stands where the decoder layers stand, and gives `x_BLD` whatever comes in."""

    x_BLD: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.x_BLD


class BeforeLayers:
    """What the model does before its first layer."""

    def __init__(self, model: PreTrainedModel, family: Family, device: torch.device) -> None:
        self._recorder = Recorder()
        self._shell = shell_of(model, family, self._recorder, device)
        self._shell.set_submodule(family.norm, nn.Identity())  # its weights are on meta, and nobody asks for its output
        self._decoder: Any = self._shell.get_decoder()  # type: ignore[no-untyped-call]
        self._embedding: Any = self._shell.get_submodule(family.embedding)
        inner, embedding = family.embedding.rpartition(".")[0], f"{family.embedding}.weight"
        self.weights = [name for name in self._shell.state_dict() if name.startswith(f"{inner}.") and name != embedding]
        """What it needs beside the embedding: learned positions, where there are some."""

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._shell.load_state_dict(tensors, strict=False, assign=True)

    def layer_kwargs(self, embedded_BLD: torch.Tensor) -> list[dict[str, Any]]:
        """What each layer is given beside the hidden states, for embeddings of this shape."""
        return [kwargs for _, kwargs in self._run(inputs_embeds=embedded_BLD)]

    def embed(self, places_BL: torch.Tensor, table_UD: torch.Tensor) -> torch.Tensor:
        """x_BLD before the first layer; the embedding of each token is the row at its place in the table."""
        self._embedding.weight, self._embedding.padding_idx = nn.Parameter(table_UD, requires_grad=False), None
        return self._run(input_ids=places_BL)[0][0]

    def _run(self, **inputs: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        self._decoder(**inputs, use_cache=False)
        calls, self._recorder.calls = self._recorder.calls, []
        return calls


class AfterLayers:
    """What the model does after its last layer, for which it needs `weights`."""

    def __init__(self, model: PreTrainedModel, family: Family, device: torch.device) -> None:
        self._injector = Injector()
        self._shell = shell_of(model, family, self._injector, device)
        self.weights = [name for name in self._shell.state_dict() if name != f"{family.embedding}.weight"]

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._shell.load_state_dict(tensors, strict=False, assign=True)
        self._shell.requires_grad_(False)

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x_TD behind the last layer -> logits_TV, through which gradients go where x_TD asks for them. No token hears of
        another here, so each is a sequence of its own."""
        self._injector.x_BLD = x_TD[:, None]
        logits_T1V: torch.Tensor = self._shell(inputs_embeds=x_TD[:, None], use_cache=False).logits
        del self._injector.x_BLD
        return logits_T1V[:, 0]


def shell_of(model: PreTrainedModel, family: Family, stand_in: nn.Module, device: torch.device) -> PreTrainedModel:
    """A copy of the model on meta in which every layer is `stand_in`; buffers that are computed, not stored, are real."""
    layers = model.get_submodule(family.layers)
    stand_ins = nn.ModuleList([stand_in] * len(list(layers.children())))
    shell = copy.deepcopy(model, {id(layers): stand_ins})  # as if the layers had been copied already
    computed = dict(shell.named_non_persistent_buffers())
    for name, buffer in computed.items():
        path, _, leaf = name.rpartition(".")
        # A scale may have been rounded to the dtype of the checkpoint, which is not the one it is computed in.
        dtype = torch.promote_types(buffer.dtype, torch.float32) if buffer.is_floating_point() else buffer.dtype
        setattr(shell.get_submodule(path), leaf, torch.empty_like(buffer, device=device, dtype=dtype))
    for path in {name.rpartition(".")[0] for name in computed}:
        # As transformers fills them when it loads a model.
        shell._init_weights(shell.get_submodule(path))  # type: ignore[no-untyped-call]
    return shell
