"""BOFT on outputs against dense float64 matrices, whatever the stages, the weight and the tiles."""

from __future__ import annotations

import pytest
import torch

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.kinds.boft_output import BLOCKS, RESCALE
from loratools.storage.lazy import LazyTensor
from tests.adapter.kinds.reference import Parts, applied, projected, random

CASES: dict[str, tuple[Parts, float, tuple[int, ...]]] = {
    "one": ({BLOCKS: random(1, 3, 4, 4)}, 0.0, (12, 8)),
    "two": ({BLOCKS: random(2, 2, 6, 6), RESCALE: random(12, 1)}, 0.0, (12, 8)),
    "three": ({BLOCKS: random(3, 8, 2, 2)}, 0.0, (16, 5)),
    "constrained": ({BLOCKS: random(3, 4, 4, 4)}, 0.01, (16, 5)),
    "kernel": ({BLOCKS: random(3, 4, 4, 4), RESCALE: random(16, 1, 1, 1)}, 0.0, (16, 3, 2, 2)),
}


def update_of(parts: Parts, constraint: float, shape: tuple[int, ...]) -> Update:
    lazy = {part: LazyTensor.of(tensor) for part, tensor in parts.items()}
    kind = kinds.claim(lazy)
    assert kind == "boft_output"
    update: Update = kinds.get(kind).build(lazy, 1.0, constraint).fitted(shape)
    again: Update = kinds.get(kind).build(lazy, 1.0, 1.0, layout=update.layout)
    assert (again.layout, again.alpha, again.scaling) == ({"constraint": constraint}, constraint, 1.0)
    return update


def defined(W: torch.Tensor, parts: Parts, constraint: float, weight: float) -> torch.Tensor:
    """Return W' by one dense matrix a stage: output p·b + i of its blocks is fed by the outputs that it permutes."""
    X = parts[BLOCKS]
    stages, count, size, _ = X.shape
    Q = X - X.mT
    limit = constraint * count * size
    Q = Q * (limit / Q.norm()) if 0 < limit < Q.norm() else Q
    out = W.flatten(1)
    for stage in range(stages):
        apart = 2**stage * size // 2
        order = [c * 2 * apart + g * apart + k for c in range(len(out) // (2 * apart))
                 for k in range(apart) for g in range(2)]  # fmt: skip
        M = torch.zeros(len(out), len(out), dtype=torch.float64)
        for block in range(count):
            R = (torch.eye(size) + Q[stage, block]) @ torch.linalg.inv(torch.eye(size) - Q[stage, block])
            R = torch.eye(size) + weight * (R - torch.eye(size))
            at = order[block * size : (block + 1) * size]
            M[torch.tensor(at)[:, None], torch.tensor(at)] = R
        out = M @ out
    rows = parts[RESCALE].reshape(-1, 1) if RESCALE in parts else 1.0
    return (rows * out).reshape(W.shape)


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("weight", [1.0, -0.4])
@pytest.mark.parametrize("name", sorted(CASES))
def test_tiles_and_projections_are_those_of_dense_matrices(name: str, weight: float, rows: int) -> None:
    parts, constraint, shape = CASES[name]
    W, X = random(*shape, seed=5), random(4, random(*shape).flatten(1).shape[1], seed=1)
    wanted = defined(W, parts, constraint, weight)
    update = update_of(parts, constraint, shape)
    for transposed in (False, True) if len(shape) == 2 else (False,):
        merged = applied(W, [(update, weight)], transposed=transposed, rows=rows, dtype=torch.float64)
        torch.testing.assert_close(merged, wanted, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(projected(W, [(update, weight)], X), X @ wanted.flatten(1).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({BLOCKS: random(2, 2, 3, 3)}, "no butterfly of even blocks"),
        ({BLOCKS: random(3, 2, 4, 4)}, "no butterfly of even blocks"),
        ({BLOCKS: random(2, 2, 4, 6)}, r"expected \(m, n, b, b\)"),
        ({BLOCKS: random(2, 2, 4, 4), RESCALE: random(7, 1)}, "expected 8 numbers"),
        ({BLOCKS: random(2, 2, 4, 4)}, "the base's weight has shape"),
    ],
)
def test_what_is_no_butterfly_is_refused(parts: Parts, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        update_of(parts, 0.0, (12, 8))
