"""Names of devices that are not known are answered with the one that may be meant."""

from __future__ import annotations

import pytest

from streamlap.errors import RecipeError
from streamlap.system.device import pick_device

HINTS = {
    "gpu": "Did you mean cuda?", "GPU": "Did you mean cuda?", "cuda0": "Did you mean cuda:0?", "gpu:1": "Did you mean cuda:1?",
    "CUDA:1": "Did you mean cuda:1?", "mps": "Apple's GPUs are not served yet; use cpu.", "tpu": "cuda or cuda:N.",
    "cuda:": "Did you mean cuda?",
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
def test_what_may_be_meant_is_said(name: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        pick_device(name)
    assert str(refusal.value).startswith(f"device is {name!r}; wanted auto, cpu, cuda or cuda:N.")
    assert str(refusal.value).endswith(HINTS[name])
