"""Measure merges into quantized models against the merge into the bf16 model that they were made from, in one run.

    python -m tests.benchmarks.quantized FOLDER [--size 1b] [--runs 3]

FOLDER takes the models of `tests/make/quantized_checkpoint.py`, 8 GB for 1b, and keeps them for later runs. All outputs
are as large as the bf16 model, so that ratios are per byte of output. Whole processes in turn, files in the page cache,
the quickest of the runs: on a machine that others use too, that is what is left of the work itself. Processor time is
that of all threads.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.process import alternate

ROOT = Path(__file__).parents[2]
SCHEMES = ("fp8", "nf4", "int4", "gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="1b", choices=["mini", "1b", "3b", "8b"])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}\n")
    measure(args.folder / args.size, args.size, args.runs)


def measure(folder: Path, size: str, count: int) -> None:
    """Print the rows of one size."""
    # In a process of its own: the peak of a process is never told as less than that of the one which started it.
    subprocess.run([sys.executable, "-m", "tests.make.quantized_checkpoint", size, folder], check=True, cwd=ROOT)
    adapter, output = folder / "adapter", folder / "output"
    loratools = [sys.executable, "-m", "loratools", "-q"]
    gguf = output.with_suffix(".gguf")
    merges = {"merge, bf16": (folder / "base", output), "merge, q8_0.gguf": (folder / "q8_0.gguf", gguf)}
    merges |= {f"merge, {scheme}": (folder / scheme, output) for scheme in SCHEMES}
    commands = {name: [*loratools, "merge", base, adapter, "-o", out] for name, (base, out) in merges.items()}
    inputs = {name: [base] for name, (base, _) in merges.items()}
    for scheme in SCHEMES:
        inputs[f"dequantize, {scheme}"] = [folder / scheme]
        commands[f"dequantize, {scheme}"] = [*loratools, "dequantize", folder / scheme, "-o", output]

    def prepare() -> None:
        shutil.rmtree(output, ignore_errors=True)
        gguf.unlink(missing_ok=True)

    runs = alternate(commands, count, prepare, inputs)
    plain = runs["merge, bf16"]
    print(f"| {size}, quickest of {count} | seconds | × bf16 | processor seconds | × bf16 | peak MB |")
    print("|---|---|---|---|---|---|")
    for name, run in runs.items():
        ratios = run.quickest / plain.quickest, run.processor / plain.processor
        print(
            f"| {name} | {run.quickest:.2f} | {ratios[0]:.2f} | {run.processor:.2f} | {ratios[1]:.2f} "
            f"| {run.peak / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
