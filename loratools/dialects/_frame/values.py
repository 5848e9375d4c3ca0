"""What may stand where an adapter's path stands: values in memory that hold one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from loratools.adapter.model import Adapter


OTHER_CONFIGS = {"lora_parameters": "adapters.safetensors"}
"""A field of a config that is not PEFT's, and the file beside which it lies: mlx-lm's."""


@runtime_checkable
class HasAdapter(Protocol):
    """What holds an adapter and gives it when it is asked, as the handle of a running model."""

    def __loratools_adapter__(self) -> Adapter:
        """Return the adapter, a value of its own."""
        ...


@runtime_checkable
class Config(Protocol):
    """A config of PEFT."""

    def to_dict(self) -> dict[str, Any]: ...


class PeftModel(Protocol):
    """What is asked of a `PeftModel`."""

    @property
    def active_adapters(self) -> list[str]: ...
    @property
    def peft_config(self) -> Mapping[str, Any]: ...


InMemory = Mapping[str, Any] | tuple[Mapping[str, Any], Mapping[str, Any] | Config] | PeftModel | HasAdapter
"""An adapter held in memory: a state dict, (state dict, config or header), a `PeftModel`, or a live handle."""


def is_pair(value: object) -> bool:
    """Tell whether a value is one adapter as (state dict, config), and not two adapters."""
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], Mapping):
        return False
    beside = value[1]
    return not isinstance(beside, Mapping) or not beside or not all(map(_is_array, beside.values()))


def _is_array(value: object) -> bool:
    return hasattr(value, "__array__")


def is_saved(value: object) -> bool:
    """Tell whether a value is what a file holds: a state dict, alone, or with the entries of a file's header.

    A pair with PEFT's config is none, for that says all by itself.
    """
    if isinstance(value, Mapping):
        return True
    if not isinstance(value, tuple) or len(value) != 2 or not all(isinstance(each, Mapping) for each in value):
        return False
    beside = value[1]
    texts = bool(beside) and all(isinstance(each, str) for each in beside.values())
    return "peft_type" not in beside and (texts or not beside.keys().isdisjoint(OTHER_CONFIGS))
