"""LoRA on every stored linear of a compressed model, which is in memory whole: it is small by now. Read `train_adapters` first.

Shape suffixes: L length, P = L - 1 predicted positions, V vocabulary, O out, I in, S rank of an adapter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamlap.errors import CheckpointError, NumericalError, RecipeError
from streamlap.families.stream import ModelStream
from streamlap.linalg.moments import fitted_sequences, held_sequences
from streamlap.loader.modules import carriers, disk_name
from streamlap.methods.trained.recovery import Recovery, merged, prediction_losses
from streamlap.output.load import load
from streamlap.pipeline.session import Session
from streamlap.pipeline.teacher import Teacher
from streamlap.planning.recovery import RecoveryNeeds
from streamlap.planning.schedule import Fit
from streamlap.store.sink import ShardFolder
from streamlap.store.source import read_tensors
from streamlap.system.progress import Progress

BETAS = (0.9, 0.95)
MOST_NORM = 1.0
"""Gradients longer than this are shortened to it."""

NOISE = (
    "p",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "residual_dropout",
    "embedding_dropout",
    "layerdrop",
)
"""Attributes of modules that make a forward random while it is trained."""
TRAINING_NAME, BEST_NAME = "training.safetensors", "adapters.safetensors"
MARKS = 10
"""Steps of the bar in an epoch."""
SAVE_SECONDS = 600.0
"""At least so often all that the next step needs is put on the disk."""

Adapters = dict[str, torch.Tensor]
"""`up NAME` [O, S] and `down NAME` [S, I], by the name on disk of the stored weight to which their product is added."""


def require_peft() -> Any:
    """The library. Raises RecipeError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise RecipeError("recover takes peft, which is not installed; pip install 'streamlap[recover]'.") from error
    return peft


