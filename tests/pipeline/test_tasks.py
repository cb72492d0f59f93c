"""Tasks of lm-eval on a stream give what lm-eval gives on the whole model."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel
from outputs import contents

import streamlap
from streamlap.errors import RecipeError, UnsupportedModel
from streamlap.pipeline.tasks import task_of

CHOICE = """
task: seafaring
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: logbook
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rows = [
        {
            "question": f"On day {day} the boat went to",
            "choices": [" sea", " the old man's house again", " bed"],
            "answer": day % 3,
        }
        for day in range(12)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = {"choice.yaml": CHOICE, "rolling.yaml": ROLLING}
    for name, text in made.items():
        (tmp_path / name).write_text(text.format(data=tmp_path / "data.jsonl"))
    return [tmp_path / name for name in made]


def whole(source: Path, files: list[Path]) -> dict[str, Any]:
    """By lm-eval's own model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    model = HFLM(pretrained=str(source), dtype="float32", device="cpu")
    found = simple_evaluate(
        model, tasks=list(map(task_of, files)), task_manager=manager, log_samples=False, bootstrap_iters=0
    )
    return {name: {k.partition(",")[0]: v for k, v in table.items()} for name, table in found["results"].items()}


@pytest.mark.filterwarnings("ignore")
def test_a_stream_gives_what_the_whole_model_gives(
    pico: MakeModel, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = pico("llama", tokenizer=True)
    found = streamlap.evaluate_tasks(source, files)
    wanted = whole(source, files)
    assert found["documents"] == {"seafaring": 12, "logbook": 12}
    for name, metric in (("seafaring", "acc"), ("seafaring", "acc_norm"), ("logbook", "word_perplexity")):
        assert found["tasks"][name][metric] == pytest.approx(wanted[name][metric], rel=1e-5), metric


@pytest.mark.filterwarnings("ignore")
def test_results_go_into_the_card_of_a_result_and_into_no_other(
    pico: MakeModel, tokens: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source, out = pico("llama", tokenizer=True), tmp_path / "out"
    streamlap.compress(source, out, files=(str(tokens),))
    before = contents(source)
    found = [streamlap.evaluate_tasks(folder, files[:1], limit=6) for folder in (source, out)]
    assert [each["card"] for each in found] == [None, str(out / "README.md")]
    assert contents(source) == before
    value = found[1]["tasks"]["seafaring"]["acc_norm"]
    assert f"\n| seafaring | acc_norm | {value:.4f} | 6 | {version('lm_eval')} |\n" in (out / "README.md").read_text()
    assert streamlap.verify(out)["ok"]


def test_a_task_that_generates_is_refused(pico: MakeModel) -> None:
    pytest.importorskip("lm_eval")
    from streamlap.pipeline.harness import StreamedModel

    with pytest.raises(UnsupportedModel, match="the task asks for generated text"):
        StreamedModel(None, 8, lambda tokens: tokens).generate_until([])


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    assert task_of("hellaswag") == "hellaswag"
    with pytest.raises(RecipeError, match=r"task .*none.yaml cannot be read"):
        task_of(tmp_path / "none.yaml")
    for text, words in (("[1]", "wanted a table with the key task"), ("task: x\nf: !function a.b", "cannot be read")):
        (tmp_path / "t.yaml").write_text(text)
        with pytest.raises(RecipeError, match=words):
            task_of(tmp_path / "t.yaml")
