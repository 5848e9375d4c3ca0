"""Measure two workers against one, and reckon how far a merge and an extraction of 70B scale on many.

    python -m tests.benchmarks.cluster FOLDER [--runs 3] [--most 64] [--rates MERGE EXTRACT PLAN]

FOLDER takes a model of 0.3 GB with a fine-tune and an adapter, and the headers of a Llama of 70B in files with holes,
which take no room; both are kept for later runs. First the wall time of a merge and an extraction on two processes of
one thread against one such process, alternately, the least of the runs. Then the work of 70B on 1 to `--most` workers,
reckoned: files, tensors and the plan are those of the real headers, and so are the parts; the rates of a worker, and
the seconds of a plan, are measured here. All workers read and write one storage, of 2, 10 or 50 GB/s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools.parallel.executors import opened
from loratools.surgery.extract import extract, plan
from loratools.surgery.merge import MergeOptions, merge, prepare
from loratools.surgery.merge.parts import call_of
from loratools.surgery.merge.planned import Planned, decide_call
from loratools.surgery.merge.resume import fingerprint
from loratools.surgery.merge.run import settings_of
from loratools.surgery.merge.shared import EACH, merge_shared
from loratools.surgery.sharing import share

HIDDEN, INNER, HEADS, LAYERS, WORDS = 8192, 28672, 1024, 80, 128256
FILE = 4_700_000_000
STORAGES = (2e9, 10e9, 50e9)


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured: bytes a second of one thread, seconds of a plan, for each task or `once`, and of the end."""

    bytes_a_second: float
    plan: float
    end: float
    once: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs=3, metavar=("MERGE", "EXTRACT", "PLAN"),
                        help="GB/s of a thread and seconds of a plan, instead of measuring them")  # fmt: skip
    parser.add_argument("--most", type=int, default=64)
    args = parser.parse_args()
    small, large = args.folder / "small", args.folder / "70b"
    make_large(large)
    if args.rates:
        merging, extracting, planned = (1e9 * args.rates[0], 1e9 * args.rates[1], args.rates[2])
    else:
        make_small(small)
        merging, extracting = measured(small, args.runs)
        planned = timed(lambda: fingerprinted(large))
    merges = {few: sizes_of(large, few) for few in (False, True)}
    tensors = {pair.path: 2 * parameters(pair.name) * 2 for pair in plan(large / "base", large / "base").pairs}
    rates = f"a thread merges {merging / 1e9:.2f} GB/s and extracts from {extracting / 1e9:.2f} GB/s"
    print(f"\nplan of 70B: {planned:.1f} s; {rates}\n")
    on = Rates(merging, planned, planned, once=True)
    rows = [(f"merge, {'1 file' if one else '31 files'}", sizes, on, EACH) for one, sizes in merges.items()]
    factors = sum(2 * 4 * 32 * sum(shape) for shape in shapes().values() if len(shape) > 1)  # written, and read again
    end = planned + factors / merging
    rows.append((f"extract-svd, {len(tensors)} tensors", tensors, Rates(extracting, planned, end), 2))
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64, 128) if count <= args.most]
    for storage in STORAGES:
        print(f"| storage of {storage / 1e9:.0f} GB/s | {' | '.join(map(str, counts))} |\n|---|{'---|' * len(counts)}")
        for name, sizes, rates, each in rows:
            seconds = [wall(sizes, count, rates, storage, each) for count in counts]
            shown = " | ".join(f"{t:.0f} s ({seconds[0] / t:.1f}×)" for t in seconds)
            print(f"| {name} | {shown} |")
        print()


def wall(sizes: Mapping[str, int], workers: int, rates: Rates, storage: float, each: int) -> float:
    """Return the seconds of a run: the caller plans, parts are taken from a queue, the largest first, the caller ends.

    `each` is how many parts there are for a worker. As many bytes a second go to a part as a thread can take, or its
    share of what the storage gives.
    """
    from loratools.parallel.shares import balanced

    of = min(len(sizes), each * workers)
    loads = sorted((sum(sizes[name] for name in names) for names in balanced(sizes, of)), reverse=True)
    queue, now = [float(load) for load in loads], 0.0
    running: list[list[float]] = []  # seconds of planning left, and bytes
    begun = 0
    while queue or running:
        while queue and len(running) < workers:
            planning = not rates.once or begun < workers
            running.append([rates.plan if planning else 0.0, queue.pop(0)])
            begun += 1
        moving = sum(left <= 0 for left, _ in running)
        rate = min(rates.bytes_a_second, storage / max(1, moving))
        step = min(left if left > 0 else load / rate for left, load in running)
        for part in running:
            if part[0] > 0:
                part[0] -= step
            else:
                part[1] -= step * rate
        now += step
        running = [part for part in running if part[0] > 1e-9 or part[1] > 1e-3 * rate]
        for part in running:
            part[0] = part[0] if part[0] > 1e-9 else 0.0
    return rates.plan + now + rates.end


