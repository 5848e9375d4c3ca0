"""Measure merge, inspect, validate and hash against `cp` and PEFT, in one run.

    python -m tests.benchmarks FOLDER [--sizes mini 1b] [--runs 5] [--no-peft] [--quantized]

FOLDER takes the models (mini 0.3 GB, 1b 2.5 GB, 3b 6.4 GB, 8b 16 GB) and keeps them for later runs. Files are in the
page cache. Whole processes, medians; the ratios are what counts, on an idle machine. With `--quantized` the merges into
quantized copies of the models follow, as `python -m tests.benchmarks.quantized` measures them.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import quantized
from tests.benchmarks.process import alternate, warm

HERE = Path(__file__).parent
MAKE = HERE.parent / "make" / "big_checkpoint.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["mini", "1b"], choices=["mini", "1b", "3b", "8b"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--quantized", action="store_true")
    args = parser.parse_args()
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {args.runs} runs, medians\n")
    print("| size | what | seconds | × cp -r | peak MB |\n|---|---|---|---|---|")
    for size in args.sizes:
        measure(args.folder / size, size, args.runs, peft=not args.no_peft and size in ("mini", "1b"))
    for size in args.sizes if args.quantized else ():
        print()
        quantized.measure(args.folder / size, size, args.runs)


def measure(folder: Path, size: str, count: int, *, peft: bool) -> None:
    """Print the rows of one size."""
    subprocess.run([sys.executable, str(MAKE), size, str(folder)], check=True, stdout=subprocess.DEVNULL)
    base, adapter, sealed, dora, output = (folder / name for name in ("base", "adapter", "sealed", "dora", "output"))
    loratools = [sys.executable, "-m", "loratools", "-q"]
    if not sealed.exists():
        subprocess.run([*loratools, "convert", adapter, "-o", sealed, "--base", base], check=True, cwd=HERE.parents[1],
                       stdout=subprocess.DEVNULL)  # fmt: skip
    commands = {
        "cp -r": ["cp", "-r", base, output],
        "loratools merge, base verified": [*loratools, "merge", base, sealed, "-o", output],
        "loratools merge, DoRA": [*loratools, "merge", base, dora, "-o", output],
        "loratools hash": [*loratools, "hash", base],
        "loratools inspect": [*loratools, "inspect", sealed],
        "loratools validate": [*loratools, "validate", sealed],
    }
    if peft:
        commands["PEFT load, merge, save"] = [sys.executable, HERE / "peft_merge.py", base, adapter, output]

    def prepare() -> None:
        shutil.rmtree(output, ignore_errors=True)
        warm(base)

    runs = alternate(commands, count, prepare)
    copy = runs["cp -r"].wall
    for name, run in runs.items():
        print(f"| {size} | {name} | {run.wall:.2f} | {run.wall / copy:.2f} | {run.peak / 1e6:.0f} |", flush=True)
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"| {size} | hash, GB/s | {stored / runs['loratools hash'].wall / 1e9:.2f} | | |", flush=True)


if __name__ == "__main__":
    main()
