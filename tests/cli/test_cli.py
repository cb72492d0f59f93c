"""The contract other programs rely on: one JSON object on stdout, fields by name, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import MakeModel

import streamlap
from streamlap.cli import main
from streamlap.demo import bundled
from streamlap.errors import counted
from streamlap.planning.public_machines import PUBLIC

Run = tuple[int, str, str]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Run:
    monkeypatch.setattr(sys, "argv", ["streamlap", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_the_main_job_in_json(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def ask(*words: object) -> dict:
        code, stdout, stderr = run(monkeypatch, capsys, *words, "--json")
        assert (code, stderr) == (0, "")
        return json.loads(stdout)

    report = ask("compress", pico("llama"), out, "--ratio", 0.4, "--calibration", tokens, "--seed", 3)
    fields = {"parameters", "layers", "peak_ram_bytes", "peak_vram_bytes", "seconds", "recipe", "shards"}
    assert fields <= set(report)
    assert report["recipe"]["calibration"]["seed"] == 3
    evaluation = ask("eval", out, "--text", tokens)
    fields = {"perplexity", "nll", "tokens", "length", "seconds", "peak_ram_bytes", "peak_vram_bytes"}
    assert set(evaluation) == fields
    table = ask("inspect", out)
    assert set(table) == {"model_type", "layers", "parameters", "kv_cache_bytes_per_token"}
    assert set(table["parameters"]) == {
        "decoder_before", "decoder_after", "total_before", "total_after", "ratio_decoder", "ratio_total",
    }  # fmt: skip
    site = table["layers"][0]["sites"]["mlp.up_proj"]
    assert {"kind", "shape", "rank", "width", "parameters"} <= set(site)
    assert ask("verify", out) == {"ok": True, "faults": []}
    assert ask("export", out, tmp_path / "dense", "--to", "dense")["shards"] == 4


def test_a_text_column_is_an_option_of_all_that_read_text(
    pico: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, rows, file = pico("llama", tokenizer=True), tmp_path / "rows.jsonl", tmp_path / "survey.json"
    rows.write_text("\n".join(json.dumps({"id": line, "body": f"The boat {line} went to sea."}) for line in range(99)))
    small = ("--calibration", rows, "--samples", 4, "--length", 16)
    for words in (("compress", model, tmp_path / "out", *small), ("plan", model, *small), ("survey", model, file, *small),
                  ("eval", model, "--text", rows, "--length", 16, "--limit", 64)):  # fmt: skip
        code, _, stderr = run(monkeypatch, capsys, *words)
        assert code == 2
        assert "row 1 the columns id, body; wanted text" in stderr
        assert run(monkeypatch, capsys, *words, "--text-column", "body")[0] == 0
    recipe = (tmp_path / "out" / "streamlap_recipe.yaml").read_text()
    assert "text_column: body" in recipe


@pytest.mark.parametrize(("to", "words"), [("factored", "import streamlap; Auto"), ("stock", "with: Auto")])
def test_the_last_line_says_how_the_format_is_loaded(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    to: str, words: str,
) -> None:  # fmt: skip
    """A plain checkpoint asks for no import."""
    command = ("compress", pico("llama"), tmp_path / "out", "--format", to, "--calibration", tokens)
    code, stdout, _ = run(monkeypatch, capsys, *command)
    assert code == 0
    assert f"{words}ModelForCausalLM.from_pretrained(" in stdout.splitlines()[-1]


def test_the_main_job_in_words(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def ask(*words: object) -> str:
        code, stdout, _ = run(monkeypatch, capsys, *words)
        assert code == 0
        return stdout

    assert "removed" in ask("compress", pico("llama"), out, "--ratio", 0.4, "--calibration", tokens)
    assert "perplexity" in ask("eval", out, "--text", tokens)
    assert "rank" in ask("inspect", out)
    assert "whole" in ask("verify", out)
    assert "streamlap" in ask("--help")


def test_a_recipe_file_and_options_together(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"ratio: 0.6\nmethods: [{{method: ffn_lorap, protect: 0.1}}]\ncalibration: {{files: [{tokens}]}}\n"
    )
    words = ("compress", pico("llama"), tmp_path / "out", "--recipe", recipe, "--ratio", 0.3, "--json")
    _, stdout, _ = run(monkeypatch, capsys, *words)
    saved = json.loads(stdout)["recipe"]
    assert (saved["ratio"], saved["methods"]) == (0.3, [{"method": "ffn_lorap", "protect": 0.1}])


EMPTY = [
    ["compress", "", "o"], ["compress", "m", ""], ["compress", "m", "o", "--work", ""], ["plan", ""],
    ["plan", "m", "--recipe", ""], ["plan", "m", "--machine", ""], ["plan", "m", "--survey", ""],
    ["survey", "m", ""], ["resume", ""], ["eval", ""], ["inspect", ""], ["verify", ""],
    ["plan", "m", "--dtype", ""], ["survey", "m", "s.json", "--shape", ""], ["recover", "m", "d", "--text", "t", "--dense", ""],
    ["export", "", "d", "--to", "dense"], ["export", "m", "", "--to", "dense"], ["demo", ""],
]  # fmt: skip
"""Calls with a variable of the shell that is not set."""
LONG = ["x" * 300, "org/" + "x" * 300]
"""No file can be called so."""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["frobnicate"], 2, "frobnicate"),
        (["compress"], 2, "MODEL"),
        (
            ["compress", "m", "o", "--ratio", "abc"],
            2,
            "ratio is 'abc'; wanted a fraction between 0 and 1, like 0.2 or 20%",
        ),
        (["plan", "m", "--ratio", "20"], 2, "Did you mean 0.2 (20%)?"),
        (["plan", "m", "--max-ram", "8 parsecs"], 2, "wanted a size like 8GiB or 8G (2^30 bytes each), or 8GB (10^9"),
        (["plan", "m", "--target-params", "5 GB"], 2, "wanted a number of parameters like 50B (billions), 7.5M, 150k"),
        (
            ["plan", "m", "--dtype", "fp8"],
            2,
            "wanted one of auto, float32, float16, bfloat16, or short fp32, fp16, bf16",
        ),
        (["plan", str(bundled("model")), "--device", "gpu"], 2, "Did you mean cuda?"),
        (["export", "a", "b", "--to", "onnx"], 2, "dense"),
        (["eval", str(bundled("model")), "--dtype", "int8"], 2, "int8"),
        (["eval", str(bundled("model")), "--limit", "5"], 2, "limit is 5"),
        (["eval", "m", "--tasks", "t", "--text-column", "body"], 2, "--text-column is given too"),
        (["eval", "m", "--tasks", "t", "--length", "0"], 2, "--length is given too"),
        (["eval", "nowhere-at-all"], 3, "nowhere-at-all"),
        *((words, 2, "it is empty; wanted a name") for words in EMPTY),
        (["eval", str(bundled("model")), "--text", ""], 2, "the name of a text is empty"),
        (["survey", "m", "."], 2, "survey . is a folder; wanted the name of a new JSON file, like survey.json"),
        (["verify", "nowhere-at-all"], 3, "nowhere-at-all"),
        (["resume", "nowhere-at-all"], 5, "nowhere-at-all"),
        *((["verify", name], 3, name[:50]) for name in LONG),
        *((["plan", name], 3, name[:50]) for name in LONG),
        (["eval", str(bundled("model")), "--text", LONG[0]], 2, LONG[0][:50]),
        (["survey", "m", LONG[0]], 2, LONG[0][:50]),
        (["resume", LONG[0]], 3, LONG[0][:50]),
    ],
)
def test_exit_codes(
    words: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    got, stdout, stderr = run(monkeypatch, capsys, *words)
    assert got == code
    assert stdout == ""
    assert said in stderr


def test_faults_give_exit_code_3(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    code, stdout, _ = run(monkeypatch, capsys, "verify", tmp_path / "empty", "--json")
    assert code == 3
    assert json.loads(stdout)["faults"]


# --- a machine that is not there -----------------------------------------------------------------------------------------


def test_known_machines_are_listed_without_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stdout, stderr = run(monkeypatch, capsys, "plan", "--machine", "list")
    assert (code, stderr) == (0, "")
    row = next(line for line in stdout.splitlines() if line.startswith("rtx-4090"))
    assert "24.00 GiB" in row
    assert "data sheet: NVIDIA" in row
    code, stdout, stderr = run(monkeypatch, capsys, "plan", "--machine", "list", "--json")
    assert (code, stderr) == (0, "")
    rows = {row["name"]: row for row in json.loads(stdout)["machines"]}
    assert set(rows) == set(PUBLIC)
    assert rows["h100-sxm"].keys() == {
        "name", "source", "share", "ram_bytes", "vram_bytes", "disk", "cpu", "gpu",
    }  # fmt: skip
    assert (rows["h100-sxm"]["vram_bytes"], rows["epyc-9654"]["gpu"]) == (80 << 30, None)


def test_a_plan_needs_a_model_otherwise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("--machine", "rtx-4090")):
        code, stdout, stderr = run(monkeypatch, capsys, "plan", *words)
        assert (code, stdout) == (2, "")
        assert "Invalid value for MODEL: it is missing" in stderr


def test_a_plan_for_another_machine(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name and by file; exit 4 where it does not fit there, 2 for what is no machine."""
    ask = ("plan", pico("llama"), "--calibration", tokens, "--machine")
    code, stdout, _ = run(monkeypatch, capsys, *ask, "rtx-4090", "--json")
    assert code == 0
    assert json.loads(stdout)["machine"]["name"] == "rtx-4090"
    file = tmp_path / "small.yaml"
    file.write_text("like: rtx-4090\nram: 2GiB\n")
    code, stdout, _ = run(monkeypatch, capsys, *ask, file)
    assert code == 4
    assert "of RAM are there" in stdout
    assert run(monkeypatch, capsys, *ask, "rtx-4090", "--max-vram", "64MB")[0] == 4
    code, stdout, stderr = run(monkeypatch, capsys, *ask, "rtx-9999")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("streamlap: machine is 'rtx-9999'; wanted a YAML file, or one of ")


