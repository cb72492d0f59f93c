"""Puts the loader into an output folder, for those who open it without streamlap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# The package's own files, byte for byte: one implementation, wherever it runs. Each imports only the others and
# third-party packages; transformers follows their relative imports from the one that auto_map names.
SHIM_FILES = ("modeling_streamlap.py", "hf_plugin.py", "modules.py", "forms.py", "linears.py", "adapters.py")


NAS_FILES = ("configuration_nas.py", "modeling_nas.py")
"""The same of the format nas."""
NAS_MAP = {
    "AutoConfig": "configuration_nas.DeciLMConfig",
    "AutoModelForCausalLM": "modeling_nas.DeciLMForCausalLM",
}


def write_nas(folder: Path, write: Callable[[Path, bytes], object] = Path.write_bytes) -> None:
    """Copy what `NAS_MAP` names into `folder`."""
    for name in NAS_FILES:
        write(folder / name, (Path(__file__).parent / name).read_bytes())


def write_shim(
    folder: Path, write: Callable[[Path, bytes], object] = Path.write_bytes, wraps: bool = False
) -> dict[str, str]:
    """Copy the loader's files into `folder`; gives back the `auto_map` for its config.json, of a model that has a language
    model beside others where it `wraps` one."""
    for name in SHIM_FILES:
        write(folder / name, (Path(__file__).parent / name).read_bytes())
    model = "AutoModelForImageTextToText" if wraps else "AutoModelForCausalLM"
    return {
        "AutoConfig": "modeling_streamlap.StreamlapAutoConfig",
        model: f"modeling_streamlap.Streamlap{model}",
    }
