"""What is in a checkpoint, from headers and config alone: kinds, shapes, ranks, widths and parameters of every site."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamlap.export.folder import REPORT_NAME
from streamlap.families.stream import ModelStream
from streamlap.linalg.budget import low_rank_parameters
from streamlap.report import Parameters
from streamlap.store.hub import local_folder

Rows = Mapping[str, Mapping[str, int]]


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
    """Parameters before any edit and after those in `rows`; `stream` may be the original or the compressed checkpoint."""
    places = [(index, path) for index in range(stream.depth) for path in stream.family.linears]
    before = sum(_site(stream, index, path, {})["parameters"] for index, path in places)
    after = sum(_site(stream, index, path, rows)["parameters"] for index, path in places)
    stored = sum(info.numel for info in stream.outer_tensors().values()) + sum(
        info.numel for index in range(stream.depth) for info in stream.layer_tensors(index).values()
    )
    in_linears = sum(_site(stream, index, path, stream.rows)["parameters"] for index, path in places)
    rest = stored - in_linears
    return Parameters(decoder_before=before, decoder_after=after, total_before=before + rest, total_after=after + rest)


def _site(stream: ModelStream, index: int, path: str, rows: Rows) -> dict[str, Any]:
    row = rows.get(f"{stream.layer_name(index)}.{path}", {})
    (out, width_in), biased = stream.dense_shape(index, path), stream.has_bias(index, path)
    width_out, width_in = row.get("out", out), row.get("in", width_in)
    rank = row.get("rank")
    kind = "low_rank" if rank is not None else "pruned" if row else "dense"
    weights = width_out * width_in if rank is None else low_rank_parameters(width_out, width_in, rank)
    width = (width_out if "out" in row else width_in) if kind == "pruned" else None
    return {
        "kind": kind,
        "shape": [width_out, width_in],
        "rank": rank,
        "width": width,
        "parameters": weights + width_out * biased,
    }


def _errors(folder: Path) -> dict[str, dict[str, float]]:
    report = folder / REPORT_NAME
    if not report.is_file():
        return {}
    layers = json.loads(report.read_text(encoding="utf-8"))["layers"]
    return {
        f"{layer['index']}.{edit['path']}": {"relative_error": edit["error"]}
        for layer in layers
        for edit in layer["edits"]
    }
