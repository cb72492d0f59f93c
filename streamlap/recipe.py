"""All that decides the result: frozen settings, presets, their YAML form.

preset: best
ratio: 0.2
dtype: auto
survey: null
refine: 0
methods:
  - {method: attention_anchored, step: null, input_step: 0.0, output: dense, storage: pivoted}
  - {method: ffn_anchored, step: null, input_step: 0.0, output: dense, storage: pivoted, share: 0.5}
calibration: {files: [], samples: 128, length: 2048, seed: 0}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from streamlap.errors import RecipeError, one_line, shown
from streamlap.families.shell import COMPUTE_DTYPES
from streamlap.families.table import Family
from streamlap.methods import ANCHORED, METHODS, PRESETS, AnchoredMethod, Method, OnePassMethod
from streamlap.methods.trained.refine import Refinement
from streamlap.untrusted.yaml import read_yaml

MOST_EPOCHS = 10_000


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which tokens the statistics are taken on."""

    files: tuple[str, ...] = ()
    """Text (.txt, .jsonl, .parquet), token ids (.npy) or a hub data set; none means the bundled text."""
    samples: int | None = None
    """Windows to use; None means 128 of a text, all rows of a two-dimensional .npy."""
    length: int | None = None
    """Tokens in a window; None means 2048 or the model's context if that is shorter, the row length of an .npy."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value < 2**63):
                raise RecipeError(
                    f"calibration: {name} is {shown(value)}; wanted a whole number of at least {least} and below 2^63."
                )
        if not isinstance(self.files, list | tuple) or not all(isinstance(file, str) for file in self.files):
            raise RecipeError(f"calibration: files is {shown(self.files)}; wanted a list of paths.")
        object.__setattr__(self, "files", tuple(self.files))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one compression; equal recipes on equal inputs give equal bytes."""

    ratio: float = 0.2
    """Fraction of the decoder-linear parameters to remove, inside (0, 1)."""
    preset: str = "best"
    """Where `methods` came from; "custom" when they were written out by hand."""
    methods: tuple[Method, ...] = PRESETS["best"]
    """Of one kind: one-pass methods that edit different linears, or anchored ones, of which several may try for one half."""
    calibration: Calibration = field(default_factory=Calibration)
    dtype: str = "auto"
    """Compute dtype; auto is float32 on a CPU and the checkpoint's dtype on a GPU. Storage keeps the checkpoint's dtype."""
    refine: int = 0
    """Recovery: epochs for which every rebuilt layer is trained on the calibration windows; see `methods.refine_block`."""
    survey: str | None = None
    """File of `streamlap survey` by which layers and halves share out what stays; None gives every one the same share."""

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio < 1:
            raise RecipeError(
                f"ratio is {shown(self.ratio)}; wanted a fraction between 0 and 1, like 0.2 for 20 % removed."
            )
        if self.preset not in (*PRESETS, "custom"):
            raise RecipeError(f"preset is {shown(self.preset)}; wanted one of {', '.join(PRESETS)}, custom.")
        if self.dtype not in ("auto", *COMPUTE_DTYPES):
            raise RecipeError(f"dtype is {shown(self.dtype)}; wanted one of auto, {', '.join(COMPUTE_DTYPES)}.")
        if type(self.refine) is not int or not 0 <= self.refine <= MOST_EPOCHS:
            raise RecipeError(f"refine is {shown(self.refine)}; wanted a whole number of epochs, 0 to {MOST_EPOCHS}.")
        if self.refine and not self.anchored:
            raise RecipeError(
                f"refine is {self.refine}, and preset {self.preset} does not keep the dense model's stream, which is what a "
                "layer is refined towards; wanted anchored methods like those of preset best, or refine 0."
            )
        if self.survey is not None and not (isinstance(self.survey, str) and self.anchored):
            raise RecipeError(
                f"survey is {shown(self.survey)}; wanted the path of a survey file, and methods that rebuild halves, as "
                "those of the preset best are."
            )

    @property
    def refinement(self) -> Refinement | None:
        """How rebuilt layers are refined, where they are."""
        return Refinement(epochs=self.refine) if self.refine else None

    @property
    def anchored(self) -> bool:
        """Whether layers are rebuilt half by half beside the dense model."""
        return any(isinstance(method, ANCHORED) for method in self.methods)

    def of_half(self, half: str) -> dict[str, AnchoredMethod]:
        """The anchored methods that try for a half, by a name that tells them apart."""
        found = [method for method in self.methods if isinstance(method, ANCHORED) and method.half == half]
        return {f"{method_name(method)} {place}": method for place, method in enumerate(found)}

    @property
    def one_pass(self) -> tuple[OnePassMethod, ...]:
        return tuple(method for method in self.methods if not isinstance(method, ANCHORED))

    def check_paths(self, family: Family) -> None:
        """Raise RecipeError where two one-pass methods would edit one linear, or kinds are mixed."""
        if self.anchored:
            if not family.halves:
                raise RecipeError(
                    f"layers of {family.model_type} are not made of halves that can be rebuilt; wanted one-pass methods, as "
                    "those of the preset lorap are."
                )
            missing = [half for half in family.halves if not self.of_half(half)]
            if self.one_pass or missing:
                raise RecipeError(
                    f"methods are {', '.join(map(method_name, self.methods))}; wanted one-pass methods alone, or anchored ones "
                    f"for every half: {', '.join(family.halves)}."
                )
        owner: dict[str, str] = {}
        for method in self.one_pass:
            for path in method.paths(family):
                if path in owner:
                    raise RecipeError(
                        f"methods {owner[path]} and {method_name(method)} both edit {path}; wanted one. Drop one of them."
                    )
                owner[path] = method_name(method)

    def override(self, **changes: Any) -> Recipe:
        """This recipe with single fields replaced; those of the calibration may be named directly."""
        within = {entry.name for entry in fields(Calibration)}
        _refuse_unknown("overrides", {key: value for key, value in changes.items() if key not in within}, Recipe)
        own = {key: value for key, value in changes.items() if key not in within}
        if "methods" in own:
            own["preset"] = own.get("preset", "custom")
        elif "preset" in own:
            own["methods"] = preset_methods(own["preset"])
        calibration = replace(
            own.get("calibration", self.calibration), **{key: value for key, value in changes.items() if key in within}
        )
        return replace(self, **(own | {"calibration": calibration}))

    def to_dict(self) -> dict[str, Any]:
        methods = [{"method": method_name(method), **asdict(method)} for method in self.methods]
        calibration = asdict(self.calibration) | {"files": list(self.calibration.files)}
        plain = {"preset": self.preset, "ratio": self.ratio, "dtype": self.dtype, "survey": self.survey}
        plain["refine"] = self.refine
        return plain | {"methods": methods, "calibration": calibration}

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Recipe:
        """The recipe that a parsed YAML or JSON object stands for. Raises RecipeError for unknown keys and bad values."""
        _refuse_unknown("recipe", table, cls)
        values = dict(table)
        preset = values.setdefault("preset", "custom" if "methods" in values else "best")
        if "methods" in values:
            if not isinstance(values["methods"], list):
                raise RecipeError(
                    f"methods is {shown(values['methods'])}; wanted a list of some of {', '.join(METHODS)}."
                )
            values["methods"] = tuple(_parse_method(row) for row in values["methods"])
        else:
            values["methods"] = preset_methods(preset)
        calibration = values.get("calibration") or {}
        if not isinstance(calibration, Mapping):
            raise RecipeError(f"calibration is {shown(calibration)}; wanted files, samples, length and seed.")
        _refuse_unknown("calibration", calibration, Calibration)
        return cls(**(values | {"calibration": Calibration(**calibration)}))

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        try:
            table = read_yaml(path)
        except OSError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error.strerror}; wanted a YAML file.") from error
        except ValueError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error}; wanted plain YAML settings.") from error
        if not isinstance(table, Mapping):
            raise RecipeError(f"recipe {path} holds a {type(table).__name__}; wanted keys like ratio and preset.")
        if "methods" in table and not table["methods"]:
            raise RecipeError(f"recipe {path} has no methods, so nothing would be compressed; wanted some or a preset.")
        return cls.from_dict(table)


