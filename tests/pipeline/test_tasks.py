"""Tasks of lm-eval on a stream give what lm-eval gives on the whole model."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEXT, MakeModel, make_tokenizer
from outputs import contents
from picos import CONTEXT, VOCABULARY

import streamlap
from streamlap.errors import Interrupted, RecipeError, UnsupportedModel
from streamlap.families.stream import ModelStream
from streamlap.pipeline import tasks
from streamlap.pipeline.tasks import pass_through, task_of
from streamlap.settings import RunSettings

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
        StreamedModel(None, 8, 8, lambda tokens: tokens).generate_until([])


@pytest.mark.filterwarnings("ignore")
def test_what_is_longer_than_the_context_is_cut_as_by_lm_eval(pico: MakeModel) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from streamlap.pipeline.harness import StreamedModel, scored

    source, tokenizer = pico("llama", tokenizer=True), make_tokenizer()
    stream, settings = ModelStream(source), RunSettings().settled()
    ours = StreamedModel(tokenizer, CONTEXT, VOCABULARY, lambda ids_NL: pass_through(stream, settings, ids_NL, scored))
    theirs = HFLM(pretrained=str(source), dtype="float32", device="cpu")
    ids = tokenizer.encode(TEXT)
    cut = [
        (None, ids[start : start + before], ids[start + before :][:after])
        for start, (before, after) in enumerate([(1, CONTEXT), (CONTEXT, 1), (99, 9), (5, 7)])
    ]
    found, wanted = (model._loglikelihood_tokens(cut) for model in (ours, theirs))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-5)
    texts = [SimpleNamespace(args=(TEXT[:length],)) for length in (9, 300, 900)]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)


def streamed(tokenizer: Any) -> tuple[Any, list[torch.Tensor]]:
    """A model that gives zeros, and the sequences that it was asked for."""
    from streamlap.pipeline.harness import StreamedModel

    asked: list[torch.Tensor] = []

    def zeros(ids_NL: torch.Tensor) -> torch.Tensor:
        asked.append(ids_NL)
        return torch.zeros(len(ids_NL), ids_NL.shape[1] - 1, 2)

    return StreamedModel(tokenizer, CONTEXT, VOCABULARY, zeros), asked


def test_a_context_of_spaces_begins_with_bos() -> None:
    pytest.importorskip("lm_eval")
    tokenizer = make_tokenizer()
    model, asked = streamed(tokenizer)
    model.loglikelihood([SimpleNamespace(args=(" ", "sea"))])
    ids = [tokenizer.bos_token_id, *tokenizer.encode(" sea")]
    assert asked[0][0, : len(ids)].tolist() == ids


def test_a_tokenizer_without_bos_and_eos_is_named() -> None:
    pytest.importorskip("lm_eval")
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    model, asked = streamed(tokenizer)
    for ask, args in ((model.loglikelihood, ("", "sea")), (model.loglikelihood_rolling, ("sea",))):
        with pytest.raises(RecipeError, match="the tokenizer has no bos or eos, and the task begins with one"):
            ask([SimpleNamespace(args=args)])
    model.loglikelihood([SimpleNamespace(args=("the", " sea"))])
    assert len(asked) == 1


def test_a_token_beyond_the_vocabulary_is_named() -> None:
    pytest.importorskip("lm_eval")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"more{number}" for number in range(VOCABULARY)])
    model, _ = streamed(tokenizer)
    words = rf"the token 'more\d+' \(id \d+\), which is in the tokenizer, .* vocabulary of 0 to {VOCABULARY - 1}"
    with pytest.raises(RecipeError, match=words):
        model.loglikelihood([SimpleNamespace(args=("the", f"more{VOCABULARY - 1}"))])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("{{question}}", "{{nope}}", "UndefinedError: 'nope' is undefined"),
        ("doc_to_target: answer", 'doc_to_target: "{{nope}}"', "UndefinedError: 'nope' is undefined"),
        ("test_split: test", "test_split: test\nnope: 1", "TypeError: .*'nope'"),
        ("metric: acc}", "metric: nope}", "KeyError: None; wanted tasks"),
    ],
)
def test_a_task_that_lm_eval_fails_on_is_one_line(
    pico: MakeModel, files: list[Path], monkeypatch: pytest.MonkeyPatch, old: str, new: str, words: str
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(files[0].parent / "cache"))
    files[0].write_text(files[0].read_text().replace(old, new))
    with pytest.raises(RecipeError, match=rf"lm-eval cannot run \['.*'\]: {words}"):
        streamlap.evaluate_tasks(pico("llama", tokenizer=True), files[:1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fault", [Interrupted("x"), KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("x"), OSError(28, "full")]
)
def test_what_befalls_the_machine_is_no_fault_of_the_task(
    pico: MakeModel, files: list[Path], monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(files[0].parent / "cache"))

    def fail(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(tasks, "pass_through", fail)
    with pytest.raises(type(fault)) as caught:
        streamlap.evaluate_tasks(pico("llama", tokenizer=True), files[:1])
    assert caught.value is fault


def test_files_that_are_no_tasks_are_refused(tmp_path: Path) -> None:
    assert task_of("hellaswag") == "hellaswag"
    with pytest.raises(RecipeError, match=r"task .*none.yaml cannot be read"):
        task_of(tmp_path / "none.yaml")
    for text, words in (("[1]", "wanted a table with the key task"), ("task: x\nf: !function a.b", "cannot be read")):
        (tmp_path / "t.yaml").write_text(text)
        with pytest.raises(RecipeError, match=words):
            task_of(tmp_path / "t.yaml")
