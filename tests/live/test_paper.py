"""The LoRA paper's findings, computed again on the demo's model, in kind; where ours differ the test says how.

§7.2 (Figures 3 and 4): two seeds share the leading direction of A and little of the whole subspace, both above two
random matrices. §7.3 (Table 7): W is stronger along ΔW's directions than along random ones, weaker than along its own.
Table 5: at an equal budget all four attention weights at a small rank do better than one at a large rank. Table 6: the
paper finds rank 1 about enough; on these small models, after few steps, the loss falls with the rank.
The real small model runs with --whole: eleven minutes of CPU time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn

from loratools import compare, live
from loratools.adapter.model import Adapter
from loratools.demo import data_folder
from loratools.demo.llama import Llama
from tests.benchmarks import paper

BASE = data_folder() / "base"
FOUR = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch have one thread: the matrices are small, and threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def trained(rank: int, seed: int, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> tuple[Adapter, float]:
    """Train on scenes of Macbeth, α = r, A Gaussian; return the adapter, and the loss on the scenes that follow."""
    text = torch.frombuffer(bytearray((data_folder() / "plays.txt").read_bytes()), dtype=torch.uint8).long()
    model = Llama.open(BASE)
    lora = live.attach(model, rank=rank, alpha=rank, targets=targets, seed=seed, init="gaussian")
    batches = torch.Generator().manual_seed(0)

    def rows() -> torch.Tensor:
        return torch.stack([text[at : at + 129] for at in torch.randint(6000 - 129, (4,), generator=batches)])

    fit(lora, model, rows, 60)
    held_out = text[6000 : 6001 + 7 * 256]
    with torch.no_grad():
        logits = model(held_out[:-1].view(-1, 256)).flatten(0, 1)
    return lora.adapter(), nn.functional.cross_entropy(logits, held_out[1:]).item()


def fit(lora: live.Lora, model: Llama, rows: Callable[[], torch.Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(lora.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = rows()
        nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def medians(first: Adapter, second: Adapter, base: Path, last: str) -> dict[str, float]:
    """Return the medians over layers of what the paper shows of modules whose name ends so."""
    report = compare(first, second, base=base, paper=True, seed=0)
    beside = [each.paper for each in report.modules if each.module.endswith(last) and each.paper]
    rows = [each.projections[1] for each in beside if each.projections[1]]
    assert len(beside) == len(rows) > 0
    return {
        "first": median(each.factor_similarity[0][0] for each in beside),
        "whole": median(each.factor_similarity[-1][-1] for each in beside),
        "first by chance": median(each.control[0][0] for each in beside),
        "whole by chance": median(each.control[-1][-1] for each in beside),
        "of update": median(row.of_update for row in rows),
        "of weight": median(row.of_weight for row in rows),
        "of random": median(row.of_random for row in rows),
    }


@pytest.mark.slow
@pytest.mark.parametrize("last", ["q_proj", "v_proj"])
def test_two_seeds_share_the_leading_direction(last: str) -> None:
    found = medians(trained(16, 0)[0], trained(16, 1)[0], BASE, last)
    assert found["first"] > 0.4 > 20 * found["first by chance"]
    assert 1.2 * found["whole by chance"] < found["whole"] < found["first"]
    assert found["of random"] < found["of update"] < found["of weight"]


@pytest.mark.slow
def test_all_four_weights_do_better_than_one_at_an_equal_budget() -> None:
    losses = {targets: trained(8 // len(targets), 0, targets)[1] for targets in (FOUR, ("q_proj",), ("k_proj",))}
    assert losses[FOUR] < min(losses["q_proj",], losses["k_proj",]) - 0.1


@pytest.mark.slow
def test_the_loss_falls_with_the_rank() -> None:
    losses = [trained(rank, 0)[1] for rank in (1, 4, 16)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[2] > 0.1


@pytest.fixture(scope="module")
def small(real_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real small model, and the folder of what `tests.benchmarks.paper` trained on it for the tests before."""
    pytest.importorskip("transformers")
    return real_models / "smol-base", tmp_path_factory.mktemp("paper")


