"""The config of a model whose layers differ as in the public models of the architecture DeciLM: `model_type` nemotron-nas.

    {"model_type": "nemotron-nas", "block_configs": [
        {"attention": {"no_op": false, "n_heads_in_group": 4}, "ffn": {"no_op": false, "ffn_mult": 3.5}}, ...]}

Everything else is as in a llama. The FFN of a layer is int(2 ffn_mult hidden / 3) channels wide, rounded up to a multiple of
256, or `intermediate_size` where it has that instead. A layer whose attention is a no-op has no norm before it either.

Imports transformers alone. Copied as it is into every output folder of that format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

NAS = "nemotron-nas"
MULTIPLE = 256
"""What a width that is given as `ffn_mult` is rounded up to a multiple of."""


class Block(dict[str, Any]):
    """A table whose values are attributes too, as engines read them; a key that is not there is no attribute."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        super().__init__({key: Block(value) if isinstance(value, Mapping) else value for key, value in table.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return Block, (dict(self),)


class DeciLMConfig(LlamaConfig):
    """Raises ValueError for blocks that are not tables."""

    model_type = NAS
    block_configs: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        blocks = self.block_configs or []
        if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
            raise ValueError(f"block_configs: seen {str(blocks)[:120]}; wanted a list with a table for each layer")
        self.block_configs = [Block(block) for block in blocks]


def ffn_width(ffn: Mapping[str, Any], hidden: int) -> int:
    """Channels of the FFN that a block describes, beside hidden states of `hidden` numbers."""
    if ffn.get("ffn_mult") is not None:
        return -(-int(2 * ffn["ffn_mult"] * hidden / 3) // MULTIPLE) * MULTIPLE
    return int(ffn["intermediate_size"])


def check_block(index: int, block: Mapping[str, Any], heads_in_group: int) -> None:
    """Raise ValueError for a layer that is neither a llama's nor one without attention."""
    attention, ffn = (block.get(name) for name in ("attention", "ffn"))
    if not isinstance(attention, Mapping) or not isinstance(ffn, Mapping):
        raise ValueError(f"block_configs[{index}]: seen {str(block)[:120]}; wanted attention and ffn")
    if attention.get("replace_with_linear") or ffn.get("replace_with_linear") or ffn.get("no_op"):
        raise ValueError(
            f"block_configs[{index}]: seen {str(block)[:120]}; wanted an FFN, and attention that is whole or a no-op"
        )
    if not attention.get("no_op") and attention.get("n_heads_in_group") != heads_in_group:
        raise ValueError(
            f"block_configs[{index}].attention: seen n_heads_in_group = {attention.get('n_heads_in_group')}; wanted "
            f"{heads_in_group}, as num_attention_heads and num_key_value_heads say"
        )
    mult, size = ffn.get("ffn_mult"), ffn.get("intermediate_size")
    given = [
        value for value, kinds in ((mult, (int, float)), (size, (int,))) if value is not None and type(value) in kinds
    ]
    if len(given) != 1 or given != [value for value in (mult, size) if value is not None] or not 0 < given[0] < 1 << 20:
        raise ValueError(
            f"block_configs[{index}].ffn: seen {str(ffn)[:120]}; wanted one of ffn_mult and intermediate_size"
        )


# So that a saved model takes this file along.
DeciLMConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
