"""Measure combine and resize against PEFT's `add_weighted_adapter`, in one run.

    python -m tests.benchmarks.bench_combine FOLDER [--sizes mini 1b] [--runs 3] [--peft svd ties_svd cat]

FOLDER takes the models (see `tests.benchmarks`). loratools is timed as whole processes, from Python's start to the
written file; PEFT is timed without its start, without loading the model and without saving. PEFT's `svd` and
`ties_svd` decompose every dense matrix, which takes minutes at mini; they are run once, and at mini only.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.process import alternate

HERE = Path(__file__).parent
MAKE = HERE.parent / "make" / "big_checkpoint.py"
METHODS = {
    "svd": ["--rank", "16"],
    "ties_svd": ["--method", "ties", "--density", "0.5", "--rank", "16", "--like", "peft"],
    "cat": [],
}
"""PEFT's combination types, and the options with which loratools does the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["mini", "1b"], choices=["mini", "1b", "3b", "8b"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peft", nargs="*", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {args.runs} runs, medians\n")
    print("| size | what | seconds | peak MB | PEFT, seconds | × |\n|---|---|---|---|---|---|")
    for size in args.sizes:
        measure(args.folder / size, size, args.runs, args.peft if size == "mini" else [])


def measure(folder: Path, size: str, count: int, peft: list[str]) -> None:
    """Print the rows of one size."""
    subprocess.run([sys.executable, str(MAKE), size, str(folder)], check=True, stdout=subprocess.DEVNULL)
    adapters, output = [folder / "adapter", folder / "adapter2"], folder / "output"
    run = [sys.executable, "-m", "loratools", "-q"]
    weights = ["-w", "0.7", "-w", "-0.3"]
    elementwise = {kind for kind, options in METHODS.items() if "--method" in options}
    commands = {
        kind: [*run, "combine", *adapters, *weights, "-o", output, *options]
        for kind, options in METHODS.items()
        if size == "mini" or kind not in elementwise
    }
    commands["resize to 8"] = [*run, "resize", adapters[0], "--rank", "8", "-o", output]
    runs = alternate(commands, count, lambda: shutil.rmtree(output, ignore_errors=True))
    for name, taken in runs.items():
        theirs = f"{seconds_of_peft(folder, name):.2f}" if name in peft else ""
        ratio = f"{float(theirs) / taken.wall:.0f}" if theirs else ""
        print(f"| {size} | {name} | {taken.wall:.2f} | {taken.peak / 1e6:.0f} | {theirs} | {ratio} |", flush=True)


def seconds_of_peft(folder: Path, kind: str) -> float:
    """Return what PEFT takes for one combination, as it says itself."""
    line = [sys.executable, HERE / "peft_combine.py", folder / "base", folder / "adapter", folder / "adapter2", kind]
    done = subprocess.run(
        [str(word) for word in line], env=dict(os.environ) | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
