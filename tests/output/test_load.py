"""`load` is from_pretrained with the loader registered, of the class of the task. It knows the short names of dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Compress, MakeModel
from picos import pico_config
from transformers import AutoModelForSequenceClassification

import streamlap


@pytest.mark.parametrize("word", ["bf16", "BF16", "bfloat16", torch.bfloat16])
def test_a_dtype_may_be_short(pico: MakeModel, word: str | torch.dtype) -> None:
    assert streamlap.load(pico("llama"), dtype=word).dtype == torch.bfloat16


def test_the_class_is_the_one_that_the_card_names(compress: Compress, tmp_path: Path) -> None:
    """Any other has a head of random numbers."""
    config = pico_config("llama", num_hidden_layers=2, num_labels=3, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "source")
    compress(tmp_path / "out", model=tmp_path / "source")
    model, ids_BL = streamlap.load(tmp_path / "out"), torch.arange(1, 9)[None]
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert "AutoModelForSequenceClassification.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    with torch.no_grad():
        wanted = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")(ids_BL).logits
        assert torch.equal(model(ids_BL).logits, wanted)
