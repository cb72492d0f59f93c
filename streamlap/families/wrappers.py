"""Models that hold a language model beside other parts, such as a vision tower: which are known, and where they keep it.

The language part is read as any other model. The rest is never built: its tensors are copied as bytes, under the names that
they have on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from streamlap.errors import CheckpointError, UnsupportedModel, shown

WRAPPERS = {
    "gemma3": {"gemma3_text": "gemma3_text"},
    "mistral3": {"mistral": "mistral", "ministral3": "ministral3"},
    "qwen2_5_vl": {"qwen2_5_vl_text": "qwen2"},
    "qwen3_vl": {"qwen3_vl_text": "qwen3"},
    "qwen3_5": {"qwen3_5_text": "qwen3_5_text"},
}
"""model_type of a wrapper -> model_type that its language model may have -> the family whose layers that has. The first is that
of a config.json that names none."""
TEXT = "text_config"
"""Key of config.json under which the language model is described."""
FLAT = "qwen2_5_vl"
"""The wrapper that may have those keys beside its own."""
DECODER = "model.language_model"
"""Path of the decoder in the model of transformers; the head is outside."""
STORED = ("language_model.model.", "language_model.", "model.", "")
"""What may stand before the names of the language model on the disk, beside the path itself."""
BESIDE = {TEXT, "vision_config", "model_type"}


def is_wrapper(raw: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is that of a wrapper."""
    kind = raw.get("model_type")
    return isinstance(kind, str) and kind in WRAPPERS


def text_of(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a parsed config.json that describes the language model, which is all of it where there is nothing else.

    Raises CheckpointError where a wrapper has no such part, UnsupportedModel where that is of an unknown kind.
    """
    if not is_wrapper(raw):
        return raw
    wrapper, inner = raw["model_type"], raw.get(TEXT)
    if inner is None and wrapper == FLAT:
        inner = {key: value for key, value in raw.items() if key not in BESIDE}
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"config.json of a {wrapper} has {TEXT} {shown(inner)}; wanted its language model there.")
    known = WRAPPERS[wrapper]
    kind = inner.get("model_type", next(iter(known)))
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedModel(
            f"the language model of this {wrapper} is a {shown(kind)[1:-1]}; wanted {' or '.join(known)}. Compress it as a "
            "model of its own, where docs/families.md has it."
        )
    return {**inner, "model_type": kind}


def with_text(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json whose language model has `changes`."""
    inner = raw.get(TEXT) if is_wrapper(raw) else None
    return {**raw, TEXT: {**inner, **changes}} if isinstance(inner, Mapping) else {**raw, **changes}


def names_inside(stored: str) -> Iterator[str]:
    """What the model of transformers may call the tensor that is `stored` on the disk, if it is one of the language model."""
    for prefix in STORED:
        if stored.startswith(prefix):
            rest = stored.removeprefix(prefix)
            yield from (rest, f"{DECODER}.{rest}")
