"""The stop of the tour at a quantized base: codes of 8 bits, into which an adapter is merged without losing it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from loratools.demo.recorded import recorded
from loratools.demo.stop import Stop
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.dequantize import dequantize
from loratools.surgery.merge import merge
from loratools.surgery.verify import verify

BLOCK = 128
LARGEST = 448.0
"""The largest number of FP8 E4M3."""


def quantized(folder: Path) -> Stop:
    """Quantize the base as DeepSeek's and Qwen's FP8 models are, and merge the adapter into it in two ways."""
    _write_fp8(folder / "base", folder / "quantized")
    with recorded("dequantize", model=folder / "quantized"):
        plain = dequantize(folder / "quantized", folder / "plain", verify=True)
    with recorded("merge", base=folder / "quantized", adapters=[folder / "adapter"]):
        kept = merge(folder / "quantized", [folder / "adapter"], folder / "in-16-bit")
    with recorded("merge", {"quantized": "requantize"}, base=folder / "quantized", adapters=[folder / "adapter"]):
        again = merge(folder / "quantized", [folder / "adapter"], folder / "codes", quantized="requantize")
    proof = verify(folder / "in-16-bit", folder / "quantized", [folder / "adapter"], exact=True)
    if not proof.ok or plain.verified is None:
        raise RuntimeError("a merge into codes is not what they stand for + adapter")
    least = min(again.recoded.values())
    return Stop(
        "A base of 8-bit codes (FP8 in blocks): merged in 16 bit it loses nothing, made codes again it may.",
        "loratools merge quantized adapter -o codes --quantized requantize",
        (
            f"dequantized: {plain.modules} modules, each number that of its code and scale; "
            f"{plain.bytes_before:,} bytes become {plain.bytes_written:,}",
            f"in 16 bit {kept.retention or 0:.2%} of the change survives, and each changed tensor is proved in float64",
            f"as codes again {again.retention or 0:.2%} survives, measured through the quantization; least in a module "
            f"{least:.2%}",
        ),
        {"retention": {"dequantize": kept.retention, "requantize": again.retention}},
    )


def _write_fp8(base: Path, target: Path) -> None:
    """Write the base with its projections in FP8: q = W/s rounded to E4M3, s = max|block|/448, blocks of 128 x 128."""
    import torch
    from safetensors.torch import save_file

    model = Checkpoint.open(base)
    tensors: dict[str, torch.Tensor] = {}
    for name in model.specs:
        W = model.read(name)
        if not name.endswith("_proj.weight"):
            tensors[name] = W
            continue
        scales = torch.ones(-(-W.shape[0] // BLOCK), -(-W.shape[1] // BLOCK))
        codes = torch.empty(W.shape, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1))
                scales[i, j] = W[block].abs().max().float() / LARGEST or 1
                codes[block] = (W[block].float() / scales[i, j]).clamp(-LARGEST, LARGEST).to(codes.dtype)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scales
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8", newline="\n")
