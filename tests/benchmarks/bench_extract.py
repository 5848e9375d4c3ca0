"""Measure extract-svd against cp, mergekit-extract-lora and torch.linalg.svd, in one run: time, memory and error.

    python -m tests.benchmarks.bench_extract BASE TUNED [BASE TUNED ...] [--rank 32] [--runs 3] [--mergekit PROGRAM]
                                             [--layers N] [--svd N]

Whole processes, files in the page cache: `cp -r` of the base and ours in turn, after one warm-up, least and median.
`--mergekit` is mergekit-extract-lora 0.1.5, in an environment of its own if need be; it takes minutes and runs once.
Errors are those of the adapters as stored, held in float64 against the optimum of their rank, layer by layer, all of
them or `--layers` spread over the model. `--svd` decomposes so many layers with torch.linalg.svd, and scales the time
up to all by their cost. The ratios are what counts; processor seconds are less moved by what else runs.
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
from statistics import median

import torch
from torch import Tensor

from loratools.adapter.low_rank import load, products
from loratools.dialects import open_adapter
from loratools.linalg.native import delta
from loratools.storage.checkpoint import Checkpoint
from tests.benchmarks.process import measure_all, warm

OURS, MERGEKIT = "loratools extract-svd", "mergekit-extract-lora"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="BASE TUNED")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", metavar="PROGRAM")
    parser.add_argument("--layers", type=int, metavar="N", help="layers that are held against the optimum [all]")
    parser.add_argument("--svd", type=int, default=0, metavar="N")
    args = parser.parse_args()
    if len(args.models) % 2:
        parser.error("models come in pairs: a base and its fine-tune")
    print(f"{machine()}; rank {args.rank}, {args.runs} runs, mergekit once\n")
    print(
        "| model | what | least s | median s | processor s | × cp | × ours | peak MB | error / optimum | worst layer |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for base, tuned in zip(args.models[::2], args.models[1::2], strict=True):
        with tempfile.TemporaryDirectory() as scratch:
            compare(base, tuned, Path(scratch), args)


def machine() -> str:
    """Return what the processor is called, what it multiplies, and how many cores there are."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    products = "bfloat16" if delta.multiplies_bf16() else f"float32, {delta.widths()[0] if delta.widths() else 0} wide"
    return f"{name or platform.machine()}, {os.cpu_count()} cores, products in {products}, torch {torch.__version__}"


def compare(base: Path, tuned: Path, folder: Path, args: argparse.Namespace) -> None:
    """Print the rows of one base and its fine-tune; `folder` takes what is written."""
    ours, theirs, copy = folder / "ours", folder / "theirs", folder / "copy"
    extract = ["extract-svd", base, tuned, "-o", ours, "--rank", args.rank]
    quick = {"cp -r": ["cp", "-r", base, copy], OURS: [sys.executable, "-m", "loratools", "-q", *extract]}
    outputs = {"cp -r": copy, OURS: ours, MERGEKIT: theirs}
    for model in (base, tuned):
        warm(model)
    taken: dict[str, list[tuple[float, int, float]]] = {name: [] for name in quick}
    for turn in range(args.runs + 1):
        for name, command in quick.items():
            shutil.rmtree(outputs[name], ignore_errors=True)
            measured = measure_all(command)
            if turn:
                taken[name].append(measured)
    if args.mergekit:
        command = [args.mergekit, "--model", tuned, "--base-model", base, "--out-path", theirs]
        taken[MERGEKIT] = [measure_all([*command, "--max-rank", args.rank, "--device", "cpu"])]
    least = {name: min(seconds for seconds, _, _ in runs) for name, runs in taken.items()}
    best: dict[str, float] = {}
    for name, runs in taken.items():
        middle, processor = median(seconds for seconds, _, _ in runs), min(used for _, _, used in runs)
        ratios = f"{least[name] / least['cp -r']:.1f} | {least[name] / least[OURS]:.1f}"
        row = f"| {base} | {name} | {least[name]:.2f} | {middle:.2f} | {processor:.2f} | {ratios} "
        row += f"| {max(peak for _, peak, _ in runs) / 1e6:.0f} "
        shown = "| | |"
        if name != "cp -r":
            total, worst = accuracy(base, tuned, outputs[name], args.layers, best)
            shown = f"| {total:.6f} | {worst:.6f} |"
        print(row + shown, flush=True)
    if args.svd:
        lapack = full_svd(base, tuned, list(products(open_adapter(ours))), args.svd)
        ratio = f"{lapack / least['cp -r']:.1f} | {lapack / least[OURS]:.1f}"
        print(
            f"| {base} | torch.linalg.svd, from {args.svd} layers | {lapack:.1f} | | | {ratio} | | 1 | 1 |", flush=True
        )


def differences(base: Path, tuned: Path, modules: list[str]) -> dict[str, Tensor]:
    """Return W' − W in float64 for linear layers that both models store under these names."""
    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    return {m: after.read(f"{m}.weight").double() - before.read(f"{m}.weight").double() for m in modules}


def accuracy(base: Path, tuned: Path, adapter: Path, count: int | None, best: dict[str, float]) -> tuple[float, float]:
    """Return error over optimum: of all layers together, or of `count` of them, and of the worst one.

    `best` takes the optimum's error² of each module and rank, Σ of the squares of the singular values beyond it.
    """
    parts = products(open_adapter(adapter))
    modules = sorted(parts)[:: max(1, len(parts) // (count or len(parts)))]
    errors, least = [], []
    for module in modules:
        (D,) = differences(base, tuned, [module]).values()
        B, A = load(parts[module])
        errors.append(float((D - B @ A).square().sum()))
        key = f"{module} {parts[module].rank}"
        if key not in best:
            gram = D.T @ D if len(D) >= D.shape[1] else D @ D.T
            best[key] = float(torch.linalg.eigvalsh(gram)[: -parts[module].rank].clamp_min(0).sum())
        least.append(best[key])
    return (sum(errors) / sum(least)) ** 0.5, max((e / b) ** 0.5 for e, b in zip(errors, least, strict=True))


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
