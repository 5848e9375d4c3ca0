"""An adapter of one of PEFT's other types in PEFT's files again: as it was read, with the modules that are left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.model import Adapter
from loratools.dialects.peft import types
from loratools.dialects.peft.typed import FIELDS, TYPE
from loratools.dialects.peft.typed_names import name_of
from loratools.format import keys, manifest
from loratools.storage.lazy import LazyTensor

_CARRIED = (
    "task_type", "auto_mapping", "fan_in_fan_out", "bias", "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Files:
    """What goes into the two files: tensors by name, and the document of the config."""

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any]


def type_of(adapter: Adapter) -> Any:
    """Return the module of the type that an adapter can be written as, the one that it was read as; None for LORA.

    That takes updates whose parts are all the type's own: what was combined, or made a LoRA, has others.
    """
    name = adapter.settings.get(TYPE)
    if name not in types.names():
        return None
    module = types.get(name)
    if hasattr(module, "stored"):
        return module if {update.kind for update in adapter.updates.values()} == {module.KIND} else None
    parts = [(path, part) for path, update in adapter.updates.items() for part in update.parts]
    return module if all(name_of(module, path, part) for path, part in parts) else None


def files_of(adapter: Adapter, module: Any) -> Files:
    """Return an adapter in PEFT's names, with a config of its type."""
    tensors: dict[str, LazyTensor] = {}
    for path, update in adapter.updates.items():
        if hasattr(module, "stored"):
            tensors |= module.stored(path, update)
        else:
            tensors |= {str(name_of(module, path, part)): lazy for part, lazy in update.parts.items()}
    listed = list(adapter.settings.get("modules_to_save") or ())
    layers: set[str] = set()
    names = manifest.names_of({"replacements": adapter.replacements, "modules": adapter.updates})
    for path, lazy in adapter.replacements.items():
        place, _, name = path.rpartition(".")
        saved = any(f".{each}." in f".{place}." for each in listed)
        bias = adapter.settings.get("bias", "none") != "none" and name == "bias"
        if hasattr(module, "WHOLE") and not saved and not bias:
            tensors[keys.join(place, module.WHOLE + name)] = lazy
            layers.add(place)
        else:
            tensors[names[path]] = lazy
            listed += [] if saved or bias else [place]
    tensors |= {
        name: adapter.copies[path]
        for path, name in manifest.names_of({"replacements": adapter.copies, "modules": adapter.updates}).items()
    }
    base = adapter.base
    config = {name: adapter.settings[name] for name in _CARRIED if name in adapter.settings} | {
        **adapter.settings[FIELDS],
        "base_model_name_or_path": base.id if base else None,
        "inference_mode": True,
        "modules_to_save": sorted(listed) or None,
        "peft_type": adapter.settings[TYPE],
        "revision": base.revision if base else None,
        "target_modules": adapter.settings.get("target_modules") or sorted({*adapter.updates, *layers}),
    }
    return Files(tensors, config)
