"""Measure folders of thousands of adapters: listed, validated, deduplicated, compared pairwise; time and memory.

    python -m tests.benchmarks.thousands FOLDER [--counts 1000 10000] [--modules 14] [--rank 4] [--jobs 1]

FOLDER takes the adapters and keeps them for later runs. Every adapter is drawn anew; every tenth is an earlier one in
another basis and with its scaling folded in, which `find` must say: the run stops if it counts others. Whole processes,
one run each; seconds of wall and of processor, peak memory, and what a further thousand costs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.benchmarks.process import environment

SIDES = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (160, 64)}
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "example/base"}
TENTH = 10


@dataclass(frozen=True, slots=True)
class Cost:
    """What one command took: seconds of wall and of processor, and peak bytes."""

    wall: float
    processor: float
    peak: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--modules", type=int, default=14)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    print("| adapters | command | s | s of processor | peak MB | s a thousand | MB a further thousand |")
    print("|---|---|---|---|---|---|---|")
    before: dict[str, tuple[int, Cost]] = {}
    for count in sorted(args.counts):
        folder, answer = args.folder / f"{count}", args.folder / "answer"
        # In a process of its own: the peak of a process is never told as less than that of the one which started it.
        maker = get_context("spawn").Process(target=make, args=(folder, count, args.modules, args.rank))
        maker.start()
        maker.join()
        for name, words in commands(folder, args.jobs).items():
            cost = run(words, answer)
            if name == "find":
                check(answer.read_text(), count)
            more = ""
            if name in before:
                less, earlier = before[name]
                more = f"{(cost.peak - earlier.peak) / 1e6 / (count - less) * 1000:.2f}"
            before[name] = count, cost
            print(
                f"| {count} | {name} | {cost.wall:.1f} | {cost.processor:.1f} | {cost.peak / 1e6:.0f} "
                f"| {cost.wall / count * 1000:.2f} | {more} |",
                flush=True,
            )


def commands(folder: Path, jobs: int) -> dict[str, list[str]]:
    """Name the commands that are measured."""
    sealed = folder.with_name(f"{folder.name}-sealed")
    shutil.rmtree(sealed, ignore_errors=True)
    each = ["--each", str(folder), "-j", str(jobs)]
    return {
        "inspect --each": ["inspect", *each],
        "convert --each": ["convert", *each, "-o", str(sealed)],
        "validate --each": ["validate", "--each", str(sealed), "-j", str(jobs)],
        "find": ["find", str(folder), "--json"],
        "compare --all": ["compare", "--all", str(folder), "--json"],
    }


def make(folder: Path, count: int, modules: int, rank: int) -> None:
    """Write `count` adapters as PEFT does, each tenth an earlier one in another basis, unless they are there."""
    if (folder / f"{count - 1:05d}").exists():
        return
    generator = np.random.default_rng(0)
    shapes = [(f"layers.{i // 2}.{name}", SIDES[name]) for i in range(modules) for name in [list(SIDES)[i % 2]]]
    for number in range(count):
        again = number % TENTH == TENTH - 1
        if not again:
            factors = {
                name: (generator.standard_normal((rank, columns)), generator.standard_normal((rows, rank)))
                for name, (rows, columns) in shapes
            }
            write(folder / f"{number:05d}", factors, rank, 2 * rank)
        else:
            turn = generator.standard_normal((rank, rank)) + 3 * np.eye(rank)
            turned = {name: (turn @ A, 2 * B @ np.linalg.inv(turn)) for name, (A, B) in factors.items()}
            write(folder / f"{number:05d}", turned, rank, rank)


def write(folder: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]], rank: int, alpha: int) -> None:
    """Write one adapter, F32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"base_model.model.model.{name}.lora_A.weight"] = A.astype(np.float32)
        tensors[f"base_model.model.model.{name}.lora_B.weight"] = B.astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in factors})
    (folder / "adapter_config.json").write_text(
        json.dumps(CONFIG | {"r": rank, "lora_alpha": alpha, "target_modules": targets})
    )


def run(words: list[str], answer: Path) -> Cost:
    """Run a command to its end, what it prints going into a file; return what it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "loratools", *words, "--quiet"]
    with answer.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, env=environment())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(words)} failed")
    return Cost(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def check(answer: str, count: int) -> None:
    """Stop unless `find` says that each tenth is the one before it."""
    found = {tuple(pair["paths"]) for pair in json.loads(answer)["duplicates"]}
    wanted = {(f"{number - 1:05d}", f"{number:05d}") for number in range(TENTH - 1, count, TENTH)}
    if found != wanted:
        sys.exit(f"find named {len(found)} pairs, {len(found & wanted)} of the {len(wanted)} that are there")


if __name__ == "__main__":
    main()
