"""Measure `inspect --each` and `validate --each` on many small adapters, and one start beside them, in one run.

    python -m tests.benchmarks.many FOLDER [--count 2000] [--modules 2 50] [--runs 3] [--profile]

FOLDER takes the adapters, of so many modules, sealed and plain, and keeps them for later runs. Milliseconds a file: of
processor time with one process, and of wall time with `-j 2`. With --profile the functions that take longest follow.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from loratools.surgery.convert import convert
from tests.benchmarks.process import environment
from tests.make import tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--modules", type=int, nargs="+", default=[2, 14, 50])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    print("| modules | command | one start, ms | ms of processor a file | ms of wall a file, -j 2 |")
    print("|---|---|---|---|---|")
    for modules in args.modules:
        folder = args.folder / f"{modules}-modules"
        make(folder, args.count, modules)
        for command, kind in (("inspect", "plain"), ("inspect", "sealed"), ("validate", "sealed")):
            first = folder / kind / "0000"
            start = min(measure([command, first])[0] for _ in range(args.runs))
            many = [command, "--each", folder / kind]
            processor = min(measure(many)[0] for _ in range(args.runs)) - start
            wall = min(measure([*many, "-j", "2"])[1] for _ in range(args.runs))
            name = f"{command}, {kind}"
            print(f"| {modules} | {name} | {start:.0f} | {processor / args.count:.2f} | {wall / args.count:.2f} |")
            if args.profile:
                profile(many)


def make(folder: Path, count: int, modules: int) -> None:
    """Make `count` copies of a LoRA with so many modules, plain as PEFT writes it and sealed, unless they are there."""
    if (folder / "sealed" / f"{count - 1:04d}").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    layers = -(-modules // len(tiny.SHAPES))
    factors = tiny.lora_factors(tuple(tiny.SHAPES), layers=layers, rank=2)
    for module in list(factors)[modules:]:
        del factors[module]
    base = tiny.save_llama(folder / "base", tiny.llama_weights(layers), shards=1)
    plain, sealed = tiny.save_peft(folder / "plain" / "0000", factors), folder / "sealed" / "0000"
    sealed.parent.mkdir()
    convert(plain, sealed, base=base)
    for number in range(1, count):
        shutil.copytree(plain, plain.with_name(f"{number:04d}"))
        shutil.copytree(sealed, sealed.with_name(f"{number:04d}"))


def measure(arguments: Sequence[str | Path]) -> tuple[float, float]:
    """Run a command and return the milliseconds that it took of processor and of wall time."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "loratools", *map(str, arguments), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    after, stop = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent * 1000, (stop - start) * 1000


def profile(arguments: Sequence[str | Path]) -> None:
    """Run a command in this process, and print the functions that take longest."""
    from loratools.cli._run import run

    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, cProfile.Profile() as profiler:
        out, sys.stdout = sys.stdout, nowhere
        try:
            run([*map(str, arguments), "--quiet"])
        finally:
            sys.stdout = out
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


if __name__ == "__main__":
    main()
