"""The LoRA paper's measurements once more, on the real small model, as data: §7.2, §7.3, and Tables 5 and 6 in kind.

    python -m tests.make
    python -m tests.benchmarks.paper OUT [--processes 2]

OUT takes the adapters, each a folder that `loratools compare --paper` reads, and figures.json; a run goes on where an
earlier one was stopped. There are twelve trainings, each of one thread and about a minute of CPU time: 60 steps with 2
rows of 64 tokens of Python's own documentation, AdamW at 2e-3, bf16 base, float32 factors, α = r as in the paper, A as
in the authors' loralib (`kaiming`), B = 0. The seed draws A alone. The loss is that of documentation not trained on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from loratools import compare, live
from loratools.surgery.compare import Comparison, ModuleComparison
from loratools.surgery.paper import Grid, Projection
from tests.make import real_models_folder

STEPS, ROWS, LENGTH, HELD_OUT, RATE = 60, 2, 64, 32, 2e-3
DOCUMENTED = "argparse asyncio collections decimal email json logging random statistics subprocess typing"
QV = ("q_proj", "v_proj")
WEIGHTS = (("q_proj",), ("k_proj",), ("v_proj",), ("o_proj",), ("q_proj", "k_proj"), QV,
           ("q_proj", "k_proj", "v_proj", "o_proj"))  # fmt: skip
"""The choices of Table 5."""
BUDGET = 345_600
"""Parameters of each: rank 10 of q or o, 15 of k or v, 6 of two and 3 of all four have exactly as many."""
RANKS = (1, 4, 16, 64)


@dataclass(frozen=True, slots=True)
class Run:
    """One training; `name` is the folder of its adapter."""

    targets: tuple[str, ...]
    rank: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{'-'.join(target[0] for target in self.targets)}-rank{self.rank}-seed{self.seed}"


COMPARED = SMALL, LARGE, OTHER = Run(QV, 4), Run(QV, 16), Run(QV, 16, 1)
"""What §7 compares: another rank, another seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    data = measure(real_models_folder() / "smol-base", args.out, args.processes)
    print("\n".join(lines(data)))


def measure(base: Path, out: Path, processes: int = 2) -> dict[str, Any]:
    """Train what is not there yet, measure, write figures.json, and return what it says."""
    train(base, out, [*COMPARED, *equal_budgets(base), *by_rank()], processes)
    data = {
        "steps": STEPS, "similarity": similarities(base, out), "table 7": strengths(base, out),
        "table 5": train(base, out, equal_budgets(base)), "table 6": train(base, out, by_rank()),
    }  # fmt: skip
    (out / "figures.json").write_text(json.dumps(data, indent=1))
    return data


def equal_budgets(base: Path) -> list[Run]:
    """Return the trainings of Table 5, each with all the parameters that the budget allows."""
    return [Run(targets, live.estimate(base, targets=targets, budget=BUDGET).rank) for targets in WEIGHTS]


def by_rank() -> list[Run]:
    """Return the trainings of Table 6."""
    return [Run(QV, rank) for rank in RANKS]


def train(base: Path, out: Path, runs: Sequence[Run], processes: int = 2) -> list[dict[str, Any]]:
    """Train and save each adapter that `out` does not have yet; return the losses of each."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [run for run in dict.fromkeys(runs) if not (out / f"{run.name}.json").is_file()]
    if missing:
        # Threads of one training wait for each other longer than two trainings of one thread each take.
        with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
            pool.map(partial(train_one, base, out), missing, chunksize=1)
    return [json.loads((out / f"{run.name}.json").read_text()) for run in runs]


def train_one(base: Path, out: Path, run: Run) -> None:
    """Train and save one adapter, and note its losses."""
    import transformers

    tokens, held_out = documentation(transformers.AutoTokenizer.from_pretrained(base))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    untrained = loss_on(model, held_out)
    lora = live.attach(model, rank=run.rank, alpha=run.rank, targets=run.targets, seed=run.seed, init="kaiming")
    optimizer = torch.optim.AdamW(lora.parameters(), lr=RATE)
    batches = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=batches)
        cross_entropy(model, torch.stack([tokens[at : at + LENGTH + 1] for at in starts])).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss = loss_on(model, held_out)
    lora.save(out / run.name, force=True)
    parameters = sum(parameter.numel() for parameter in lora.parameters())
    notes = {"targets": run.targets, "rank": run.rank, "seed": run.seed, "parameters": parameters,
              "untrained": untrained, "loss": loss}  # fmt: skip
    (out / f"{run.name}.json").write_text(json.dumps(notes))


def documentation(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return token ids to train on, and rows of others, (HELD_OUT, LENGTH + 1)."""
    parts = [
        f"Q: What does {module.__name__}.{name} do?\nA: {text.strip()}"
        for module in map(importlib.import_module, DOCUMENTED.split())
        for name, value in sorted(vars(module).items())
        if isinstance(text := getattr(value, "__doc__", None), str) and text.strip()
    ]
    random.Random(0).shuffle(parts)
    ids = torch.tensor(tokenizer("\n\n".join(parts), verbose=False)["input_ids"])
    kept = HELD_OUT * (LENGTH + 1)
    return ids[:-kept], ids[-kept:].view(HELD_OUT, LENGTH + 1)


