"""How much every half of every layer may store: the same share of its parameters everywhere, or what a survey advises.

A survey file says for every half how far the model's output moves when that half alone is cut, at several cuts (see
`survey`). A curve through them tells what each half loses at any share, and the shares are chosen so that the sum is least.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from streamlap.errors import RecipeError, first_line, shown
from streamlap.families.stream import ModelStream
from streamlap.linalg.allocation import Part, allocate, fit_curve
from streamlap.methods.base import Budget
from streamlap.untrusted.json import parse_json, read_limited

FORMAT_VERSION = 1
MOST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cut of one half, all else dense."""

    keep: float
    """Share of the half's parameters that stayed."""
    kl: float
    """Divergence of the model's predictions from the dense ones, nats a token."""
    error: float
    """Of the half itself: squared, relative to its output, on held-out tokens."""

    def __post_init__(self) -> None:
        numbers = all(type(value) in (int, float) for value in (self.keep, self.kl, self.error))
        if not (numbers and 0 < self.keep < 1 and 0 <= self.kl < float("inf")):
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
    """Half -> its points, a table for each layer."""

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
                {half: tuple(Point(**point) for point in points) for half, points in layer.items()}
                for layer in table.pop("layers")
            )
            if not all(points for layer in layers for points in layer.values()):
                raise ValueError("a half without points")
            if not all(isinstance(table.get(key), str) for key in ("model", "calibration", "compute")):
                raise ValueError("wanted model, calibration and compute as text")
            return cls(**table, layers=layers)
        except OSError as error:
            raise RecipeError(
                f"survey {path} cannot be read: {error.strerror}; make it with streamlap survey."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"survey {path} is no survey file ({first_line(error)}); make it with streamlap survey."
            ) from error


def half_budgets(stream: ModelStream, ratio: float, index: int, survey: str | None = None) -> dict[str, Budget]:
    """Half -> its budget in a layer."""
    family = stream.family
    if survey is None:
        counts = {half: int((1.0 - ratio) * dense_parameters(stream, index, half)) for half in family.halves}
    else:
        counts = surveyed_parameters(stream, ratio, survey)[index]
    return {
        half: Budget(parameters=count, itemsize=stream.storage_itemsize(index), head_dim=stream.head_dim)
        for half, count in counts.items()
    }


@lru_cache(maxsize=1)  # of one run: every layer of it asks, and all must go by one reading of the file
def surveyed_parameters(stream: ModelStream, ratio: float, survey: str) -> list[dict[str, int]]:
    """What the halves of every layer may store so that a survey's losses are least. Raises RecipeError for another model's."""
    found, halves = Survey.read(Path(survey)), list(stream.family.halves)
    if (wanted := model_digest(stream)) != found.model:
        raise RecipeError(
            f"survey {survey} was made of another model ({shown(found.model)}); {stream.folder} is {wanted}. "
            "Make one of this model with streamlap survey."
        )
    if [sorted(layer) for layer in found.layers] != [sorted(halves)] * stream.depth:
        raise RecipeError(f"survey {survey} lacks a half of a layer; make it again with streamlap survey.")
    parts = [
        Part(
            parameters=dense_parameters(stream, index, half),
            curve=fit_curve([(point.keep, point.kl) for point in layer[half]]),
        )
        for index, layer in enumerate(found.layers)
        for half in halves
    ]
    counts = iter(allocate(parts, int((1.0 - ratio) * sum(part.parameters for part in parts))))
    return [{half: next(counts) for half in halves} for _ in found.layers]


def dense_parameters(stream: ModelStream, index: int, half: str) -> int:
    """Parameters of the linears of a half before any edit, biases included."""
    total = 0
    for path in stream.family.half_linears(half):
        out, inner = stream.dense_shape(index, path)
        total += out * (inner + stream.has_bias(index, path))
    return total


def model_digest(stream: ModelStream) -> str:
    """Equal for checkpoints of equal config.json and shard headers."""
    shards = {name: [header.file_bytes, header.digest] for name, header in sorted(stream.source.headers.items())}
    table = json.dumps([stream.raw_config, shards], sort_keys=True)
    return hashlib.sha256(table.encode()).hexdigest()[:16]
