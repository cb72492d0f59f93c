"""What tasks gave, in the model card of a folder that streamlap wrote, and in no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamlap.output.card import CARD_BYTES, CARD_NAME, model_card, record_tasks, with_tasks, without_tasks
from streamlap.output.report import KvCache, Parameters

SIZES = Parameters(decoder_before=10, decoder_after=8, total_before=20, total_after=18)
ROWS = [("seas", "acc", 0.25, 1200, "0.4.13"), ("seas", "acc_norm", 0.5, 1200, "0.4.13")]


def card() -> str:
    return model_card(
        base="a/model", licence={}, parameters=SIZES, cache=KvCache(before=4, after=4), made="Made so.",
        loader="AutoModelForCausalLM", to="stock",
    )  # fmt: skip


def test_rows_of_a_task_give_way_and_others_stay() -> None:
    first = with_tasks(card(), [*ROWS, ("logs", "acc", 0.125, None, "0.4.13")])
    assert first.startswith(card().rstrip())
    assert first.endswith(
        "\n## Tasks of lm-eval\n\n| task | metric | value | documents | lm-eval |\n|---|---|---|---|---|\n"
        "| seas | acc | 0.2500 | 1,200 | 0.4.13 |\n| seas | acc_norm | 0.5000 | 1,200 | 0.4.13 |\n"
        "| logs | acc | 0.1250 |  | 0.4.13 |\n"
    )
    again = with_tasks(first + "\nMy own words.\n", [("seas", "acc", 0.75, 9, "0.5")])
    assert "| logs | acc | 0.1250 |  | 0.4.13 |\n| seas | acc | 0.7500 | 9 | 0.5 |\n\nMy own words.\n" in again
    assert again.count("| seas |") == 1
    assert without_tasks(again) == card() + "\nMy own words.\n"


def test_a_name_cannot_leave_its_cell() -> None:
    assert "\n| a_b__i_ x | acc_ | 0.0000 | 1 | 1 |\n" in with_tasks(card(), [("a|b\n<i> x", "acc|", 0.0, 1, "1")])


def test_only_a_card_of_ours_is_written(tmp_path: Path) -> None:
    assert record_tasks(tmp_path, ROWS) is None
    path = tmp_path / CARD_NAME
    for text in ("# A model, compressed by hand\n", card() + " " * CARD_BYTES):
        path.write_text(text)
        assert record_tasks(tmp_path, ROWS) is None
        assert path.read_text() == text
    (tmp_path / "elsewhere").write_text(card())
    path.unlink()
    path.symlink_to("elsewhere")
    assert record_tasks(tmp_path, ROWS) is None
    assert (tmp_path / "elsewhere").read_text() == card()
    path.unlink()
    path.write_text(card())
    assert record_tasks(tmp_path, ROWS) == path
    assert path.read_text() == with_tasks(card(), ROWS)


@pytest.mark.parametrize("text", ["", "# a\n"])
def test_a_card_without_tasks_stays(text: str) -> None:
    assert without_tasks(text) == text
