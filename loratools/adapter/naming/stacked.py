"""How the classes of transformers 5 stack the weights of experts; `python -m tests.make.stacked_models` lists it.

A file names neither the order in which a class registers its parameters, which is the order in which PEFT wraps them,
nor how a square weight lies. These tables do, for the model types of transformers; of others evidence must tell.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loratools.decisions import warned

ORDERS: tuple[tuple[str, ...], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    ("up_proj", "down_proj"),
    ("w1", "v1", "w2"),
)
"""Parameters of one module in the order in which classes register them."""

IS_TRANSPOSED = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
"""Model types whose experts PEFT takes for (E, in, out), since their classes say `is_transposed`."""

STORED_IN_OUT = frozenset({
    "aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "llama4_vision_model", "openai_privacy_filter",
})  # fmt: skip
"""Model types that compute with (E, in, out). PEFT does not know it of Llama 4, whose class does not say so."""

INTERLEAVED = frozenset({"gpt_oss"})
"""Model types that store the rows of gate and up in turn: g₀, u₀, g₁, u₁, …"""

KNOWN = frozenset({
    "afmoe", "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "convbert", "csm",
    "csm_depth_decoder_model", "dbrx", "deepseek_ocr2", "deepseek_ocr2_encoder", "deepseek_ocr2_sam_vision_model",
    "deepseek_ocr2_text", "deepseek_ocr2_vision", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4",
    "diffusion_gemma", "diffusion_gemma_text", "dinat", "dots1", "dots3_note", "dots3_note_audio_encoder",
    "dots3_note_text", "dots3_note_vision_encoder", "ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text",
    "ernie4_5_vl_moe_vision", "esmfold2", "exaone_moe", "flex_olmo", "flint", "gemma4", "gemma4_audio",
    "gemma4_text", "gemma4_unified", "gemma4_unified_audio", "gemma4_unified_text", "gemma4_unified_vision",
    "gemma4_vision", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm4v_moe_vision", "glm5_next",
    "glm5_next_text", "glm5_next_vision", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2", "inkling2_text",
    "inkling2_vision", "inkling_audio", "inkling_mm_model", "inkling_text", "inkling_vision", "jamba", "jetmoe",
    "kimi_k25", "kimi_k25_vision", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "llama4_text",
    "llama4_vision_model", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl",
    "minimax_m3_vl_text", "minimax_m3_vl_vision", "mistral4", "mistral_large4", "mistral_large4_text", "mixtral",
    "muse_spark", "muse_spark_audio", "muse_spark_text", "muse_spark_vision", "nemotron_h", "olmoe",
    "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_moe_vision",
    "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_audio_encoder",
    "qwen3_omni_moe_talker_code_predictor", "qwen3_omni_moe_talker_text", "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker", "qwen3_omni_moe_vision_encoder", "qwen3_vl_moe", "qwen3_vl_moe_text",
    "qwen3_vl_moe_vision", "qwen4_exp", "qwen4_exp_text", "qwen4_exp_vision", "solar_open", "step3p5",
    "step3p5_vision", "step3p7", "unlimited_ocr", "unlimited_ocr_sam_vision_model", "unlimited_ocr_text",
    "unlimited_ocr_vision", "unlimited_ocr_vision_encoder", "zamba", "zaya",
})  # fmt: skip
"""Model types with stacked weights, among them those above."""


def in_order(parameters: Collection[str]) -> list[str] | None:
    """Return parameters of one module in the order in which classes register them; None where no class has them.

    >>> in_order({"down_proj", "up_proj"}), in_order({"w_in", "w_out"})
    (['up_proj', 'down_proj'], None)
    """
    order = next((order for order in ORDERS if set(parameters) <= set(order)), None)
    return None if order is None else [name for name in order if name in parameters]


def nested(module: str, parameters: Collection[str]) -> dict[str, str]:
    """Return parameter -> module as PEFT names the wrappers of one module: the one registered first is innermost.

    >>> nested("mlp.experts", ["down_proj", "gate_up_proj"])
    {'down_proj': 'mlp.experts', 'gate_up_proj': 'mlp.experts.base_layer'}
    """
    order = in_order(parameters)
    if order is None and len(parameters) > 1:
        order = sorted(parameters)
        warned(
            "%s: no class that is known registers %s; PEFT, whose files do not name them, may take one for another",
            module, " and ".join(order),
        )  # fmt: skip
    outermost_first = (order or list(parameters))[::-1]
    return {name: module + ".base_layer" * depth for depth, name in enumerate(outermost_first)}


def known_type(config: Mapping[str, Any]) -> str | None:
    """Return the first model type of a config.json that is in `KNOWN`: the model's own, or that of one inside it."""
    parts = (config, *(value for key, value in config.items() if key.endswith("_config")))
    types = (part.get("model_type") for part in parts if isinstance(part, Mapping))
    return next((each for each in types if isinstance(each, str) and each in KNOWN), None)
