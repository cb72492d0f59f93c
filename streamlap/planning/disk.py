"""Room on the disk, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamlap.system.budget import existing_ancestor, require_disk

COMPANION_BYTES = 64 << 20
"""What stands beside shards and hidden states: tokenizer, report, kept channels."""


@dataclass(frozen=True, kw_only=True)
class DiskNeeds:
    """What a run writes."""

    output_bytes: int
    """Into its output, for good."""
    hidden_bytes: int = 0
    """Of hidden states, at one time."""
    what: str = "the output folder"
    """What messages call the output."""

    def require(self, out: Path, hidden: Path, freed: int = 0) -> None:
        """Raise BudgetError where the disks under the output and under the hidden states cannot hold it.

        Args: freed, bytes that the output gives back before.
        """
        same_disk = existing_ancestor(hidden).stat().st_dev == existing_ancestor(out).stat().st_dev
        require_disk(out, self.output_bytes + self.hidden_bytes * same_disk - freed, self.what)
        if not same_disk:
            require_disk(hidden, self.hidden_bytes, "the hidden states")
