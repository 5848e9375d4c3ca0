"""Measure how each command grows: double its input, and fit the exponent of the time, in one run.

    python -m tests.benchmarks.growth FOLDER [--most 8000] [--width 512] [--runs 3] [--inputs modules experts]
                                             [--commands inspect combine]

FOLDER takes the models and adapters (2 GB at 8,000 modules; bases are sparse files) and keeps them for later runs.

    modules   an adapter that PEFT writes, of 252 modules and doubled from there: each has a rank and an alpha of its
              own in rank_pattern and alpha_pattern, and its full name in target_modules
    experts   one of a layer for each of up to 6,144 experts
    index     a base of up to 100,000 tensors, in an index and its shards, and an adapter of 56 modules for it
    wrong     up to 8,000 modules, and a base that has none of them: every name is looked for among those alike

Whole processes; seconds of processor, user and system, the least of the runs: what other work on the machine does to
wall time is not in them. The sizes are run in turn, so that a drift of the machine bends no line. What the same command
takes for an input of one layer (7 modules, 16 experts, 1,000 tensors) is its start, and is taken off: the exponent is
the slope of a straight line through log(seconds − start) over log(size − size of the start), fitted to the sizes whose
difference is 20 ms or more. Then follow wall seconds and peak memory at the largest.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.benchmarks.process import alternate

HERE = Path(__file__).parent
RUN = [sys.executable, "-m", "loratools", "-q"]
LEAST = 0.02
"""Seconds above the start from which on a size counts: below, the clock's grain and the machine's noise do."""

PROJECTIONS = {
    "self_attn.q_proj": (1, 1), "self_attn.k_proj": (0.5, 1), "self_attn.v_proj": (0.5, 1), "self_attn.o_proj": (1, 1),
    "mlp.gate_proj": (2, 1), "mlp.up_proj": (2, 1), "mlp.down_proj": (1, 2),
}  # fmt: skip
"""Sides of each projection of a layer, (out, in), as multiples of the width."""

Shapes = Mapping[str, tuple[int, int]]
"""Module -> (out, in)"""


@dataclass(frozen=True)
class Point:
    """One size of an input: how many modules, experts or tensors, and the command lines for it by their names."""

    size: int
    commands: Mapping[str, Sequence[object]]
    accepts: tuple[int, ...] = (0,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=8000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS), choices=list(INPUTS))
    parser.add_argument("--commands", nargs="+", default=None, help="default: all")
    args = parser.parse_args()
    print("| input | command | start, s | sizes | seconds of processor above the start | **exponent** | wall, s | MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.inputs:
        folder = args.folder / f"{name}-{args.width}"
        points = INPUTS[name](folder, args.most, args.width)
        measure(name, points, args.runs, args.commands, folder / "output")


def measure(name: str, points: Sequence[Point], count: int, only: Sequence[str] | None, output: Path) -> None:
    """Print the rows of one input; the first point is the start."""

    def prepare() -> None:
        shutil.rmtree(output, ignore_errors=True)
        output.with_suffix(".safetensors").unlink(missing_ok=True)

    for command in (each for each in points[0].commands if only is None or each in only):
        by_size = {str(point.size): point.commands[command] for point in points}
        runs = alternate(by_size, count, prepare, accepts=points[0].accepts)
        taken = {int(size): of_size for size, of_size in runs.items()}
        first, *sizes = taken
        above = {size: taken[size].processor - taken[first].processor for size in sizes}
        shown = " · ".join(f"{seconds:.2f}" for seconds in above.values())
        cells = [
            name, command, f"{taken[first].processor:.2f}", " · ".join(f"{size:,}" for size in sizes), shown,
            f"**{exponent({size - first: seconds for size, seconds in above.items()})}**",
            f"{taken[sizes[-1]].quickest:.2f}", f"{taken[sizes[-1]].peak / 1e6:.0f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


def exponent(seconds: Mapping[int, float]) -> str:
    """Return the slope of log(seconds) over log(size), "-" where fewer than two sizes take `LEAST`."""
    counted = {size: value for size, value in seconds.items() if value >= LEAST}
    if len(counted) < 2:
        return "-"
    logs = [[math.log(value) for value in values] for values in (counted, counted.values())]
    return f"{statistics.linear_regression(*logs).slope:.2f}"


def doubled(first: int, most: int, start: int) -> list[int]:
    """Return the start, and sizes from the first on, each twice the one before, up to the most."""
    sizes = [first]
    while sizes[-1] * 2 <= most * 1.01:
        sizes.append(sizes[-1] * 2)
    return [start, *sizes]


def modules(folder: Path, most: int, width: int) -> list[Point]:
    """Make adapters of so many modules, each with patterns of its own, sealed ones, and their bases."""
    points = []
    for layers in doubled(36, most // len(PROJECTIONS) + 1, 1):
        at = folder / f"{layers * len(PROJECTIONS)}"
        shapes = {
            f"model.layers.{layer}.{name}": (int(out * width), int(inner * width))
            for layer in range(layers)
            for name, (out, inner) in PROJECTIONS.items()
        }
        adapter, other, base, sealed = (at / name for name in ("adapter", "other", "base", "sealed"))
        if not sealed.exists():
            shutil.rmtree(at, ignore_errors=True)
            save_adapter(adapter, shapes, seed=1)
            save_adapter(other, shapes, seed=2)
            save_base(base, {f"{module}.weight": shape for module, shape in shapes.items()}, layers)
            seal = [*RUN, "convert", adapter, "-o", sealed, "--base", base]
            subprocess.run(seal, check=True, cwd=HERE.parents[1], stdout=subprocess.DEVNULL)
        points.append(Point(len(shapes), lines(folder / "output", adapter, other, sealed, base)))
    return points


def lines(output: Path, adapter: Path, other: Path, sealed: Path, base: Path) -> dict[str, Sequence[object]]:
    """Return the command lines that are measured for adapters and their base."""
    return {
        "inspect": [*RUN, "inspect", adapter],
        "validate": [*RUN, "validate", sealed],
        "convert to kohya": [*RUN, "convert", adapter, "-o", output.with_suffix(".safetensors"), "--to", "kohya",
                             "--allow-loss"],
        "convert to loratools": [*RUN, "convert", adapter, "-o", output, "--to", "loratools"],
        "resize": [*RUN, "resize", adapter, "--rank", "2", "-o", output],
        "combine": [*RUN, "combine", adapter, other, "--rank", "8", "-o", output],
        "spectrum": [*RUN, "inspect", adapter, "--spectrum"],
        "compare": [*RUN, "compare", adapter, other],
        "plan a merge": [*RUN, "merge", base, adapter, "-o", output, "--dry-run"],
    }  # fmt: skip


def experts(folder: Path, most: int, width: int) -> list[Point]:
    """Make adapters of one module for each expert, 64 experts a layer, and their bases."""
    points = []
    for count in doubled(384, min(most, 6144), 64):
        at, side = folder / f"{count}", width // 2
        shapes = {
            f"model.layers.{layer}.mlp.experts.{expert}.down_proj": (side, side)
            for layer in range(count // 64)
            for expert in range(64)
        }
        adapter, other, base, sealed = (at / name for name in ("adapter", "other", "base", "sealed"))
        if not sealed.exists():
            shutil.rmtree(at, ignore_errors=True)
            save_adapter(adapter, shapes, seed=1, patterns=False)
            save_adapter(other, shapes, seed=2, patterns=False)
            save_base(base, {f"{module}.weight": shape for module, shape in shapes.items()}, count // 64, "qwen3_moe")
            seal = [*RUN, "convert", adapter, "-o", sealed, "--base", base]
            subprocess.run(seal, check=True, cwd=HERE.parents[1], stdout=subprocess.DEVNULL)
        points.append(Point(count, lines(folder / "output", adapter, other, sealed, base)))
    return points


def index(folder: Path, most: int, width: int) -> list[Point]:
    """Make bases of many tensors, in an index and shards, and one adapter."""
    points = []
    shapes = {
        f"model.layers.{layer}.{name}": (int(out * width), int(inner * width))
        for layer in range(8)
        for name, (out, inner) in PROJECTIONS.items()
    }
    for count in doubled(12_500, 100_000 if most >= 8000 else 25_000, 1000):
        at = folder / f"{count}"
        adapter, base = at / "adapter", at / "base"
        if not base.exists():
            save_adapter(adapter, shapes, seed=1)
            tensors = {f"{module}.weight": shape for module, shape in shapes.items()}
            layer = 8
            while len(tensors) < count:
                tensors[f"model.layers.{layer // 100}.mlp.experts.{layer % 100}.scale"] = (1, 1)
                layer += 1
            save_base(base, tensors, 8, shards=16)
        points.append(Point(count, {
            "plan a merge": [*RUN, "merge", base, adapter, "-o", folder / "output", "--dry-run"],
            "inspect the base": [*RUN, "inspect", base],
            "compare on it": [*RUN, "compare", adapter, adapter, "--base", base],
        }))  # fmt: skip
    return points


def wrong(folder: Path, most: int, width: int) -> list[Point]:
    """Make adapters of many modules, and bases whose names are all a little different."""
    points = []
    for layers in doubled(36, most // len(PROJECTIONS) + 1, 1):
        at, side = folder / f"{layers * len(PROJECTIONS)}", width // 8
        names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in PROJECTIONS]
        if not at.exists():
            save_adapter(at / "adapter", dict.fromkeys(names, (side, side)), seed=1, patterns=False)
            others = {f"{name.replace('layers', 'blocks')}_in.weight": (side, side) for name in names}
            save_base(at / "base", others, layers)
        merge = [*RUN, "merge", at / "base", at / "adapter", "-o", folder / "output", "--dry-run"]
        points.append(Point(len(names), {"plan a merge": merge}, accepts=(1,)))
    return points


INPUTS: dict[str, Callable[[Path, int, int], list[Point]]] = {
    "modules": modules, "experts": experts, "index": index, "wrong": wrong,
}  # fmt: skip


def save_adapter(folder: Path, shapes: Shapes, *, seed: int, patterns: bool = True) -> None:
    """Write a LoRA as PEFT does, in float32 with ranks 4, 6 and 8 in turn, full names as targets."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    ranks = {module: 4 + 2 * (i % 3) if patterns else 4 for i, module in enumerate(shapes)}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "lab/base", "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 8, "lora_dropout": 0.0, "r": 4,
        "modules_to_save": None, "use_rslora": False, "target_modules": sorted(shapes),
        "rank_pattern": ranks if patterns else {},
        "alpha_pattern": {module: 2 * rank for module, rank in ranks.items()} if patterns else {},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (out, inner) in shapes.items():
        for name, shape in (("A", (ranks[module], inner)), ("B", (out, ranks[module]))):
            values = random.standard_normal(shape, np.float32) * np.float32(0.02)
            tensors[f"base_model.model.{module}.lora_{name}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def save_base(folder: Path, shapes: Shapes, layers: int, model_type: str = "llama", shards: int = 1) -> None:
    """Write a model of bfloat16 zeros, as sparse files."""
    folder.mkdir(parents=True)
    config = {"model_type": model_type, "num_hidden_layers": layers, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(shapes)
    parts = [names[len(names) * i // shards : len(names) * (i + 1) // shards] for i in range(shards)]
    files = ["model.safetensors"] if shards == 1 else [
        f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)
    ]  # fmt: skip
    for file, part in zip(files, parts, strict=True):
        save_sparse(folder / file, [(name, shapes[name]) for name in part])
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_sparse(path: Path, tensors: Iterable[tuple[str, tuple[int, int]]]) -> None:
    """Write a safetensors file whose data are a hole."""
    entries: dict[str, object] = {}
    offset = 0
    for name, shape in tensors:
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)


if __name__ == "__main__":
    main()
