"""Results as lines of text, for people at a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

from streamlap.demo import DemoResult
from streamlap.errors import counted, few
from streamlap.output.card import OWN_LOADER
from streamlap.output.report import Report
from streamlap.pipeline.adapt import Recovered
from streamlap.pipeline.evaluate import Evaluation
from streamlap.planning.plan import Plan
from streamlap.planning.sheets import Sheet
from streamlap.planning.survey_file import Survey
from streamlap.system.budget import show_size

FEW_SIZES = 3
"""Of eigen-problems, in a line of text."""


def describe_parameters(table: dict[str, Any]) -> list[str]:
    return [
        f"decoder linears {table['decoder_before']:,} -> {table['decoder_after']:,} ({table['ratio_decoder']:.2%} removed)",
        f"whole model     {table['total_before']:,} -> {table['total_after']:,} ({table['ratio_total']:.2%} removed)",
    ]


def describe_cache(table: dict[str, Any]) -> str:
    return f"keys and values {table['before']:,} -> {table['after']:,} bytes a token ({table['ratio']:.2%} less)"


def describe_inventory(table: dict[str, Any]) -> list[str]:
    """What `inspect` found, linear by linear."""
    lines = [f"{table['model_type']}, {counted(len(table['layers']), 'layer')}"]
    for layer in table["layers"]:
        lines.append(f"layer {layer['index']}")
        lines += [f"  {path:<22}{describe_site(site)}" for path, site in layer["sites"].items()]
    unused = table.get("unused", [])
    left = [f"tensors that are not read ({len(unused):,}): {few(unused)}"] if unused else []
    return [*lines, *describe_parameters(table["parameters"]), describe_cache(table["kv_cache_bytes_per_token"]), *left]


def describe_evaluation(result: Evaluation) -> list[str]:
    return [
        f"perplexity {result.perplexity:.4f}  (mean NLL {result.nll:.6f} nats, {result.tokens:,} predicted tokens, "
        f"windows of {result.length})",
        f"{result.seconds:.1f} s, peak RAM {show_size(result.peak_ram_bytes)}",
    ]


def describe_tasks(found: dict[str, Any]) -> list[str]:
    """A line for each metric of each task."""
    rows = [(name, metric, value) for name, table in found["tasks"].items() for metric, value in table.items()]
    return [
        *[f"{name:<24}{metric:<16}{value:.4f}" for name, metric, value in rows],
        *[f"written into {found['card']}"] * bool(found["card"]),
        f"{found['seconds']:.1f} s, peak RAM {show_size(found['peak_ram_bytes'])}",
    ]


def describe_site(site: dict[str, Any]) -> str:
    shape = " x ".join(map(str, site["shape"]))
    detail = f" rank {site['rank']}" if site["rank"] is not None else ""
    error = f"  error {site['relative_error']:.4f}" if "relative_error" in site else ""
    return f"{site['kind']:<9} {shape}{detail}  {site['parameters']:,} parameters{error}"


def describe_report(report: Report) -> list[str]:
    registered = "import streamlap; " if report.format in OWN_LOADER else ""
    return [
        f"{report.out}: {counted(len(report.layers), 'layer')} in {report.seconds:.1f} s, peak RAM "
        f"{show_size(report.peak_ram_bytes)}",
        *describe_parameters(report.parameters.to_json()),
        describe_cache(report.kv_cache.to_json()),
        *describe_numerics(report),
        f"load it with: {registered}{report.loader}.from_pretrained({report.out!r})",
    ]


def describe_numerics(report: Report) -> list[str]:
    """What went bad on the way, where something did; the report has it layer by layer."""
    lines, (sequences, length) = [], report.calibration_tokens
    worst = max(report.layers, key=lambda layer: layer.excluded_tokens)
    if worst.excluded_tokens:
        lines.append(
            f"left out of the fit as NaN or infinite: up to {worst.excluded_tokens:,} of {sequences * length:,} calibration "
            f"tokens (layer {worst.index})"
        )
    if noted := [layer.index for layer in report.layers if layer.numerics]:
        lines.append(f"numbers that took special care in {counted(len(noted), 'layer')}, see `numerics` in the report")
    return lines


def describe_export(out: Path, result: dict[str, int]) -> list[str]:
    return [f"{out}: {counted(result['shards'], 'shard')}, {show_size(result['bytes'])}"]


def describe_recovery(out: Path, result: Recovered) -> list[str]:
    loss = f"loss on {result.held_tokens:,} held-out tokens {result.before:.4f} -> {result.after:.4f} nats"
    if not result.kept:
        return [f"{loss}: no gain, so nothing is written"]
    return [
        f"{out}: {loss}, LoRA of rank {result.rank} over {result.tokens:,} tokens, {counted(result.epochs, 'epoch')}"
    ]


def describe_survey(found: Survey) -> list[str]:
    """A line for each sub-layer of each layer."""
    lines = ["divergence from the dense model, nats a token, where one sub-layer alone is cut"]
    for index, layer in enumerate(found.layers):
        for name, points in layer.items():
            cells = [f"{point.kl:.5f} at {point.keep:.0%}" for point in points]
            lines.append(f"layer {index:<4}{name:<11}{'   '.join(cells)}")
    return lines


def describe_plan(plan: Plan) -> list[str]:
    sequences, length = plan.calibration_tokens
    hours = " to ".join(tqdm.format_interval(seconds) for seconds in (plan.seconds_low, plan.seconds_high))
    way = "read-ahead on" if plan.overlap else "read-ahead off"
    heaviest = max(plan.figures, key=lambda layer: layer.seconds_low)
    rows = [
        *describe_machine(plan),
        ("output", f"{show_size(plan.output_bytes)} of shards at ratio {plan.ratio:g}"),
        ("peak RAM", show_size(plan.peak_ram_bytes)),
        ("peak VRAM", show_size(plan.peak_vram_bytes)),
        ("disk", f"{show_size(plan.disk_bytes)} beside the source"),
        ("read, written", f"{show_size(plan.read_bytes)}, {show_size(plan.write_bytes)}"),
        *describe_moves(plan),
        (
            "operations",
            f"{plan.flops:.3g} FLOP ({describe_flops(plan)}), {counted(sequences, 'window')} of {length} tokens",
        ),
        ("eigen-problems", describe_eigen_problems(plan)),
        (
            "calibration",
            "{tokens:,} tokens; the widest linear to fit has {inputs:,} inputs".format_map(plan.calibration),
        ),
        (
            "time",
            f"{hours}, {heaviest.seconds_low:.1f} s for a layer at the least, {counted(len(plan.layers), 'layer')}",
        ),
        *describe_own_survey(plan),
        ("schedule", f"{way}, hidden states in {plan.hidden_states}, {plan.forward_tokens:,} tokens a forward"),
    ]
    lines = [f"{name:<15}{value}" for name, value in rows]
    if not plan.disk_measured:
        lines.append(
            "the speed of the disk could not be measured, so the time is that of a fast one to that of a slow one"
        )
    return [*lines, *(plan.advice or ["it fits"])]


def describe_machine(plan: Plan) -> list[tuple[str, str]]:
    if not plan.machine:
        return []
    sizes = [f"{show_size(plan.fit.ram.cap)} of RAM"]
    sizes += [f"{show_size(plan.fit.vram.cap)} of VRAM"] * (plan.fit.vram.cap > 0)
    return [("machine", f"{plan.machine.name} ({plan.machine.source}), {' and '.join(sizes)} may be taken")]


def describe_own_survey(plan: Plan) -> list[tuple[str, str]]:
    if plan.survey_left_out:
        return [("survey", f"none, so all layers keep the same share: {plan.survey_left_out}")]
    if plan.survey is None:
        return []
    seconds = tqdm.format_interval(plan.survey_seconds_low)
    return [
        ("survey", f"{seconds} of that at the least, unless there is one beside OUT already; --no-survey makes none")
    ]


def describe_moves(plan: Plan) -> list[tuple[str, str]]:
    """What goes over the other links, and the hidden states among what is read and written."""
    states = (
        f"{show_size(plan.generation_bytes)} a generation of one stream; a layer reads {plan.generations_read:g} and"
    )
    links = f"{show_size(plan.upload_bytes)} up, {show_size(plan.download_bytes)} down"
    return [
        *[("over PCIe", links)] * (plan.upload_bytes > 0),
        ("hidden states", f"{states} writes {plan.generations_written} on the disk"),
    ]


def describe_flops(plan: Plan) -> str:
    return ", ".join(f"{name} {count:.3g}" for name, count in plan.flops_by_dtype.items() if count)


def describe_eigen_problems(plan: Plan) -> str:
    rows = [f"{count:,} of size {size:,}" for size, count in plan.eigen_problems.items()]
    more = [f"{len(rows) - FEW_SIZES:,} smaller sizes"] if len(rows) > FEW_SIZES else []
    return f"{', '.join(rows[:FEW_SIZES] + more)}, as in float64" if rows else "none"


def describe_sheets(sheets: list[Sheet]) -> list[str]:
    """The machines that have a name, a line each."""
    rows: list[tuple[str, ...]] = [("name", "RAM", "VRAM", "bfloat16", "float16", "float32", "float64", "source")]
    for sheet in sheets:
        flops = sheet.unit("cuda:0" if sheet.gpu else "cpu").flops
        rates = [f"{flops[name] / 1e12:g}" if name in flops else "-" for name in rows[0][3:7]]
        rows.append((sheet.name, show_size(sheet.ram), show_size(sheet.vram), *rates, sheet.source))
    lines = ["{:<15}{:>11}{:>11}{:>10}{:>9}{:>9}{:>9}  {}".format(*row) for row in rows]
    return [
        *lines,
        "rates in 10^12 FLOP/s; RAM, disk and CPU around a GPU are no part of its sheet, see docs/cookbook.md",
    ]


def describe_demo(result: DemoResult) -> list[str]:
    rows = [("", "before", "after")]
    rows += [(label, before, after) for label, before, after in result.table()]
    lines = [f"{label:<28}{before:>16}{after:>16}" for label, before, after in rows]
    samples = [f"\n{name} goes on from {result.prompt!r}:\n  {text}" for name, text in result.samples.items()]
    return [*lines, *samples, f"\ncompressed model and its report: {result.out} ({result.seconds:.0f} s in all)"]


def emit(as_json: bool, value: dict[str, Any], lines: list[str]) -> None:
    """Print a result: one JSON object, or the lines."""
    typer.echo(json.dumps(value) if as_json else "\n".join(lines))
