"""The gradient of the dense model's language-model loss behind every layer; the model need not fit into memory.

The loss of a window is the sum over its tokens of the cross-entropy of the next one. One sweep forward keeps what each layer
reads. The head gives the gradient behind the last layer. One sweep back brings it through one layer after another, each of
which runs again for that, in float32 and a window at a time.

What is done is on the disk generation by generation, and a run that dies goes on there. Gradients are stored as they are for
the sum, not the mean, over tokens: so float16 holds them.

input     generation k is what layer k reads; it goes once the gradient in front of the layer is there
gradient  generation k + 1 is the gradient behind layer k; it goes once the layer is committed

Shape suffixes: N windows, L length, B batch, D hidden, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import cross_entropy

from streamlap.families.layer import StreamLayer
from streamlap.families.stream import HEAD_TOKENS, ModelStream
from streamlap.linalg.rows import MOST_OUT, any_out, blanked, marked, rows_out, struck
from streamlap.pipeline.evaluate import stream_layers
from streamlap.pipeline.runner import LayerRunner, host_memory, start_runner
from streamlap.pipeline.session import Session
from streamlap.pipeline.streams import HiddenStates, open_bank
from streamlap.planning.plan import Plan
from streamlap.planning.schedule import Fit
from streamlap.store.hidden import HiddenBank
from streamlap.system.allocator import trim_heap
from streamlap.system.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Sweeps:
    """Everything both sweeps need. They stay inside the memory that the plan claims for its loop and its head."""

    stream: ModelStream
    fit: Fit
    tokens_NL: torch.Tensor
    session: Session

    def bank(self, name: str, tier: str = "") -> HiddenBank:
        """input or gradient, as it is on the disk; with nothing in memory yet."""
        schedule = self.fit.schedule
        schedule = replace(schedule, tier=tier) if tier else schedule
        return open_bank(self.stream, self.tokens_NL, schedule, self.session.run.hidden, name)

    def stop(self, index: int, way: str, moved: bool) -> None:
        """Raise Interrupted where a stop is due."""
        if self.session.stops.due(moved=moved):
            where = f"at layer {index} of {self.stream.depth} {way}, before the first one is compressed"
            raise self.session.stops.stopped(where)


def loss_gradients(stream: ModelStream, plan: Plan, tokens_NL: torch.Tensor, session: Session) -> HiddenBank | None:
    """Those behind all layers that are not committed yet, made once in a run and kept in its state; None where no method asks
    for them.

    Raises Interrupted where a stop is due, NumericalError where the numbers of too many tokens are not finite.
    """
    if not plan.recipe.reads_gradient:
        return None
    sweeps = Sweeps(stream=stream, fit=plan.fit, tokens_NL=tokens_NL, session=session)
    gradients = sweeps.bank("gradient", tier="disk")
    if session.journal.next_layer == 0:
        if not any(gradients.has(generation) for generation in range(1, stream.depth + 1)):
            sweep_forward(sweeps)
            leave_head(sweeps)
        sweep_back(sweeps)
    return gradients


def sweep_forward(sweeps: Sweeps) -> None:
    """What every layer of the dense model reads, from the first that is not there yet."""
    stream, inputs = sweeps.stream, sweeps.bank("input")
    first = next((index for index in range(stream.depth, 0, -1) if inputs.has(index)), 0)
    stream_layers(
        stream, sweeps.fit, inputs, sweeps.tokens_NL, name="gradient", most_out=MOST_OUT, first=first, keeps=True,
        before=lambda index: sweeps.stop(index, "of the dense model", moved=index > first),
    )  # fmt: skip


def leave_head(sweeps: Sweeps) -> None:
    """The gradient behind the last layer. In front of the first one nothing asks for it, nor for what that reads."""
    stream, fit = sweeps.stream, sweeps.fit
    inputs, gradients = (sweeps.bank(name, tier="disk") for name in ("input", "gradient"))
    inputs.drop(0)
    trim_heap()
    with (
        fit.ram.claim(fit.schedule.ram["head"]),
        fit.vram.claim(fit.schedule.vram.get("head", {})),
        host_memory(fit, stream.accelerator, [inputs, gradients]),
        contextlib.closing(inputs),
        contextlib.closing(gradients),
    ):
        gradients.write(stream.depth, head_gradients(stream, inputs.read(stream.depth), sweeps.tokens_NL))


def head_gradients(
    stream: ModelStream, batches: Iterable[torch.Tensor], tokens_NL: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Behind the last layer, from the last hidden states, batch by batch."""
    head, move, tokens = stream.head(), stream.accelerator.move, iter(tokens_NL.to(stream.device))
    for x_BLD in map(move, batches):
        yield torch.stack([window_gradient(head, x_LD, next(tokens)) for x_LD in x_BLD])


