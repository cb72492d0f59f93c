"""The rows of methods in recipes, both ways: {method: refine, epochs: 25} <-> Refine(epochs=25)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, cast

from streamlap.errors import RecipeError, one_line, shown
from streamlap.methods import DISTILLED, FINAL, METHODS, PRESETS, SHAPES, TRAINED, AnyMethod
from streamlap.methods.trained.refine import Refine


def known_methods() -> dict[str, type[AnyMethod]]:
    """Every method by its name. Built when asked for: the tables may have got new rows."""
    return {**METHODS, **DISTILLED, **TRAINED, **FINAL}


def preset_methods(preset: str, shape: str) -> tuple[AnyMethod, ...]:
    """Raises RecipeError for a preset or a shape that there is not."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RecipeError(f"preset is {shown(preset)}; wanted one of {', '.join(PRESETS)}.")
    if not isinstance(shape, str) or shape not in SHAPES:
        raise RecipeError(f"shape is {shown(shape)}; wanted one of {', '.join(SHAPES)}.")
    if preset not in SHAPES[shape]:
        raise RecipeError(
            f"preset {preset} has no shape {shape}; wanted shape free, or preset {', '.join(SHAPES[shape])}."
        )
    return SHAPES[shape][preset]


def with_refinement(methods: tuple[AnyMethod, ...], epochs: Any) -> tuple[AnyMethod, ...]:
    """The methods with a refinement of so many epochs, or without one where that is 0."""
    others = tuple(method for method in methods if not isinstance(method, Refine))
    if type(epochs) is int and epochs == 0:
        return others
    before = [method for method in methods if isinstance(method, Refine)] or [Refine()]
    return (*others, replace(before[0], epochs=epochs))


def method_name(method: AnyMethod) -> str:
    return next(name for name, kind in known_methods().items() if type(method) is kind)


def method_row(method: AnyMethod) -> dict[str, Any]:
    """As plain values, of which YAML and JSON make the same."""
    knobs = asdict(cast(Any, method)).items()
    return {"method": method_name(method)} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in knobs
    }


KNOBS: dict[str, tuple[tuple[type, ...], str]] = {
    "float": ((float, int), "a number"),
    "int": ((int,), "a whole number"),
    "str": ((str,), "a word"),
    "bool": ((bool,), "true or false"),
    "None": ((type(None),), "nothing"),
    "tuple[float, ...]": ((list, tuple), "a list of numbers"),
}
"""Annotation of a knob -> what it may be, and how messages say it."""


def parse_methods(methods: Any) -> tuple[AnyMethod, ...]:
    """Methods as they are, and those that rows of a recipe stand for."""
    if not isinstance(methods, list | tuple):
        raise RecipeError(f"methods is {shown(methods)}; wanted a list of some of {', '.join(known_methods())}.")
    kinds = tuple(known_methods().values())
    if isinstance(methods, tuple) and all(isinstance(method, kinds) for method in methods):
        return methods  # the very tuple of a preset
    return tuple(method if isinstance(method, kinds) else parse_method(method) for method in methods)


def parse_method(row: Any) -> AnyMethod:
    known = known_methods()
    if not isinstance(row, Mapping) or not isinstance(row.get("method"), str) or row["method"] not in known:
        raise RecipeError(
            f"methods holds {shown(row)}; wanted rows like {{method: NAME}} with one of {', '.join(known)}."
        )
    kind: Any = known[row["method"]]
    knobs = {key: value for key, value in row.items() if key != "method"}
    refuse_unknown(row["method"], knobs, kind)
    for entry in fields(kind):
        value, wanted = knobs.get(entry.name, entry.default), str(entry.type).split(" | ")
        if not any(type(value) in KNOBS[name][0] for name in wanted):
            words = " or ".join(KNOBS[name][1] for name in wanted)
            raise RecipeError(f"{row['method']}: {entry.name} is {shown(value)}; wanted {words}.")
    method: AnyMethod = kind(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in knobs.items()}
    )
    return method


def refuse_unknown(where: str, table: Mapping[str, Any], kind: type) -> None:
    known = [entry.name for entry in fields(kind)]
    unknown = [key if isinstance(key, str) and key.isidentifier() else shown(key) for key in table if key not in known]
    if unknown:
        raise RecipeError(
            f"{where} has unknown keys {one_line(', '.join(unknown[:8]), 200)}; wanted some of {', '.join(known)}."
        )
