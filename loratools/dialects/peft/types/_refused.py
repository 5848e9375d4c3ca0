"""The types of PEFT that no weight can take in, and why: what they do depends on the tokens or on the activations."""

from __future__ import annotations

_PROMPT = "trained vectors stand before the tokens of the input; no weight changes, so there is nothing to merge"

REFUSED = {
    "PROMPT_TUNING": f"prompt tuning: {_PROMPT}",
    "MULTITASK_PROMPT_TUNING": f"multitask prompt tuning: {_PROMPT}",
    "P_TUNING": f"p-tuning: {_PROMPT}",
    "CPT": f"context-aware prompt tuning: {_PROMPT}",
    "PREFIX_TUNING": "prefix tuning: trained keys and values stand before those of each layer; no weight changes",
    "CARTRIDGE": "a cartridge: a trained cache of keys and values stands before those of each layer; no weight changes",
    "ADAPTION_PROMPT": "LLaMA-Adapter: each layer attends to a trained prompt behind a gate; no weight changes",
    "LILY": "LILY: a router weighs several factors for each token; there is no single change of a weight",
    "XLORA": "X-LoRA: a classifier weighs several LoRAs for each token; merge those LoRAs one by one",
    "POLY": "Poly: a router weighs several LoRAs by the task of the input; there is no single change of a weight",
    "SHADOW": "Shadow: a small model runs beside the base and adds to its activations; no weight changes",
}
"""`peft_type` -> what it is, and why it cannot be merged."""
