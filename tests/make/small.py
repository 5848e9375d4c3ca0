"""A small model of every model type of transformers: its default config, each number of a known name shrunk."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

LARGEST = 130_000_000
"""Parameters of the largest model that is still small."""

# What a model type is trained as, the usual first; the automatic class of each.
_TASKS = (
    "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MULTIMODAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_TEXT_TO_WAVEFORM",
    "MODEL_FOR_TEXT_TO_SPECTROGRAM", "MODEL_FOR_CTC", "MODEL_FOR_MASKED_LM", "MODEL_FOR_IMAGE_CLASSIFICATION",
    "MODEL_FOR_OBJECT_DETECTION", "MODEL_FOR_DEPTH_ESTIMATION", "MODEL",
)  # fmt: skip

SIZES: Mapping[str, Mapping[str, Any]] = {
    "layers": {
        r"(num|n)_(hidden_|encoder_|decoder_|attention_)?layers?|(encoder|decoder)_layers|depth|"
        r"(encoder|decoder)_num_hidden_layers|num_global_layers|(?!num_feat).*_(num_hidden_layers|num_layers|depth|layers)|"
        r"n_layer": 2,
        r"depths|num_blocks": [1], "layer_types|mlp_layer_types|layers_block_type": "cut",
        r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|n_dense_layers|first_k_dense": 1,
        r"num_nextn_predict_layers|num_kv_shared_layers|num_mtp_layers": 0,
    },
    "vocabulary": {r"(\w+_)?vocab_size(_\w+)?|codebook_size|audio_vocab_size": 128},
    "widths": {
        r"hidden_size|d_model|embed_dim|n_embd|dim|hidden_dim|embedding_size|encoder_hidden_size|decoder_hidden_size|"
        r"width|projection_dim|out_hidden_size|output_dim|text_hidden_size|word_embed_proj_dim|lm_hidden_size|"
        r"projector_hidden_size|mm_hidden_size|n_embed": 32,
        r"(\w+_)?intermediate_size|ffn_dim|(encoder|decoder)_ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim|"
        r"shared_expert_intermediate_size|moe_intermediate_size|feedforward_dim|dim_feedforward": 48,
        r"(\w*num_|n_|num_)?(encoder_|decoder_)?(\w*attention_|self_)?heads?|\w+_attention_heads|n_head|num_heads": 4,
        r"num_key_value_heads|\w+_key_value_heads|num_kv_heads|n_kv_heads": 2,
        r"(\w+_)?head_dim|d_kv|kv_channels|attention_head_size|attention_key_dim": 8,
        r"q_lora_rank|kv_lora_rank|o_lora_rank|dt_rank|\w+_lora_rank": 16,
        r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|index_head_dim|rotary_dim|qk_head_dim": 8,
        r"hidden_sizes|embed_dims|encoder_hidden_sizes|num_channels_list": [16],
        r"mrope_section": [1, 1, 2],
    },
    "experts": {
        r"num_(local_|routed_|total_)?experts|n_routed_experts|moe_num_experts|num_moe_experts": 4,
        r"num_experts_per_tok|moe_k|num_experts_per_token|moe_top_k|top_k_experts|moe_topk|n_group|topk_group": "two",
    },
    "images": {r"image_size|img_size|input_size": 32, r"patch_size": 8, "max_position_embeddings|n_positions": 64},
}  # fmt: skip
"""Groups of fields that are shrunk together: pattern of the whole name -> value. A group that keeps a class from being
built is left out."""

OPEN: Mapping[str, Any] = {
    "prediction_length": 2, "head_dim": 8, "num_key_value_heads": 2, "n_routed_experts": 4, "vocab_size": 128,
    "vocabulary_map": {"<image>": 4}, "n_shared_experts": 1,
}  # fmt: skip
"""Fields that a default leaves open (None), and a class asks for."""

OWN: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "glm5_next_text": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "neomme": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "zero_expert_num": 2, "num_layers": 2},
    "ernie4_5_vl_moe_text": {"hidden_size": 512},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "mistral_large4_text": {"kv_source_layers": [0, 1]},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "flaubert": {"n_words": 128, "emb_dim": 32, "n_heads": 4},
    "xlm": {"n_words": 128, "emb_dim": 32, "n_heads": 4},
}
"""What a model type needs beside that, in its own config wherever it lies."""


def names() -> dict[str, list[str]]:
    """Return model type -> names of its classes, what people most likely train first; none of them is imported."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    named: dict[str, list[str]] = {}
    for task in _TASKS:
        for model_type, name in getattr(modeling_auto, f"{task}_MAPPING_NAMES", {}).items():
            if model_type in CONFIG_MAPPING_NAMES:
                named.setdefault(model_type, []).append(name if isinstance(name, str) else name[0])
    return dict(sorted(named.items()))


