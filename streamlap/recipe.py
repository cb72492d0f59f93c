"""All that decides the result: frozen settings, presets, their YAML form.

preset: best
ratio: 0.2
dtype: auto
survey: auto
methods:
  - {method: attention_anchored, step: null, input_step: 0.0, output: dense, storage: pivoted}
  - {method: ffn_anchored, step: null, input_step: 0.0, output: dense, storage: pivoted, shares: [0.25, 0.5, 0.75, 1.0]}
  - {method: final_gain}
  - {method: refine, epochs: 25}
calibration: {files: [], samples: 128, length: 2048, seed: 0, redraw: true}
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import yaml

from streamlap.errors import RecipeError, shown
from streamlap.families.opening import parse_dtype
from streamlap.families.table import Family
from streamlap.methods import DISTILLED, FINAL, FORMATS, PRESETS, SHAPES, TRAINED, AnyMethod
from streamlap.methods.anchored.ffn import FfnAnchored
from streamlap.methods.anchored.groups import AttentionGroups
from streamlap.methods.base import Method
from streamlap.methods.final.gain import FinalGain
from streamlap.methods.rows import (
    method_name,
    method_row,
    parse_methods,
    preset_methods,
    refuse_unknown,
    with_refinement,
)
from streamlap.methods.trained.base import Distilled, Trained
from streamlap.system.amounts import parse_ratio
from streamlap.untrusted.paths import path_of
from streamlap.untrusted.yaml import read_yaml

AUTO = "auto"
"""A survey that a compression makes for itself, where there is none yet."""
DEFAULT_SURVEY: str | None = AUTO
NOT_GIVEN: tuple[AnyMethod, ...] = (*PRESETS["best"],)
"""The methods of a recipe for which none are given, until it is known which preset and shape it has. A tuple of its own."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which tokens the statistics are taken on."""

    files: tuple[str, ...] = ()
    """Text (.txt, .md, .jsonl, .json, .parquet, also .gz and .zst), token ids (.npy) or a hub data set; none means the bundled
    text."""
    samples: int | None = None
    """Windows to use; None means 128, or all rows of a two-dimensional .npy."""
    length: int | None = None
    """Tokens in a window; None means 2048 or the model's context if that is shorter, the row length of an .npy."""
    seed: int = 0
    text_column: str | None = None
    """Where the text of a row of JSON or parquet is; None looks for text, messages and a few more."""
    redraw: bool = True
    """Whether anchored methods, where the windows hold few tokens, see each again with some of its tokens drawn anew from the
    model's own predictions."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value < 2**63):
                raise RecipeError(
                    f"calibration: {name} is {shown(value)}; wanted a whole number of at least {least} and below 2^63."
                )
        if not isinstance(self.files, list | tuple) or not all(isinstance(file, str | Path) for file in self.files):
            raise RecipeError(f"calibration: files is {shown(self.files)}; wanted a list of paths.")
        if type(self.redraw) is not bool:
            raise RecipeError(f"calibration: redraw is {shown(self.redraw)}; wanted true or false.")
        if self.text_column is not None and (not isinstance(self.text_column, str) or not self.text_column):
            raise RecipeError(f"calibration: text_column is {shown(self.text_column)}; wanted the name of a column.")
        object.__setattr__(self, "files", tuple(map(str, self.files)))

    @classmethod
    def of(cls, value: Any) -> Calibration:
        """One as it is, or the one that a table of its settings stands for."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise RecipeError(
                f"calibration is {shown(value)}; wanted files, samples, length, seed, text_column and redraw."
            )
        refuse_unknown("calibration", value, cls)
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; without a text column there is no such key, as in the files of earlier versions."""
        values = asdict(self) | {"files": list(self.files)}
        return {name: value for name, value in values.items() if (name, value) != ("text_column", None)}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one compression; equal recipes on equal inputs give equal bytes."""

    ratio: float = 0.2
    """Fraction of the decoder-linear parameters to remove, inside (0, 1); text like 20% becomes a number."""
    preset: str = "best"
    """Where `methods` came from; "custom" when they were written out by hand."""
    shape: str = "free"
    """What the result may be made of, see `methods.SHAPES`."""
    format: str = "factored"
    """How the output folder holds it, see `methods.FORMATS`. A format that holds less than every form implies its shape."""
    multiple: int | None = None
    """What the width of every FFN is a multiple of, in the shapes whose linears are dense. None is what the format's engines
    want, and 1 where that is factored."""
    methods: tuple[AnyMethod, ...] = NOT_GIVEN
    """Those of the preset and shape where none are given. Either methods for sub-layers (all one-pass or all anchored, see
    `methods.base`), and after them at most one that trains their result. Or one distilled method, which compresses whole layers
    by training. At the end at most one final method, for what comes after the last layer."""
    calibration: Calibration = field(default_factory=Calibration)
    dtype: str = "auto"
    """Compute dtype; auto is the checkpoint's dtype where the device is fast in it (a GPU; bfloat16 on a CPU with instructions
    for it), else float32. Storage keeps the checkpoint's dtype. A short name (bf16) becomes the whole one, so that recipes can
    be compared."""
    survey: str | None = field(default_factory=lambda: DEFAULT_SURVEY)
    """File of `streamlap survey`, which decides what share of its parameters each sub-layer keeps. None gives all the same
    share. With auto a compression by anchored methods makes one first, and keeps it beside the output; without anchored
    methods, and with the shape stock, auto becomes None."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", parse_ratio(self.ratio))
        object.__setattr__(self, "dtype", parse_dtype(self.dtype))
        object.__setattr__(self, "calibration", Calibration.of(self.calibration))
        object.__setattr__(self, "methods", parse_methods(self.methods))
        if isinstance(self.survey, Path):
            object.__setattr__(self, "survey", str(self.survey))
        check_words(vars(self))
        self._settle_shape()
        if self.methods is NOT_GIVEN or (self.methods is PRESETS["best"] and self.preset != "custom"):
            object.__setattr__(self, "methods", own_methods(self.preset, self.shape))
        self._check_shape()
        if self.distilled and (len(self.distilled) > 1 or self.solving or self.trained):
            others = [method for method in self.methods if method is not self.distilled[0]]
            raise RecipeError(
                f"methods have {method_name(self.distilled[0])}, which makes whole layers, and beside it "
                f"{', '.join(map(method_name, others))}; wanted it alone, or with final_gain, and no refine."
            )
        if self.trained and not self.anchored:
            raise RecipeError(
                f"methods have {method_name(self.trained[0])}, and preset {self.preset} does not keep the dense model's "
                "stream, towards which a layer is trained; wanted anchored methods, as those of the preset best are, or no "
                "training (refine 0)."
            )
        if self.final and not self.beside_dense:
            raise RecipeError(
                f"methods have {method_name(self.final[0])}, which is fitted to the dense model's stream, and none that keeps "
                "it; wanted anchored methods beside it, as those of the preset best are."
            )
        if isinstance(self.survey, str) and self.survey == AUTO and not self.may_survey:
            object.__setattr__(self, "survey", None)
        if self.survey is not None and not (isinstance(self.survey, str) and self.anchored):
            raise RecipeError(
                f"survey is {shown(self.survey)}; wanted auto, or the path of a survey file, and anchored methods, as those of "
                "the preset best are."
            )

    def _settle_shape(self) -> None:
        """The shape that the format implies. Raises RecipeError where another was given."""
        implied = shape_for(self.format, self.shape)
        if self.shape not in ("free", implied):
            raise RecipeError(
                f"format is {self.format} and shape {self.shape}; wanted shape {implied}, which that format holds, or format "
                "factored, which holds every shape."
            )
        object.__setattr__(self, "shape", implied)
        if self.multiple is not None and (type(self.multiple) is not int or not 1 <= self.multiple < 2**20):
            raise RecipeError(f"multiple is {shown(self.multiple)}; wanted a whole number of at least 1.")
        if self.multiple is not None and self.shape == "free":
            raise RecipeError(
                f"multiple is {self.multiple} and shape free; wanted shape nas or stock: in a free one channels and ranks are "
                "shared out one by one."
            )

    def _check_shape(self) -> None:
        """Raise RecipeError where a method makes what the shape cannot be made of."""
        for method in self.solving if self.shape != "free" else ():
            whole = isinstance(method, FfnAnchored) and method.shares == (1.0,)
            if not whole and not isinstance(method, AttentionGroups):
                raise RecipeError(
                    f"shape is {self.shape} and methods have {method_name(method)}; wanted what leaves linears dense: "
                    "attention_groups, and ffn_anchored with shares [1.0]."
                )

    @property
    def solving(self) -> tuple[Method, ...]:
        """The methods that compress a sub-layer."""
        others = (*DISTILLED.values(), *TRAINED.values(), *FINAL.values())
        found = (method for method in self.methods if not isinstance(method, others))
        return cast("tuple[Method, ...]", tuple(found))

    @property
    def distilled(self) -> tuple[Distilled, ...]:
        """The one that compresses whole layers by training, if there is one."""
        found = (method for method in self.methods if isinstance(method, tuple(DISTILLED.values())))
        return cast("tuple[Distilled, ...]", tuple(found))

    @property
    def trained(self) -> tuple[Trained, ...]:
        """Those that train what the others have made."""
        found = (method for method in self.methods if isinstance(method, tuple(TRAINED.values())))
        return cast("tuple[Trained, ...]", tuple(found))

    @property
    def final(self) -> tuple[FinalGain, ...]:
        """What comes after the last layer."""
        return tuple(method for method in self.methods if isinstance(method, FinalGain))

    def without_final(self) -> Recipe:
        """The same for a model without a head."""
        return replace(self, methods=tuple(method for method in self.methods if not isinstance(method, FinalGain)))

    @property
    def anchored(self) -> bool:
        """Whether sub-layers are rebuilt beside the dense model: the methods for them look at both streams."""
        return any(not method.needs for method in self.solving)

    @property
    def may_survey(self) -> bool:
        """Whether a compression may make a survey for itself. In the shape stock one does not pay unless it is asked for."""
        return self.anchored and self.shape != "stock"

    @property
    def beside_dense(self) -> bool:
        """Whether the dense model's stream is kept beside the compressed one, as anchored and distilled methods ask for."""
        return self.anchored or bool(self.distilled)

    @property
    def reads_gradient(self) -> bool:
        """Whether the gradient of the dense model's language-model loss is kept behind each layer."""
        return any(method.reads_gradient for method in self.distilled)

    def edited(self, family: Family) -> set[str]:
        """Names of the sub-layers that the methods compress."""
        return set(family.sublayers) if self.distilled else {method.sublayer for method in self.solving}

    def of_sublayer(self, sublayer: str) -> dict[str, Method]:
        """The methods that may compress a sub-layer, by a name that tells them apart."""
        found = [method for method in self.solving if method.sublayer == sublayer]
        names = [method_name(method) for method in found]
        return {
            name if names.count(name) == 1 else f"{name} {place}": method
            for place, (name, method) in enumerate(zip(names, found, strict=True))
        }

    def check_methods(self, family: Family) -> None:
        """Raise RecipeError where the methods do not go together on layers of this family."""
        names = ", ".join(map(method_name, self.solving))
        one_pass = [method for method in self.solving if method.needs]
        counts = {name: len(self.of_sublayer(name)) for name in family.sublayers}
        if self.anchored and (one_pass or not all(counts.values())):
            raise RecipeError(
                f"methods are {names}; wanted one-pass methods alone, or anchored ones for every sub-layer: "
                f"{', '.join(counts)}."
            )
        for name, rivals in ((name, self.of_sublayer(name).values()) for name in counts):
            if len(rivals) > 1 and not self.anchored:
                raise RecipeError(
                    f"one-pass methods {', '.join(map(method_name, rivals))} all edit {name}; wanted one. Drop the others."
                )
        if len(self.trained) > 1:
            raise RecipeError(
                f"methods have {len(self.trained)} that train ({', '.join(map(method_name, self.trained))}); wanted one."
            )
        if len(self.final) > 1:
            raise RecipeError(f"methods have {len(self.final)} rows of {method_name(self.final[0])}; wanted one.")

    def override(self, **changes: Any) -> Recipe:
        """This recipe with single fields replaced; those of the calibration may be named directly.

        `refine` stands for a method of that name: so many epochs, with its other knobs as they are; 0 for none.
        """
        within = {entry.name for entry in fields(Calibration)}
        own = {key: value for key, value in changes.items() if key not in within}
        epochs = own.pop("refine", None)
        if unknown := [shown(key) for key in changes if key not in OVERRIDES]:
            raise RecipeError(
                f"a recipe has no {', '.join(unknown)} to override; wanted some of {', '.join(OVERRIDES)}."
            )
        check_words(own)
        if "methods" in own:
            own |= {"preset": own.get("preset", "custom"), "methods": parse_methods(own["methods"])}
        elif {"preset", "shape", "format"} & own.keys():
            format = own.get("format", self.format)
            own.setdefault("shape", shape_for(format, self.shape))
            shape = shape_for(format, own["shape"])
            preset = own.get("preset", self.preset)
            if preset != self.preset or (preset != "custom" and ("preset" in own or shape != self.shape)):
                own["methods"] = (*own_methods(preset, shape), *self.trained)
        shape = shape_for(own.get("format", self.format), own.get("shape", self.shape))
        if self.survey is not None and (changes.get("preset", self.preset), shape) != (self.preset, self.shape):
            own.setdefault("survey", AUTO)  # a file serves the methods and the shape that it was given with
        if self.survey is None and not self.may_survey:  # nobody has chosen to have none
            own.setdefault("survey", DEFAULT_SURVEY)
        if epochs is not None:
            own["methods"] = with_refinement(own.get("methods", self.methods), epochs)
        calibration = replace(
            Calibration.of(own.get("calibration", self.calibration)),
            **{key: value for key, value in changes.items() if key in within},
        )
        return replace(self, **(own | {"calibration": calibration}))

    def to_dict(self) -> dict[str, Any]:
        """As plain values; a shape, format or multiple that is the default has no key, as in the files of earlier versions."""
        methods = [method_row(method) for method in self.methods]
        plain = {"preset": self.preset, "ratio": self.ratio, "dtype": self.dtype, "survey": self.survey}
        defaults = {"shape": "free", "format": "factored", "multiple": None}
        shape = {name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value}
        return plain | shape | {"methods": methods, "calibration": self.calibration.to_dict()}

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    @classmethod
    def of(cls, value: Recipe | None) -> Recipe:
        """The recipe itself, the default for None. Raises RecipeError for what is none."""
        if value is not None and not isinstance(value, cls):
            raise RecipeError(
                f"recipe is {shown(value)}; wanted a Recipe, as Recipe.from_yaml(path) and Recipe.from_dict(table) give one."
            )
        return value or cls()

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Recipe:
        """The recipe that a parsed YAML or JSON object stands for. Raises RecipeError for unknown keys and bad values."""
        if not isinstance(table, Mapping):
            raise RecipeError(f"a recipe is {shown(table)}; wanted a table with keys like ratio and preset.")
        values = {key: value for key, value in table.items() if key != "refine"}
        refuse_unknown("recipe", values, cls)
        check_words(values)
        preset = values.setdefault("preset", "custom" if "methods" in values else "best")
        if "methods" in values:
            values["methods"] = parse_methods(values["methods"])
        else:
            values["methods"] = own_methods(preset, shape_for(values.get("format"), values.get("shape", "free")))
        if "refine" in table:
            values["methods"] = with_refinement(values["methods"], table["refine"])
        if values.get("calibration") is None:
            values["calibration"] = Calibration()
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """The recipe in a file. A survey that lies beside it is meant before one of that name elsewhere."""
        path = path_of(path, "path")
        try:
            table = read_yaml(path)
        except OSError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error.strerror}; wanted a YAML file.") from error
        except ValueError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error}; wanted plain YAML settings.") from error
        if table is None:
            raise RecipeError(f"recipe {path} is empty; wanted keys like ratio and preset.")
        if not isinstance(table, Mapping):
            raise RecipeError(f"recipe {path} holds a {type(table).__name__}; wanted keys like ratio and preset.")
        if "methods" in table and not table["methods"]:
            raise RecipeError(f"recipe {path} has no methods, so nothing would be compressed; wanted some or a preset.")
        return cls.from_dict({**table, "survey": _beside(path, table["survey"])} if "survey" in table else table)


