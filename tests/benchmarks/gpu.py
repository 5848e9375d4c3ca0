"""Measure merge and extract-svd on a GPU beside the processor and `cp`, in one run of less than five minutes.

    python -m tests.benchmarks.gpu FOLDER [--sizes 1b 8b] [--blocks 2] [--runs 2] [--device cuda:1] [--small]

FOLDER takes the models, which are made here (1b 2.5 GB and its fine-tune, 8b 16 GB, blocks of a 70B model 1.7 GB each
and theirs), and keeps them. Files are in the page cache. Whole processes, the least of the runs; what a merge computes
on the device is held against the processor's bytes, and against a second run. Of a 70B model two and one blocks are
extracted: what 80 take is reckoned from their difference, and said to be. With --small everything is a few megabytes.

Where torch has no CUDA the same code runs on CPU tensors that say they are on a device (`tests/make/pretended_gpu.py`):
its times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.process import measure_all, warm
from tests.make.big_checkpoint import SIZES, Size, make, write_adapter, write_checkpoint
from tests.make.pretended_gpu import pretended

LARGE = Size(80, 8192, 28672, 1024, 1024, True, 128)
"""A 70B model's blocks, with a small vocabulary: what is extracted is in the blocks."""
SMALL = Size(2, 256, 512, 64, 512, True, 64)
RANK = 32
_SPECTRUM = 128  # directions of the fine-tune's change; their singular values fall like i^-0.8


@dataclass(frozen=True)
class Run:
    """What one kind of process took: the least wall seconds, and peaks in bytes, where a device is used.

    Those are of resident memory, of memory on the device, and of page-locked memory.
    """

    seconds: float
    peaks: tuple[int, ...] = ()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="*", default=["1b", "8b"], choices=SIZES)
    parser.add_argument("--blocks", type=int, default=2, help="of a 70B model, at least 2")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    begun = time.perf_counter()
    print(f"{machine(args.device)}, {args.runs} runs, least\n")
    sizes = {"small": SMALL} if args.small else {name: SIZES[name] for name in args.sizes}
    made = {name: models(args.folder / name, size, tuned=name in ("1b", "small")) for name, size in sizes.items()}
    large = replace(SMALL, hidden=320, inner=576) if args.small else LARGE
    large_made = {
        layers: models(args.folder / f"70b-{layers}-{large.hidden}", replace(large, layers=layers), tuned=True)
        for layers in (1, args.blocks)
    }
    print(f"models made in {time.perf_counter() - begun:.0f} s\n")
    for copied in copies(args.device, (1 << 22) if args.small else (1 << 28)):
        print(copied)
    print("\n| model | what | seconds | × cp -r | GB/s | peak MB | on the device MB | page-locked MB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    said: list[str] = []
    for name, folder in made.items():
        said += merges(folder, name, args.runs, args.device)
        if (folder / "tuned").exists():
            said += extractions(folder, name, args.runs, args.device)
    said += blocks(large_made, args.device)
    print()
    for line in said:
        print(line)
    print(f"\n{time.perf_counter() - begun:.0f} s in all, with the making of what was not there")


def machine(device: str) -> str:
    """Return what this ran on: the device, its driver, and the versions of what computes."""
    here = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    here += f", torch {torch.__version__}"
    if not torch.cuda.is_available():
        return f"{here}; no CUDA device: CPU tensors in its place, whose times say nothing of a GPU"
    query = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        driver = "driver {}, PCIe {} x{}".format(*told.split(", "))
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "driver unknown"
    return f"{here}, CUDA {torch.version.cuda}; {torch.cuda.get_device_name(device)}, {driver}"


def copies(device: str, nbytes: int) -> Iterator[str]:
    """Yield how fast memory of the host goes to the device and back, the bound of any merge there."""
    there = torch.cuda.is_available()
    far = torch.empty(nbytes, dtype=torch.uint8, device=device if there else "cpu")
    for name, pinned in (("pageable", False), ("page-locked", True)):
        near = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned and there)
        for what, target, source in (("to the device", far, near), ("back", near, far)):
            seconds = []
            for _ in range(4):
                begun = time.perf_counter()
                target.copy_(source)
                if there:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begun)
            yield f"copies of {name} memory {what}: {nbytes / min(seconds) / 1e9:.1f} GB/s"


