"""Measure what the README's table says in one run: merge, its proof and undoing, extraction, beside cp and the peers.

    python -m tests.benchmarks FOLDER [--sizes mini 1b] [--dtypes f16 f32] [--runs 5] [--peers peft mergekit]
                               [--mergekit PROGRAM] [--quantized]

FOLDER takes the models (mini 0.3 GB, 1b 2.5 GB, 3b 6.4 GB, 8b 16 GB; a fine-tune as large as the model beside each) and
keeps them for later runs. Whole processes, each command in turn, so that a drift of the machine meets all alike; files
are in the page cache; the least and the median of the runs, after one to warm up, against `cp -r` of what the command
reads. What the peers do takes minutes: it runs once, in the same run. `--dtypes` measures the merge into the same model
in other dtypes too. `--mergekit` is mergekit-extract-lora, where it is in an environment of its own. With `--quantized`
the merges into quantized copies follow, as `python -m tests.benchmarks.quantized` measures them.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks import quantized
from tests.benchmarks.process import Runs, alternate

HERE = Path(__file__).parent
MAKE = HERE.parent / "make"
LORATOOLS = (sys.executable, "-m", "loratools", "-q")


@dataclass(frozen=True, slots=True)
class Work:
    """One row: the command, the folders it reads, and the name of the copy that it is held against."""

    command: Sequence[object]
    reads: Sequence[Path] = ()
    against: str = "cp -r"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["mini", "1b"], choices=["mini", "1b", "3b", "8b"])
    parser.add_argument("--dtypes", nargs="*", default=[], choices=["f16", "f32"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=["peft"], choices=["peft", "mergekit"])
    parser.add_argument("--mergekit", default="mergekit-extract-lora", metavar="PROGRAM")
    parser.add_argument("--quantized", action="store_true")
    args = parser.parse_args()
    print(f"{machine()}\n{args.runs} runs, peers once\n")
    print("| size | what | least s | median s | × cp, least | median | peak MB |\n|---|---|---|---|---|---|---|")
    for size in args.sizes:
        measure(args.folder / size, size, args.runs, args.dtypes, args.peers, args.mergekit)
    for size in args.sizes if args.quantized else ():
        print()
        quantized.measure(args.folder / size, size, args.runs)


def machine() -> str:
    """Name the processor, its cores and what its arithmetic can do, the memory and the versions."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    told = {key.strip(): value.strip() for key, _, value in lines}
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    can = " ".join(flag for flag in known if flag in told.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{told.get('model name', platform.machine())} ({can}), {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, torch {version('torch')}"
    )


def measure(
    folder: Path, size: str, count: int, dtypes: Sequence[str], peers: Sequence[str], mergekit: str
) -> None:  # fmt: skip
    """Print the rows of one size."""
    # In a process of its own: the peak of a process is never told as less than that of the one which started it.
    subprocess.run(
        [sys.executable, MAKE / "big_checkpoint.py", size, folder, "--tuned"], check=True, stdout=subprocess.DEVNULL
    )
    base, output = folder / "base", folder / "output"
    prepare_inputs(folder)
    work = works(folder, output)
    for dtype in dtypes:
        other = folder / f"base-{dtype}"
        subprocess.run([sys.executable, MAKE / "cast_checkpoint.py", base, other, dtype], check=True)
        work[f"cp -r, {dtype}"] = Work(["cp", "-r", other, output], [other], f"cp -r, {dtype}")
        merge = [*LORATOOLS, "merge", other, folder / "adapter", "-o", output]
        work[f"loratools merge, {dtype}"] = Work(merge, [other], f"cp -r, {dtype}")
    theirs = {
        "peft": ("PEFT load, merge, save", [sys.executable, HERE / "peft_merge.py", base, folder / "adapter", output]),
        "mergekit": ("mergekit-extract-lora --max-rank 32", [
            mergekit, "--model", folder / "tuned", "--base-model", base, "--out-path", output, "--max-rank", "32",
            "--device", "cpu",
        ]),
    }  # fmt: skip
    slow = {theirs[peer][0]: Work(theirs[peer][1], [base, folder / "tuned"]) for peer in peers}

    def prepare() -> None:
        shutil.rmtree(output, ignore_errors=True)

    runs = taken(work, count, prepare) | taken(slow, 0, prepare)
    for name, run in runs.items():
        copy = runs[(work | slow)[name].against]
        ratios = run.quickest / copy.quickest, run.wall / copy.wall
        print(
            f"| {size} | {name} | {run.quickest:.3f} | {run.wall:.3f} | {ratios[0]:.2f} | {ratios[1]:.2f} "
            f"| {run.peak / 1e6:.0f} |",
            flush=True,
        )
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"| {size} | hash, GB/s | {stored / runs['loratools hash'].quickest / 1e9:.2f} | | | | |", flush=True)


def taken(work: Mapping[str, Work], count: int, prepare: Callable[[], None]) -> dict[str, Runs]:
    """Run every work in turn, `count` times after one to warm up; 0: once, and that counts."""
    commands = {name: one.command for name, one in work.items()}
    return alternate(commands, count, prepare, {name: one.reads for name, one in work.items()}) if work else {}


def prepare_inputs(folder: Path) -> None:
    """Seal the adapter to its base, and make a merged model with its residual, where they are not there yet."""
    base, sealed, merged = folder / "base", folder / "sealed", folder / "merged"
    for output, command in (
        (sealed, ["convert", folder / "adapter", "-o", sealed, "--base", base]),
        (merged, ["merge", base, sealed, "-o", merged, "--keep-residual"]),
    ):
        if not output.exists():
            words = [str(word) for word in (*LORATOOLS, *command)]
            subprocess.run(words, check=True, cwd=HERE.parents[1], stdout=subprocess.DEVNULL)


def works(folder: Path, output: Path) -> dict[str, Work]:
    """Name the commands of ours that are measured, and the copy of the base."""
    base, sealed, merged, tuned = (folder / name for name in ("base", "sealed", "merged", "tuned"))
    adapters = [folder / "adapter", folder / "adapter2"]

    def ours(*words: object, reads: Sequence[Path] = ()) -> Work:
        return Work([*LORATOOLS, *words], reads)

    return {
        "cp -r": Work(["cp", "-r", base, output], [base]),
        "loratools merge, base verified": ours("merge", base, sealed, "-o", output, reads=[base]),
        "loratools merge, DoRA": ours("merge", base, folder / "dora", "-o", output, reads=[base]),
        "loratools merge --keep-residual": ours("merge", base, sealed, "-o", output, "--keep-residual", reads=[base]),
        "loratools unmerge, by the residual": ours("unmerge", merged, sealed, "-o", output, reads=[merged]),
        "loratools verify": ours("verify", merged, "--base", base, "--adapter", sealed, reads=[base, merged]),
        "loratools hash": ours("hash", base, reads=[base]),
        "loratools combine --rank 16": ours("combine", *adapters, "-o", output, "--rank", "16", reads=adapters),
        "loratools extract-svd --rank 32": ours(
            "extract-svd", base, tuned, "-o", output, "--rank", "32", reads=[base, tuned]
        ),
        "loratools inspect": ours("inspect", sealed, reads=[sealed]),
        "loratools validate": ours("validate", sealed, reads=[sealed]),
        "loratools --help": ours("--help"),
    }


if __name__ == "__main__":
    main()
