"""The `adapter_config.json` of an adapter: what PEFT needs to apply the same numbers, derived in this one place.

PEFT computes s = α/r, or α/√r with `use_rslora`; here the rule is solved for α, so that the scaling that a file
records is the scaling that PEFT applies. What differs from the most common rank and alpha goes into patterns that match
one module's whole name each, so that their order, which PEFT does not keep, means nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.format import keys, manifest

# Settings that PEFT wrote and reads again, as long as they say something; older versions of PEFT refuse unknown fields,
# so a field at its default is left out.
_CARRIED = (
    "layer_replication", "target_parameters", "trainable_token_indices", "ensure_weight_tying", "megatron_config",
)  # fmt: skip
FOREIGN = "LORATOOLS"
"""The `peft_type` of an adapter with updates that PEFT's LoRA does not have (clause L-14)."""

# part of an update -> the switch that makes PEFT create it
_SWITCHES = {"lora_magnitude_vector": "use_dora", "lora_B.bias": "lora_bias"}


def derive_config(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of `adapter_config.json`, sorted, that make PEFT apply this adapter.

    `r` and `lora_alpha` are the most common ones (the smallest of equals); other modules have a `rank_pattern` or
    `alpha_pattern` of their own, `^` and the escaped name. rsLoRA is kept where it explains every scaling and the plain
    rule does not. What no config can say, the losses of the dialect `peft` list.
    """
    settings, updates = adapter.settings, adapter.updates
    base, kinds = adapter.base, {module: {"kind": update.kind} for module, update in updates.items()}
    identity = {"base_model_name_or_path": base and base.id, "revision": base and base.revision}
    targets = manifest.target_modules(kinds, settings, settings.get(manifest.ORIGIN, {}))
    from loratools.format.registry import KINDS  # not needed to read

    if any(update.kind not in KINDS or not KINDS[update.kind].peft for update in updates.values()):
        # PEFT has no such updates, and refuses a type that it does not know: it must not load half of an adapter.
        return {**identity, "peft_type": FOREIGN, "target_modules": targets, "task_type": settings.get("task_type")}
    rows = {module: list(update.replaced_rows) for module, update in updates.items() if update.replaced_rows}
    updates = {module: update for module, update in updates.items() if module not in rows}
    rslora = uses_rslora(updates.values())
    ranks = {_path(module, update): update.rank for module, update in updates.items()}
    alphas = {_path(module, update): _alpha(update, rslora) for module, update in updates.items()}
    r, alpha = manifest.usual(ranks.values(), 8), manifest.usual(alphas.values(), 8)
    config: dict[str, Any] = identity | {
        "alpha_pattern": {keys.exactly(module): value for module, value in sorted(alphas.items()) if value != alpha},
        "auto_mapping": settings.get("auto_mapping"),
        "bias": settings.get("bias", "none"),
        "fan_in_fan_out": settings.get("fan_in_fan_out", False),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": settings.get("lora_dropout", 0.0),
        "modules_to_save": _modules_to_save(adapter),
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {keys.exactly(module): value for module, value in sorted(ranks.items()) if value != r},
        "target_modules": targets,
        "task_type": settings.get("task_type"),
        "use_rslora": rslora,
    }
    config |= {name: settings[name] for name in _CARRIED if settings.get(name)}
    stacked = sorted({_path(module, update) for module, update in updates.items() if update.layout.get("parameter")})
    if manifest.unmatched(stacked, config.get("target_parameters") or ()):  # a sealed file says it in its modules alone
        config["target_parameters"] = stacked
    if rows:
        config["trainable_token_indices"] = rows
    for update in updates.values():
        config |= {_SWITCHES[part]: True for part in update.parts if part in _SWITCHES}
    return dict(sorted(config.items()))


def _path(module: str, update: Update) -> str:
    """Return what PEFT's patterns are matched with: a module's path, or that of a stack's parameter."""
    parameter = update.layout.get("parameter")
    return f"{re.sub(r'([.]base_layer)+$', '', module)}.{parameter}" if parameter else module


def uses_rslora(updates: Iterable[Update]) -> bool:
    """Tell whether s = α/√r explains every scaling and s = α/r does not (rank 1 fits both)."""
    updates = list(updates)
    return all(update.scaling == update.alpha / math.sqrt(update.rank) for update in updates) and not all(
        update.scaling == update.alpha / update.rank for update in updates
    )


def _alpha(update: Update, rslora: bool) -> float:
    """Return the α with which the rule gives exactly this scaling: the file's own where it does."""
    divisor = math.sqrt(update.rank) if rslora else update.rank
    solved = update.scaling * divisor
    near = (update.alpha, solved, math.nextafter(solved, -math.inf), math.nextafter(solved, math.inf))
    alpha = next((value for value in near if value / divisor == update.scaling), solved)
    return manifest.as_read(alpha)


def _modules_to_save(adapter: Adapter) -> list[str] | None:
    """Return the list as given, and the modules of replaced tensors that it does not name (real files lack some)."""
    listed = list(adapter.settings.get("modules_to_save") or ()) if adapter.replacements else []
    biases = adapter.settings.get("bias", "none") != "none"
    whole = {path.rpartition(".")[0] for path in adapter.replacements if not (biases and path.endswith(".bias"))}
    missing = {module for module in whole - {""} if not any(f".{name}." in f".{module}." for name in listed)}
    return sorted({*listed, *missing}) or None
