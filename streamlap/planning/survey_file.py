"""A survey file: for every sub-layer how far predictions move when that sub-layer alone is cut, see `pipeline.survey`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamlap.errors import RecipeError, first_line, shown
from streamlap.families.stream import ModelStream
from streamlap.planning.cuts import LAYER
from streamlap.untrusted.json import parse_json, read_limited

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
    """Sub-layer -> its points, a table for each layer; LAYER has those of the layer as a whole, where it may go."""
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
    if found.shape != shape:
        raise RecipeError(
            f"survey {path} serves results of shape {shown(found.shape)}, and wanted is shape {shape}; make one with "
            f"streamlap survey --shape {shape}."
        )
    names = [set(stream.family_of(index).compressible) for index in range(stream.depth)]
    may_lack = {"attention"} if shape == "stock" else set()  # where no KV head can go
    may_have = {LAYER} if shape != "free" else set()
    if len(names) != len(found.layers) or not all(
        own - may_lack <= layer.keys() <= own | may_have for own, layer in zip(names, found.layers, strict=True)
    ):
        raise RecipeError(f"survey {path} lacks a sub-layer of a layer; make it again with streamlap survey.")
    return found


def model_digest(stream: ModelStream) -> str:
    """Equal for checkpoints of equal config.json and shard headers."""
    shards = {name: [header.file_bytes, header.digest] for name, header in sorted(stream.source.headers.items())}
    table = json.dumps([stream.raw_config, shards], sort_keys=True)
    return hashlib.sha256(table.encode()).hexdigest()[:16]
