"""Every way of quantizing that has a name, told by the tensors it writes; and models that only look like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratools.storage.codecs.schemes import SCHEMES, find
from loratools.storage.header import TensorSpec

Q, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"
PLAIN = {"model.layers.0.self_attn.k_proj.weight": "BF16", "model.embed_tokens.weight": "BF16", f"{Q}.bias": "F16"}

# What is written for one module: scheme, config's quantization, part -> dtype, and the module if it is not q_proj.
LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, str], str]] = {
    "bnb nf4": ("bitsandbytes NF4", {"quant_method": "bitsandbytes", "load_in_4bit": True},
                {"weight": "U8", "weight.absmax": "U8", "weight.quant_map": "F32", "weight.nested_absmax": "F32",
                 "weight.nested_quant_map": "F32", "weight.quant_state.bitsandbytes__nf4": "U8"}, Q),
    "bnb fp4 in bf16": ("bitsandbytes FP4", {}, {"weight": "BF16", "weight.absmax": "F32", "weight.quant_map": "F32",
                                                 "weight.quant_state.bitsandbytes__fp4": "U8"}, Q),
    "bnb stack": ("bitsandbytes NF4", {}, {"absmax": "F32", "quant_map": "F32",
                                           "quant_state.bitsandbytes__nf4": "U8"}, f"{EXPERTS}.gate_up_proj"),
    "bnb int8": ("bitsandbytes int8 (LLM.int8)", {}, {"weight": "I8", "SCB": "F32", "weight_format": "U8"}, Q),
    "gptq": ("GPTQ", {"quant_method": "gptq", "bits": 4},
             {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}, Q),
    "gptq, no config": ("GPTQ", {}, {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}, Q),
    "awq": ("AWQ", {"quant_method": "awq"}, {"qweight": "I32", "qzeros": "I32", "scales": "F16"}, Q),
    "auto-round": ("AutoRound", {"quant_method": "auto-round"},
                   {"qweight": "I32", "qzeros": "I32", "scales": "F16"}, Q),
    "mxfp4": ("MXFP4", {"quant_method": "mxfp4"}, {"_blocks": "U8", "_scales": "U8"}, f"{EXPERTS}.down_proj"),
    "mlx": ("MLX", {"bits": 4, "group_size": 64}, {"weight": "U32", "scales": "BF16", "biases": "BF16"}, Q),
    "ct packed": ("compressed-tensors", {"quant_method": "compressed-tensors", "format": "pack-quantized"},
                  {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64",
                   "weight_zero_point": "I32"}, Q),
    "ct float": ("compressed-tensors", {"quant_method": "compressed-tensors"},
                 {"weight": "F8_E4M3", "weight_scale": "BF16", "input_scale": "BF16"}, Q),
    "ct frozen": ("compressed-tensors", {"quant_method": "compressed-tensors"},
                  {"weight": "BF16", "weight_scale": "BF16"}, Q),
    "fp8": ("FP8 with scales", {"quant_method": "fp8"}, {"weight": "F8_E4M3", "weight_scale_inv": "F32"}, Q),
    "fp8 stack": ("FP8 with scales", {"quant_method": "fp8"}, {"": "F8_E4M3", "_scale_inv": "F32"},
                  f"{EXPERTS}.gate_up_proj"),
    "modelopt nvfp4": ("NVFP4 (modelopt)", {"quant_algo": "NVFP4"}, {"weight": "U8", "weight_scale": "F8_E4M3",
                                                                     "weight_scale_2": "F32", "input_scale": "F32"}, Q),
    "modelopt fp8": ("modelopt", {"quant_method": "modelopt", "quant_algo": "FP8"},
                     {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"}, Q),
    "modelopt svd": ("NVFP4 with SVDQuant (modelopt)", {"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"},
                     {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "pre_quant_scale": "BF16",
                      "svdquant_lora_a": "BF16", "svdquant_lora_b": "BF16"}, Q),
    "torchao": ("torchao", {"quant_method": "torchao"}, {"_weight_qdata": "I8", "_weight_scale": "F32",
                                                         "_weight_zero_point": "I8"}, Q),
    "hqq": ("HQQ", {"quant_method": "hqq"}, {"W_q": "U8", "scale": "F16", "zero": "F16", "shape": "I64"}, Q),
    "exl3": ("EXL3", {"quant_method": "exl3"}, {"trellis": "I16", "suh": "F16", "svh": "F16"}, Q),
    "exl2": ("EXL2", {}, {"q_weight": "I32", "q_invperm": "I16", "q_scale": "I32", "q_groups": "I16"}, Q),
    "quanto": ("quanto", {}, {"weight._data": "I8", "weight._scale": "F16", "input_scale": "F16"}, Q),
    "fp8 stack, static": ("FP8 with scales", {"quant_method": "fp8"},
                          {"": "F8_E4M3", "_scale_inv": "F32", "_activation_scale": "F32"}, f"{EXPERTS}.gate_up_proj"),
    "fp8 stack of modelopt": ("modelopt", {"quant_algo": "FP8"},
                              {"": "F8_E4M3", "_weight_scale": "F32", "_input_scale": "F32"}, f"{EXPERTS}.down_proj"),
    "fp8 of DeepSeek-V4": ("FP8 with scales", {"quant_method": "fp8"}, {"weight": "F8_E4M3", "scale": "F8_E8M0"}, Q),
    "fp8 of Mistral": ("FP8 with scales", {"quant_method": "fp8"},
                       {"weight": "F8_E4M3", "qscale_weight": "F32", "qscale_act": "F32"}, Q),
    "comfy, with JSON": ("ComfyUI", {}, {"weight": "F8_E4M3", "weight_scale": "F32", "comfy_quant": "U8"}, Q),
    "comfy, NVFP4": ("ComfyUI", {}, {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32",
                                     "comfy_quant": "U8"}, Q),
    "comfy": ("scaled FP8 (ComfyUI)", {}, {"weight": "F8_E4M3", "scale_weight": "F32", "scale_input": "F32"}, Q),
    "fp8 cast": ("FP8 without scales", {}, {"weight": "F8_E5M2"}, Q),
    "gguf": ("GGUF", {}, {"weight": "Q4_K"}, Q),
    "nunchaku": ("SVDQuant (nunchaku)", {}, {"qweight": "I8", "wscales": "BF16", "smooth": "BF16",
                                             "proj_down": "BF16"}, Q),
    "aqlm": ("AQLM", {"quant_method": "aqlm"}, {"codes": "I16", "codebooks": "F16", "scales": "F16"}, Q),
    "vptq": ("VPTQ", {"quant_method": "vptq"}, {"centroids": "F16", "indices": "I32", "weight_scale": "F16"}, Q),
    "bitnet": ("BitNet", {"quant_method": "bitnet"}, {"weight": "U8", "weight_scale": "BF16"}, Q),
}  # fmt: skip


def specs(names: dict[str, str]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(dtype, (4, 4), Path("model.safetensors"), 0, 0) for name, dtype in names.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scheme_is_called_by_its_name(layout: str) -> None:
    scheme, stated, parts, module = LAYOUTS[layout]
    joined = {
        f"{module}{'' if not part or (part[0] == '_' and module != Q) else '.'}{part}": parts[part] for part in parts
    }
    codes = find(specs(PLAIN | joined), {"quantization_config": stated} if stated else {})
    assert codes.modules == {module: scheme}
    assert codes.tensors == joined.keys()
    assert all(codes.of_tensor(name) == scheme for name in joined if name.startswith(f"{module}."))
    assert (codes.stated is None) == (not stated)


def test_every_scheme_has_a_layout_here() -> None:
    untold = {"bitsandbytes 4 bit", "FP-Quant", "AWQ or GPTQ", "SpQR", "HIGGS", "EETQ int8"}
    assert {scheme.name for scheme in SCHEMES} - {layout[0] for layout in LAYOUTS.values()} == untold


@pytest.mark.parametrize(
    "names",
    [
        {"model.embeddings.position_ids": "I64", "h.0.attn.bias": "BOOL", "h.0.attn.masked_bias": "F32"},
        {"swin.relative_position_index": "I64", "bn.num_batches_tracked": "I64"},
        {"attn.W_q": "BF16", "attn.W_k": "BF16"},  # a projection of its own name, not HQQ's codes
        {"vq.codebooks": "F32", "kmeans.centroids": "F32", "vq.codes": "I32"},
        {"clip.logit_scale": "F32", "layer.gamma_scale": "F32", "norm.scale": "F32", "x.layer_scale": "F32"},
        {"time.token_blocks": "F32", "pyramid.feature_scales": "F32"},
        {"rope.freqs_cis": "C64", "lookup.table": "I32"},
    ],
)
def test_models_that_only_look_like_it(names: dict[str, str]) -> None:
    codes = find(specs(PLAIN | names), {"model_type": "llama"})
    assert (dict(codes.modules), codes.tensors) == ({}, frozenset())


def test_a_calibration_beside_plain_weights() -> None:
    """The scales of a cache are the quantization's, the weights beside them are plain numbers."""
    scales = {"model.layers.0.self_attn.k_scale": "F32", "model.layers.0.self_attn.k_proj.input_scale": "F32"}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}}
    codes = find(specs(PLAIN | scales), config)
    assert (dict(codes.modules), codes.tensors) == ({}, scales.keys())
    awq = find(
        specs(PLAIN | {"model.layers.0.mlp.act.scales": "F16"}), {"quantization_config": {"quant_method": "awq"}}
    )
    assert awq.tensors == {"model.layers.0.mlp.act.scales"}
