"""What the model does before its first layer and after its last one.

The model exists on the `meta` device only. A shell is a copy of it with stand-ins in place of the decoder layers, through which
its own forward runs. So no family has to say what it does to embeddings, masks, positions or logits.

Shape suffixes: B batch, L length, D hidden, T tokens, U different tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from streamlap.families.table import Family


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
