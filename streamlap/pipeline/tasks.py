"""Tasks of lm-eval on a checkpoint that streams through memory, one layer at a time.

Shape suffixes: N sequences, L length, T tokens that are scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from streamlap.data.tokenizer import load_tokenizer
from streamlap.errors import RecipeError, StreamlapError, first_line, shown, whole
from streamlap.families.opening import parse_dtype
from streamlap.families.stream import ModelStream
from streamlap.output.card import record_tasks
from streamlap.pipeline.evaluate import token_losses
from streamlap.planning.schedule import fit, require_fit
from streamlap.planning.workload import evaluation_workload
from streamlap.settings import RunSettings, refuse_options, split_options
from streamlap.store.hub import local_folder
from streamlap.system.budget import is_out_of_memory
from streamlap.system.meters import peak_ram_bytes, peak_vram_bytes, reset_peaks
from streamlap.untrusted.yaml import read_yaml


def evaluate_tasks(
    model: str | Path, tasks: Sequence[str | Path], *, limit: int | None = None, dtype: str = "auto", **options: Any
) -> dict[str, Any]:
    """Results of tasks by lm-eval, with never more than one layer of the checkpoint in memory.

    Args: tasks, YAML files of single tasks, without code, or names that lm-eval knows, whose data it fetches; limit, documents
    of each task at most; options, single fields of RunSettings.

    Returns {"tasks": {name: {metric: value}}, "documents": {name: count}, "card", "seconds", "peak_ram_bytes",
    "peak_vram_bytes"}. Of a folder that streamlap wrote the results are in its model card too, `card`; else that is None.
    Raises StreamlapError where lm-eval is not installed, RecipeError for a task that it does not know or that it fails on, and
    UnsupportedModel for one that generates text.
    """
    require_lm_eval()
    settings, others = split_options(options)
    refuse_options(evaluate_tasks, others)
    if isinstance(tasks, str) or not tasks:
        raise RecipeError(f"tasks is {shown(tasks)}; wanted a list of names or files, of at least one.")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise RecipeError(f"limit is {shown(limit)}; wanted a whole number of at least 1.")
    dtype, start, settings = parse_dtype(dtype), time.perf_counter(), settings.settled()
    reset_peaks()
    folder = local_folder(model, settings.trust_remote_code)
    dtype = "float32" if (settings.device, dtype) == ("cpu", "auto") else dtype
    stream = ModelStream(folder, settings.device, dtype)
    stream.require_head()
    tables = [task_of(task) for task in tasks]
    tokenizer = load_tokenizer(folder, Path(str(tasks[0])), settings.trust_remote_code)
    found = by_lm_eval(tables, stream, settings, tokenizer, limit, named=shown(list(map(str, tasks))))
    results = {name: metrics_of(table) for name, table in found["results"].items()}
    documents = {name: counts["effective"] for name, counts in found["n-samples"].items()}
    rows = [
        (name, metric, value, documents.get(name), version("lm_eval"))
        for name, table in results.items()
        for metric, value in table.items()
    ]
    card = record_tasks(folder, rows) if Path(model).is_dir() else None  # the hub's cache stays as it is
    return {
        "tasks": results, "documents": documents, "card": card and str(card),
        "seconds": time.perf_counter() - start, "peak_ram_bytes": peak_ram_bytes(), "peak_vram_bytes": peak_vram_bytes(),
    }  # fmt: skip


def require_lm_eval() -> None:
    """Raise StreamlapError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks  # noqa: F401

        import streamlap.pipeline.harness  # noqa: F401
    except ImportError as error:
        raise StreamlapError(
            "lm-eval is not installed, and runs the tasks; run pip install 'streamlap[tasks]'."
        ) from error


def by_lm_eval(
    tables: list[str | dict[str, Any]], stream: ModelStream, settings: RunSettings, tokenizer: Any, limit: int | None,
    named: str,
) -> dict[str, Any]:  # fmt: skip
    """What lm-eval gives for these tasks; `named`, how an error calls them. Raises RecipeError for one that it fails on; what
    befalls the pass over the layers is no fault of a task, and is raised as it is."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from streamlap.pipeline.harness import StreamedModel, scored

    faults: list[Exception] = []

    def score(tokens_NL: torch.Tensor) -> torch.Tensor:
        try:
            return pass_through(stream, settings, tokens_NL, scored)
        except Exception as error:
            faults.append(error)
            raise

    streamed = StreamedModel(tokenizer, stream.context, stream.vocabulary, score)
    by_name = any(isinstance(table, str) for table in tables)  # to look through all that lm-eval has takes a while
    manager = TaskManager(include_defaults=by_name)
    try:
        found: dict[str, Any] = simple_evaluate(
            streamed, tasks=tables, limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=0
        )
    except Exception as error:  # lm-eval, jinja2 and datasets raise a different one for every way to write a task wrong
        if isinstance(error, StreamlapError) or error in faults or is_out_of_memory(error):
            raise
        raise RecipeError(f"lm-eval cannot run {named}: {whole(error)}; wanted tasks that it runs.") from error
    return found


def task_of(task: str | Path) -> str | dict[str, Any]:
    """A name, or the table in a file. Code that a file names is not run: it is no plain YAML."""
    if not str(task).endswith((".yaml", ".yml")):
        return str(task)
    try:
        table = read_yaml(Path(task))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"task {task} cannot be read: {first_line(error)}; wanted a YAML file of plain values."
        ) from error
    if not isinstance(table, Mapping) or not isinstance(table.get("task"), str):
        raise RecipeError(f"task {task} holds {shown(table)}; wanted a table with the key task, its name.")
    return dict(table)


def pass_through(stream: ModelStream, settings: RunSettings, tokens_NL: torch.Tensor, score: Any) -> torch.Tensor:
    """One pass of all layers over these sequences. Their last tokens are scored, and go through no layer."""
    inputs_NT, target_NT = tokens_NL[:, :-1], tokens_NL[:, 1:]
    sequences, length = inputs_NT.shape
    work = evaluation_workload(stream, sequences, length, disk=settings.work is not None)
    choice = fit(work, settings.caps, settings.overlap)
    require_fit(choice, settings.caps)
    return token_losses(stream, inputs_NT, choice, Path(settings.work) if settings.work else None, score, target_NT)


def metrics_of(table: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task's result, by the names of the metrics."""
    plain = {
        name.partition(",")[0]: value for name, value in table.items() if "stderr" not in name and name != "sample_len"
    }
    return {name: value for name, value in plain.items() if isinstance(value, int | float) and math.isfinite(value)}