def window_gradient(
    head: Callable[[torch.Tensor], torch.Tensor], x_LD: torch.Tensor, tokens_L: torch.Tensor
) -> torch.Tensor:
    """Of one window [L, D], a piece of it at a time: logits are as wide as the vocabulary. Rows that are out are so here."""
    out_L, g_LD = any_out(x_LD), torch.zeros_like(x_LD)
    pieces = (torch.split(rows, HEAD_TOKENS) for rows in (x_LD[:-1], g_LD[:-1], tokens_L[1:]))
    for x_TD, g_TD, next_T in zip(*pieces, strict=True):
        out_T = rows_out(x_TD)
        given_TD = blanked(x_TD, out_T).detach().requires_grad_()
        with torch.enable_grad():
            losses_T = cross_entropy(head(given_TD).float(), next_T, reduction="none")
            g_TD.copy_(torch.autograd.grad(losses_T[~out_T].sum(), given_TD)[0])
    return struck(marked(g_LD), out_L)


def sweep_back(sweeps: Sweeps) -> None:
    """The gradient behind every layer but the last, from the last that is not there yet to the first."""
    stream, inputs, gradients = sweeps.stream, sweeps.bank("input"), sweeps.bank("gradient")
    done = next(index for index in range(1, stream.depth + 1) if gradients.has(index))
    for generation in range(done, stream.depth + 1):
        inputs.drop(generation)  # where the run died between the gradient and this
    if done == 1:
        return
    kwargs = stream.layer_kwargs(sweeps.tokens_NL.shape[1])
    progress = Progress("gradient back", stream.depth, stream.depth - done + 1)
    with start_runner(stream, sweeps.fit, [inputs, gradients], progress) as runner:
        for index in range(done - 1, 0, -1):
            sweeps.stop(index, "on the way back", moved=index < done - 1)
            pull_layer(runner, inputs, gradients, index, kwargs[index])
            runner.require_baseline(index)


def pull_layer(
    runner: LayerRunner, inputs: HiddenBank, gradients: HiddenBank, index: int, kwargs: Mapping[str, object]
) -> None:
    """The gradient from behind a layer to in front of it; a function of its own, so that nothing holds this layer while the one
    before it is read."""
    runner.progress.phase("read")
    layer = runner.layer(index, kwargs, back=True)
    around = HiddenStates(bank=inputs, generation=index), HiddenStates(bank=gradients, generation=index + 1)
    with runner.claim("refine"):
        pulled = pulled_batches(layer, runner.together(around, "gradient"))
        runner.take(HiddenStates(bank=gradients, generation=index), pulled, layer.prefix)
    gradients.settle()
    inputs.drop(index)
    runner.progress.next()


def pulled_batches(layer: StreamLayer, around: Iterable[Sequence[torch.Tensor]]) -> Iterator[torch.Tensor]:
    """From x_BLD in front of the layer and g_BLD behind it the gradient in front of it, window by window: no result depends on
    how many fit into a forward."""
    values = {name: tensor.float() for name, tensor in layer.module.named_parameters()}
    for x_BLD, g_BLD in around:
        windows = zip(torch.split(x_BLD, 1), torch.split(g_BLD, 1), strict=True)
        yield torch.cat([pulled(layer, values, x_1LD, g_1LD) for x_1LD, g_1LD in windows])


def pulled(
    layer: StreamLayer, values: Mapping[str, torch.Tensor], x_BLD: torch.Tensor, g_BLD: torch.Tensor
) -> torch.Tensor:
    """The gradient at x of <g, layer(x)>. Rows that are out in front of the layer are so in it; those that are behind it, or of
    which the gradient is out, count for nothing."""
    out_BL = any_out(x_BLD)
    given_BLD = blanked(x_BLD, out_BL).float().detach().requires_grad_()
    with torch.enable_grad():
        y_BLD = layer.with_parameters(values, given_BLD)
        wanted_BLD = blanked(g_BLD, any_out(g_BLD)).float()
        (found_BLD,) = torch.autograd.grad(y_BLD, given_BLD, wanted_BLD)
    return struck(marked(found_BLD.to(x_BLD.dtype)), out_BL)
