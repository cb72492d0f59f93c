"""What is in a checkpoint, from headers and config alone: kinds, shapes, ranks, widths and parameters of every linear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamlap.errors import CheckpointError, shown
from streamlap.families.cache import KEPT, cache_bytes
from streamlap.families.stream import ModelStream
from streamlap.loader.forms import Dense, Form, Removed, index_parameters, kind_of, read_row
from streamlap.output.depth import CLOSED
from streamlap.output.folder import REPORT_NAME
from streamlap.output.report import KvCache, Parameters
from streamlap.store.header import read_header
from streamlap.store.hub import local_folder
from streamlap.untrusted.paths import REPORT_BYTES, read_object


def inspect(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint or output folder as JSON-ready values (fields: docs/formats.md).

    Relative errors are there for folders that streamlap wrote. Raises CheckpointError and UnsupportedModel.
    """
    folder = local_folder(path)
    stream = ModelStream(folder)
    errors = _errors(folder)
    layers = [
        {
            "index": index,
            "sites": {
                path: _site(stream, index, role) | errors.get(f"{index}.{path}", {})
                for role, path in stream.family_of(index).roles.items()
            },
        }
        for index in range(stream.depth)
    ]
    parameters = count_parameters(stream, stream.rows).to_json()
    table = {
        "model_type": stream.family.model_type, "layers": layers, "parameters": parameters,
        "kv_cache_bytes_per_token": count_cache(stream, stream.rows).to_json(),
    }  # fmt: skip
    return table | ({"unused": list(stream.source.unused)} if stream.source.unused else {})


def count_parameters(stream: ModelStream, rows: Mapping[str, Mapping[str, int]], marked: bool = True) -> Parameters:
    """Parameters before any edit and after those in `rows`; `stream` may be the original or the compressed checkpoint. Linears
    without a role count as they are.

    A stored index counts as the weights that would take its bytes; `marked`, whether what is removed leaves a mark. What the
    format nas has added, or left out with an attention, is taken back for the number before.
    """
    before = after = stored = 0
    added = added_biases(stream)
    for index in range(stream.depth):
        for role, native in stream.natives(index).items():
            itemsize, name = stream.storage_dtype(index, role).itemsize, stream.linear_name(index, role)
            edited = read_row(name, rows[name], native) if name in rows else native
            before += native.parameters(itemsize) - native.shape[0] * (role in added)
            after += _numbers(edited, itemsize, marked and stream.marked)
            stored += _numbers(stream.form(index, role), itemsize, stream.marked)
        stays = stream.kept_parameters(index)
        before, after, stored = before + stays, after + stays, stored + stays
    rest = sum(info.numel for info in stream.outer_tensors().values()) - stored
    rest += sum(_stored(stream, index) for index in range(stream.depth))
    gone = (
        sum(isinstance(stream.form(index, "q"), Removed) for index in range(stream.depth)) if not stream.marked else 0
    )
    return Parameters(
        decoder_before=before, decoder_after=after, total_before=before + rest + gone * stream.width,  # with their norms
        total_after=after + rest,
    )  # fmt: skip


def added_biases(stream: ModelStream) -> set[str]:
    """Roles whose biases are zeros that the format nas has added: it has one flag for all four linears of attention. The first
    layer, which keeps its attention, tells."""
    if stream.marked:
        return set()
    biases = {
        role: stream.source.read(f"{stream.linear_name(0, role)}.bias")
        for role in stream.family.sublayers["attention"].roles
        if stream.native(0, role).bias
    }
    return {role for role, bias in biases.items() if not bias.any()}


def count_written(
    stream: ModelStream, rows: Mapping[str, Mapping[str, int]], to: str, out: Path, shards: Iterable[str]
) -> Parameters:
    """Of a model before any edit, and after those in `rows` in the folder `out` of the format `to`. What a format writes
    besides the linears' forms, or leaves out, is counted on the disk."""
    if to not in CLOSED:
        return count_parameters(stream, rows)
    counted = count_parameters(stream, rows, marked=False)
    stored = [(name, info.numel) for shard in shards for name, info in read_header(out / shard).tensors.items()]
    unbiased = tuple(
        f".{stream.family.path(role)}.bias" for role, native in stream.natives(0).items() if not native.bias
    )
    added = sum(numel for name, numel in stored if name.endswith(unbiased))
    return replace(counted, decoder_after=counted.decoder_after + added, total_after=sum(numel for _, numel in stored))


def count_cache(stream: ModelStream, rows: Mapping[str, Mapping[str, int]]) -> KvCache:
    """Of the model before any edit and with those in `rows`, as `count_parameters`."""
    before = after = 0
    for index in range(stream.depth):
        natives: dict[str, Form] = {role: form for role, form in stream.natives(index).items() if role in KEPT}
        edited = dict(natives)
        for role in natives:
            name = stream.linear_name(index, role)
            if name in rows:
                edited[role] = read_row(name, rows[name], stream.native(index, role))
        before += cache_bytes(stream, index, natives)
        after += cache_bytes(stream, index, edited)
    return KvCache(before=before, after=after)


def _numbers(form: Form, itemsize: int, marked: bool) -> int:
    return 0 if isinstance(form, Removed) and not marked else form.parameters(itemsize)


def _stored(stream: ModelStream, index: int) -> int:
    """Parameters of a layer as its tensors tell; the mark of a matrix that is stored apart is none."""
    marks = {f"{path}.weight" for path in stream.family.joined}
    tensors = {name: info for name, info in stream.layer_tensors(index).items() if name not in marks}
    indices = {name: info for name, info in tensors.items() if not info.dtype.is_floating_point}
    weights = sum(info.numel for name, info in tensors.items() if name not in indices)
    return weights + sum(
        index_parameters(info.numel, stream.storage_dtype(index, stream.family.role(name.rpartition(".")[0])).itemsize)
        for name, info in indices.items()
    )


def _site(stream: ModelStream, index: int, role: str) -> dict[str, Any]:
    form, native = stream.form(index, role), stream.native(index, role)
    return {
        "kind": kind_of(form, native),
        "shape": list(form.shape),
        "rank": form.rank or None,
        "width": _width(form, native),
        "parameters": _numbers(form, stream.storage_dtype(index, role).itemsize, stream.marked),
    }


def _width(form: Form, native: Dense) -> int | None:
    """Channels that stay where some went and nothing else did."""
    if kind_of(form, native) != "pruned":
        return None
    return form.shape[0] if form.shape[0] != native.shape[0] else form.shape[1]


def _errors(folder: Path) -> dict[str, dict[str, float]]:
    report = folder / REPORT_NAME
    if not report.is_file():
        return {}
    table = read_object(folder, REPORT_NAME, REPORT_BYTES)
    try:
        return {
            f"{int(place)}.{edit['path']}": {"relative_error": float(edit["error"])}
            for layer in table["layers"]
            if (place := layer.get("place", layer["index"])) is not None
            for edit in layer["edits"]
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{report} is no report of streamlap ({shown(error)}); remove it, or compress again."
        ) from error