def models(folder: Path, size: Size, *, tuned: bool) -> Path:
    """Make a base model, an adapter and, where it is asked for, a fine-tune; return their folder."""
    generator = torch.Generator().manual_seed(0)
    make(folder / "base", lambda path: write_checkpoint(path, tensors(size, generator), size), **size.config)
    make(folder / "adapter", lambda path: write_adapter(path, size, 16, 2), r=16)
    if tuned:
        again = torch.Generator().manual_seed(0)
        make(folder / "tuned", lambda path: write_checkpoint(path, tensors(size, again, True), size), **size.config)
    return folder


def tensors(size: Size, generator: torch.Generator, tuned: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors: each shape is drawn once, and every block has it with its rows moved on by its number.

    A fine-tune has what falls like i^-0.8 up to 128 directions on top, of a tenth of the weight's norm, and noise.
    """
    drawn: dict[tuple[int, int], Tensor] = {}
    for shape in dict.fromkeys(size.linear.values()):
        W = torch.randn(*shape, generator=generator) * 0.02
        if tuned:
            moved = torch.Generator().manual_seed(sum(shape))
            spectrum = torch.arange(1, _SPECTRUM + 1).float() ** -0.8
            D = torch.randn(shape[0], _SPECTRUM, generator=moved) * spectrum
            D = D @ torch.randn(_SPECTRUM, shape[1], generator=moved)
            W = W + 0.1 * D * (W.norm() / D.norm()) + 4e-4 * torch.randn(*shape, generator=moved)
        drawn[shape] = W.bfloat16()
    E = torch.randn(size.vocabulary, size.hidden, generator=torch.Generator().manual_seed(9)).mul_(0.02).bfloat16()
    ones = torch.ones(size.hidden, dtype=torch.bfloat16)
    yield "model.embed_tokens.weight", E
    for layer in range(size.layers):
        for module, shape in size.linear.items():
            yield f"model.layers.{layer}.{module}.weight", drawn[shape].roll(layer, 0)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", ones.clone()
    yield "model.norm.weight", ones.clone()
    if not size.tied:
        yield "lm_head.weight", E.roll(1, 0)


def merges(folder: Path, name: str, count: int, device: str) -> Iterator[str]:
    """Print the rows of `cp -r` and merges of one model; yield what its bytes say."""
    base, adapter = folder / "base", folder / "adapter"
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    outputs = {what: folder / f"out-{what}" for what in ("cp", "cpu", "device", "again")}
    merge = ["merge", base, adapter, "-o"]
    copied = took(["cp", "-r", base, outputs["cp"]], count, [outputs["cp"]], base)
    row(name, "cp -r", copied, copied.seconds, stored)
    for what, where in (("cpu", "cpu"), ("device", device)):
        run = took([*merge, outputs[what], "--device", where], count, [outputs[what]], base)
        row(name, f"merge, {where}", run, copied.seconds, stored)
    took([*merge, outputs["again"], "--device", device, "--threads", 2], 1, [outputs["again"]], base)
    other, most, total = differences(outputs["cpu"], outputs["device"])
    again = differences(outputs["device"], outputs["again"])[0]
    for path in outputs.values():
        shutil.rmtree(path, ignore_errors=True)
    yield (
        f"{name}: {other} of {total} numbers ({other / total:.1e}) differ from the processor's, by {most} unit(s) at "
        f"most; {again} between two runs on the device with other threads"
    )


def extractions(folder: Path, name: str, count: int, device: str) -> Iterator[str]:
    """Print the rows of extract-svd of one model, processor and device; yield how their errors compare."""
    pair = [folder / "base", folder / "tuned"]
    stored = sum(file.stat().st_size for path in pair for file in path.glob("*.safetensors"))
    output, errors = folder / "extracted", {}
    for where in ("cpu", device):
        command = ["extract-svd", *pair, "-o", output, "--rank", RANK, "--device", where]
        run = took(command, count, [output], *pair)
        row(name, f"extract-svd, {where}", run, None, stored)
        errors[where] = error_of(output)
    shutil.rmtree(output, ignore_errors=True)
    yield f"{name}: error of the extraction {errors['cpu']:.8f} on the processor, {errors[device]:.8f} on the device"


def blocks(made_of: Mapping[int, Path], device: str) -> Iterator[str]:
    """Print the rows of extract-svd of one block and several of a 70B model; yield what all would take."""
    took_by: dict[tuple[str, int], float] = {}
    for layers, made in made_of.items():
        pair = [made / "base", made / "tuned"]
        stored = sum(file.stat().st_size for path in pair for file in path.glob("*.safetensors"))
        for where in ("cpu", device):
            output = made / "extracted"
            command = ["extract-svd", *pair, "-o", output, "--rank", RANK, "--device", where]
            run = took(command, 1, [output], *pair)
            row(f"70b, {layers} block(s)", f"extract-svd, {where}", run, None, stored)
            took_by[where, layers] = run.seconds
            shutil.rmtree(output, ignore_errors=True)
    for where in ("cpu", device):
        count = max(made_of)
        each = (took_by[where, count] - took_by[where, 1]) / (count - 1)
        if each <= 0:
            yield f"70b, {where}: blocks that are too small to tell what one takes"
            continue
        yield (
            f"70b, {where}: {each:.2f} s a block; 80 blocks would take {took_by[where, 1] + 79 * each:.0f} s, reckoned "
            "from these, not measured"
        )


def took(command: Sequence[object], count: int, outputs: Sequence[Path], *read: Path) -> Run:
    """Run a command so often, each time into nothing and out of the page cache, and return the least that it took."""
    told, best = outputs[0].with_suffix(".json"), None
    words = command if command[0] == "cp" else [sys.executable, "-m", "loratools", "-q", *command]
    if "--device" in command and command[command.index("--device") + 1] != "cpu":
        words = [sys.executable, "-m", "tests.benchmarks.gpu", "--child", told, *command]
    for _ in range(count):
        for path in outputs:
            shutil.rmtree(path, ignore_errors=True)
        for path in read:
            warm(path)
        seconds, _, _ = measure_all(words)
        peaks = json.loads(told.read_text()) if told.exists() else ()
        told.unlink(missing_ok=True)
        if best is None or seconds < best.seconds:
            best = Run(seconds, tuple(peaks))
    assert best is not None
    return best


def child(told: Path, words: Sequence[str]) -> int:
    """Run a command line in this process, and write what it took of the device; on CPU tensors where there is none."""
    from loratools.cli._run import run

    device = next((after for word, after in pairwise(words) if word == "--device"), "cpu")
    pretends = device != "cpu" and not torch.cuda.is_available()
    with pretended() if pretends else nullcontext() as log:
        code = run(["-q", *words])
    used = (0, log.pinned) if log else (torch.cuda.max_memory_reserved(device), locked())
    told.write_text(json.dumps((resident(), *used)))
    return code


def resident() -> int:
    """Return the most bytes of memory that this process had; where the system does not say it, 0."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def locked() -> int:
    """Return the most bytes of page-locked memory that torch held; 0 where its version does not tell."""
    statistics: dict[str, Any] = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    return int(statistics.get("allocated_bytes.peak", 0))


def row(model: str, what: str, run: Run, copied: float | None, stored: int) -> None:
    """Print one row of the table."""
    beside = "" if copied is None else f"{run.seconds / copied:.2f}"
    speed = f"{stored / run.seconds / 1e9:.2f}"
    peaks = " | ".join(f"{nbytes / 1e6:.0f}" for nbytes in run.peaks) or " | | "
    print(f"| {model} | {what} | {run.seconds:.2f} | {beside} | {speed} | {peaks} |", flush=True)


def differences(first: Path, second: Path) -> tuple[int, int, int]:
    """Return how many BF16 numbers of two models differ, by how many units at most, and how many there are."""
    count = most = total = 0
    for file in sorted(first.glob("*.safetensors")):
        one, other = (np.memmap(folder / file.name, np.uint8, "r") for folder in (first, second))
        start = 8 + int.from_bytes(one[:8].tobytes(), "little")
        for at in range(start, len(one), 1 << 26):
            a, b = (bits[at : at + (1 << 26)].view(np.int16) for bits in (one, other))
            total += len(a)
            if unlike := np.flatnonzero(a != b).tolist():
                count += len(unlike)
                off = np.abs(a[unlike].astype(int) - b[unlike].astype(int))
                most = max(most, int(off.max()))
    return count, most, total


def error_of(adapter: Path) -> float:
    """Return the total error of an extraction, as its record has it."""
    from loratools.dialects import open_adapter
    from loratools.surgery.extract.layers import from_json, total

    for step in open_adapter(adapter).provenance:
        if layers := from_json(step.parameters.get("certificate")):
            return total(layers).error
    raise ValueError(f"{adapter} has no certificate")


if __name__ == "__main__":
    main()
