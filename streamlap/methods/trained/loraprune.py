"""LoRAPrune: groups go while low-rank adapters are trained, by the importance that the adapters' gradients give them.

Zhang et al. 2023, arXiv 2305.18403, a layer at a time. Groups are KV heads with their query heads, and channels of the FFN.
Each step brings the running importance of every group up to date, and every few steps the least important ones are masked,
along a cubic schedule, until just those are left that the budget holds. Then the adapters are merged, and what was masked is
cut.

The loss is that of the layer on the compressed stream against the dense model's stream. In the first layer both are the same,
so that nothing is missed before something is cut, and every gradient is zero. So a little noise lies on the target: its
gradients tell how far the output moves with a weight, which is what a cut does.

Importance may go by the dense model's language-model loss instead, as published. Its gradient behind the layer is known, see
`pipeline.gradients`, so that of its first-order change <gradient, layer(x)> in the adapters is that of the loss itself, with
the layer on the dense stream x. The adapters are trained by the layer's own loss in any case.

Shape suffixes: B batch, L length, D hidden, G groups, O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from streamlap.errors import NumericalError, RecipeError, located, shown
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.gram import Gram
from streamlap.linalg.lora import BLOCK, group_scores, line_importance, lowest
from streamlap.linalg.storage import as_stored
from streamlap.methods.base import Cost, Layout, Natives, ParameterBudget
from streamlap.methods.trained.adapters import (
    MASTER,
    RUN,
    STATE,
    Adapted,
    Adapter,
    adapter_numbers,
    dense_numbers,
    random_factors,
)
from streamlap.methods.trained.base import Lesson, TrainingCost
from streamlap.methods.trained.groups import LAST, LINES, channels_within, heads_within
from streamlap.methods.trained.steps import (
    HeldLoss,
    Pace,
    Steps,
    check_pace,
    check_share,
    check_whole,
    distances,
    mean,
)

METRICS = ("lora", "magnitude", "random")
LOSSES = ("block", "model")
WORK = 4 * 4 * BLOCK
"""Bytes for each column of a matrix while the importance of some of its rows is made."""
GRADIENT_WIDTHS = 3
"""Hidden states that importance by the model's loss looks at: the dense stream, the gradient, and their product."""
STEP_FORWARDS = 3
"""What a forward with its gradients costs."""


