"""The bundled model is what its record says, and the demo shows what it promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import streamlap
from streamlap.data.calibration import bundled_text
from streamlap.demo import bundled, run_demo

README = Path(__file__).parents[2] / "README.md"


def test_the_bundled_model_is_small_trained_and_near_convergence() -> None:
    record = json.loads(bundled("training.json").read_text())
    config = json.loads((bundled("model") / "config.json").read_text())
    assert record["tokens_per_non_embedding_parameter"] >= 20
    assert (bundled("model") / "model.safetensors").stat().st_size <= 8_000_000
    assert config["vocab_size"] <= 4096
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    counted = streamlap.inspect(bundled("model"))["parameters"]["total_before"]
    assert counted == record["parameters"]
    measured = streamlap.evaluate(bundled("model"), limit=16_384).perplexity
    assert measured == pytest.approx(record["validation_perplexity"], rel=0.15)
    assert record["untrained_validation_perplexity"] / measured > 15


def test_calibration_and_validation_text_share_nothing() -> None:
    (calibration,), (validation,) = bundled_text("calibration"), bundled_text("validation")
    lines = [
        {line for line in Path(path).read_text().splitlines() if len(line) > 80} for path in (calibration, validation)
    ]
    assert all(len(part) > 100 for part in lines)
    assert not lines[0] & lines[1]


def test_the_demo_compresses_and_measures(tmp_path: Path) -> None:
    """What README says of it."""
    result = run_demo(tmp_path / "out")
    said = re.search(r"perplexity ([\d.]+) to ([\d.]+) \(256 windows", README.read_text())
    assert said
    measured = result.before.perplexity, result.after.perplexity
    assert measured == pytest.approx(tuple(map(float, said.groups())), rel=2e-3)  # processors round otherwise
    assert result.after.parameters < 0.9 * result.before.parameters
    assert result.after.bytes < 0.9 * result.before.bytes
    assert result.before.perplexity < result.after.perplexity < 1.5 * result.before.perplexity
    assert all(len(text.split()) > 20 for text in result.samples.values())
    assert streamlap.verify(tmp_path / "out")["ok"]
