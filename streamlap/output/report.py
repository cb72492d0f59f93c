"""What was done, as plain values: one LayerReport a journal line, one Report a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from streamlap.errors import ResumeMismatch, first_line, shown
from streamlap.families.layer import Edit
from streamlap.families.table import Family


@dataclass(frozen=True, kw_only=True)
class EditReport:
    path: str
    row: Mapping[str, int]
    """What config.json says of it: rank, out, in."""
    of: tuple[int, int]
    """(out, in) of the dense linear."""
    error: float
    kept: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    index: int
    """Its number in the source."""
    place: int | None
    """Its number in the result; None where that has no place for it, since nothing is left of it."""
    edits: tuple[EditReport, ...]
    seconds: Mapping[str, float]
    """By phase, as the loop went through them: read, dense, capture, solve, refine, write, propagate. What ran beside it is in
    none."""
    peak_ram_bytes: int
    peak_vram_bytes: int
    baseline_ram_bytes: int
    """Resident set at the end of the layer."""
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Sub-layer -> method and variant -> error on held-out tokens, where sub-layers are rebuilt beside the dense model."""
    refinement: Mapping[str, float] | None = None
    """Of a refined layer: its loss on held-out tokens at the start and at the best, and the epochs that were done."""
    ladder: tuple[str, ...] = ()
    """What gave way because memory ran out."""
    numerics: tuple[str, ...] = ()
    """What took more than arithmetic: damping that had to grow, inputs that are dead, factors that were balanced, methods that
    failed. Of all that was tried for the layer, applied or not; of a method that failed the reason alone."""
    excluded_tokens: int = 0
    """Calibration tokens whose numbers were NaN or infinite, in either stream or inside, and that were left out."""
    bytes_read: int = 0
    """By the whole process since the commit before, headers and hidden states included."""
    bytes_written: int = 0
    sha256: str = ""
    """Of the layer's shard."""

    @staticmethod
    def describe(edits: Iterable[Edit], family: Family) -> tuple[EditReport, ...]:
        return tuple(
            EditReport(
                path=family.path(edit.role),
                row=edit.form.row(edit.native),
                of=edit.native.shape,
                error=edit.error,
                kept=edit.kept,
            )
            for edit in edits
        )

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> LayerReport:
        """Raises ResumeMismatch for a line that `to_json` did not write."""
        try:
            edits = tuple(EditReport(**edit) for edit in line["edits"])
            texts = {name: tuple(line.get(name, ())) for name in ("ladder", "numerics")}
            return cls(
                **{"place": line["index"], **line, "edits": edits, **texts}
            )  # earlier versions left no layer out
        except (TypeError, KeyError) as error:
            raise ResumeMismatch(
                f"the journal line of layer {shown(line.get('index'))} lacks something ({first_line(error)}); wanted the line "
                "of a finished layer. Delete the output folder and give the first command again."
            ) from error

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def public(self) -> dict[str, Any]:
        """Without the kept channels, which have a file of their own."""
        table = self.to_json()
        for edit in table["edits"]:
            edit.pop("kept")
        return table


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Stored parameters: decoder linears (weights and biases, factors counted as written), and everything in the file."""

    decoder_before: int
    decoder_after: int
    total_before: int
    total_after: int

    @property
    def ratio_decoder(self) -> float:
        return 1.0 - self.decoder_after / self.decoder_before

    @property
    def ratio_total(self) -> float:
        return 1.0 - self.total_after / self.total_before

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio_decoder": self.ratio_decoder, "ratio_total": self.ratio_total}


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """Bytes of the keys and values of one more token, in the dtype in which the linears are stored."""

    before: int
    after: int

    @property
    def ratio(self) -> float:
        """Share that is gone; 0 where there was none, as in a model without a layer of attention."""
        return 1.0 - self.after / self.before if self.before else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of one compression; `to_json` is what `compress --json` prints and the output folder keeps."""

    out: str
    recipe: Mapping[str, Any]
    parameters: Parameters
    kv_cache: KvCache
    layers: tuple[LayerReport, ...]
    shards: Mapping[str, str]
    """Shard -> sha256."""
    calibration_tokens: tuple[int, int]
    """[N, L] as given."""
    redrawn: int = 0
    """Windows that were seen beside them."""
    calibration_inputs: int
    """Of the widest linear that was fitted."""
    seconds: float
    """Summed over the layers, over all runs where the compression was resumed."""
    kept_channels: str
    """File in the output folder with the channels that stay, by layer."""
    final_gain: float = 1.0
    """By what the final norm's gain was scaled."""
    loader: str = "AutoModelForCausalLM"
    """The class of transformers that loads it."""

    @property
    def format(self) -> str:
        """How the folder holds it, see `formats`."""
        return str(self.recipe.get("format", "factored"))

    @property
    def peak_ram_bytes(self) -> int:
        return max((layer.peak_ram_bytes for layer in self.layers), default=0)

    @property
    def peak_vram_bytes(self) -> int:
        return max((layer.peak_vram_bytes for layer in self.layers), default=0)

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": dict(self.recipe),
            "parameters": self.parameters.to_json(),
            "kv_cache_bytes_per_token": self.kv_cache.to_json(),
            "calibration_tokens": list(self.calibration_tokens),
            "redrawn": self.redrawn,
            "calibration": {"tokens": math.prod(self.calibration_tokens), "inputs": self.calibration_inputs},
            "kept_channels": self.kept_channels,
            "final_gain": self.final_gain,
            "layers": [layer.public() for layer in self.layers],
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_vram_bytes": self.peak_vram_bytes,
            "seconds": self.seconds,
            "ladder": [step for layer in self.layers for step in layer.ladder],
            "shards": dict(self.shards),
        }
