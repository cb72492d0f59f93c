"""How much every sub-layer may store: the same share of its parameters everywhere, or what a survey advises.

A survey file says for every sub-layer how far the model's output moves when that sub-layer alone is cut, at several cuts (see
`pipeline.survey`). A curve through them tells what each loses at any share, and the shares are chosen so that the sum is least.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamlap.errors import RecipeError, first_line, shown
from streamlap.families.stream import ModelStream
from streamlap.linalg.allocation import Part, allocate, fit_curve
from streamlap.planning.layouts import dense_parameters, uniform_parameters
from streamlap.recipe import Recipe
from streamlap.untrusted.json import parse_json, read_limited

LEAST_WIDTH = 0.1
"""Share that all FFNs together keep at least where attention keeps its form."""

FORMAT_VERSION = 1
MOST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Point:
    """One sub-layer cut, all else dense."""

    keep: float
    """Share of the sub-layer's parameters that stayed."""
    kl: float
    """Divergence of the model's predictions from the dense ones, nats a token."""
    error: float
    """Of the sub-layer itself on held-out tokens, see `methods.anchored.fitting.map_error`."""

    def __post_init__(self) -> None:
        numbers = all(type(value) in (int, float) for value in (self.keep, self.kl, self.error))
        if not (numbers and 0 <= self.keep < 1 and 0 <= self.kl < float("inf")):
            raise ValueError(f"a point at keep {shown(self.keep)} with kl {shown(self.kl)}")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The content of a survey file."""

    model: str
    """What the checkpoint must be, see `model_digest`."""
    calibration: str
    """Shape and hash of the tokens that it was measured on."""
    compute: str
    layers: tuple[dict[str, tuple[Point, ...]], ...]
    """Sub-layer -> its points, a table for each layer."""
    shape: str = "free"
    """That of the results which it serves."""

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Survey:
        """Raises RecipeError for a file that is none."""
        try:
            table = parse_json(read_limited(path, MOST_BYTES))
            if table.pop("format_version") != FORMAT_VERSION:
                raise ValueError(f"wanted format_version {FORMAT_VERSION}")
            layers = tuple(
                {name: tuple(Point(**point) for point in points) for name, points in layer.items()}
                for layer in table.pop("layers")
            )
            if not all(points for layer in layers for points in layer.values()):
                raise ValueError("a sub-layer without points")
            if not all(
                isinstance(table.get(key), str)
                for key in ("model", "calibration", "compute", "shape")
                if key in table or key != "shape"
            ):
                raise ValueError("wanted model, calibration, compute and shape as text")
            return cls(**table, layers=layers)
        except OSError as error:
            raise RecipeError(
                f"survey {path} cannot be read: {error.strerror}; make it with streamlap survey."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"survey {path} is no survey file ({first_line(error)}); make it with streamlap survey."
            ) from error


def read_survey(stream: ModelStream, path: Path, shape: str) -> Survey:
    """The survey of this model and shape. Raises RecipeError for a file that is none, or one of another model or shape."""
    found = Survey.read(path)
    if (wanted := model_digest(stream)) != found.model:
        raise RecipeError(
            f"survey {path} was made of another model ({shown(found.model)}); {stream.folder} is {wanted}. "
            "Make one of this model with streamlap survey."
        )
    if [sorted(layer) for layer in found.layers] != [sorted(stream.family.sublayers)] * stream.depth:
        raise RecipeError(f"survey {path} lacks a sub-layer of a layer; make it again with streamlap survey.")
    if found.shape != shape:
        raise RecipeError(
            f"survey {path} serves results of shape {shown(found.shape)}, and wanted is shape {shape}; make one with "
            f"streamlap survey --shape {shape}."
        )
    return found


def layer_parameters(stream: ModelStream, recipe: Recipe, survey: Survey | None) -> list[dict[str, int]]:
    """What the sub-layers of every layer may store: all the same share, or so that a survey's losses are least. One that may
    store nothing is removed. Raises RecipeError where the shape cannot hold the ratio."""
    if recipe.shape != "free":
        return whole_shares(stream, recipe, survey)
    if survey is None:
        return [uniform_parameters(stream, index, recipe.ratio) for index in range(stream.depth)]
    names = list(stream.family.sublayers)
    parts = [part_of(stream, survey, index, name) for index in range(stream.depth) for name in names]
    counts = iter(allocate(parts, int((1.0 - recipe.ratio) * sum(part.parameters for part in parts))))
    return [{name: next(counts) for name in names} for _ in survey.layers]


def part_of(stream: ModelStream, survey: Survey, index: int, sublayer: str) -> Part:
    points = survey.layers[index][sublayer]
    curve = fit_curve([(point.keep, point.kl) for point in points])
    return Part(parameters=dense_parameters(stream, index, sublayer), curve=curve)


def whole_shares(stream: ModelStream, recipe: Recipe, survey: Survey | None) -> list[dict[str, int]]:
    """The same where attention is whole or removed, and the FFNs take the rest of the cut.

    By a survey the cheapest attention goes, in so many layers that the sum of all losses is least; what an FFN loses follows
    from that.
    """
    attention, ffn = ([dense_parameters(stream, i, name) for i in range(stream.depth)] for name in ("attention", "ffn"))
    total = int((1.0 - recipe.ratio) * sum(attention + ffn))
    if total - sum(attention) < LEAST_WIDTH * sum(ffn) and survey is None:
        most = 1.0 - (sum(attention) + LEAST_WIDTH * sum(ffn)) / sum(attention + ffn)
        raise RecipeError(
            f"shape {recipe.shape} at ratio {recipe.ratio:g} would leave less than {LEAST_WIDTH:.0%} of the FFNs; wanted a "
            f"ratio of at most {most:.3f}, or shape free."
        )
    if survey is None:
        share = (total - sum(attention)) / sum(ffn)
        return [{"attention": a, "ffn": int(share * f)} for a, f in zip(attention, ffn, strict=True)]
    parts = [part_of(stream, survey, index, "ffn") for index in range(stream.depth)]
    lost = {index: survey.layers[index]["attention"][0].kl for index in removable(stream)}
    cheapest = sorted(lost, key=lambda index: lost[index] / attention[index])
    best: tuple[float, list[dict[str, int]]] | None = None
    for count in range(len(cheapest) + 1):
        gone = set(cheapest[:count])
        rest = total - sum(attention[index] for index in range(stream.depth) if index not in gone)
        if not LEAST_WIDTH * sum(ffn) <= rest <= sum(ffn):
            continue
        widths = allocate(parts, rest)
        loss = sum(lost[index] for index in gone)
        loss += sum(part.curve.loss(width / part.parameters) for part, width in zip(parts, widths, strict=True))
        if best is None or loss < best[0]:
            rows = [{"attention": 0 if i in gone else attention[i], "ffn": widths[i]} for i in range(stream.depth)]
            best = loss, rows
    if best is None:
        raise RecipeError(
            f"shape {recipe.shape} cannot reach ratio {recipe.ratio:g}; wanted a lower one, or shape free."
        )
    return best[1]


def removable(stream: ModelStream) -> list[int]:
    """Layers whose attention may go: engines, and the masks of transformers, look at the first of each kind."""
    kinds = list(getattr(stream.config, "layer_types", None) or ["full_attention"] * stream.depth)
    return [index for index, kind in enumerate(kinds) if index > kinds.index(kind)]


def model_digest(stream: ModelStream) -> str:
    """Equal for checkpoints of equal config.json and shard headers."""
    shards = {name: [header.file_bytes, header.digest] for name, header in sorted(stream.source.headers.items())}
    table = json.dumps([stream.raw_config, shards], sort_keys=True)
    return hashlib.sha256(table.encode()).hexdigest()[:16]