def measured(small: Path, runs: int) -> tuple[float, float]:
    """Print the wall time of one and of two workers; return the bytes of one thread in a second, of either verb."""
    size = sum(path.stat().st_size for path in (small / "base").glob("*.safetensors"))
    base, tuned, adapter, out = (small / name for name in ("base", "tuned", "adapter", "out"))
    options = {"threads": 1, "retention": "off"}
    given = {"base": str(base), "tuned": str(tuned), "output": str(out), "ranks": 32, "threads": 1}
    verbs: dict[str, Callable[[object], object]] = {
        "merge": lambda pool: merge_shared(call_of(base, [adapter], out, **options), pool),
        "extract-svd": lambda pool: share("extract-svd", pool, **given),
    }
    least: dict[tuple[str, int], float] = {}
    with opened(1) as one, opened(2) as two:
        for _ in range(runs + 1):
            for name, verb in verbs.items():
                for count, pool in ((1, one), (2, two)):
                    took = timed(lambda verb=verb, pool=pool: verb(pool.executor))  # type: ignore[misc]
                    shutil.rmtree(out)
                    least[name, count] = min(took, least.get((name, count), took))
    for name in verbs:
        first, second = least[name, 1], least[name, 2]
        print(f"{name}: one worker {first:.2f} s, two {second:.2f} s: {first / second:.2f}×")
    alone = min(timed(lambda: _alone(lambda: merge(base, [adapter], out, threads=1, retention="off"), out))
                for _ in range(runs))  # fmt: skip
    apart = min(timed(lambda: _alone(lambda: extract(**given), out)) for _ in range(runs))
    return size / alone, 2 * size / apart


def _alone(verb: Callable[[], object], out: Path) -> None:
    verb()
    shutil.rmtree(out)


def timed(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def fingerprinted(large: Path) -> str:
    """Decide the merge of 70B as every task does."""
    prepared = prepare(large / "base", [str(large / "adapter")], large / "out", options=MergeOptions(threads=1))
    return fingerprint(prepared.plan, settings_of(prepared))


def sizes_of(large: Path, one: bool) -> dict[str, int]:
    """Return the bytes of what a merge of 70B is shared out in, into the base's files or into one file."""
    options = {"threads": 1, "max_shard_size": "1000GB" if one else None}
    call = call_of(large / "base", [large / "adapter"], large / "out", **options)
    prepared = decide_call(call)
    return {name: piece.nbytes for name, piece in Planned.of(call, prepared).pieces(prepared.plan).items()}


def make_small(folder: Path) -> None:
    program = Path(__file__).parents[1] / "make" / "big_checkpoint.py"
    subprocess.run([sys.executable, program, "mini", folder, "--tuned"], check=True)


def shapes() -> dict[str, tuple[int, int] | tuple[int]]:
    """Return the tensors of Llama-3.1-70B."""
    found: dict[str, tuple[int, int] | tuple[int]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        found |= {f"{stem}.{norm}.weight": (HIDDEN,) for norm in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{stem}.{module}.weight": shape for module, shape in MODULES.items()}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}


MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HEADS, HIDDEN), "self_attn.v_proj": (HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def parameters(name: str) -> int:
    from math import prod

    return prod(shapes()[name])


def make_large(folder: Path) -> None:
    """Write the headers of a Llama of 70B and of an adapter of rank 16 for it; their data are holes."""
    if (folder / "adapter" / "adapter_config.json").exists():
        return
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes().items():
        size = 2 * parameters(name)
        if filled + size > FILE:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += size
    index: dict[str, str] = {}
    for number, held in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        holes(base / file, held, "BF16", 2)
        index |= dict.fromkeys(held, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    factors = {
        f"base_model.model.model.layers.{layer}.{module}.lora_{letter}.weight": shape
        for layer in range(LAYERS)
        for module, (out, inner) in MODULES.items()
        for letter, shape in (("A", (16, inner)), ("B", (out, 16)))
    }
    holes(adapter / "adapter_model.safetensors", factors, "BF16", 2)
    targets = [each.rpartition(".")[2] for each in MODULES]
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def holes(path: Path, held: Mapping[str, tuple[int, ...]], dtype: str, width: int) -> None:
    from math import prod

    header, end = {}, 0
    for name, shape in held.items():
        begin, end = end, end + width * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


if __name__ == "__main__":
    main()
