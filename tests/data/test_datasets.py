"""The name of a text -> files: which of a data set's files are its configurations and splits, and which of them is read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from streamlap.data.datasets import CALIBRATION, EVALUATION, choose_files, text_files
from streamlap.data.splits import matches, read_data_set, split_by_names
from streamlap.errors import BudgetError, RecipeError

SPLITS = ("test", "train", "validation")
WIKI = [f"{config}/{split}-00000-of-00001.parquet" for config in ("wiki-2", "wiki-103") for split in SPLITS]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def chosen(folder: Path, files: Collection[str], inside: str | None = None, split: str | None = None,
           wanted: Collection[str] = CALIBRATION) -> list[str]:  # fmt: skip
    return choose_files(read_data_set("org/x", folder, dict.fromkeys(files, 1)), inside, split, wanted)


def card(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(f"---\nlicense: mit\n{text}---\n# Card\n")
    return folder


# --- splits by names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["data.txt"], {"": ["data.txt"]}),
        (["train.txt", "test.txt", "validation.txt"],
         {"train": ["train.txt"], "test": ["test.txt"], "validation": ["validation.txt"]}),
        (["my_train_file1.jsonl", "eval.jsonl", "dev-0.jsonl"],
         {"train": ["my_train_file1.jsonl"], "test": ["eval.jsonl"], "validation": ["dev-0.jsonl"]}),
        (["data/train/a.txt", "data/val/b.txt", "data/notes.txt"],
         {"train": ["data/train/a.txt"], "validation": ["data/val/b.txt"]}),
        (["data/train-00000-of-00002.parquet", "data/random-00001-of-00002.parquet"],
         {"train": ["data/train-00000-of-00002.parquet"], "random": ["data/random-00001-of-00002.parquet"]}),
        (["training.txt", "contest.txt", "trainer.txt"], {"train": ["training.txt"]}),
        (["Test.txt", "Training.txt"], {"test": ["Test.txt"], "train": ["Training.txt"]}),
    ],
)  # fmt: skip
def test_splits_are_words_in_the_names_of_folders_or_files(files: list[str], splits: dict[str, list[str]]) -> None:
    assert split_by_names(files) == splits


@pytest.mark.parametrize(
    ("path", "pattern", "meant"),
    [
        ("data/train-0.txt", "data/train-*", True),
        ("data/train-0.txt", "./data/train-*", True),
        ("data/a/train-0.txt", "data/train-*", False),
        ("data/a/train-0.txt", "data/*", False),
        ("data/a/train-0.txt", "data/**", True),
        ("data/a/train-0.txt", "**/train-*", True),
        ("train-0.txt", "**/train-*", True),
        ("a/b/c.txt", "a/**/c.txt", True),
        ("a/c.txt", "a/**/c.txt", True),
        ("a/b.txt", "a", False),
        ("en/c4-train.00001.json", "en/c4-train.0000[1-3].json", True),
        ("/".join("a" * 200), "/".join(["**", "a"] * 90) + "/b", False),
    ],
)
def test_patterns_of_a_card(path: str, pattern: str, meant: bool) -> None:
    assert matches(path, pattern) is meant


# --- which split ---------------------------------------------------------------------------------------------------------

THREE = ["test.txt", "train.txt", "validation.txt"]


@pytest.mark.parametrize(
    ("files", "split", "wanted", "found"),
    [
        (THREE, None, CALIBRATION, ["train.txt"]),
        (THREE, None, EVALUATION, ["validation.txt"]),
        (["test.txt", "train.txt"], None, EVALUATION, ["test.txt"]),
        (THREE, "test", CALIBRATION, ["test.txt"]),
        (THREE, "dev", CALIBRATION, ["validation.txt"]),
        (THREE, "train", EVALUATION, ["train.txt"]),
        (["b.txt", "a.jsonl"], None, CALIBRATION, ["a.jsonl", "b.txt"]),
        (["b.txt", "a.jsonl"], None, EVALUATION, ["a.jsonl", "b.txt"]),
        (["b.txt"], "train", EVALUATION, ["b.txt"]),
        (["LICENSE.txt", "requirements.txt", ".hidden.txt", "__old__/a.txt", "a.txt"], None, CALIBRATION, ["a.txt"]),
    ],
)
def test_which_split_is_read(
    tmp_path: Path, files: list[str], split: str | None, wanted: Collection[str], found: list[str]
) -> None:
    assert chosen(tmp_path, files, split=split, wanted=wanted) == found


@pytest.mark.parametrize(
    ("files", "split", "wanted", "words"),
    [
        (["train.txt"], None, EVALUATION, "org/x has the splits train; wanted one of them, as in org/x:train"),
        (["test.txt"], None, CALIBRATION, "org/x has the splits test; wanted"),
        (THREE, "exam", CALIBRATION, "has no split 'exam', but the splits test, train, validation; wanted"),
        (["a.txt"], "test", CALIBRATION, "org/x has no splits; wanted its name alone"),
        (["a.csv", "script.py"], None, CALIBRATION, r"has no \.txt, .*\.jsonl, .* file; wanted text. No script"),
    ],
)
def test_a_split_that_is_not_there_is_answered_by_those_that_are(
    tmp_path: Path, files: list[str], split: str | None, wanted: Collection[str], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        chosen(tmp_path, files, split=split, wanted=wanted)


def test_what_is_chosen_among_several_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen(tmp_path, THREE)
    assert caplog.messages == ["org/x: its split train is read, of test, train, validation"]
    caplog.clear()
    chosen(tmp_path, THREE, split="train")
    chosen(tmp_path, ["a.txt"])
    assert not caplog.messages


# --- which configuration -------------------------------------------------------------------------------------------------


def test_of_several_configurations_one_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"org/x has the configurations wiki-103, wiki-2; wanted .* as in org/x/wiki-103"
    ):
        chosen(tmp_path, WIKI)
    assert chosen(tmp_path, WIKI, "wiki-2") == [WIKI[1]]
    assert chosen(tmp_path, WIKI, "wiki-2", "test") == [WIKI[0]]
    assert chosen(tmp_path, WIKI, "wiki-103", wanted=EVALUATION) == [WIKI[5]]
    with pytest.raises(RecipeError, match="has no 'wiki-3', but the configurations wiki-103, wiki-2"):
        chosen(tmp_path, WIKI, "wiki-3")
    with pytest.raises(RecipeError, match=r"org/x/wiki-2 has no split 'exam', but the splits .* org/x/wiki-2:test"):
        chosen(tmp_path, WIKI, "wiki-2", "exam")


def test_files_at_the_top_are_the_default_where_they_have_splits(tmp_path: Path) -> None:
    assert chosen(tmp_path, ["train.txt", "test.txt", "raw/a.txt"]) == ["train.txt"]
    with pytest.raises(RecipeError, match="configurations default, en"):
        chosen(tmp_path, ["a.txt", "en/b.txt"])


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    assert chosen(tmp_path, WIKI, WIKI[2]) == [WIKI[2]]
    assert chosen(tmp_path, [*WIKI, "ids.npy"], "ids.npy") == ["ids.npy"]
    with pytest.raises(RecipeError, match=r"has no 'wiki-2/x.txt', but the files wiki-103/test"):
        chosen(tmp_path, WIKI, "wiki-2/x.txt")


def test_the_card_says_which_files_are_a_split(tmp_path: Path) -> None:
    files = ["a.txt", "holdout/b.txt", "holdout/c.txt", "train.txt"]
    card(tmp_path, 'configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.txt\n'
                   '  - split: test\n    path: ["holdout/b.txt", "holdout/c*"]\n')  # fmt: skip
    assert chosen(tmp_path, files) == ["a.txt"]
    assert chosen(tmp_path, files, wanted=EVALUATION) == ["holdout/b.txt", "holdout/c.txt"]
    assert chosen(tmp_path, files, "default", "train") == ["a.txt"]


CONFIGS = "configs:\n- config_name: en\n  data_files: en.txt\n- config_name: de\n  data_files: [de.txt, de2.txt]\n"


def test_the_card_lists_configurations_and_may_name_the_default(tmp_path: Path) -> None:
    files = ["en.txt", "de.txt", "de2.txt"]
    card(tmp_path, CONFIGS)
    with pytest.raises(RecipeError, match="configurations en, de; wanted"):
        chosen(tmp_path, files)
    assert chosen(tmp_path, files, "de") == ["de.txt", "de2.txt"]
    card(tmp_path, CONFIGS + "  default: true\n")
    assert chosen(tmp_path, files) == ["de.txt", "de2.txt"]
    card(tmp_path, CONFIGS + "- config_name: default\n  data_files: '*.txt'\n")
    assert chosen(tmp_path, files) == sorted(files)
    card(tmp_path, "configs:\n- config_name: en\n  data_dir: en\n- config_name: de\n  data_dir: ./de\n")
    assert chosen(tmp_path, ["en/train.txt", "de/train.txt", "de/test.txt"], "de") == ["de/train.txt"]


def test_splits_of_other_names_are_named(tmp_path: Path) -> None:
    card(tmp_path, "configs:\n- config_name: default\n  data_files:\n  - split: train_sft\n    path: data/train_sft-*\n"
                   "  - split: test_sft\n    path: data/test_sft-*\n")  # fmt: skip
    files = ["data/test_sft-0.parquet", "data/train_sft-0.parquet"]
    with pytest.raises(RecipeError, match="splits train_sft, test_sft; wanted one of them, as in org/x:train_sft"):
        chosen(tmp_path, files)
    assert chosen(tmp_path, files, split="train_sft") == ["data/train_sft-0.parquet"]


@pytest.mark.parametrize(
    "text",
    [
        "configs: 7\n", "configs: [1, 2]\n", "configs:\n- config_name: a\n", "a: &x 1\nb: *x\n", "a: [\n",
        "configs:\n- {config_name: [a], data_files: b}\n",
    ],
)  # fmt: skip
def test_a_card_that_says_nothing_of_files_leaves_the_names(tmp_path: Path, text: str) -> None:
    assert chosen(card(tmp_path, text), THREE) == ["train.txt"]


def test_a_configuration_without_text_is_said(tmp_path: Path) -> None:
    card(tmp_path, "configs:\n- config_name: csv\n  data_files: '*.csv'\n- config_name: txt\n  data_files: '*.txt'\n")
    with pytest.raises(RecipeError, match=r"org/x/csv has no \.txt, .*\.parquet file"):
        chosen(tmp_path, ["a.csv", "a.txt"], "csv")


# --- in the hub's cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache, offline, with two revisions of `org/x`."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = hub / "datasets--org--x"
    for revision, commit in (("main", COMMIT), ("refs/pr/1", COMMIT[::-1])):
        (repository / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        for name in ("README.md", *WIKI):
            path = repository / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{revision} {name}")
    return repository / "snapshots"


@pytest.mark.parametrize(
    ("name", "commit", "file"),
    [
        ("org/x/wiki-2", COMMIT, WIKI[1]),
        ("org/x/wiki-2:test", COMMIT, WIKI[0]),
        ("org/x@main/wiki-103:validation", COMMIT, WIKI[5]),
        (f"org/x@{COMMIT}/wiki-2:train", COMMIT, WIKI[1]),
        ("org/x@refs/pr/1/wiki-2:train", COMMIT[::-1], WIKI[1]),
        ("org/x@refs%2Fpr%2F1/wiki-2:train", COMMIT[::-1], WIKI[1]),
        (f"org/x/{WIKI[0]}", COMMIT, WIKI[0]),
        (f"org/x@refs/pr/1/{WIKI[0]}", COMMIT[::-1], WIKI[0]),
    ],
)
def test_names_lead_to_files_of_the_cache(cache: Path, name: str, commit: str, file: str) -> None:
    assert text_files(name) == [cache / commit / file]


def test_the_hubs_name_is_refused_with_what_is_there(cache: Path) -> None:
    for name, words in (
        ("org/x", "configurations wiki-103, wiki-2"),
        ("org/x@v9", "org/x@v9 is not a folder, nor a hub id under which a dataset can be had"),
        ("org/absent:train", "org/absent is not a folder, nor"),
        ("org/absent/a.txt", "org/absent is not a folder, nor"),
        ("texts/2024/cal.txt", "^there is no file texts/2024/cal.txt here; as a data set: texts/2024 is not"),
    ):
        with pytest.raises(RecipeError, match=words):
            text_files(name)


def test_files_here_come_first_and_absent_ones_stay_names(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "x").mkdir(parents=True)
    for name in ("a.txt", "org/a.txt", "org/x/absent.txt", "/org/x/a.txt", "./org/x:train", "text", "org/ids.npy"):
        assert text_files(name) == [Path(name)]
    (tmp_path / "org" / "x" / "wiki-2").mkdir()
    assert text_files("org/x/wiki-2") == [Path("org/x/wiki-2")]


def test_a_split_that_does_not_fit_on_the_disk_is_not_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlap.data.datasets.list_data_set", lambda name: (cache / COMMIT, {"a.txt": 1 << 60}))
    monkeypatch.setattr("streamlap.data.datasets.fetch_data_files", lambda *_: pytest.fail("fetched"))
    with pytest.raises(
        BudgetError, match=r"org/big takes 1,152,921,504,606,846,976 bytes .* are free. Name a single file"
    ):
        text_files("org/big")
