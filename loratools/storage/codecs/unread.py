"""Ways of quantizing that config.json names and no file here reads: their names, and their codes, whatever their parts.

unread   the name of the scheme, where config.json states one that is not read
codes    tensors of integers that are codes by that alone
rotated  whether the weights are those of a rotated model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratools.storage.header import TensorSpec

READ = frozenset({
    "", "auto-round", "auto_round", "awq", "bitsandbytes", "compressed-tensors", "compressed_tensors", "fbgemm_fp8",
    "fp8", "gptq", "hqq", "intel/auto-round", "modelopt", "modelopt_fp4", "mxfp4", "mxfp8", "nvfp4", "torchao",
})  # fmt: skip
"""The `quant_method` of config.json that files here know; any other, known by name or not, is refused by its name."""

_NAMES = {
    "aqlm": "AQLM", "bitblas": "BitBLAS", "bitnet": "BitNet", "eetq": "EETQ int8", "exl2": "EXL2", "exl3": "EXL3",
    "fouroversix": "Four Over Six", "fp_quant": "FP-Quant", "gemma": "Gemma's quantization", "higgs": "HIGGS",
    "marlin": "Marlin", "metal": "Metal", "paroquant": "ParoQuant", "qqq": "QQQ", "quanto": "quanto", "quark": "Quark",
    "sinq": "SINQ", "spqr": "SpQR", "svdquant": "SVDQuant (nunchaku)", "vptq": "VPTQ",
}  # fmt: skip

_DTYPES = frozenset({"U8", "I8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2"})

# Integers that belong to plain modules.
_BUFFERS = frozenset({
    "bias", "masked_bias", "num_batches_tracked", "position_ids", "relative_position_index", "token_type_ids",
})  # fmt: skip


def unread(statement: Mapping[str, Any]) -> str | None:
    """Return the name of the scheme that config.json states and no file here reads; None where it is read."""
    method = str(statement.get("quant_method") or "").lower()
    return None if method in READ else _NAMES.get(method, method)


def rotated(statement: Mapping[str, Any]) -> bool:
    """Tell whether config.json says that the weights are those of a rotated model: no ΔW of the model itself fits."""
    transforms = statement.get("transform_config")
    return bool(transforms.get("config_groups", True) if isinstance(transforms, Mapping) and transforms else transforms)


def codes(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str, str]]:
    """Yield name, module and part of every tensor of integers, or of floats of at most 8 bits, that is no buffer."""
    for name, spec in specs.items():
        module, _, part = name.rpartition(".")
        if spec.dtype in _DTYPES and spec.shape and part not in _BUFFERS:
            yield name, module.removesuffix(".weight"), part
