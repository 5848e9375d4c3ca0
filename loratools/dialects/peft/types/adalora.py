"""ADALORA: singular values that training prunes, ranks of which may be gone (kind `adalora`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors, number, rank

PARTS = {"lora_A": "right factor: (r, in·…)", "lora_B": "left factor: (out, r)", "lora_E": "values: (r, 1)"}


def _kept(value: Any) -> bool:
    """Tell whether a value maps names to lists of switches, one for each rank at the beginning."""
    return isinstance(value, dict) and all(
        isinstance(each, list) and all(type(switch) is bool for switch in each) for each in value.values()
    )


FIELDS = {
    "init_r": rank(12), "lora_alpha": number(8), "rank_pattern": Field(_kept, "names to lists of switches", None),
}  # fmt: skip
_TRAINING = (
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "lora_dropout",
)  # fmt: skip
HARMLESS = {
    **dict.fromkeys(_TRAINING, "training only"),
    "r": "init_r counts",
    **dict.fromkeys(("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"), "training"),
    **dict.fromkeys(("use_rslora", "alpha_pattern", "ensure_weight_tying"), "AdaLoRA does not look at it"),
    **dict.fromkeys(("megatron_config", "megatron_core", "runtime_config", "velora_config"), "how it is computed"),
    "qalora_group_size": "counts only with use_qalora, which is refused",
}
_OF_LORA = "a variant of LoRA that AdaLoRA does not have"
_VARIANTS = (
    "use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens", "monteclora_config", "use_bdlora", "arrow_config",
    "kasa_config", "target_parameters", "layer_replication", "trainable_token_indices",
)  # fmt: skip
REFUSED = dict.fromkeys(_VARIANTS, (bool, _OF_LORA))


def deleted(fields: Mapping[str, Any]) -> set[str]:
    """Return the modules of which no rank is left, and whose tensors are empty."""
    kept = fields.get("rank_pattern") or {}
    return {name.removesuffix(".lora_E") for name, switches in kept.items() if not any(switches)}


def update(one: ModuleTensors) -> Update:
    """Return the update with PEFT's s = α/(r₀ + 10⁻⁵), α the rank that is left where it is not above zero."""
    one.has(*PARTS)
    kept = (one["rank_pattern"] or {}).get(f"{one.module}.lora_E")
    left = one["init_r"] if kept is None else sum(kept)
    alpha = one["lora_alpha"] if one["lora_alpha"] > 0 else float(left)
    built: Update = kinds.get("adalora").build(one.parts, alpha / (one["init_r"] + 1e-5), alpha)
    if built.rank != left:
        raise ValueError(f"its tensors have rank {built.rank}, the config says that {left} are left")
    return built
