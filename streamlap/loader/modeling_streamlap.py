"""What `auto_map` in a streamlap folder names: `trust_remote_code=True` loads it where streamlap is not installed.

No class here is ever instantiated. Importing hf_plugin registers the loader; after that the native classes do the work,
so what comes out is the config and the model of transformers itself. Copied as it is into every output folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

# For what their import does. All are named here: older transformers copy only the files that this very one imports.
from .forms import Form  # noqa: F401
from .hf_plugin import StreamlapQuantizer  # noqa: F401
from .linears import StoredLinear  # noqa: F401
from .modules import swap_modules  # noqa: F401

if TYPE_CHECKING:  # it needs peft, so it is only named
    from .adapters import register  # noqa: F401


class StreamlapAutoConfig:
    """Stands where transformers expects a config class."""

    @classmethod
    def from_pretrained(cls, folder: str, /, **kwargs: Any) -> PreTrainedConfig:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **{**kwargs, "trust_remote_code": False})
        return config

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: the native class is in the table. Marking it as custom code would break its own saving."""


class StreamlapAutoModelForCausalLM:
    """Stands where transformers expects a model class."""

    native: ClassVar[Any] = AutoModelForCausalLM

    @classmethod
    def from_pretrained(cls, folder: str, /, *args: Any, **kwargs: Any) -> PreTrainedModel:
        # Asked for an adapter, transformers gives its base model here, and the adapter under this name: begin with that one.
        adapter = dict(kwargs.get("adapter_kwargs") or {})
        folder = adapter.pop("_adapter_model_path", folder)
        model: PreTrainedModel = cls.native.from_pretrained(
            folder, *args, **{**kwargs, "adapter_kwargs": adapter, "trust_remote_code": False}
        )
        return model

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        kwargs["trust_remote_code"] = False
        model: PreTrainedModel = cls.native.from_config(config, **kwargs)
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing to do, as above."""


class StreamlapAutoModelForImageTextToText(StreamlapAutoModelForCausalLM):
    """The same for a model that has a language model beside others."""

    native = AutoModelForImageTextToText
