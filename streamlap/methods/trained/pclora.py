"""PC-LoRA: low-rank adapters learn what a dense weight does while it fades, and are all that is left of it.

Hwang et al. 2024, arXiv 2406.09117, a layer at a time: y = lambda W x + B A x + c with lambda falling from 1 to 0 over the
first part of the steps. What every linear gives is drawn to what it gives in the dense model on its own stream, and what the
layer gives to the dense model's stream behind it.

As published A begins at random and B at zero, so that the layer begins as the dense one. A warm start begins with the closed
form of the nearest low-rank map on the inputs that there are (`linalg.subspace`), and brings it in as the weight goes out:
y = lambda W x + (1 - lambda) (B A x + c).

Shape suffixes: B batch, L length, D hidden, O out, I in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from streamlap.errors import NumericalError, RecipeError, located, shown
from streamlap.families.layer import Edit, StreamLayer
from streamlap.families.linears import SUBLAYERS
from streamlap.families.watch import linear_outputs
from streamlap.linalg.gram import Gram
from streamlap.linalg.lora import Factors
from streamlap.linalg.storage import as_stored, balanced
from streamlap.linalg.subspace import subspace, two_factors
from streamlap.loader.forms import LowRank
from streamlap.loader.linears import LowRankLinear
from streamlap.methods.anchored.costs import low_rank_cost
from streamlap.methods.anchored.ranks import RankSite, share_ranks
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
from streamlap.methods.trained.steps import BestSteps, HeldLoss, Pace, check_pace, check_share, distances, mean

STARTS = ("warm", "random")
DECAYS: dict[str, Callable[[float], float]] = {
    "sine": lambda p: 1 - math.sin(math.pi * p / 2),
    "linear": lambda p: 1 - p,
    "cosine": lambda p: math.cos(math.pi * p / 2),
}
"""lambda by the share p of the fading that is done, as published."""


@dataclass(frozen=True, kw_only=True)
class PcLora(Pace):
    """Knobs of the method. `Edit.error` is the share of a linear's squared weights that its factors differ by."""

    reads_dense: ClassVar[bool] = True
    reads_gradient: ClassVar[bool] = False

    learning_rate: float = 3e-2
    begin: str = "warm"
    """warm: with the closed form; random: as published."""
    decay: str = "sine"
    """How the weight fades: sine, linear or cosine."""
    fade: float = 0.5
    """Share of the steps after which it is gone. Below 1, so that some steps are left."""
    features: float = 0.5
    """Share of the loss that the linears have; the layer's output has the rest."""

    def __post_init__(self) -> None:
        check_pace("pclora", self)
        for name, value, choices in (("begin", self.begin, STARTS), ("decay", self.decay, tuple(DECAYS))):
            if value not in choices:
                raise RecipeError(f"pclora: {name} is {shown(value)}; wanted one of {', '.join(choices)}.")
        check_share("pclora", "features", self.features, least=0)
        check_share("pclora", "fade", self.fade)
        if self.fade == 1:
            raise RecipeError("pclora: fade is 1, with which the weight is never gone; wanted a number below 1.")

    def layout(self, sublayer: str, natives: Natives, budget: ParameterBudget) -> Layout:
        """Of all linears the same share, less a bias each. What could stay dense has the highest rank that stores less: here
        every linear becomes factors. Raises RecipeError where there is no such rank."""
        own = {role: natives[role] for role in SUBLAYERS[sublayer].roles if role in natives}
        left = budget.parameters - sum(native.shape[0] for native in own.values())
        sites = [
            RankSite(name=role, shape=native.shape, itemsize=budget.itemsize, storage="factors")
            for role, native in own.items()
        ]
        ranks = share_ranks(sites, left)
        for site in sites:
            if not site.most:
                raise RecipeError(
                    f"pclora: {site.name} {list(site.shape)} has no rank at which two factors store less; wanted a larger "
                    "matrix. Take another preset."
                )
        return {site.name: LowRank(site.shape, True, ranks[site.name] or site.most) for site in sites}

    def cost(self, sublayer: str, natives: Natives, layout: Layout, budget: ParameterBudget) -> Cost:
        if self.begin == "random":
            return Cost()
        shapes = [(layout[role].shape, layout[role].rank) for role in SUBLAYERS[sublayer].roles if role in layout]
        held = 2 * RUN * adapter_numbers(natives, {role: form.rank for role, form in layout.items()})
        return low_rank_cost(shapes, held)

    def training_cost(self, natives: Natives, layout: Layout, itemsize: int) -> TrainingCost:
        numbers = adapter_numbers(natives, {role: form.rank for role, form in layout.items()})
        numbers += sum(native.shape[0] for native in natives.values())
        outputs = sum(native.shape[0] for native in natives.values())
        ranks = sum(form.rank for form in layout.values())
        return TrainingCost(
            parameters=numbers, held_bytes=(MASTER + RUN) * numbers + RUN * dense_numbers(natives) * (itemsize < RUN),
            state_bytes=(STATE + RUN) * numbers, token_bytes=RUN * (2 * outputs + ranks), forwards=4,
        )  # fmt: skip

    def require_steps(self, steps: int) -> None:
        if self.lambda_at(steps - 1, steps):
            raise RecipeError(
                f"pclora: fade {self.fade:g} over {steps} steps ends before the weight is gone, which would compress nothing; "
                "wanted more. Raise epochs or --samples, or lower fade."
            )

    def lambda_at(self, step: int, steps: int) -> float:
        """What is left of the weight at a step of so many."""
        done = step / (self.fade * steps)
        return DECAYS[self.decay](done) if done < 1 else 0.0

    def start(self, layer: StreamLayer, index: int, layout: Layout, gram: Callable[[str], Gram], steps: int) -> Fading:
        adapters = {}
        generator = torch.Generator().manual_seed((self.seed << 20) + index)
        for name in layer.family.compressible:
            part = layer.family.sublayers[name]
            for roles in (part.reads, (part.writes,)):
                seen = gram(roles[0]) if self.begin == "warm" else None
                for role in roles:
                    linear, rank = layer.linear(role), layout[role].rank
                    found = (
                        random_factors(linear, rank, generator)
                        if seen is None
                        else closed_form(layer, role, seen, rank)
                    )
                    own = None if seen is None else linear.bias
                    c_O = linear.weight.new_zeros(len(linear.weight)).float() if own is None else own.detach().float()
                    adapters[role] = Adapter(linear, found.a_RI, found.b_OR, c_O.clone())
        return Fading(self, Adapted(layer=layer, adapters=adapters), steps)