@dataclass(frozen=True, kw_only=True)
class LoraPrune(Pace):
    """Knobs of the method. `Edit.error` is the share of a linear's squared weights that went."""

    rank: int = 32
    """Of the adapters."""
    scale: float = 2.0
    """c, by which B A counts."""
    every: int = 10
    """Steps from one look at the masks to the next."""
    hold: float = 0.1
    """Share of the steps before the first group goes, and of those after the last one has gone."""
    smoothing: float = 0.9
    """Share that a step leaves of the importance before it."""
    noise: float = 0.1
    """On the target, as a share of what the layer adds; see above."""
    metric: str = "lora"
    """What importance is: lora; to compare with, magnitude, of the merged weights alone, or random."""
    importance: str = "block"
    """Whose loss it goes by: block, the layer's own, or model, the dense model's language-model loss."""

    def __post_init__(self) -> None:
        check_pace("loraprune", self)
        check_whole("loraprune", "rank", self.rank, 1, 1024)
        check_whole("loraprune", "every", self.every, 1, 10_000)
        check_share("loraprune", "scale", self.scale, most=1e3)
        check_share("loraprune", "hold", self.hold, least=0, most=0.4)
        check_share("loraprune", "smoothing", self.smoothing, least=0, most=0.999)
        check_share("loraprune", "noise", self.noise, least=0, most=10)
        if self.metric not in METRICS:
            raise RecipeError(f"loraprune: metric is {shown(self.metric)}; wanted one of {', '.join(METRICS)}.")
        if self.importance not in LOSSES:
            raise RecipeError(f"loraprune: importance is {shown(self.importance)}; wanted one of {', '.join(LOSSES)}.")
        if self.reads_gradient and self.metric != "lora":
            raise RecipeError(
                f"loraprune: importance is model and metric {self.metric}, which asks for no gradient; wanted metric lora, or "
                "importance block."
            )

    @property
    def reads_gradient(self) -> bool:
        return self.importance == "model"

    @property
    def reads_dense(self) -> bool:
        return self.reads_gradient

    def layout(self, sublayer: str, natives: Natives, budget: ParameterBudget) -> Layout:
        return heads_within(natives, budget) if sublayer == "attention" else channels_within(natives, budget)

    def cost(self, sublayer: str, natives: Natives, layout: Layout, budget: ParameterBudget) -> Cost:
        return Cost()

    def training_cost(self, natives: Natives, layout: Layout, itemsize: int) -> TrainingCost:
        numbers = adapter_numbers(natives, dict.fromkeys(natives, self.rank))
        widened = RUN * dense_numbers(natives) * (itemsize < RUN)
        work = WORK * max(native.shape[1] for native in natives.values())
        masked = sum(natives[role].shape[1] for role in LAST.values() if role in natives)
        groups = 8 * natives["down"].shape[1] + 8 * (natives["v"].shape[0] if "v" in natives else 0)
        seen = GRADIENT_WIDTHS * natives["up"].shape[1] if self.reads_gradient else 0
        return TrainingCost(
            parameters=numbers, held_bytes=MASTER * numbers + widened + work + 2 * groups,
            state_bytes=STATE * numbers + groups, token_bytes=RUN * (masked + seen),
            forwards=STEP_FORWARDS * (1 + self.reads_gradient),
        )  # fmt: skip

    def require_steps(self, steps: int) -> None:
        """Any number will do: the last step at the latest cuts what has to go."""

    def start(self, layer: StreamLayer, index: int, layout: Layout, gram: Callable[[str], Gram], steps: int) -> Pruning:
        generator = torch.Generator().manual_seed((self.seed << 20) + index)
        adapters = {}
        for role in layer.family.roles:
            linear = layer.linear(role)
            factors = random_factors(linear, self.rank, generator)
            adapters[role] = Adapter(linear, factors.a_RI, factors.b_OR, None)
            adapters[role].weight = self.scale
        return Pruning(self, Adapted(layer=layer, adapters=adapters), index, layout, steps)

    def closing(self, steps: int) -> int:
        """The step of so many from which on just what the budget holds is left."""
        return min(steps - 1, math.ceil((1 - self.hold) * steps))

    def removed(self, step: int, steps: int, most: int) -> int:
        """Groups that are masked at a step: none at first, then along 1 - (1 - p)^3, at last `most`."""
        first, closing = self.hold * steps, self.closing(steps)
        if step >= closing:
            return most
        done = min(1.0, max(0.0, (step - first) / max(1.0, closing - first)))
        return round(most * (1 - (1 - done) ** 3))

    def looks(self, step: int, steps: int) -> bool:
        """Whether the masks are looked at in a step."""
        return step == self.closing(steps) or (step < self.closing(steps) and step % self.every == 0)


