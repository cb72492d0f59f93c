"""What scripts/check_engines and scripts/bench_engines.py make of figures; the engines themselves are run by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import MakeModel

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_engines
import engines

WANTED = {"top": [{"1": -0.5, "2": -1.0}, {"3": -0.25, "4": -2.0}], "greedy": [1, 2]}


def test_a_cell_tells_how_far_two_engines_are_apart() -> None:
    found = {"top": [{"1": -0.75, "2": -1.0}, {"4": -0.5}], "greedy": [1, 3]}
    assert engines.cell(WANTED, WANTED) == "0.0e+00 (0e+00), 2 of 2, 2 of 2"
    assert engines.cell(WANTED, found) == "1.5e+00 (6e-01), 1 of 2, 1 of 2"
    assert engines.cell(WANTED, {"error": "Refused: it is so"}) == "Refused: it is so"


def test_a_table_says_why_a_cell_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    (tmp_path / "wanted.json").write_text(json.dumps({"versions": {"torch": "2"}, engines.key(folder): WANTED}))
    (tmp_path / "llama.cpp.json").write_text(json.dumps({"versions": {}, engines.key(folder): WANTED}))
    (tmp_path / "vllm.json").write_text(json.dumps({"versions": {}, engines.key(folder): {"error": "no such format"}}))
    (tmp_path / "mlx-lm.log").write_text("looking\nERROR: no wheel for this machine\n")
    engines.table(tmp_path, [folder])
    head, _, row = capsys.readouterr().out.splitlines()[1:]
    cells = dict(zip(head.split(" | ")[1:], row.split(" | ")[1:], strict=True))
    assert cells["llama.cpp"] == "0.0e+00 (0e+00), 2 of 2, 2 of 2"
    assert cells["vllm"] == "no such format"
    assert cells["mlx-lm"] == "ERROR: no wheel for this machine"
    assert cells["lm-eval"] == "not run"


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_finds_is_what_is_wanted(
    pico: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("PROMPT", 8), ("NEW", 3), ("WINDOWS", 2), ("WINDOW", 4)):
        monkeypatch.setattr(engines, name, size)
    folders = [pico("llama", tokenizer=True), pico("qwen2")]
    engines.run("transformers", tmp_path, folders)
    engines.run("transformers:bf16", tmp_path, folders)
    wanted, found = (engines.results(tmp_path, name) for name in ("transformers", "transformers:bf16"))
    for folder in map(engines.key, folders):
        assert [len(wanted[folder][name]) for name in ("prompt", "windows", "top", "greedy")] == [8, 2, 8, 3]
        assert engines.cell(wanted[folder], wanted[folder]) == "0.0e+00 (0e+00), 8 of 8, 3 of 3"
        assert not engines.cell(wanted[folder], found[folder]).startswith("0.0e+00")
    assert engines.told(tmp_path, folders[0], ".gguf").is_file()


@pytest.mark.filterwarnings("ignore")
def test_speed_is_told_beside_the_first_folder(
    pico: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(command: list[str], **_: Any) -> None:
        monkeypatch.setattr(sys, "argv", command[1:])
        bench_engines.main()

    monkeypatch.setattr(bench_engines, "subprocess", SimpleNamespace(run=in_this_process))
    folders = [str(pico("llama", tokenizer=True)), str(pico("qwen2", num_hidden_layers=1, tokenizer=True))]
    words = ["bench", *folders, "--engines", "transformers", "--prompt", "8", "--decode", "2", "--rounds", "1"]
    monkeypatch.setattr(
        sys, "argv", [*words, "--threads", "2", "--work", str(tmp_path), "--out", str(tmp_path / "out.json")]
    )
    bench_engines.main()
    result = json.loads((tmp_path / "out.json").read_text())
    first, second = (Path(folder).name for folder in folders)
    assert result["sizes"][first]["cache_token"] == 3 * result["sizes"][second]["cache_token"] == 3 * 2 * 2 * 8 * 4
    assert all(rate > 0 for each in result["engines"]["transformers"]["folders"].values() for rate in each["rounds"][0])
    rates = result["engines"]["transformers"]["folders"] | {second: {"error": "it does not"}}
    lines = bench_engines.table(result | {"engines": {"transformers": {"folders": rates}}}).splitlines()
    assert [line.count("| 1.00 |") for line in lines[2:]] == [2, 0]
    assert "it does not" in lines[3]
