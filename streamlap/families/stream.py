"""A checkpoint as a stream: embed the tokens, give one decoder layer at a time, score the last hidden states.

The model exists on the `meta` device only. Its layers are filled one by one from the source; what is around them is run by the
model's own code, see `shell`.

Shape suffixes: N sequences, B batch, L length, D hidden, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamlap.accelerator.devices import accelerator_of
from streamlap.errors import UnsupportedModel, shown
from streamlap.families.bounds import check_roles, check_widths, described_by, native_config
from streamlap.families.fused import PHI3_PARTS, StoredApart, Together, read_as
from streamlap.families.layer import StreamLayer, is_parallel
from streamlap.families.names import check_depth
from streamlap.families.nas import as_llama, is_nas, unmark
from streamlap.families.opening import (
    check_alone,
    check_orders,
    checked_tensors,
    compute_dtype,
    cpu_has_bfloat16,
    joined_table,
    meta_model,
    module_table,
    read_config,
    swapped,
)
from streamlap.families.shell import AfterLayers, BeforeLayers
from streamlap.families.table import Family, find_family
from streamlap.linalg.rows import marked
from streamlap.loader.forms import Dense, Form, form_of
from streamlap.loader.modules import carriers, disk_name
from streamlap.store.header import TensorInfo
from streamlap.store.journal import refuse_unfinished
from streamlap.store.source import SafetensorsFolder, TensorSource, equal_numbers, read_rows
from streamlap.store.staging import Staging
from streamlap.untrusted.paths import check_folder

BATCH_TOKENS = 4096
"""Tokens per forward. Fixed, because the shape of a matrix product can move its last bits."""

HEAD_TOKENS = 512
"""Tokens whose logits are in memory at a time."""


def batch_of(length: int) -> int:
    """Sequences of `length` tokens that go through a layer together."""
    return max(1, BATCH_TOKENS // length)


class ModelStream:
    """A checkpoint folder, original or compressed, ready to be run layer by layer on `device` in `dtype`.

    Opening it reads headers only and checks every name, shape and dtype against the architecture.
    `bfloat16` says whether a CPU multiplies in it by itself; None asks this one. Raises CheckpointError and UnsupportedModel.
    """

    def __init__(
        self, folder: Path, device: str = "cpu", dtype: str = "auto", source: TensorSource | None = None,
        bfloat16: bool | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.accelerator = folder, accelerator_of(device)
        self._bfloat16 = cpu_has_bfloat16() if bfloat16 is None else bfloat16
        check_folder(folder)
        refuse_unfinished(folder)
        check_alone(folder)
        raw = read_config(folder)
        self.marked = not is_nas(raw)
        """Whether what is gone has left a mark in its place, as in the factored format."""
        self.raw_config = raw if self.marked else as_llama(raw, folder)
        self.family = find_family(self.raw_config)
        source = read_as(source or SafetensorsFolder(folder), self.family)
        with described_by(folder):
            self._open(source, dtype)

    def _open(self, source: TensorSource, dtype: str) -> None:
        config: Any = native_config(self.raw_config, self.folder)
        depth = int(config.get_text_config().num_hidden_layers)
        check_depth(depth, source, self.family, self.folder)
        self.model = meta_model(config)
        self.config: Any = self.model.config.get_text_config()
        self.joined = joined_table(self.model, self.family)
        """Path of each matrix that holds several linears -> its row. In memory they are always apart."""
        rows = module_table(self.raw_config, self.family, depth, self.joined)
        self.apart = bool(rows.keys() & self.joined.keys())
        """Whether they are apart on the disk too, as in the factored format."""
        self.rows = {path: row for path, row in rows.items() if path not in self.joined}
        self._dense = swapped(self.model, self.joined | rows)  # what stood there before, by path
        if not self.marked:
            unmark(self.model.get_submodule(self.family.layers))
        self.layers = list(self.model.get_submodule(self.family.layers).children())
        self._families = [self.family.of_layer(layer) for layer in self.layers]
        self.width, self.vocabulary = int(self.config.hidden_size), int(self.config.vocab_size)
        self.context = int(self.config.max_position_embeddings)
        """The longest sequence the model was made for."""
        self.head_dim = int(getattr(self.config, "head_dim", None) or self.width // self.config.num_attention_heads)
        """Numbers in one attention head."""
        self.tied = bool(self.model.config.tie_word_embeddings)
        """Whether one matrix is embedding and head, unless two are stored."""
        if not isinstance(operator.attrgetter(self.family.norm)(self.model), nn.Module):
            raise UnsupportedModel(
                f"{self.folder}: this {self.family.model_type} has no {self.family.norm} behind its last layer; wanted one, as "
                "the others of its family have."
            )
        check_roles(self.model, self.family, depth)
        apart = StoredApart(source, self._stored_together())
        self.source = checked_tensors(apart, self.model, self.family, self.raw_config, self.folder)
        stored = self.source.info(f"{self.family.embedding}.weight").dtype
        self.dtype = compute_dtype(
            dtype, stored, self.accelerator.away or (stored == torch.bfloat16 and self._bfloat16)
        )
        for index in range(self.depth) if self.rows else ():
            forms = {role: self.form(index, role) for role in self.family_of(index).roles}
            check_widths(forms, self.natives(index), self.family_of(index), self.head_dim, self.layer_name(index))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.accelerator.device

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def compressed(self) -> bool:
        """Whether streamlap's loader is needed to open it."""
        return bool(self.rows) or self.apart

    def family_of(self, index: int) -> Family:
        """The family's row as it is for one layer."""
        return self._families[index]

    def kept_linears(self, index: int) -> list[nn.Linear]:
        """The linears of a layer that have no role, since they are in what some layers have in place of a sub-layer."""
        parts = [part.module for part in self.family_of(index).sublayers.values() if not part.roles]
        modules = (self.layers[index].get_submodule(path).modules() for path in parts if path is not None)
        return [module for inner in modules for module in inner if isinstance(module, nn.Linear)]

    def kept_parameters(self, index: int) -> int:
        """What they store, biases included."""
        return sum(weight.numel() for linear in self.kept_linears(index) for weight in linear.parameters())

    def heads_width(self, index: int) -> int:
        """Numbers that attention works on for each token, as many as q writes. What some layers have in its place works in
        float32, on as many as its widest linear writes."""
        if "q" in self.family_of(index).roles:
            return self.native(index, "q").shape[0]
        wide = max((linear.out_features for linear in self.kept_linears(index)), default=0)
        return wide * torch.float32.itemsize // self.dtype.itemsize

    def storage_itemsize(self, index: int) -> int:
        """Bytes of a weight of a layer's linears; of the widest where they differ."""
        return max(self.storage_dtype(index, role).itemsize for role in self.family_of(index).roles)

    def storage_dtype(self, index: int, role: str) -> torch.dtype:
        """Of a weight of a linear, which is on disk under the dense layer's own name whatever became of it; of one that has
        left nothing, that of the embedding."""
        name = f"{self.linear_name(index, role)}.weight"
        return self.source.info(name if name in self.source else f"{self.family.embedding}.weight").dtype

    def parallel(self, index: int) -> bool:
        """Whether all sub-layers of a layer read its input."""
        return is_parallel(self.layers[index], self.family)

    def layer_name(self, index: int) -> str:
        return f"{self.family.layers}.{index}"

    def linear_name(self, index: int, role: str) -> str:
        """Path of a linear in the model."""
        return f"{self.layer_name(index)}.{self.family.path(role)}"

    def native(self, index: int, role: str) -> Dense:
        """A linear before any edit, with the bias that the model gives it."""
        name = self.linear_name(index, role)
        return Dense.from_module(self._dense.get(name) or self.model.get_submodule(name))

    def natives(self, index: int) -> dict[str, Dense]:
        """Role -> the linear before any edit."""
        return {role: self.native(index, role) for role in self.family_of(index).roles}

    def form(self, index: int, role: str) -> Form:
        """A linear as it is in this checkpoint."""
        return form_of(self.model.get_submodule(self.linear_name(index, role)))

    def outer_tensors(self) -> dict[str, TensorInfo]:
        """Everything outside the decoder layers, by name on disk: embeddings, final norm, heads."""
        names = [name for name in self.source.names() if not name.startswith(self.family.layers + ".")]
        head, stored = self.family.head, self.family.stored_head or self.family.head
        called = {f"{head}.weight": f"{stored}.weight"}
        return {called.get(name, name): self.source.info(name) for name in sorted(names)}

    def layer_names(self, index: int) -> dict[str, str]:
        """Module state name -> name in the source, for one decoder layer."""
        prefix, module = self.layer_name(index), self.layers[index]
        parts = carriers(module)
        return {name: f"{prefix}.{disk_name(name, parts)}" for name in module.state_dict()}

    def layer_tensors(self, index: int) -> dict[str, TensorInfo]:
        """Module state name -> place in the source, for one decoder layer."""
        return {name: self.source.info(stored) for name, stored in self.layer_names(index).items()}

    @torch.no_grad()
    def layer_kwargs(self, length: int) -> list[dict[str, Any]]:
        """What the model passes to each decoder layer beside the hidden states, for sequences of `length` tokens.

        Raises CheckpointError where the values of config.json give no forward.
        """
        embedded_BLD = torch.zeros(1, length, self.width, dtype=self.dtype, device=self.device)
        with described_by(self.folder):
            return self._before().layer_kwargs(embedded_BLD)

    @torch.no_grad()
    def embed(self, tokens_NL: torch.Tensor) -> Iterator[torch.Tensor]:
        """Hidden states before the first layer, in batches x_BLD; rows that the compute dtype cannot hold are out, see
        `linalg.rows`. Of the table only the rows of a batch are in memory."""
        info = self.source.info(f"{self.family.embedding}.weight")
        before = self._before()
        for tokens_BL in torch.split(tokens_NL, batch_of(tokens_NL.shape[1])):
            ids, places_BL = torch.unique(tokens_BL, return_inverse=True)
            table_UD = read_rows(info, ids.tolist()).to(self.device, self.dtype)
            yield marked(before.embed(places_BL.to(self.device), table_UD))

    def _before(self) -> BeforeLayers:
        before = BeforeLayers(self.model, self.family, self.device)
        tensors = ((name, self.source.read(name)) for name in before.weights)
        before.load({name: tensor.to(self.device, self._computed(tensor)) for name, tensor in tensors})
        return before

    def layer(
        self, index: int, kwargs: Mapping[str, Any], staging: Staging | None = None, back: bool = False
    ) -> StreamLayer:
        """Read one decoder layer into memory. The caller drops it before it asks for the next; the stream keeps nothing.

        With `staging` the next layer is read ahead while this one is in use: the one before it on the way `back`, which ends
        behind the first.
        """
        stored = self.layer_tensors(index)
        if staging is None:
            tensors = {name: self.source.read(found) for name, found in self.layer_names(index).items()}
        else:
            tensors = staging.take(stored)
            if not staging.lasting:  # some tensors are converted, and those that are not must leave the buffer too
                tensors = {name: tensor.to(self._computed(tensor), copy=True) for name, tensor in tensors.items()}
        module = self._materialise(self.layers[index], tensors)
        check_orders(module, self.layer_name(index))
        following = index - 1 if back else index + 1
        if staging is not None and 0 < following < self.depth:
            staging.prefetch(self.layer_tensors(following))
        return StreamLayer(module, self.layer_name(index), self.family_of(index), kwargs, stored, self.natives(index))

    def frame(self, index: int, kwargs: Mapping[str, Any]) -> StreamLayer:
        """A decoder layer without the numbers of its linears, which stay on meta: what its first sub-layer reads depends on
        none of them."""
        linears = tuple(f"{path}." for path in self.family_of(index).paths)
        names = {name: found for name, found in self.layer_names(index).items() if not name.startswith(linears)}
        module = copy.deepcopy(self.layers[index])
        tensors = {name: self.source.read(found) for name, found in names.items()}
        placed = {name: tensor.to(self.device, self._computed(tensor)) for name, tensor in tensors.items()}
        module.load_state_dict(placed, strict=False, assign=True)
        module.eval().requires_grad_(False)
        return StreamLayer(
            module, self.layer_name(index), self.family_of(index), kwargs, self.layer_tensors(index),
            self.natives(index),
        )  # fmt: skip

    def check_sublayers(self, tokens_NL: torch.Tensor, writes: bool) -> None:
        """Raise UnsupportedModel where the sub-layers of the first layer are not that layer, on the first window: a family that
        was understood wrongly must not be compressed. Where some layers have other sub-layers, also of the first of those. See
        `StreamLayer.check_sublayers`."""
        x_BLD, kwargs = next(self.embed(tokens_NL[:1])), self.layer_kwargs(tokens_NL.shape[1])
        kinds = [tuple(family.roles) for family in self._families]
        for index in sorted(map(kinds.index, set(kinds))):
            self.layer(index, kwargs[index]).check_sublayers(x_BLD, writes)

    @property
    def has_head(self) -> bool:
        """Whether this is a language model: a decoder alone, or one for another task, may have no output head."""
        return self.tied or f"{self.family.head}.weight" in self.source

    @property
    def caps_logits(self) -> bool:
        """Whether logits are bent between bounds, so that a scale before that is no temperature."""
        return getattr(self.config, "final_logit_softcapping", None) is not None

    def require_head(self) -> None:
        """Raise UnsupportedModel where there is no output head, and so no prediction to measure."""
        if not self.has_head:
            raise UnsupportedModel(
                f"{self.folder} has no language-model head (architectures {shown(self.raw_config.get('architectures'))}); "
                "wanted one, to measure its predictions. Compress it without a survey, and measure it on its own task."
            )

    @property
    def head_name(self) -> str:
        """Name of the matrix that makes the logits. A tied model may store one beside its embedding: where their numbers differ
        transformers keeps both, and where they are equal either will do."""
        head = f"{self.family.head}.weight"
        return head if head in self.source else f"{self.family.embedding}.weight"

    def two_heads(self) -> bool:
        """Whether config.json ties the head to the embedding, and other numbers are stored for it. Reads both."""
        head, embedding = (f"{path}.weight" for path in (self.family.head, self.family.embedding))
        return self.tied and head in self.source and not equal_numbers(*map(self.source.info, (head, embedding)))

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Final norm and output head, read into memory: x_TD -> logits_TV in the compute dtype."""
        after = AfterLayers(self.model, self.family, self.device)
        names = {name: self.head_name if name == f"{self.family.head}.weight" else name for name in after.weights}
        tensors = ((name, self.source.read(stored)) for name, stored in names.items())
        after.load({name: tensor.to(self.device, self._computed(tensor)) for name, tensor in tensors})
        return lambda x_TD: after.logits(x_TD.to(self.device, self.dtype))

    def _materialise(self, meta: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """A copy of a module on meta with `tensors` in it, in the compute dtype on the device; copied only to change."""
        module = copy.deepcopy(meta)
        module.load_state_dict({n: t.to(self.device, self._computed(t)) for n, t in tensors.items()}, assign=True)
        return module.eval().requires_grad_(False)

    def _computed(self, tensor: torch.Tensor) -> torch.dtype:
        """What `tensor` is computed in: whole numbers stay what they are."""
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _stored_together(self) -> list[Together]:
        """Matrices of a layer on the disk that hold several linears."""
        rows = {self.family.path(role): native.shape[0] for role, native in self.natives(0).items()}
        if not self.family.joined:
            known = [(path, parts) for path, parts in PHI3_PARTS.items() if rows.keys() >= set(parts)]
            return [Together(path=path, parts={part: rows[part] for part in parts}) for path, parts in known]
        row = {path: self.joined[f"{self.layer_name(0)}.{path}"] for path in self.family.joined}
        return [
            Together(
                path=path,
                parts={part: count for part, count in rows.items() if part.startswith(f"{path}.")},
                head_dim=row[path].get("head_dim"),
                marked=True,
            )
            for path in (() if self.apart else self.family.joined)
        ]
