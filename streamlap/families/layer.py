"""One decoder layer while it is in memory: run it, look at its inputs, edit it, hand over its tensors.

Shape suffixes: B batch, L length, D hidden, T tokens, I in.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from streamlap.families.checks import check_layer
from streamlap.families.opening import head_dim_of
from streamlap.families.standins import KEPT, StandIn, replaced, silent, silent_linear
from streamlap.families.table import Family
from streamlap.linalg.rows import any_out, carried, finite_rows
from streamlap.loader.forms import Dense, Form, Removed, form_of
from streamlap.loader.modules import carriers, disk_name, skip_removed
from streamlap.store.header import TensorInfo
from streamlap.store.sink import TensorEntry


class Collector(Protocol):
    """What may look at the inputs of a linear: it is shown x_TI, batch after batch."""

    def update(self, x_TI: torch.Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One linear becomes another module. Pure description, applied once: what runs next is what is saved."""

    role: str
    module: nn.Module
    """In the storage dtype, exactly as it will be written."""
    native: Dense
    """The linear before any edit."""
    error: float
    """Relative error that the method knows of; its meaning is in the method's docstring."""
    kept: tuple[int, ...] | None = None
    """Indices of the channels that stay, ascending; None where the width did not change."""
    notes: tuple[str, ...] = ()
    """What took more than arithmetic."""

    @property
    def form(self) -> Form:
        return form_of(self.module)


def is_parallel(module: nn.Module, family: Family) -> bool:
    """Whether all sub-layers of this layer read its input."""
    return bool(getattr(module, family.parallel)) if isinstance(family.parallel, str) else family.parallel


