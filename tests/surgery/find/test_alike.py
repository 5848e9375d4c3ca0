"""The pair search over thousands of sketches: what float64 says of every pair, in memory that does not grow with n²."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from loratools.linalg.delta import Product
from loratools.linalg.sketch import sketch
from loratools.parallel import one_torch_thread
from loratools.surgery.find.alike import NEIGHBOURS, cosines, near, nearest, same
from loratools.surgery.find.sketches import FoundAdapter, Sketched

SIDE, COUNT = 16, 2400
FOUND = FoundAdapter("", "peft", None, (), (1, 1), 1, 0, 1, 1, "", "", ())


@dataclass
class Changes:
    """Whole changes as vectors, float64 (n, 256): each pair is what it is, without factors or files."""

    vectors: torch.Tensor

    def norm2(self, i: int) -> float:
        return self.inner(i, i)

    def inner(self, i: int, j: int) -> float:
        return float(self.vectors[i] @ self.vectors[j])


def adapters(count: int, rounding2: float = 0.0) -> list[Sketched]:
    return [Sketched(replace(FOUND, path=str(i)), str(i), "one layout", rounding2) for i in range(count)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def many() -> tuple[Changes, torch.Tensor]:
    """2,400 changes in a drawn order: unlike ones of many sizes, and families around each twelfth of them.

    A family has two that are the same but for rounding, one 1e-4 of it away, which no rounding is, one of half its
    length, one at cosine 0.95, one at 0.88 and the opposite; three changes are zero.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        return torch.randn(count, SIDE * SIDE, dtype=torch.float64, generator=generator)

    rows = []
    for x in drawn(COUNT // 12) * torch.logspace(-4, 4, COUNT // 12, dtype=torch.float64)[:, None]:
        others = drawn(12)
        others -= (others @ x / (x @ x))[:, None] * x
        others *= x.norm() / others.norm(dim=1, keepdim=True)
        family = [x, x + 1e-7 * others[0], x + 1e-4 * others[1], x / 2, -x]
        family += [c * x + math.sqrt(1 - c * c) * y for c, y in zip((0.95, 0.88), others[2:4], strict=True)]
        rows += [*family, *others[len(family) :]]
    rows[7], rows[500], rows[-1] = (torch.zeros_like(rows[0]) for _ in range(3))
    order = torch.randperm(len(rows), generator=generator)
    vectors = torch.stack(rows)[order]
    whole = torch.eye(SIDE, dtype=torch.float64)
    sketches = torch.stack([sketch([("m", Product(D.reshape(SIDE, SIDE), whole))]) for D in vectors]).float()
    return Changes(vectors), sketches


def test_the_same_are_those_that_float64_finds_among_all_pairs(many: tuple[Changes, torch.Tensor]) -> None:
    changes, sketches = many
    norms = changes.vectors.norm(dim=1)
    gram = changes.vectors @ changes.vectors.mT
    off = (gram.diagonal() + gram.diagonal()[:, None] - 2 * gram).clamp(min=0).sqrt()
    expected = list(range(COUNT))
    is_head = torch.ones(COUNT, dtype=torch.bool)
    for k in range(1, COUNT):  # the nearest of the earlier ones that are no duplicates themselves
        j = int(off[k, :k].masked_fill(~is_head[:k], math.inf).argmin())
        if off[k, j] <= 1e-5 * max(norms[k], norms[j]):
            expected[k], is_head[k] = j, False
    found = same(adapters(COUNT), sketches, changes)
    assert [head for head, _ in found] == expected
    twice = [i for i, head in enumerate(expected) if head != i]
    assert len(twice) == COUNT // 12 + 2  # each family has one pair; of three zeros two are the first
    for i in twice:
        true = (changes.vectors[i] - changes.vectors[expected[i]]).norm() / norms[expected[i]] if norms[i] else 0.0
        assert found[i][1] == pytest.approx(float(true), abs=3e-8)  # a difference of squares keeps half the digits


def test_rounding_allows_what_it_may_have_moved(many: tuple[Changes, torch.Tensor]) -> None:
    changes, sketches = many
    rounded = [replace(each, rounding2=1e-8 * changes.norm2(i)) for i, each in enumerate(adapters(COUNT))]
    found = same(rounded, sketches, changes)
    assert sum(head != i for i, (head, _) in enumerate(found)) == 2 * (COUNT // 12) + 2  # those 1e-4 away too


def test_near_pairs_are_those_that_float64_finds_among_all_pairs(many: tuple[Changes, torch.Tensor]) -> None:
    changes, sketches = many
    norms = changes.vectors.norm(dim=1)
    table = changes.vectors @ changes.vectors.mT / (norms[:, None] * norms).masked_fill(norms[:, None] * norms == 0, 1)
    expected = {(int(i), int(j)) for i, j in (table.triu(1) >= 0.9).nonzero()}
    assert len(expected) == 10 * (COUNT // 12)  # of five in a family, and 0.95 with 0.88 is 0.836
    assert int((table >= 0.9).sum(1).max()) - 1 <= NEIGHBOURS
    found, unlisted = near(sketches, range(COUNT), changes, 0.9)
    assert ({(min(p.first, p.second), max(p.first, p.second)) for p in found}, unlisted) == (expected, 0)
    for pair in found:
        assert pair.cosine == pytest.approx(float(table[pair.first, pair.second]), abs=1e-12)
        assert pair.ratio == pytest.approx(float(norms[pair.second] / norms[pair.first]), rel=1e-12)


def test_the_nearest_of_each_are_those_of_the_whole_table(many: tuple[Changes, torch.Tensor]) -> None:
    _, sketches = many
    chosen = list(range(0, COUNT, 3))
    rows, norms = cosines(sketches, chosen)
    table = torch.tensor(rows, dtype=torch.float64)
    unit = sketches[chosen].double()
    unit /= unit.norm(dim=1, keepdim=True).clamp(min=1e-300)
    assert float((table - (unit @ unit.mT).fill_diagonal_(1.0)).abs().max()) < 1e-14
    listed, again = nearest(sketches, chosen, 3)
    assert again == pytest.approx(norms, rel=1e-6)
    table.fill_diagonal_(-1)
    least = table.topk(3).values[:, -1]
    for (i, j), value in listed.items():
        assert value == pytest.approx(float(table[i, j]), abs=1e-6)
        assert value >= min(float(least[i]), float(least[j])) - 1e-6
    assert {i for pair in listed for i in pair} == set(range(len(chosen)))
    assert 1.5 * len(chosen) <= len(listed) <= 3 * len(chosen)


GROWTH = """
import resource, torch
from tests.surgery.find.test_alike import Changes, adapters
from loratools.surgery.find.alike import near, nearest, same
torch.set_num_threads(1)
peaks = []
for count in (1000, 8000):
    sketches = torch.randn(count, 256, generator=torch.Generator().manual_seed(1))
    everything = adapters(count)
    assert all(head == i for i, (head, _) in enumerate(same(everything, sketches, Changes(sketches))))
    assert near(sketches, range(count), Changes(sketches), 0.9) == ([], 0)
    assert len(nearest(sketches, range(count), 1)[0]) >= count // 2
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[1] - peaks[0])
"""


def test_memory_grows_with_the_number_and_not_with_its_square() -> None:
    """Of 8,000 the products of all pairs are 256 MB in float32, and what tells which are near 64 MB."""
    pytest.importorskip("resource")
    made = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert int(made.stdout) < 96e6