def preset_methods(preset: str) -> tuple[Method, ...]:
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RecipeError(f"preset is {shown(preset)}; wanted one of {', '.join(PRESETS)}.")
    return PRESETS[preset]


def method_name(method: Method) -> str:
    return next(name for name, kind in METHODS.items() if type(method) is kind)


KNOB_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int), "int": (int,), "str": (str,), "bool": (bool,), "None": (type(None),),
}  # fmt: skip
KNOB_WORDS = {"float": "a number", "int": "a whole number", "str": "a word", "bool": "true or false", "None": "nothing"}
"""By the annotation of a knob, what it may be."""


def _parse_method(row: Any) -> Method:
    known = ", ".join(METHODS)
    if not isinstance(row, Mapping) or row.get("method") not in list(METHODS):
        raise RecipeError(f"methods holds {shown(row)}; wanted rows like {{method: NAME}} with one of {known}.")
    kind = METHODS[row["method"]]
    knobs = {key: value for key, value in row.items() if key != "method"}
    _refuse_unknown(row["method"], knobs, kind)
    for entry in fields(kind):
        value, wanted = knobs.get(entry.name, entry.default), str(entry.type).split(" | ")
        if not any(type(value) in KNOB_TYPES[name] for name in wanted):
            raise RecipeError(
                f"{row['method']}: {entry.name} is {shown(value)}; wanted {' or '.join(KNOB_WORDS[name] for name in wanted)}."
            )
    return kind(**knobs)


def _refuse_unknown(where: str, table: Mapping[str, Any], kind: type) -> None:
    known = [entry.name for entry in fields(kind)]
    unknown = [key if isinstance(key, str) and key.isidentifier() else shown(key) for key in table if key not in known]
    if unknown:
        raise RecipeError(
            f"{where} has unknown keys {one_line(', '.join(unknown[:8]), 200)}; wanted some of {', '.join(known)}."
        )