def cross_entropy(model: Any, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1]).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def loss_on(model: Any, rows: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float(torch.stack([cross_entropy(model, few) for few in rows.split(4)]).mean())


def similarities(base: Path, out: Path) -> list[dict[str, Any]]:
    """Return what Figures 3 and 4 show, φ(i, j), for each pair and type of weight: the medians over the layers."""
    found = []
    for pair in ((SMALL, LARGE), (SMALL, OTHER), (LARGE, OTHER)):
        for target, modules in by_target(compared(base, out, *pair)):
            beside = [module.paper for module in modules if module.paper is not None]
            found.append({
                "pair": [run.name for run in pair], "target": target, "layers": len(modules),
                "of A": medians(each.factor_similarity for each in beside),
                "of dW, input side": medians(module.input_similarity for module in modules),
                "of dW, output side": medians(module.output_similarity for module in modules),
                "control": medians(each.control for each in beside),
            })  # fmt: skip
    return found


def strengths(base: Path, out: Path) -> list[dict[str, Any]]:
    """Return the columns of Table 7 for two ranks and each type of weight: the medians over the layers."""
    rows = []
    for side, run in enumerate((SMALL, LARGE)):
        for target, modules in by_target(compared(base, out, SMALL, LARGE)):
            measured = [module.paper.projections[side] for module in modules if module.paper is not None]
            values = {
                each.name: median(getattr(row, each.name) for row in measured if row is not None)
                for each in fields(Projection)
            }
            rows.append({"adapter": run.name, "target": target, "layers": len(measured)} | values)
    return rows


@cache
def compared(base: Path, out: Path, first: Run, second: Run) -> Comparison:
    return compare(out / first.name, out / second.name, base=base, paper=True, seed=0)


def by_target(report: Comparison) -> Iterator[tuple[str, list[ModuleComparison]]]:
    for target in QV:
        yield target, [module for module in report.modules if module.module.endswith(target)]


def medians(grids: Iterable[Grid]) -> list[list[float]]:
    """Return the median of each φ(i, j)."""
    return torch.tensor(list(grids), dtype=torch.float64).quantile(0.5, dim=0).tolist()


def lines(data: dict[str, Any]) -> Iterator[str]:
    """Yield the corners of the grids, and the tables."""
    grids = ("of A", "of dW, input side", "of dW, output side", "control")
    yield "φ(1, 1), φ(1, all), φ(all, all)"
    yield from table(
        ["pair", "target", *grids],
        [[" ".join(each["pair"]), each["target"], *(corners(each[name]) for name in grids)]
         for each in data["similarity"]],
    )  # fmt: skip
    for name, chosen in (
        ("table 7", ("adapter", "target", "rank", "weight_norm", "update_norm", "of_update", "of_weight", "of_random",
                     "amplification")),
        ("table 5", ("targets", "rank", "parameters", "untrained", "loss")),
        ("table 6", ("targets", "rank", "parameters", "untrained", "loss")),
    ):  # fmt: skip
        yield ""
        yield name
        yield from table(chosen, [[shown(row[key]) for key in chosen] for row in data[name]])


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"|{'---|' * len(heading)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def corners(grid: Sequence[Sequence[float]]) -> str:
    return " ".join(f"{value:.3f}" for value in (grid[0][0], grid[0][-1], grid[-1][-1]))


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).strip("()[]")


if __name__ == "__main__":
    main()
