"""An adapter that is no file: a state dict with PEFT's config, a `PeftModel`, or what holds one and says so.

PEFT is asked only where the value is PEFT's, and so is imported already. Tensors are copied: training goes on without
changing the adapter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from loratools.adapter.model import Adapter
from loratools.dialects._frame.values import Config, HasAdapter, PeftModel
from loratools.errors import BadFile, InvalidOption, counted

if TYPE_CHECKING:
    from loratools.storage.lazy import LazyTensor

_CONFIG = Path("the config of the state dict")
_WANTED = (
    "expected a path or a reference such as hf://org/name, or an adapter in memory"
    " (`Adapter`, (state dict, config), PeftModel, handle of a live model)"
)


def held(value: object, *, initial: bool = False) -> Adapter:
    """Return the adapter that a value in memory holds, its tensors copied; an `Adapter` comes back as it is.

    `initial` is that of `open_adapter`. Raises `InvalidOption` for what holds no adapter or several, and as a file of
    PEFT where tensors and config are wrong.
    """
    if isinstance(value, Adapter):
        return value
    if isinstance(value, HasAdapter):
        return value.__loratools_adapter__()
    if _is_peft_model(value):
        return _of_model(value, initial)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Mapping):
        return _of_pair(value[0], value[1], initial)
    raise InvalidOption(f"{_WANTED}, found {type(value).__name__}")


def refuse_unscaled(state: Mapping[Any, Any]) -> NoReturn:
    """Raise `InvalidOption` for a state dict under PEFT's names without its config."""
    raise InvalidOption(
        f"{_WANTED}, found a state dict ({type(state).__name__}) without its config, so the scaling is unknown",
        hint="Give a pair: (state_dict, config), the config as in adapter_config.json, or PEFT's LoraConfig.",
    )


def _is_peft_model(value: object) -> TypeGuard[PeftModel]:
    kind = vars(sys.modules["peft"]).get("PeftModel") if "peft" in sys.modules else None
    return kind is not None and isinstance(value, kind)


def _of_model(model: PeftModel, initial: bool) -> Adapter:
    """Return the active adapter of a `PeftModel`, of the tensors that its `save_pretrained` would write."""
    active = list(model.active_adapters)
    if len(active) != 1:
        there = f"{len(active)} adapters are active in this PeftModel: {', '.join(active)}"
        raise InvalidOption(
            f"{there}; which one is meant?" if active else "no adapter is active in this PeftModel",
            hint="Choose one with model.set_adapter(NAME), or give the pair"
            " (peft.get_peft_model_state_dict(model, adapter_name=NAME), model.peft_config[NAME]).",
        )
    state = sys.modules["peft"].get_peft_model_state_dict(model, adapter_name=active[0])
    return _of_pair(state, model.peft_config[active[0]], initial)


def _of_pair(state: Mapping[Any, Any], config: object, initial: bool) -> Adapter:
    from loratools.dialects._frame import memory
    from loratools.dialects._frame.build import check_gathered
    from loratools.dialects.peft import checks, typed
    from loratools.dialects.peft.assemble import assemble

    document = _document(config)
    tensors = typed.present(_tensors(state), document)
    check_gathered(memory.STATE, tensors, checks.is_flat)
    return assemble(memory.STATE, tensors, document, _CONFIG, initial=initial)


def _tensors(state: Mapping[Any, Any]) -> dict[str, LazyTensor]:
    """Return copies of the tensors, under the names that a file has; raise `BadFile` with all that are none."""
    from loratools.dialects._frame import memory
    from loratools.dialects.peft.names import unwrap
    from loratools.format import keys

    tensors = memory.tensors_of(state)
    # Without PEFT's wrapper around the model (`model.add_adapter` of transformers and diffusers) there is no prefix.
    bare = not any(unwrap(name).startswith(keys.PREFIX) for name in tensors)
    prefix = keys.PREFIX if bare else ""
    return {f"{prefix}{unwrap(name) if bare else name}": lazy for name, lazy in tensors.items()}


def _document(config: object) -> dict[str, Any]:
    """Return a config as it would be read from a file; raise `BadFile` with every field that no file can hold."""
    if not isinstance(config, Mapping | Config):
        raise InvalidOption(
            "the config beside a state dict: expected a mapping as in adapter_config.json, or PEFT's LoraConfig,"
            f" found {type(config).__name__}"
        )
    fields = config if isinstance(config, Mapping) else config.to_dict()
    document: dict[str, Any] = {}
    faults = []
    for name, value in fields.items():
        try:
            document[name] = json.loads(json.dumps(value, default=_listed))
        except (TypeError, ValueError) as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise BadFile(f"{_CONFIG}: {counted(len(faults), 'field')} that adapter_config.json cannot hold", faults)
    return document


def _listed(value: object) -> list[Any]:
    """Return a set as the list that PEFT writes, sorted; raise `TypeError` for all else."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"found {type(value).__name__}")
