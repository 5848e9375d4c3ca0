#!/usr/bin/env python3
"""Write a checkpoint with its tensors in another dtype, shard by shard, to measure speed and memory on.

    python tests/make/cast_checkpoint.py BASE OUT {f16,f32}

A folder that exists is complete and is left alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

DTYPES = {"f16": torch.float16, "f32": torch.float32}


def cast(base: Path, output: Path, dtype: torch.dtype) -> None:
    """Write `base` as `output`, its tensors in `dtype`; under another name first, then renamed."""
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(base, part, ignore=shutil.ignore_patterns("*.safetensors"))
    total = 0
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            read = {name: tensors.get_tensor(name).to(dtype) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        save_file(read, part / file.name, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in read.values())
    index = part / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"total_size": total}}))
    part.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("dtype", choices=DTYPES)
    args = parser.parse_args()
    if not args.output.exists():
        cast(args.base, args.output, DTYPES[args.dtype])


if __name__ == "__main__":
    main()
