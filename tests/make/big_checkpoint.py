#!/usr/bin/env python3
"""Make a Llama-shaped checkpoint with random weights, to measure speed and memory on.

    python tests/make/big_checkpoint.py 1b OUT [--rank 16] [--tuned]

It writes these folders under OUT:

    base/        safetensors shards of about 1 GB, index and config.json, bf16
    adapter/     a PEFT LoRA, F32, on all seven linear layers of every block
    adapter2/    another one, to combine with it
    dora/        a PEFT DoRA on the same layers, its magnitudes near the norms of the rows
    tuned/       with --tuned: base plus a delta whose singular values fall like i^-0.8 up to rank 128,
                 plus white noise, plus changed norms; the same shards, bf16

Sizes: mini 0.3 GB, 1b 2.5 GB, 3b 6.4 GB, 8b 16 GB. Speed does not depend on the values; the spectra are as stated.
A folder that exists is complete and is left alone. Never commit the output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 1_000_000_000
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a Llama: `kv` is the width of all key or value heads together, `head` that of one."""

    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int
    tied: bool
    head: int

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: module -> (out, in)."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def config(self) -> dict[str, object]:
        """What transformers reads from config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // self.head,
            "num_key_value_heads": self.kv // self.head,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        }


SIZES = {
    "mini": Size(8, 1024, 4096, 256, 32000, True, 64),
    "1b": Size(16, 2048, 8192, 512, 128256, True, 64),
    "3b": Size(28, 3072, 8192, 1024, 128256, True, 128),
    "8b": Size(32, 4096, 14336, 1024, 128256, False, 128),
}


def normal(generator: torch.Generator, *shape: int, std: float = 0.02) -> Tensor:
    return torch.randn(*shape, generator=generator) * std


def base_tensors(size: Size) -> Iterator[tuple[str, Tensor]]:
    """Draw the base model's tensors one after another, so that only one shard need be in memory."""
    generator = torch.Generator().manual_seed(0)
    yield "model.embed_tokens.weight", normal(generator, size.vocabulary, size.hidden).bfloat16()
    for layer in range(size.layers):
        for module, shape in size.linear.items():
            yield f"model.layers.{layer}.{module}.weight", normal(generator, *shape).bfloat16()
        for norm in NORMS:
            yield f"model.layers.{layer}.{norm}.weight", torch.ones(size.hidden, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(size.hidden, dtype=torch.bfloat16)
    if not size.tied:
        yield "lm_head.weight", normal(generator, size.vocabulary, size.hidden).bfloat16()


def tuned_tensors(base: Path) -> Iterator[tuple[str, Tensor]]:
    """Move every linear layer by a tenth of its norm along a falling spectrum, and add white noise and new norms."""
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.arange(1, 129).float() ** -0.8
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safe_open is no mapping)
                W = tensors.get_tensor(name).float()
                if ".layers." in name and W.ndim == 2:
                    rows, columns = W.shape
                    delta = normal(generator, rows, 128, std=rows**-0.5) * spectrum
                    delta = delta @ normal(generator, 128, columns, std=columns**-0.5)
                    delta *= 0.1 * W.norm() / delta.norm()
                    W = W + delta + normal(generator, rows, columns, std=0.02 * W.std().item())
                elif W.ndim == 1:
                    W = W * (1 + normal(generator, *W.shape, std=0.01))
                yield name, W.bfloat16()


def write_checkpoint(folder: Path, tensors: Iterator[tuple[str, Tensor]], size: Size) -> None:
    """Write tensors as they come, in shards of about SHARD_BYTES, then the index and config.json."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = in_shard = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and in_shard + tensor.nbytes > SHARD_BYTES:
            flush()
            in_shard = 0
        pending[name] = tensor.contiguous()
        in_shard += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(shards):  # only now is the number of shards known, which their names say
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(size.config, indent=1))


def write_adapter(folder: Path, size: Size, rank: int, seed: int, dora: bool = False) -> None:
    """Write a LoRA as PEFT does, with A and B drawn at random, alpha = 2·rank."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(size.layers):
        for module, (rows, columns) in size.linear.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            factors[f"{prefix}.lora_A.weight"] = normal(generator, rank, columns)
            factors[f"{prefix}.lora_B.weight"] = normal(generator, rows, rank, std=0.01)
            if dora:
                norms = 0.02 * columns**0.5 * (1 + normal(generator, rows, std=0.05))
                factors[f"{prefix}.lora_magnitude_vector"] = norms
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted(module.split(".")[1] for module in size.linear),
        "base_model_name_or_path": "example/base",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": dora,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def make(folder: Path, write: Callable[[Path], None], **config: object) -> None:
    """Make one folder under another name, then rename it: it is there whole or not at all.

    A folder that exists is left alone if what its config file says is `config`; otherwise the run stops.
    """
    if folder.exists():
        existing = json.loads(next(folder.glob("*config.json")).read_text())
        if any(existing[key] != value for key, value in config.items()):
            sys.exit(f"{folder} was made with another size or rank; delete it or choose another folder")
        print(f"{folder.name}: exists", flush=True)
        return
    print(folder.name, flush=True)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path, help="the folder to write to; it is made if need be")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters (default: 16)")
    parser.add_argument("--tuned", action="store_true", help="make a fine-tune of the base model too")
    args = parser.parse_args()
    size: Size = SIZES[args.size]
    make(args.out / "base", lambda folder: write_checkpoint(folder, base_tensors(size), size), **size.config)
    for name, seed in (("adapter", 2), ("adapter2", 3), ("dora", 4)):
        write = partial(write_adapter, size=size, rank=args.rank, seed=seed, dora=name == "dora")
        make(args.out / name, write, r=args.rank)
    if args.tuned:
        tuned = tuned_tensors(args.out / "base")
        make(args.out / "tuned", lambda folder: write_checkpoint(folder, tuned, size), **size.config)


if __name__ == "__main__":
    main()
