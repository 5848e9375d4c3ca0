#!/usr/bin/env python3
"""Make quantized copies of a checkpoint of `big_checkpoint.py`, by plain formulas, to measure speed and memory on.

    python -m tests.make.quantized_checkpoint 1b OUT

Beside OUT/base, made if need be, it writes OUT/fp8 (E4M3, blocks of 128 × 128), OUT/nf4 (bitsandbytes, blocks of 64,
double quantization), OUT/int4 (compressed-tensors, groups of 128), OUT/gptq (4 bit, groups of 128) and OUT/q8_0.gguf.
Linear layers of blocks are codes, all else stays as it is, but for GGUF, where the embeddings are codes too. A folder
that exists is complete and is left alone. Never commit the output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tests.make import big_checkpoint
from tests.make.big_checkpoint import SIZES, Size

GROUP = 128
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
Tensors = Iterator[tuple[str, Tensor]]


def fp8(path: str, W: Tensor) -> Tensors:
    """Return E4M3 codes and a scale for each block."""
    rows, columns = W.shape
    blocks = W.view(rows // 128, 128, columns // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    yield f"{path}.weight", (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(W.shape)
    yield f"{path}.weight_scale_inv", scale


def nf4(path: str, W: Tensor) -> Tensors:
    """Return codes two a byte, codes of their scales, and the state."""
    blocks = W.view(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / absmax[:, None], (NF4[1:] + NF4[:-1]) / 2).to(torch.uint8).view(-1, 2)
    offset = absmax.mean()
    nested = (absmax - offset).view(-1, 256)
    largest, levels = nested.abs().amax(1), torch.linspace(-1, 1, 256)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(W.shape), "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": float(offset),
    }  # fmt: skip
    yield f"{path}.weight", (codes[:, 0] << 4 | codes[:, 1]).view(-1, 1)
    yield f"{path}.weight.absmax", ((nested / largest[:, None] + 1) * 127.5).round().to(torch.uint8).view(-1)
    yield f"{path}.weight.quant_map", NF4.clone()
    yield f"{path}.weight.nested_absmax", largest
    yield f"{path}.weight.nested_quant_map", levels
    raw = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    yield f"{path}.weight.quant_state.bitsandbytes__nf4", torch.from_numpy(raw)


def _int4(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (rows, columns) from 0 to 15 and scales (rows, groups)."""
    groups = W.view(len(W), -1, GROUP)
    scale = (groups.abs().amax(2) / 7.5).half()
    codes = (groups / scale.float()[:, :, None]).round().clamp(-8, 7) + 8
    return codes.to(torch.int64).view(W.shape), scale


def _words(codes: Tensor) -> Tensor:
    """Return eight codes in each word of 32 bits, along the rows."""
    shifted = codes.view(len(codes), -1, 8) << 4 * torch.arange(8)
    return shifted.sum(2).to(torch.int32)


def int4(path: str, W: Tensor) -> Tensors:
    """Return words along the rows, and a scale for each group."""
    codes, scale = _int4(W)
    yield f"{path}.weight_packed", _words(codes)
    yield f"{path}.weight_scale", scale.bfloat16()
    yield f"{path}.weight_shape", torch.tensor(W.shape)


def gptq(path: str, W: Tensor) -> Tensors:
    """Return words along the columns, zero points of 8, and a scale for each group."""
    codes, scale = _int4(W)
    yield f"{path}.qweight", _words(codes).T.contiguous()
    yield f"{path}.scales", scale.T.contiguous()
    yield f"{path}.qzeros", torch.full((scale.shape[1], len(W) // 8), 0x77777777, dtype=torch.int32)
    yield f"{path}.g_idx", (torch.arange(W.shape[1]) // GROUP).to(torch.int32)


_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
SCHEMES: Mapping[str, tuple[Callable[[str, Tensor], Tensors], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                  "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]}),
    "int4": (int4, {"quant_method": "compressed-tensors", "format": "pack-quantized",
                    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}}, "ignore": ["lm_head"]}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
}  # fmt: skip


def stored(base: Path) -> Tensors:
    """Yield the tensors of a checkpoint one after another."""
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safe_open is no mapping)
                yield name, tensors.get_tensor(name)


def write_copy(folder: Path, base: Path, size: Size, scheme: str) -> None:
    """Write a copy with the linear layers of its blocks in a scheme."""
    convert, statement = SCHEMES[scheme]

    def tensors() -> Tensors:
        for name, W in stored(base):
            if ".layers." in name and W.ndim == 2:
                yield from convert(name.removesuffix(".weight"), W.float())
            else:
                yield name, W

    big_checkpoint.write_checkpoint(folder, tensors(), size)
    (folder / "config.json").write_text(json.dumps(size.config | {"quantization_config": statement}, indent=1))


def write_gguf(path: Path, base: Path, size: Size) -> None:
    """Write a GGUF file in Q8_0, as llama.cpp's converter names tensors."""
    import gguf

    from tests.make.gguf_models import name_of, permuted

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(size.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(size.hidden)
    writer.add_feed_forward_length(size.inner)
    heads, kv_heads = size.hidden // size.head, size.kv // size.head
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(7)
    for name, W in stored(base):
        count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        array = (permuted(W, count) if count else W).float().numpy()
        if array.ndim < 2:
            writer.add_tensor(name_of(name), array)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name_of(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(size: str, out: Path) -> None:
    """Make the base, its adapters, and all copies that are not there."""
    subprocess.run([sys.executable, big_checkpoint.__file__, size, str(out)], check=True)
    shape = SIZES[size]
    for scheme in SCHEMES:
        big_checkpoint.make(out / scheme, lambda folder, scheme=scheme: write_copy(folder, out / "base", shape, scheme))
    if not (path := out / "q8_0.gguf").exists():
        print(path.name, flush=True)
        write_gguf(path.with_suffix(".part"), out / "base", shape)
        path.with_suffix(".part").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path, help="the folder to write to; it is made if need be")
    args = parser.parse_args()
    make(args.size, args.out)


if __name__ == "__main__":
    main()
