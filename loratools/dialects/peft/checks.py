"""What must agree in a PEFT adapter: its tensors with each other, and with its config."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from loratools.dialects._frame.build import some
from loratools.dialects.peft.config import PeftConfig
from loratools.dialects.peft.names import Groups, unwrap
from loratools.dialects.peft.targets import Targets
from loratools.format import keys
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_FACTORS_A = {one for one, _ in _PAIRS}
_NUMBER = r"\.\d+(?=\.|$)"
_NESTED = r"(\.base_layer)+$"
_FACTOR = r"\.lora_[AB]\.([^.]+\.)?weight$"


def is_flat(name: str, lazy: LazyTensor) -> bool:
    """Tell whether a tensor is flat where a factor has rows and columns, as in a save of one rank's share."""
    return "_flat_param" in name or (len(lazy.shape) == 1 and re.search(_FACTOR, unwrap(name)) is not None)


def faults(groups: Groups, config: PeftConfig, held: Collection[str]) -> list[str]:
    """List missing partners, tensors that the config contradicts, and targets of the config without tensors.

    `held` are the modules whose own parameters the config targets.
    """
    lines = []
    dora = config.fields.get("use_dora")
    for module, parts in groups.modules.items():
        for pair in _PAIRS:
            if (pair[0] in parts) != (pair[1] in parts):
                missing = pair[pair[0] in parts]
                lines.append(f"{keys.join(module, missing)}: missing, while its partner is there")
        if dora and "lora_magnitude_vector" not in parts and not _FACTORS_A.isdisjoint(parts):
            lines.append(f"{keys.join(module, 'lora_magnitude_vector')}: missing, and the config says use_dora")
        for part, lazy in parts.items():
            if not lazy.dtype.startswith(("F", "BF")):
                lines.append(f"{keys.join(module, part)}: {lazy.dtype} numbers, expected floating point")
        path = re.sub(_NESTED, "", module.partition(".base_layer.")[0]) if ".base_layer" in module else module
        if any(part.startswith("lora_") for part in parts) and path not in held and not _targeted(path, config):
            lines.append(f"{module}: has tensors, but the config does not target it, so PEFT would ignore them")
    return lines + [
        f"{name}: the config targets it by its full name, but it has no tensors"
        for name in config.targets.unused(groups.modules)
        if in_layer(name) and config.targets.select(name)
    ]


def lacking(modules: Collection[str], targets: Targets, base: Checkpoint | None) -> list[str]:
    """Return a note on the modules of the base that a config targets and a file has no tensors for, or nothing.

    Looked for are those whose names are that of one of `modules` but for the numbers, as the same in another layer.
    """
    alike = {re.sub(_NUMBER, ".#", module) for module in modules}
    names = [name.removesuffix(".weight") for name in (base.specs if base else ()) if name.endswith(".weight")]
    missing = [
        name for name in names if name not in modules and re.sub(_NUMBER, ".#", name) in alike and targets.select(name)
    ]
    if not missing:
        return []
    return [f"no tensors for {some(missing)}, which the config targets: what is not there changes nothing"]


def is_plain(module: str, groups: Groups) -> bool:
    """Tell whether a module's name says which weight it is.

    A name with `base_layer` does not: PEFT wraps two targets in one place there, and the name does not say which. The
    exception is the output projection of an `nn.MultiheadAttention`, which PEFT always wraps with the attention itself.
    """
    if "base_layer" not in module:
        return True
    outer, nested, inner = module.partition(".base_layer.")
    return "base_layer" not in module.split(".") or (bool(nested) and inner == "out_proj" and outer in groups.modules)


def _targeted(module: str, config: PeftConfig) -> bool:
    # PEFT gives a tied layer an adapter without a name in target_modules.
    tied = bool(config.fields.get("ensure_weight_tying")) and not in_layer(module)
    return tied or config.targets.select(module)


def in_layer(name: str) -> bool:
    """Tell whether a name has a layer's number in it."""
    return re.search(r"\.\d+\.", name) is not None