class Pruning(Steps):
    """The training of one layer; see `trained.base.DistillingLayer`."""

    def __init__(self, knobs: LoraPrune, adapted: Adapted, index: int, layout: Layout, steps: int) -> None:
        super().__init__(knobs, adapted.masters, adapted.sizes, steps)
        self.knobs, self.adapted, self._index = knobs, adapted, index
        self.layer = adapted.layer
        self.groups = {"ffn": self.layer.native("down").shape[1]}
        if "attention" in self.layer.family.compressible:
            heads = self.layer.native("v").shape[0] // self.layer.head_dim
            self.groups = {"attention": heads, **self.groups}
        self.most = {
            name: count - count * layout[LAST[name]].shape[1] // self.layer.native(LAST[name]).shape[1]
            if LAST[name] in layout
            else 0
            for name, count in self.groups.items()
        }
        """Sub-layer -> groups that go."""
        device = next(iter(self.masters.values())).device
        self.scores = {
            name: torch.zeros(count, dtype=torch.float64, device=device) for name, count in self.groups.items()
        }
        self.alive = {name: torch.ones(count, dtype=torch.bool, device=device) for name, count in self.groups.items()}
        self._mask()

    @property
    def ends(self) -> bool:
        return self.epoch >= self.knobs.epochs

    @torch.no_grad()
    def measure(self, held: Iterable[Lesson]) -> float:
        """Loss on held-out tokens with what is left so far."""
        self._adam.zero_grad()
        found = HeldLoss()
        for x_BLD, target_BLD, *_ in held:
            found.update(x_BLD, target_BLD, self.adapted(x_BLD))
        return self.noted(found)

    def step(self, place: int, lesson: Lesson) -> None:
        x_BLD, target_BLD, dense_BLD, gradient_BLD = lesson
        number = self.step_number(place)
        looking = number <= self.knobs.closing(self.total)  # no group goes later
        if looking and self.knobs.reads_gradient:
            self._adam.zero_grad()
            # The mean over the tokens that are predicted, as of a language model's loss.
            change = (gradient_BLD.float() * self.adapted(dense_BLD)).sum() / (gradient_BLD.shape[1] - 1)
            change.backward()  # type: ignore[no-untyped-call]
            self._observe()
        self._adam.zero_grad()
        # The first token counts too: the few channels that make an attention sink of it matter to no other token.
        loss = mean(distances(self._noisy(target_BLD, number), self.adapted(x_BLD), first=0)) / self._update
        loss.backward()  # type: ignore[no-untyped-call]
        if looking and not self.knobs.reads_gradient:
            self._observe()
        if self.knobs.looks(number, self.total):
            for name, most in self.most.items():
                gone = self.knobs.removed(number, self.total, most)
                if gone and self._tells(name, number):
                    self.alive[name] = lowest(self.scores[name], self.alive[name], gone)
            self._mask()
        self.move(place)

    def _tells(self, name: str, number: int) -> bool:
        """Whether the scores tell the groups of a sub-layer apart, in a step of that number. While all are zero, groups wait.
        Raises NumericalError where no step is left, or none can help: they would go by their place."""
        if bool(self.scores[name].any()):
            return True
        still = self.knobs.metric == "lora" and self.knobs.importance == "block" and not self.knobs.noise
        if not still and number < self.knobs.closing(self.total):
            return False
        advice = (
            "Where a layer errs nowhere yet, as the first one does, gradients come from a noise above 0."
            if still
            else "The sub-layer adds nothing by which they differ. Take more epochs, or the preset best."
        )
        raise NumericalError(
            f"{name}: the importance of all {self.groups[name]} groups is zero, so they would go by their place alone; wanted "
            f"some above zero. {advice}"
        )

    def _noisy(self, target_BLD: torch.Tensor, number: int) -> torch.Tensor:
        """The target with noise on it, drawn on the CPU, so that every device sees the same."""
        generator = torch.Generator().manual_seed((self.knobs.seed << 44) + (self._index << 28) + number)
        noise_BLD = torch.randn(target_BLD.shape, generator=generator).to(target_BLD.device)
        size_BL1 = target_BLD.float().square().mean(dim=-1, keepdim=True).sqrt()
        return target_BLD.float() + self.knobs.noise * math.sqrt(self._update) * size_BL1 * noise_BLD

    @torch.no_grad()
    def _observe(self) -> None:
        """Bring the running importance of every group up to date."""
        kept = self.knobs.smoothing
        for name, part in self.layer.family.sublayers.items():
            if not self.most.get(name):
                continue
            with located(name):
                scores_G = self.importance(part.roles, self.groups[name])
            self.scores[name].mul_(kept).add_(scores_G, alpha=1 - kept)

    def importance(self, roles: Sequence[str], groups: int) -> torch.Tensor:
        """[G], of this step."""
        adapters = {role: self.adapted.adapters[role] for role in roles}
        if self.knobs.metric == "random":
            generator = torch.Generator().manual_seed((self.knobs.seed << 20) + self._index)
            return torch.rand(groups, generator=generator, dtype=torch.float64).to(self.scores["ffn"].device)
        if self.knobs.metric == "magnitude":
            lines = [self._merged(role).abs().sum(dim=1 - LINES[role]) for role in roles]
            return group_scores(lines, groups)
        lines = [
            line_importance(found.w_OI, found.factors, found.gradient, self.knobs.scale, LINES[role])
            for role, found in adapters.items()
        ]
        return group_scores(lines, groups)

    def _merged(self, role: str) -> torch.Tensor:
        found = self.adapted.adapters[role]
        return found.w_OI + self.knobs.scale * (found.b_OR.detach() @ found.a_RI.detach())

    def _mask(self) -> None:
        """Have nothing heard of the groups that are gone."""
        for name, alive_G in self.alive.items():
            role = LAST[name]
            columns = self.layer.native(role).shape[1]
            mask_I = alive_G.repeat_interleave(columns // len(alive_G)).float()
            self.adapted.adapters[role].mask_I = None if bool(alive_G.all()) else mask_I

    def close_epoch(self, loss: float) -> None:
        self.held.append(loss)

    def parts(self) -> dict[str, Mapping[str, torch.Tensor]]:
        return {
            **super().parts(),
            "scores": self.scores,
            "alive": {n: t.to(torch.uint8) for n, t in self.alive.items()},
        }

    def take(self, state: Mapping[str, torch.Tensor]) -> None:
        super().take(state)
        for name, scores_G in self.scores.items():
            scores_G.copy_(state[f"scores {name}"])
            self.alive[name] = state[f"alive {name}"].bool().to(scores_G.device)
        self._mask()

    @torch.no_grad()
    def finish(self) -> list[Edit]:
        """What is left of every linear, with its adapter in it. Raises NumericalError where its numbers are not finite."""
        if not self.adapted.finite:
            raise NumericalError("adapters are not finite after training; wanted numbers. Take a lower learning_rate.")
        found = ((role, name) for name, part in self.layer.family.sublayers.items() for role in part.roles)
        return [self._edit(role, name) for role, name in found]

    def _edit(self, role: str, sublayer: str) -> Edit:
        alive_G, adapter, dim = self.alive[sublayer], self.adapted.adapters[role], LINES[role]
        assert int((~alive_G).sum()) == self.most[sublayer], "the schedule ends at the budget"
        lines = adapter.w_OI.shape[dim]
        kept = alive_G.repeat_interleave(lines // len(alive_G)).nonzero().flatten()
        w_OI, at = adapter.w_OI.index_select(dim, kept), adapter.factors
        a_RI, b_OR = (at.a_RI, at.b_OR[kept]) if dim == 0 else (at.a_RI[:, kept], at.b_OR)
        path, dtype = self.layer.family.path(role), self.layer.storage_dtype(role)
        module = nn.Linear(w_OI.shape[1], w_OI.shape[0], adapter.bias_O is not None, device="meta")
        merged_OI = as_stored(torch.addmm(w_OI, b_OR, a_RI, alpha=self.knobs.scale), dtype, path)
        module.weight = nn.Parameter(merged_OI.contiguous(), requires_grad=False)
        if adapter.bias_O is not None:
            bias_O = adapter.bias_O[kept] if dim == 0 else adapter.bias_O.clone()
            module.bias = nn.Parameter(as_stored(bias_O, dtype, f"{path}.bias"), requires_grad=False)
        whole = float(adapter.w_OI.double().square().sum())
        error = 1.0 - float(w_OI.double().square().sum()) / whole if whole else 0.0
        return Edit(
            role=role, module=module, native=self.layer.native(role), error=max(0.0, error),
            kept=tuple(kept.tolist()) if len(kept) < lines else None,
        )  # fmt: skip