def test_one_is_no_plural(
    pico: MakeModel, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = [counted(number, "shard") for number in (0, 1, 2, 1000)]
    assert counts == ["0 shards", "1 shard", "2 shards", "1,000 shards"]
    source, out = pico("llama", tokenizer=True, num_hidden_layers=1), tmp_path / "out"
    sizes = ["--calibration", text, "--samples", 1, "--length", 64]
    _, printed, _ = run(monkeypatch, capsys, "plan", source, *sizes)
    assert "1 window of 64 tokens" in printed
    assert ", 1 layer\n" in printed
    _, printed, _ = run(monkeypatch, capsys, "compress", source, out, *sizes)
    assert f"{out}: 1 layer in " in printed
    assert "calibrated on 1 window of 64 tokens" in (out / "README.md").read_text()


def test_a_plain_checkpoint_has_nothing_to_export(
    pico: MakeModel, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may well have been compressed: in the format stock that leaves no trace in it."""
    stock = tmp_path / "stock"
    streamlap.compress(pico("llama"), stock, files=(str(tokens),), format="stock", multiple=4)
    for folder in (pico("llama"), stock):
        code, _, said = run(monkeypatch, capsys, "export", folder, tmp_path / "dense", "--to", "dense")
        assert code == 3
        assert "is a plain checkpoint, with nothing to undo; wanted a folder of the format factored or nas" in said
