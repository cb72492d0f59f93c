"""`load` is from_pretrained with the loader registered, and knows the short names of dtypes."""

from __future__ import annotations

import pytest
import torch
from conftest import MakeModel

import streamlap


@pytest.mark.parametrize("word", ["bf16", "BF16", "bfloat16", torch.bfloat16])
def test_a_dtype_may_be_short(pico: MakeModel, word: str | torch.dtype) -> None:
    assert streamlap.load(pico("llama"), dtype=word).dtype == torch.bfloat16