OVERRIDES = tuple(dict.fromkeys([*(entry.name for kind in (Recipe, Calibration) for entry in fields(kind)), "refine"]))
"""What `Recipe.override` replaces, by name."""


def check_words(table: Mapping[str, Any]) -> None:
    """Raise RecipeError for a preset, a format or a shape in it that there is not."""
    known: dict[str, Collection[str]] = {"preset": (*PRESETS, "custom"), "format": FORMATS, "shape": SHAPES}
    for name, words in known.items():
        if name in table and (not isinstance(table[name], str) or table[name] not in words):
            raise RecipeError(f"{name} is {shown(table[name])}; wanted one of {', '.join(words)}.")


def own_methods(preset: Any, shape: Any) -> tuple[AnyMethod, ...]:
    """The methods of a preset. Raises RecipeError for custom, which has none of its own, and as `preset_methods` does."""
    if preset == "custom":
        raise RecipeError(f"preset is custom, and no methods are given; wanted them, or one of {', '.join(PRESETS)}.")
    return preset_methods(preset, shape)


def shape_for(format: Any, shape: Any) -> Any:
    """The shape that a format implies; `shape` where it implies none."""
    implied = FORMATS[format] if isinstance(format, str) and format in FORMATS else "free"
    return shape if implied == "free" else implied


def _beside(path: Path, survey: Any) -> Any:
    """The survey of a recipe file: what lies beside the file by that name, if anything does."""
    if isinstance(survey, str) and survey != AUTO:
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if (path.parent / survey).is_file():
                return str(path.parent / survey)
    return survey
