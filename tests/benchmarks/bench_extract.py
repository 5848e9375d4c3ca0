"""Measure extract-svd against mergekit-extract-lora and torch.linalg.svd, in one run: time, memory and error.

    python -m tests.benchmarks.bench_extract BASE TUNED [--rank 32] [--runs 3] [--mergekit PATH] [--svd LAYERS]

Whole processes after one warm-up, files in the page cache; medians; the ratios are what counts, on an idle machine.
`--mergekit` is the program of mergekit 0.1.5 (in an environment of its own, if need be); its adapter is measured with
the same ruler. `--svd` decomposes so many layers with torch.linalg.svd, and scales the time up to all by their cost.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from loratools.adapter.low_rank import load, products
from loratools.dialects import open_adapter
from loratools.storage.checkpoint import Checkpoint
from tests.benchmarks.process import alternate, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", help="path of mergekit-extract-lora")
    parser.add_argument("--svd", type=int, default=3, metavar="LAYERS")
    parser.add_argument("--layers", type=int, default=10, help="layers whose error is held against the optimum")
    args = parser.parse_args()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, {args.runs} runs, medians\n")
    with tempfile.TemporaryDirectory(dir=args.tuned.parent) as scratch:
        folder = Path(scratch)
        ours, theirs = folder / "ours", folder / "theirs"
        extract = ["extract-svd", args.base, args.tuned, "-o", ours, "--rank", args.rank]
        commands = {"loratools extract-svd": [sys.executable, "-m", "loratools", "-q", *extract]}
        if args.mergekit:
            commands["mergekit-extract-lora"] = [
                args.mergekit, "--model", args.tuned, "--base-model", args.base, "--out-path", theirs,
                "--max-rank", args.rank, "--device", "cpu",
            ]  # fmt: skip

        def clean() -> None:
            for path in (ours, theirs):
                shutil.rmtree(path, ignore_errors=True)

        runs = alternate(commands, args.runs, clean)
        print("| what | seconds | × ours | peak MB | error / optimum | worst layer |\n|---|---|---|---|---|---|")
        for name, run in runs.items():
            output = ours if name.startswith("loratools") else theirs
            measure(commands[name])  # `clean` took the output away
            total, worst = accuracy(args.base, args.tuned, output, args.layers)
            ratio = run.wall / runs["loratools extract-svd"].wall
            numbers = f"{run.wall:.2f} | {ratio:.1f} | {run.peak / 1e6:.0f} | {total:.6f} | {worst:.6f}"
            print(f"| {name} | {numbers} |", flush=True)
        lapack = full_svd(args.base, args.tuned, list(products(open_adapter(ours))), args.svd)
        ratio = lapack / runs["loratools extract-svd"].wall
        print(f"| torch.linalg.svd of every layer, from {args.svd} | {lapack:.1f} | {ratio:.1f} | | 1 | 1 |")


def differences(base: Path, tuned: Path, modules: list[str]) -> dict[str, Tensor]:
    """Return W' − W in float64 for linear layers that both models store under these names."""
    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    return {m: after.read(f"{m}.weight").double() - before.read(f"{m}.weight").double() for m in modules}


def accuracy(base: Path, tuned: Path, adapter: Path, count: int) -> tuple[float, float]:
    """Return error over optimum of some layers: together, and of the worst of them."""
    parts = products(open_adapter(adapter))
    modules = sorted(parts)[:: max(1, len(parts) // count)]
    errors, best = [], []
    for module in modules:
        (D,) = differences(base, tuned, [module]).values()
        B, A = load(parts[module])
        errors.append(float((D - B @ A).square().sum()))
        gram = D.T @ D if len(D) >= D.shape[1] else D @ D.T
        best.append(float(torch.linalg.eigvalsh(gram)[: -parts[module].rank].clamp_min(0).sum()))
    return (sum(errors) / sum(best)) ** 0.5, max((e / b) ** 0.5 for e, b in zip(errors, best, strict=True))


def full_svd(base: Path, tuned: Path, modules: list[str], count: int) -> float:
    """Return the seconds that torch.linalg.svd in float32 takes for all layers, estimated from the first few."""
    specs = Checkpoint.open(base).specs
    costs = {}
    for module in modules:
        m, n = specs[f"{module}.weight"].shape
        costs[module] = m * n * min(m, n)
    taken, done = 0.0, 0
    for module in sorted(costs, key=lambda name: costs[name])[:: max(1, len(costs) // count)][:count]:
        D = differences(base, tuned, [module])[module].float()
        begun = time.perf_counter()
        torch.linalg.svd(D, full_matrices=False)
        taken += time.perf_counter() - begun
        done += costs[module]
    return taken / done * sum(costs.values())


if __name__ == "__main__":
    main()