def closed_form(layer: StreamLayer, role: str, gram: Gram, rank: int) -> Factors:
    """The nearest map of that rank on inputs of this Gram, as two factors in float32."""
    path, w_OI = layer.family.path(role), layer.linear(role).weight
    with located(f"{layer.prefix}.{path}"):
        found = subspace(w_OI, gram, rank)
        up_OR, down_RI = two_factors(found.value, gram, w_OI, torch.float32, path).value
    return Factors(down_RI.contiguous(), up_OR.contiguous())


class Fading(BestSteps):
    """The training of one layer; see `trained.base.DistillingLayer`."""

    def __init__(self, knobs: PcLora, adapted: Adapted, steps: int) -> None:
        super().__init__(knobs, adapted.masters, adapted.sizes, steps)
        self.knobs, self.adapted, self.layer = knobs, adapted, adapted.layer

    @property
    def ends(self) -> bool:
        return self.epoch >= self.knobs.epochs

    def begin(self, loss: float) -> None:
        """Take down the loss before the first epoch. A closed form is what is written where no epoch is better."""
        super().begin(loss)
        if self.knobs.begin == "warm":
            self.keep()

    def fade_to(self, left: float) -> None:
        """So much is left of the weight."""
        for adapter in self.adapted.adapters.values():
            adapter.fade, adapter.weight = left, 1.0 - left if self.knobs.begin == "warm" else 1.0

    @torch.no_grad()
    def measure(self, held: Iterable[Lesson]) -> float:
        """Loss on held-out tokens of the adapters alone."""
        self._adam.zero_grad()
        self.fade_to(0.0)
        found = HeldLoss()
        for x_BLD, target_BLD, *_ in held:
            found.update(x_BLD, target_BLD, self.adapted(x_BLD))
        return self.noted(found)

    def step(self, place: int, lesson: Lesson) -> None:
        x_BLD, target_BLD, dense_BLD, _ = lesson
        self._adam.zero_grad()
        self.fade_to(self.knobs.lambda_at(self.step_number(place), self.total))
        loss = self.loss(x_BLD, target_BLD, linear_outputs(self.layer, self.adapted.adapters, dense_BLD))
        loss.backward()  # type: ignore[no-untyped-call]
        self.move(place)

    def loss(self, x_BLD: torch.Tensor, target_BLD: torch.Tensor, taught: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of the layer and of its linears, `taught` what these should give; each error relative, as `distances` has it."""
        adapters = self.adapted.adapters
        for adapter in adapters.values():
            adapter.keeps = True
        block = mean(distances(target_BLD, self.adapted(x_BLD))) / self._update
        out_BL = target_BLD[..., 0].isnan()
        wide = []
        for role, adapter in adapters.items():
            assert adapter.given is not None
            wanted_BLO = taught[role].float().masked_fill(out_BL[..., None], torch.nan)
            wide.append(mean(distances(wanted_BLO, adapter.given.view(wanted_BLO.shape))))
            adapter.given, adapter.keeps = None, False
        return (1 - self.knobs.features) * block + self.knobs.features * torch.stack(wide).mean()

    @torch.no_grad()
    def finish(self) -> list[Edit]:
        """The adapters alone, those that served held-out tokens best. Raises NumericalError where nothing was learnt."""
        if not self.best and self.knobs.begin == "random":
            raise NumericalError(
                f"no epoch has brought the loss on held-out tokens below {self.held[0]:.4g}, where the adapters begin with "
                "nothing; wanted less. Take a lower learning_rate, more epochs, or begin warm."
            )
        for name, best in self.best.items():
            self.masters[name].copy_(best)
        return [self._edit(role) for role in self.layer.family.roles]

    def _edit(self, role: str) -> Edit:
        adapter, path, dtype = self.adapted.adapters[role], self.layer.family.path(role), self.layer.storage_dtype(role)
        factors = balanced(adapter.b_OR, adapter.a_RI, dtype, path)
        up_OR, down_RI = (factor.detach().clone() for factor in factors.value)
        assert adapter.c_O is not None
        c_O = as_stored(adapter.c_O.detach(), dtype, f"{path}.bias").clone()
        gone = (adapter.w_OI - up_OR.float() @ down_RI.float()).double().square().sum()
        whole = float(adapter.w_OI.double().square().sum())
        return Edit(
            role=role, module=LowRankLinear.from_factors(up_OR, down_RI, c_O), native=self.layer.native(role),
            error=float(gone) / whole if whole else 0.0, notes=factors.notes,
        )  # fmt: skip
