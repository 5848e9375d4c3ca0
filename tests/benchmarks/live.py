"""LoRA on a running model against PEFT, in CPU time of one thread, as ratios of interleaved medians.

    python -m tests.benchmarks.live [attach|step|rows|saved …]

`mid` is a random Llama of 30 M parameters. A ratio below 1 means that loratools takes less.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratools import live

warnings.simplefilter("ignore")
SIDES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9}


def mid(dtype: torch.dtype = torch.float32, **sides: int) -> Any:
    """Return the model, the same every time; `sides` change its shape."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIDES | sides, num_key_value_heads=3, vocab_size=4096, use_cache=False)
    return transformers.LlamaForCausalLM(config).to(dtype)


def with_peft(model: Any, **options: Any) -> Any:
    """Return a model with PEFT's factors, rank 16 on every linear layer."""
    import peft

    settings = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"} | options
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def interleaved(jobs: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, float]:
    """Return the median CPU milliseconds of each job, the jobs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def show(title: str, times: dict[str, float], over: str) -> None:
    """Print times and their ratios over one of them."""
    parts = (f"{name} {value:.2f} ms ({value / times[over]:.3f})" for name, value in times.items())
    print(f"{title}: {', '.join(parts)}")


def attach() -> None:
    """Attach, add the second and the eighth adapter from a file and from a value, switch."""
    for layers in (8, 30):  # 30 as SmolLM-135M
        ours, plain = mid(num_hidden_layers=layers), mid(num_hidden_layers=layers)
        times: dict[str, list[float]] = {"ours": [], "peft": []}
        for _ in range(7):  # the taking out is not timed
            start = time.process_time()
            lora = live.attach(ours, rank=16, targets="all-linear")
            times["ours"].append(1e3 * (time.process_time() - start))
            lora.detach()
            start = time.process_time()
            peer = with_peft(plain)
            times["peft"].append(1e3 * (time.process_time() - start))
            peer.unload()
        show(f"attach, {layers} layers", {name: statistics.median(each) for name, each in times.items()}, "peft")
    ours, plain = mid(), mid()
    lora, peer = live.attach(ours, rank=16, targets="all-linear"), with_peft(plain)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        value = live.of(ours).adapter()
        for number in range(2, 9):

            def by(what: Any, number: int = number) -> None:
                lora.add(f"n{number}", what)
                lora.remove(f"n{number}")

            def load(number: int = number) -> None:
                peer.load_adapter(folder, adapter_name=f"n{number}")
                peer.delete_adapter(f"n{number}")

            if number in (2, 8):
                jobs = {"file": lambda: by(Path(folder)), "value": lambda: by(value), "peft": load}
                show(f"adapter {number}, added and removed", interleaved(jobs, 5), "peft")
            lora.add(f"n{number}", value)
            peer.load_adapter(folder, adapter_name=f"n{number}")
    start = time.perf_counter()
    for turn in range(10_000):
        lora.use("n2" if turn % 2 else "n8")
    print(f"use: {1e2 * (time.perf_counter() - start):.2f} µs")


def step() -> None:
    """One training step, forward and backward, 2 rows of 96 tokens."""
    x = torch.randint(0, 4096, (2, 96), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        ours, peer, full = mid(dtype).train(), with_peft(mid(dtype)).train(), mid(dtype).train()
        live.attach(ours, rank=16, targets="all-linear")

        def run(model: Any) -> Callable[[], None]:
            def job() -> None:
                model(input_ids=x, labels=x).loss.backward()
                model.zero_grad()

            return job

        jobs = {"ours": run(ours), "peft": run(peer), "full fine-tuning": run(full)}
        show(f"step, {dtype}", interleaved(jobs, 7), "peft")


def saved() -> None:
    """Bytes that a forward keeps for the backward, without the parameters."""
    x = torch.randint(0, 4096, (2, 96), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.05):
            ours, peer, full = (
                mid(dtype).train(),
                with_peft(mid(dtype), lora_dropout=dropout).train(),
                mid(dtype).train(),
            )
            live.attach(ours, rank=16, targets="all-linear", dropout=dropout)
            sizes = {name: kept(m, x) for name, m in (("ours", ours), ("peft", peer), ("full fine-tuning", full))}
            parts = (f"{name} {size / 1e6:.1f} MB ({size / sizes['peft']:.3f})" for name, size in sizes.items())
            print(f"saved, {dtype}, dropout {dropout}: {', '.join(parts)}")


def kept(model: Any, x: Tensor) -> int:
    """Return the bytes of all storages kept for the backward, each once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=x, labels=x)
    return sum(storages.values())


def rows() -> None:
    """Eight adapters in eight rows, over one model with the adapter merged."""
    import peft

    ours, peer, merged = mid().eval(), mid().eval(), mid().eval()
    names = [f"n{number}" for number in range(8)]
    for number, name in enumerate(names):
        lora = live.attach(ours, rank=16, targets="all-linear", name=name, seed=number)
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        if number:
            peer.add_adapter(name, config)
        else:
            peer = peft.get_peft_model(peer, config, adapter_name=name).eval()
    peer.eval()
    with torch.no_grad():
        for tokens in (1, 16, 64):
            x = torch.randint(0, 4096, (8, tokens), generator=torch.Generator().manual_seed(0))
            with lora.route(names):
                jobs = {
                    "ours": lambda x=x: ours(x),
                    "peft": lambda x=x: peer(x, adapter_names=names),
                    "merged": lambda x=x: merged(x),
                }
                show(f"8 rows of {tokens} tokens", interleaved(jobs, 15 if tokens == 1 else 7), "merged")
    rows_with_dora(merged, names)


def rows_with_dora(merged: Any, names: list[str]) -> None:
    """Eight adapters of DoRA in eight rows, which PEFT refuses, over one model with the adapter merged."""
    ours = mid().eval()
    for number, name in enumerate(names):
        lora = live.attach(ours, rank=16, targets="all-linear", name=name, seed=number, dora=True)
    with torch.no_grad():
        for tokens in (1, 16, 64):
            x = torch.randint(0, 4096, (8, tokens), generator=torch.Generator().manual_seed(0))
            with lora.route(names):
                jobs = {"ours": lambda x=x: ours(x), "merged": lambda x=x: merged(x)}
                show(f"8 rows of {tokens} tokens, DoRA", interleaved(jobs, 15 if tokens == 1 else 7), "merged")


def main() -> None:
    """Run the measurements that are named, or all."""
    torch.set_num_threads(1)
    every = {"attach": attach, "step": step, "saved": saved, "rows": rows}
    for name in sys.argv[1:] or every:
        every[name]()


if __name__ == "__main__":
    main()
