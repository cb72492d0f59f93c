"""From a layer in memory to its edits, applied: one way for the methods that look once, one for those that rebuild halves."""

from __future__ import annotations

from collections.abc import Callable

from streamlap.errors import NumericalError, located
from streamlap.families.layer import Edit, StreamLayer
from streamlap.linalg.notes import note
from streamlap.linalg.statistics import all_finite
from streamlap.methods.base import Statistic
from streamlap.pipeline.runner import Engine
from streamlap.pipeline.sublayers import Banks, HalfErrors, rebuild_layer
from streamlap.planning.forecast import plan_halves
from streamlap.recipe import Recipe
from streamlap.system.meters import PhaseClock


def edit_by_halves(
    recipe: Recipe, engine: Engine, banks: Banks, layer: StreamLayer, index: int, clock: PhaseClock,
    ready: Callable[[], None],
) -> tuple[list[Edit], HalfErrors]:  # fmt: skip
    """The layer rebuilt beside the dense model; its edits, and what the methods that tried for its halves erred by.

    `ready` is called before the first solve: by then the layer before is on the disk, and out of memory.
    """
    candidates = plan_halves(engine.stream, recipe, index)
    edits, errors = rebuild_layer(engine, banks, layer, index, candidates, clock, ready)
    for edit in edits:
        refuse_overflow(layer, edit)
    return edits, errors


def edit_in_one_pass(
    recipe: Recipe, engine: Engine, layer: StreamLayer, index: int, clock: PhaseClock, ready: Callable[[], None]
) -> list[Edit]:
    """Statistics from one dense pass on inputs from the compressed prefix, then every method's edits, applied."""
    methods, ratio = recipe.one_pass, recipe.ratio

    def capture() -> list[dict[str, Statistic]]:
        for careful in (False, True):  # rows that go bad inside are searched for only where there are some
            stats = [method.wants(layer) for method in methods]  # anew on every attempt
            pairs = [pair for wanted in stats for pair in wanted.items()]
            if pairs:
                with layer.observed(pairs, careful):
                    engine.observe(layer, index)
            if all(statistic.finite for _, statistic in pairs):
                break
        else:
            raise NumericalError(
                f"{layer.prefix}: squares of activations overflow; wanted finite ones. Scale the model."
            )
        for site, count in {site: statistic.dead for site, statistic in pairs}.items():
            if count:
                note(layer.family.dead_inputs(site, count))
        return stats

    def solve() -> list[Edit]:
        with layer.on(engine.ladder.solve_device), located(layer.prefix):
            pairs = zip(methods, stats, strict=True)
            return [edit for method, seen in pairs for edit in method.edit(layer, seen, ratio)]

    with clock.phase("capture"):
        stats = engine.run("capture", index, capture)
    ready()
    with clock.phase("solve"):
        edits = engine.run("solve", index, solve)
        for edit in edits:
            refuse_overflow(layer, edit)
        layer.apply(edits)
    return edits


def refuse_overflow(layer: StreamLayer, edit: Edit) -> None:
    """Raise NumericalError where an edit has no finite form in the storage dtype; nothing of it is written then."""
    for name, tensor in edit.module.state_dict().items():
        if not all_finite(tensor):
            raise NumericalError(
                f"{layer.prefix}.{edit.path}: {name} is not finite in {tensor.dtype}; wanted numbers that {tensor.dtype} "
                "can hold. Convert the checkpoint to bfloat16 or float32 and compress that."
            )