def adapted_names(model: nn.Module, layers: str) -> list[str]:
    """Paths of the linears inside the decoder layers, and of the parts where a linear is stored in parts. What is removed has
    none."""
    found = model.get_submodule(layers).named_modules(prefix=layers)
    return [name for name, module in found if isinstance(module, nn.Linear)]


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What came of it."""

    kept: bool
    """Whether the loss on held-out tokens fell. Where it did not, nothing is written."""
    before: float
    after: float
    """Loss on held-out tokens, nats a token: of the compressed model, and with the adapters in its weights, as stored."""
    distilled: bool
    """Whether the loss has the divergence from the dense model in it, or is cross-entropy alone."""
    rank: int
    epochs: int
    tokens: int
    """In the windows that were trained on, each counted once."""
    held_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RecoveryJob:
    """Everything one recovery needs, checked."""

    stream: ModelStream
    dense: ModelStream | None
    teacher_fit: Fit | None
    knobs: Recovery
    tokens_NL: torch.Tensor
    needs: RecoveryNeeds
    thrifty: bool

    @property
    def held(self) -> list[int]:
        """Windows that are not trained on."""
        return list(held_sequences(*self.tokens_NL.shape))

    @property
    def train(self) -> list[int]:
        return list(fitted_sequences(*self.tokens_NL.shape))

    @property
    def steps(self) -> int:
        """In an epoch."""
        return math.ceil(len(self.train) / self.knobs.batch)

    def batch(self, step: int) -> list[int]:
        """The windows of a step, counted over all epochs; every epoch has an order of its own."""
        epoch, place = divmod(step, self.steps)
        generator = torch.Generator().manual_seed((self.knobs.seed << 20) + epoch)
        order = torch.randperm(len(self.train), generator=generator).tolist()
        return [self.train[number] for number in order[place * self.knobs.batch : (place + 1) * self.knobs.batch]]


class Adapting:
    """The model with its adapters, AdamW, and how far they are.

    Args: steps, in all.
    """

    def __init__(
        self, stream: ModelStream, knobs: Recovery, teacher: Teacher | None, steps: int, thrifty: bool
    ) -> None:
        self.knobs, self._teacher, self._steps, self.done = knobs, teacher, steps, 0
        self.held: list[float] = []
        """Loss on held-out tokens at the start and after each epoch."""
        self.best: Adapters = {}
        """Of the epoch of least loss; none while nothing is better than the start."""
        self.device = stream.device
        self.model: Any = load(stream.folder, dtype=stream.dtype, device_map={"": str(self.device)})
        parts, names = carriers(self.model), adapted_names(self.model, stream.family.layers)
        peft = require_peft()
        within = [name.removeprefix(f"{stream.family.layers}.") for name in names]
        config = peft.LoraConfig(r=knobs.rank, lora_alpha=knobs.rank, target_modules=within)
        self.model.requires_grad_(False)  # peft freezes no more than what it is given, and that is the layers alone
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(knobs.seed)
            # Into the layers and not the model: of a model type that may have experts, peft takes all FFNs to be experts.
            peft.inject_adapter_in_model(config, self.model.get_submodule(stream.family.layers))
        for module in self.model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):  # a step's share of a narrow number would round away
                module.lora_A.float()
                module.lora_B.float()
        self._modules: dict[str, Any] = {
            disk_name(f"{name}.weight", parts): self.model.get_submodule(name) for name in names
        }
        for module in self.model.modules():  # train() is for checkpointing alone: what is compressed has no noise in it
            for name in NOISE:
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if thrifty:
            older = "gradient_checkpointing_enable"  # its name in transformers before 5.23
            enable = getattr(self.model, "activation_checkpointing_enable", None) or getattr(self.model, older)
            enable({"use_reentrant": False})
        self._parameters = {
            f"{side} {name}": table["default"].weight
            for name, module in self._modules.items()
            for side, table in (("up", module.lora_B), ("down", module.lora_A))
        }
        self._adam = torch.optim.AdamW(self._parameters.values(), lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)

    def step(self, numbers: Sequence[int], tokens_NL: torch.Tensor) -> None:
        """One step, over the windows of these numbers. Raises NumericalError where its gradients are not finite."""
        self.model.train()
        self._adam.zero_grad()
        tokens = 0
        for number in numbers:
            losses_P = self._losses(number, tokens_NL)
            losses_P.sum().backward()  # type: ignore[no-untyped-call]
            tokens += losses_P.numel()
        # Of the sum, not the mean, on the way back: so float16 holds them. Those of the adapters are float32.
        for tensor in self._parameters.values():
            if tensor.grad is not None:
                tensor.grad /= tokens
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), MOST_NORM))
        if not math.isfinite(norm):
            raise NumericalError(
                f"the gradients of step {self.done + 1} of {self._steps} have the norm {norm}; wanted a number. Take dtype "
                "float32 or bfloat16; if it is one of these already, a lower learning_rate."
            )
        for group in self._adam.param_groups:
            group["lr"] = self.knobs.rate(self.done, self._steps)
        self._adam.step()
        self.done += 1

    @torch.no_grad()
    def measure(self, numbers: Sequence[int], tokens_NL: torch.Tensor) -> float:
        """Mean loss over the windows of these numbers."""
        self.model.eval()
        self._adam.zero_grad()
        losses = [self._losses(number, tokens_NL).double().mean() for number in numbers]
        return float(torch.stack(losses).mean())

    def _losses(self, number: int, tokens_NL: torch.Tensor) -> torch.Tensor:
        tokens_L = tokens_NL[number].to(self.device)
        logits_LV = self.model(input_ids=tokens_L[None], use_cache=False).logits[0]
        likely = None if self._teacher is None else self._teacher.window(number).to(self.device)
        return prediction_losses(logits_LV[:-1], tokens_L[1:], likely, self.knobs.distil)

    def take_down(self, loss: float) -> None:
        """The loss on held-out tokens, at the start and after each epoch; the adapters too where it is the least so far."""
        if self.held and loss < min(self.held):
            self.best = self.adapters()
        self.held.append(loss)

    def adapters(self) -> Adapters:
        """What they are now, copied to RAM."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._parameters.items()}

    def merge(self, adapters: Adapters, stream: ModelStream) -> None:
        """Make the model what a folder with these in its weights will be, rounding included. It cannot be trained then."""
        for name, module in self._modules.items():
            stored_OI = stream.source.read(name)
            weight_OI = merged(stored_OI, adapters[f"up {name}"], adapters[f"down {name}"])
            module.get_base_layer().weight.data.copy_(weight_OI)
            module.enable_adapters(False)

    def state(self) -> dict[str, torch.Tensor]:
        """All that the next step needs."""
        state = {f"value {name}": tensor.detach() for name, tensor in self._parameters.items()}
        state |= {f"best {name}": tensor for name, tensor in self.best.items()}
        for name, tensor in self._parameters.items():
            state |= {f"{part} {name}": self._adam.state[tensor][part] for part in ("exp_avg", "exp_avg_sq")}
        return state | {"done": torch.tensor(self.done), "held": torch.tensor(self.held, dtype=torch.float64)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from there."""
        self.done, self.held = int(state["done"]), state["held"].tolist()
        self.best = {name: state[f"best {name}"] for name in self._parameters if f"best {name}" in state}
        for name, tensor in self._parameters.items():
            tensor.detach().copy_(state[f"value {name}"])
            moments = {part: state[f"{part} {name}"].to(self.device) for part in ("exp_avg", "exp_avg_sq")}
            step = torch.tensor(float(self.done), device=self.device)
            self._adam.state[tensor] = {"step": step, **moments}


def train_adapters(job: RecoveryJob, teacher: Teacher | None, running: Session) -> Recovered:
    """All epochs; the best of them is in the run's state where, measured as it will be stored, it is better than the start.

    Raises Interrupted after a step where a stop is due, NumericalError where there is nothing to train from.
    """
    adapting = Adapting(job.stream, job.knobs, teacher, job.steps * job.knobs.epochs, job.thrifty)
    take_up(adapting, running.state / TRAINING_NAME)
    if not adapting.held:
        adapting.take_down(adapting.measure(job.held, job.tokens_NL))
    before = adapting.held[0]
    if not math.isfinite(before):
        raise NumericalError(
            f"the loss on held-out tokens is {before} before training; wanted a number. Try dtype float32."
        )
    train_epochs(adapting, job, running)
    after = before
    if adapting.best:
        adapting.merge(adapting.best, job.stream)
        after = min(before, adapting.measure(job.held, job.tokens_NL))  # NaN is no less than anything
    if after < before:
        ShardFolder(running.state).write(BEST_NAME, adapting.best)
    length = job.tokens_NL.shape[1]
    return Recovered(
        kept=after < before, before=before, after=after, distilled=teacher is not None, rank=job.knobs.rank,
        epochs=job.knobs.epochs, tokens=len(job.train) * length, held_tokens=len(job.held) * length,
    )  # fmt: skip


def train_epochs(adapting: Adapting, job: RecoveryJob, running: Session) -> None:
    """From the next step to the end of the last epoch."""
    begun, saved, steps = adapting.done, time.monotonic(), job.steps * job.knobs.epochs
    with Progress("recover", MARKS * job.knobs.epochs, MARKS * begun // job.steps) as progress:
        for step in range(begun, steps):
            progress.phase("step", step, steps)
            adapting.step(job.batch(step), job.tokens_NL)
            for _ in range(MARKS * step // job.steps, MARKS * (step + 1) // job.steps):
                progress.next()
            if (step + 1) % job.steps == 0:
                adapting.take_down(adapting.measure(job.held, job.tokens_NL))
            stop = running.stops.due() and step + 1 < steps
            if stop or time.monotonic() - saved > SAVE_SECONDS:
                ShardFolder(running.state).write(TRAINING_NAME, adapting.state())
                saved = time.monotonic()
            if stop:
                raise running.stops.stopped(f"after {step + 1} of {steps} steps")


def take_up(adapting: Adapting, path: Path) -> None:
    """Go on from the state of a run that died, where there is one."""
    try:
        adapting.load(read_tensors(path))
    except CheckpointError:  # none, or one that is damaged: without it the same comes out, only later
        return
