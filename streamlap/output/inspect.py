"""What is in a checkpoint, from headers and config alone: kinds, shapes, ranks, widths and parameters of every site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamlap.errors import CheckpointError, shown
from streamlap.families.stream import ModelStream
from streamlap.linalg.budget import index_parameters, low_rank_parameters, pivoted_parameters
from streamlap.output.folder import REPORT_NAME
from streamlap.output.report import Parameters
from streamlap.store.hub import local_folder
from streamlap.untrusted.paths import REPORT_BYTES, read_object

Row = Mapping[str, int]
Rows = Mapping[str, Row]

KINDS = {"rank": "low_rank", "pivots": "pivoted", "out_heads": "head_cut", "in_heads": "head_cut",
         "out": "pruned", "in": "pruned"}  # fmt: skip
"""Key of a row -> what it makes of a site; the first that is there counts. A site without any is dense."""


def inspect(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint or output folder as JSON-ready values (fields: docs/formats.md).

    Relative errors are there for folders that streamlap wrote. Raises CheckpointError and UnsupportedModel.
    """
    folder = local_folder(str(path))
    stream = ModelStream(folder)
    errors = _errors(folder)
    layers = [
        {
            "index": index,
            "sites": {
                path: _site(stream, index, path, stream.rows) | errors.get(f"{index}.{path}", {})
                for path in stream.family.linears
            },
        }
        for index in range(stream.depth)
    ]
    parameters = count_parameters(stream, stream.rows).to_json()
    return {"model_type": stream.family.model_type, "layers": layers, "parameters": parameters}


def count_parameters(stream: ModelStream, rows: Rows) -> Parameters:
    """Parameters before any edit and after those in `rows`; `stream` may be the original or the compressed checkpoint.

    A stored index counts as the weights that would take its bytes.
    """
    places = [(index, path) for index in range(stream.depth) for path in stream.family.linears]
    before = sum(_site(stream, index, path, {})["parameters"] for index, path in places)
    after = sum(_site(stream, index, path, rows)["parameters"] for index, path in places)
    in_linears = sum(_site(stream, index, path, stream.rows)["parameters"] for index, path in places)
    rest = sum(info.numel for info in stream.outer_tensors().values()) - in_linears
    rest += sum(_stored(stream, index) for index in range(stream.depth))
    return Parameters(decoder_before=before, decoder_after=after, total_before=before + rest, total_after=after + rest)


def _stored(stream: ModelStream, index: int) -> int:
    """Parameters of a layer as its tensors tell."""
    tensors = stream.layer_tensors(index)
    indices = {name: info for name, info in tensors.items() if not info.dtype.is_floating_point}
    weights = sum(info.numel for name, info in tensors.items() if name not in indices)
    return weights + sum(
        index_parameters(info.numel, _itemsize(stream, index, name.rpartition(".")[0]))
        for name, info in indices.items()
    )


def _itemsize(stream: ModelStream, index: int, path: str) -> int:
    """Bytes of one weight of a linear, which is on disk under the dense layer's own name whatever became of it."""
    return stream.source.info(f"{stream.layer_name(index)}.{path}.weight").dtype.itemsize


def _site(stream: ModelStream, index: int, path: str, rows: Rows) -> dict[str, Any]:
    row = rows.get(f"{stream.layer_name(index)}.{path}", {})
    out, width_in = stream.dense_shape(index, path)
    shape = (row.get("out", out), row.get("in", width_in))
    kind = next((kind for key, kind in KINDS.items() if key in row), "dense")
    return {
        "kind": kind,
        "shape": list(shape),
        "rank": row.get("rank", row.get("pivots")),
        "width": _width(kind, row),
        "parameters": site_parameters(shape, row, stream.has_bias(index, path), _itemsize(stream, index, path)),
    }


def _width(kind: str, row: Row) -> int | None:
    """Channels that stay where some went."""
    if kind == "head_cut":
        return row["head_dim"] * row.get("out_heads", row.get("in_heads", 0))
    return row.get("out", row.get("in")) if kind == "pruned" else None


def site_parameters(shape: tuple[int, int], row: Row, biased: bool, itemsize: int) -> int:
    """Parameters of a linear of (out, in) `shape` that is stored as `row` says, in weights of `itemsize` bytes; `biased` says
    whether the dense one has a bias."""
    (out, width_in), biased = shape, biased or "bias" in row
    if "rank" in row:
        return low_rank_parameters(out, width_in, row["rank"]) + out * biased
    if "pivots" in row:
        index = 0 if "groups" in row else index_parameters(out, itemsize)
        return pivoted_parameters(out, width_in, row["pivots"]) + index + out * biased
    if "out_heads" in row:
        out = row["out_heads"] * row["head_dim"]
    if "in_heads" in row:
        width_in = row["in_heads"] * row["head_dim"]
    return out * (width_in + biased)


def _errors(folder: Path) -> dict[str, dict[str, float]]:
    report = folder / REPORT_NAME
    if not report.is_file():
        return {}
    table = read_object(folder, REPORT_NAME, REPORT_BYTES)
    try:
        return {
            f"{int(layer['index'])}.{edit['path']}": {"relative_error": float(edit["error"])}
            for layer in table["layers"]
            for edit in layer["edits"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{report} is no report of streamlap ({shown(error)}); remove it, or compress again."
        ) from error