class StreamLayer:
    """A materialised decoder layer. Untouched tensors stay tied to their place in the source, edited ones replace them."""

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        family: Family,
        kwargs: Mapping[str, Any],
        stored: Mapping[str, TensorInfo],
        natives: Mapping[str, Dense],
    ) -> None:
        self.module, self.prefix, self.family = module, prefix, family
        self._kwargs, self._stored, self._natives = kwargs, stored, natives
        self._dense = {path: module.get_submodule(path) for path in map(family.path, natives)}
        self._edited: dict[str, nn.Module] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        self._out_BL: torch.Tensor | None = None
        """Rows of the batch in hand that are out."""
        self._shape_BL = torch.Size()

    def linear(self, role: str) -> nn.Linear:
        linear = self.module.get_submodule(self.family.path(role))
        assert isinstance(linear, nn.Linear), role
        return linear

    def native(self, role: str) -> Dense:
        """The linear before any edit."""
        return self._natives[role]

    def natives(self, roles: Iterable[str]) -> dict[str, Dense]:
        return {role: self._natives[role] for role in roles}

    @torch.no_grad()
    def added(self, name: str, output_BLD: torch.Tensor) -> torch.Tensor:
        """What a sub-layer adds to the hidden states when this is the output of its last linear."""
        part = self.family.sublayers[name]
        if part.multiplier is not None:
            output_BLD = output_BLD * getattr(self.module, part.multiplier)
        if part.norm is not None:
            output_BLD = self.module.get_submodule(part.norm)(output_BLD)
        return output_BLD

    def gain(self, role: str) -> torch.Tensor | None:
        """[O], what each output of a linear is multiplied by on its way to the hidden states: a multiplier, or the gain of a
        norm. By what such a norm divides each token, `watch` measures. None where the layer does nothing to it."""
        for name, part in self.family.sublayers.items():
            if part.writes == role and (part.norm or part.multiplier):
                weight = next(self.module.parameters())
                return self.added(name, weight.new_ones(self.native(role).shape[0])).float()
        return None

    def acting(self, role: str) -> torch.Tensor:
        """The weight [O, I] of a linear as it acts on the hidden states: its rows times their gain."""
        weight_OI, gain_O = self.linear(role).weight, self.gain(role)
        return weight_OI if gain_O is None else weight_OI * gain_O[:, None].to(weight_OI.dtype)

    @property
    def head_dim(self) -> int:
        """Numbers in one attention head."""
        path = self.family.sublayers["attention"].module
        assert path is not None, "attention is a module everywhere"
        return head_dim_of(self.module.get_submodule(path))

    def storage_dtype(self, role: str) -> torch.dtype:
        return self._stored[f"{self.family.path(role)}.weight"].dtype

    @torch.no_grad()
    def __call__(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Run the layer with the mask and position embeddings that the whole model would give it.

        Rows that are out stay so and are seen by no other; rows that become NaN or infinite are out behind it, see
        `linalg.rows`.
        """
        x_BLD = self._here(x_BLD)
        self._out_BL, self._shape_BL = any_out(x_BLD), x_BLD.shape[:2]
        return carried(self._run, x_BLD, self._out_BL)

    @property
    def parallel(self) -> bool:
        """Whether all sub-layers read the input of the layer."""
        return is_parallel(self.module, self.family)

    @torch.no_grad()
    def run_sublayer(self, name: str, x_BLD: torch.Tensor) -> torch.Tensor:
        """x and what a sub-layer adds to it. Unless they are parallel, all sub-layers in their order give what the layer gives;
        of rows that are out, too."""
        with replaced(self.module, self._silent({name})):
            return self(x_BLD)

    def base(self, name: str, x_BLD: torch.Tensor) -> torch.Tensor:
        """The hidden states that the output of a sub-layer is added to, when it is given x: x itself; in a parallel layer x and
        what the sub-layers before it have added."""
        names = list(self.family.sublayers)
        before = set(names[: names.index(name)]) if self.parallel else set()
        if not before:
            return x_BLD
        with replaced(self.module, self._silent(before)):
            return self(x_BLD)

    def in_sequence(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """x and what all sub-layers add to it, one after another."""
        y_BLD = x_BLD
        for name in self.family.sublayers:
            given_BLD = x_BLD if self.parallel else y_BLD
            made_BLD = self.run_sublayer(name, given_BLD)
            y_BLD = y_BLD + (made_BLD - given_BLD) if self.parallel else made_BLD
        return y_BLD

    def run_dense(self, name: str, x_BLD: torch.Tensor) -> torch.Tensor:
        """`run_sublayer` with the dense linears, whatever edits are tried or applied; `apply` must have kept them."""
        with replaced(self.module, self._dense):
            return self.run_sublayer(name, x_BLD)

    @torch.no_grad()
    def sublayer_input(self, name: str, x_BLD: torch.Tensor) -> torch.Tensor:
        """What the linears that read the input of a sub-layer are given, when the sub-layer is given x."""
        stand_ins = self._stand_ins(name, keeps=True)
        with replaced(self.module, self._silent({name}) | stand_ins):
            self._run(self._here(x_BLD))
        return next(iter(stand_ins.values())).given.reshape(*x_BLD.shape[:2], -1)

    @torch.no_grad()
    def sublayer_middle(self, name: str, x_BLD: torch.Tensor) -> torch.Tensor:
        """What the linear at the end of a sub-layer (o, down) is given, when the sub-layer is given x."""
        role = self.family.sublayers[name].writes
        kept = silent_linear(self.native(role).shape[0])
        with replaced(self.module, {**self._silent({name}), self.family.path(role): kept}):
            self._run(self._here(x_BLD))
        return kept.given.reshape(*x_BLD.shape[:2], -1)

    def _silent(self, but: Collection[str]) -> dict[str, StandIn]:
        """Path -> what stands there to silence a sub-layer, for all but these."""
        others = (name for name in self.family.sublayers if name not in but)
        return {path: part for name in others for path, part in self._stand_ins(name).items()}

    def _stand_ins(self, name: str, keeps: bool = False) -> dict[str, StandIn]:
        """What silences a sub-layer, by where it stands: in place of its module, or of its linears where it has none. With
        `keeps` the first of them keeps what the sub-layer reads."""
        part = self.family.sublayers[name]
        if part.module is not None:
            return {part.module: silent(name if part.roles else KEPT, keeps)}
        return {self.family.path(role): silent_linear(self.linear_width(role)) for role in part.roles}

    def linear_width(self, role: str) -> int:
        """Outputs of a linear as it is now."""
        return form_of(self.module.get_submodule(self.family.path(role))).shape[0]

    @torch.no_grad()
    def check_sublayers(self, x_BLD: torch.Tensor, writes: bool) -> None:
        """Raise UnsupportedModel unless, on this batch, `in_sequence` gives what the layer does.

        With `writes`, also unless each adds to x just what its last linear makes of `sublayer_middle`, behind the norm or
        multiplier that the family's row names: methods that fit this linear to what is missing in the hidden states rely on it.
        """
        check_layer(self, self._here(x_BLD), writes)

    def _here(self, x_BLD: torch.Tensor) -> torch.Tensor:
        parameter = next(parameter for parameter in self.module.parameters() if not parameter.is_meta)
        return x_BLD.to(parameter.device, parameter.dtype)

    def _run(self, x_BLD: torch.Tensor) -> torch.Tensor:
        y = self.module(x_BLD, **self._kwargs)
        y_BLD: torch.Tensor = y[0] if isinstance(y, tuple) else y
        return y_BLD

    @contextlib.contextmanager
    def tried(self, edits: Iterable[Edit]) -> Iterator[None]:
        """While the block lasts the layer runs with these edits."""
        with replaced(self.module, {self.family.path(edit.role): self._running(edit) for edit in edits}):
            yield

    @contextlib.contextmanager
    def observed(self, collectors: Iterable[tuple[str, Collector]], careful: bool = False) -> Iterator[None]:
        """While the block lasts, each collector sees the input of its role's linear, sequence by sequence as x_LI, without
        the rows that are out before the layer; with `careful` also without those that are not finite there."""
        hooks = [
            self.linear(role).register_forward_pre_hook(self._feed(collector, careful))
            for role, collector in collectors
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _feed(self, collector: Collector, careful: bool) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def feed(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x_BLI = inputs[0].reshape(*self._shape_BL, -1)  # some layers put all tokens in one row
            for place, x_LI in enumerate(x_BLI):  # one after another, so that the sums do not depend on the batch
                if self._out_BL is not None:
                    x_LI = x_LI[~self._out_BL[place]]
                collector.update(x_LI[finite_rows(x_LI)] if careful else x_LI)

        return feed

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """While the block lasts, the weights are on `device`."""
        home = next(self.module.parameters()).device
        if device.type == home.type:
            yield
            return
        self.module.to(device)
        try:
            yield
        finally:
            self.module.to(home)

    def apply(self, edits: Iterable[Edit], keep_dense: bool = False) -> None:
        """Put the edits in their places, for good. Args: keep_dense, whether the dense linears stay, for `run_dense`."""
        for edit in edits:
            path = self.family.path(edit.role)
            assert edit.form.bias >= edit.native.bias or isinstance(edit.form, Removed), f"{path}: its bias is lost"
            if not keep_dense:
                self._dense.pop(path)
            self._edited[path] = edit.module
            self.module.set_submodule(path, self._running(edit))
        skip_removed(self.module)

    def _running(self, edit: Edit) -> nn.Module:
        """The edit's module in the dtype and on the device of the layer."""
        weight = next(self.module.parameters())
        stored = next(itertools.chain(edit.module.parameters(), edit.module.buffers()))
        if (stored.device, stored.dtype) == (weight.device, weight.dtype):
            return edit.module
        return copy.deepcopy(edit.module).to(weight.device, weight.dtype)

    def stored_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter of the layer, edits included, by its name in the module and in the dtype in which it is stored."""
        for name, parameter in self.module.named_parameters():
            owner = self._owner(name)
            if owner is None:
                yield name, parameter.detach().to(self._stored[name].dtype)
            else:
                yield name, self._edited[owner].get_parameter(name.removeprefix(owner + ".")).detach()

    def with_parameters(self, values: Mapping[str, torch.Tensor], x_BLD: torch.Tensor) -> torch.Tensor:
        """The layer's output, computed with `values`, by the names of `stored_parameters`, and in their dtype and on their
        device; gradients go through. The layer itself stays as it is."""
        weight = next(iter(values.values()))
        kwargs = {key: _cast(value, weight.dtype) for key, value in self._kwargs.items()}
        y = torch.func.functional_call(self.module, dict(values), (x_BLD.to(weight.device, weight.dtype),), kwargs)
        y_BLD: torch.Tensor = y[0] if isinstance(y, tuple) else y
        return y_BLD

    def with_linears(
        self, linears: Mapping[str, nn.Module], values: Mapping[str, torch.Tensor], x_BLD: torch.Tensor
    ) -> torch.Tensor:
        """The same with these modules in place of the linears of their roles; `values` are of all other parameters."""
        with replaced(self.module, {self.family.path(role): module for role, module in linears.items()}):
            return self.with_parameters(values, x_BLD)

    def replace(self, values: Mapping[str, torch.Tensor]) -> None:
        """Other numbers, in the dtype in which they are stored, for parameters of the layer; they run next and are written."""
        for name, tensor in values.items():
            owner = self._owner(name)
            if owner is None:
                self._replaced[name] = tensor
            else:
                _set_parameter(self._edited[owner], name.removeprefix(owner + "."), tensor)
            running = self.module.get_parameter(name)
            _set_parameter(self.module, name, tensor.to(running.device, running.dtype))

    def _owner(self, name: str) -> str | None:
        """The path of the edit that the parameter of this name belongs to."""
        return next((path for path in self._edited if name.startswith(path + ".")), None)

    def tensors(self) -> dict[str, TensorEntry]:
        """Everything of this layer that is to be written, by name on disk."""
        dropped = tuple(path + "." for path in self._edited)
        entries: dict[str, TensorEntry] = {
            f"{self.prefix}.{name}": self._replaced.get(name, info)
            for name, info in self._stored.items()
            if not name.startswith(dropped)
        }
        parts = carriers(self.module)
        for path, module in self._edited.items():
            for name, tensor in module.state_dict(prefix=path + ".").items():
                entries[f"{self.prefix}.{disk_name(name, parts)}"] = tensor
        return entries


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of an argument in `dtype`."""
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _set_parameter(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