def model_class(candidates: Sequence[str]) -> Any:
    """Return the first class of these that the packages here allow, None where there is none."""
    import transformers

    classes = (getattr(transformers, name, None) for name in candidates)
    usable = (cls for cls in classes if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel))
    return next((cls for cls in usable if cls.config_class), None)


@cache
def types() -> dict[str, Any]:
    """Return model type -> the class that people most likely train, for every model type that has one here."""
    made = {model_type: model_class(candidates) for model_type, candidates in names().items()}
    return {model_type: cls for model_type, cls in made.items() if cls is not None}


def built(cls: Any, config_class: Any = None) -> Any:
    """Return a small model of a class, the same every time. Raises what transformers raises where nothing builds it."""
    import torch

    first: Exception | None = None
    for groups in _attempts():
        try:
            config = _config(config_class or cls.config_class, groups)
            with torch.device("meta"):
                count = sum(each.numel() for each in cls(config).parameters())
            if count > LARGEST:
                raise ValueError(f"{count} parameters")
            config = _config(config_class or cls.config_class, groups)
            torch.manual_seed(0)
            model = cls(config)
            _fill(model)
            return model
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def _attempts() -> Iterator[tuple[str, ...]]:
    every = tuple(SIZES)
    yield every
    yield (*every, "open")
    for left_out in every:
        yield tuple(name for name in every if name != left_out)
    yield ("layers", "vocabulary", "experts")
    yield ("layers", "vocabulary")
    yield ("layers",)
    yield ("vocabulary",)
    yield ()


def _config(config_class: Any, groups: tuple[str, ...]) -> Any:
    """Return the default config, shrunk; made anew from the shrunk numbers, so that derived fields follow."""
    plain = config_class()
    shrunk = _shrunk(plain.to_dict(), groups)
    for key, value in _inner(plain):  # what to_dict leaves out is the default of the inner config's class
        shrunk.setdefault(key, _shrunk(value.to_dict(), groups))
    return config_class.from_dict(shrunk)


def _inner(config: Any) -> Iterator[tuple[str, Any]]:
    from transformers import PretrainedConfig

    yield from ((key, value) for key, value in vars(config).items() if isinstance(value, PretrainedConfig))


def _shrunk(told: Mapping[str, Any], groups: tuple[str, ...]) -> dict[str, Any]:
    patterns = [(re.compile(pattern), value) for name in groups for pattern, value in SIZES.get(name, {}).items()]
    made: dict[str, Any] = {}
    own = OWN.get(told.get("model_type", ""), {}) if "widths" in groups else {}
    for key, value in told.items():
        if not isinstance(key, str) or (value is None and "open" in groups and key in OPEN):
            made[key] = OPEN[key] if isinstance(key, str) else value
            continue
        if key == "per_layer_config" and isinstance(value, dict) and "layers" in groups:
            made[key] = {layer: each for layer, each in value.items() if int(layer) < 2}
            continue
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            made[key] = _shrunk(value, groups)
            continue
        wanted = next((new for pattern, new in patterns if pattern.fullmatch(key)), None)
        made[key] = _changed(value, wanted)
    made |= own
    size = made.get("vocab_size")
    for key, value in made.items():
        if (
            isinstance(key, str)
            and re.fullmatch(r"\w*token_(id|index)", key)
            and isinstance(value, int)
            and isinstance(size, int)
        ):
            made[key] = min(value, size - 1)
    return made


def _changed(value: Any, wanted: Any) -> Any:
    """Return what a field becomes: never larger than it was, a list as long as it was."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if wanted == "cut":
        return value[-2:] if isinstance(value, list) else value
    if wanted == "two":
        return min(value, 2) if number else value
    if isinstance(wanted, list) and isinstance(value, list | tuple):
        if len(wanted) > 1:
            return wanted if len(value) == len(wanted) else value
        return [wanted[0] * 2**i if wanted[0] > 1 else 1 for i in range(len(value))]
    if isinstance(wanted, int) and number:
        return min(value, wanted)
    if isinstance(wanted, int) and isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        return [min(each, wanted) for each in value]
    return value


def _fill(model: Any) -> None:
    """Give every parameter random numbers: a class may begin with zeros or leave memory as it was."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


if __name__ == "__main__":
    for model_type, cls in types().items():
        if len(sys.argv) > 1 and model_type not in sys.argv[1:]:
            continue
        try:
            model = built(cls)
            print(model_type, cls.__name__, sum(each.numel() for each in model.parameters()), flush=True)
        except Exception as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            print(model_type, cls.__name__, "FAILED", told, flush=True)