def held_out(small: tuple[Path, Path], runs: Sequence[paper.Run]) -> dict[str, float]:
    each = zip(runs, paper.train(*small, runs), strict=True)
    return {run.name.rpartition("-seed")[0]: notes["loss"] for run, notes in each}


@pytest.mark.slow
@pytest.mark.paper(0)
def test_the_real_small_model_shows_figures_3_and_4(small: tuple[Path, Path]) -> None:
    """The leading direction is shared and the whole subspace is not, of A and of ΔW, between ranks and between seeds.

    So it does with A as loralib draws it, whose rows have the length 0.6. Gaussian ones of deviation 1/r (1.5 here)
    still hide what 60 steps taught A: φ(1, 1) = 0.14 and 0.18 between two seeds at rank 16.
    """
    paper.train(*small, paper.COMPARED)
    found = paper.similarities(*small)
    assert [each["layers"] for each in found] == [30] * 6
    for each in found:
        least = 0.2 if "rank4" in each["pair"][0] else 0.4
        chance = each["control"]
        for side in ("of A", "of dW, input side"):
            grid = each[side]
            assert grid[0][0] > least > 20 * chance[0][0]
            assert 3 * chance[-1][-1] < grid[-1][-1] < 0.25
        outputs = each["of dW, output side"]
        assert outputs[0][0] > max(0.5, outputs[-1][-1])


@pytest.mark.slow
@pytest.mark.paper(0)
def test_the_real_small_model_shows_table_7_in_part(small: tuple[Path, Path]) -> None:
    """W's own directions are far stronger than ΔW's, and a small rank amplifies more, as in the paper.

    There W_q is 16 times as strong along ΔW (r = 4) as along random directions, which ΔW amplifies 21.5 times; here,
    after 60 steps on a small model, 1.2 times and 1.5 times.
    """
    paper.train(*small, paper.COMPARED)
    rows = {(row["rank"], row["target"]): row for row in paper.strengths(*small)}
    assert len(rows) == 4
    for row in rows.values():
        assert 0.9 < row["of_update"] / row["of_random"] < 1.5
        assert row["of_weight"] > 5 * row["of_update"]
    for target in paper.QV:
        few, many = (rows[rank, target]["amplification"] for rank in (4, 16))
        assert 2.5 > few > 1.5 * many > 0.5


@pytest.mark.slow
@pytest.mark.paper(0)
def test_the_real_small_model_shows_table_5(small: tuple[Path, Path]) -> None:
    """At an equal budget q and k, alone or together, do worst, and all four best of all but o, as in the paper."""
    runs = paper.equal_budgets(small[0])
    assert [run.rank for run in runs] == [10, 15, 15, 10, 6, 6, 3]
    found = held_out(small, runs)
    worse = {name: found.pop(name) for name in ("q-rank10", "k-rank15", "q-k-rank6")}
    assert min(worse.values()) > max(found.values()) + 0.1
    assert max(found.values()) < min(found.values()) + 0.15
    assert max(worse.values()) < 3.5  # untrained 3.59


@pytest.mark.slow
@pytest.mark.paper(0)
def test_the_real_small_model_shows_table_6_in_part(small: tuple[Path, Path]) -> None:
    """Rank 1 does most of it; the paper's gain from more rank is none, here the loss goes on falling.

    With α = r and one learning rate for all, more rank also moves ΔW faster, which counts when there are but 60 steps.
    """
    runs = paper.by_rank()
    untrained = paper.train(*small, runs)[0]["untrained"]
    found = list(held_out(small, runs).values())
    assert found == sorted(found, reverse=True)
    assert untrained - found[0] > 0.5 * (untrained - found[-1]) - 0.05
    assert found[-1] < found[0] - 0.2
