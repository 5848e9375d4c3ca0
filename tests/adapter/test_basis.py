"""Updates carried into another basis: what they do to diag(r)·W·diag(c) there is diag(r)·W'·diag(c)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.adapter import kinds
from loratools.adapter.basis import Basis
from loratools.adapter.kinds import Update
from loratools.adapter.site import Site
from loratools.storage.lazy import LazyTensor

OUT, IN, RANK = 24, 32, 4
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "lora": {"lora_A.weight": (RANK, IN), "lora_B.weight": (OUT, RANK)},
    "dora": {"lora_A.weight": (RANK, IN), "lora_B.weight": (OUT, RANK), "lora_magnitude_vector": (OUT,)},
    "loha": {"hada_w1_a": (OUT, RANK), "hada_w1_b": (RANK, IN), "hada_w2_a": (OUT, RANK), "hada_w2_b": (RANK, IN)},
    "lokr": {"lokr_w1": (4, 8), "lokr_w2_a": (6, RANK), "lokr_w2_b": (RANK, 4)},
    "full": {"diff": (OUT, IN)},
    "glora": {"a1.weight": (IN, RANK), "a2.weight": (RANK, IN), "b1.weight": (OUT, RANK), "b2.weight": (RANK, IN)},
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 4


def update_of(kind: str) -> Update:
    parts = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES[kind].items())}
    if "lora_magnitude_vector" in parts:
        parts["lora_magnitude_vector"] = parts["lora_magnitude_vector"].abs() + 1
    update: Update = kinds.get(kind).build({name: LazyTensor.of(part) for name, part in parts.items()}, 1.5, 6.0)
    return update


def applied(update: Update, W: Tensor, weight: float = 1.0) -> Tensor:
    site = Site.whole("m.weight", (W.shape[0], W.shape[1]))
    term = update.fitted(tuple(W.shape)).term(site, weight, torch.float64, torch.device("cpu"))
    result, rows = W.clone(), slice(0, len(W))
    if term.needs_pass:
        term.observe_rows(W, rows)
    term.apply_rows(result, rows, None)
    return result


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("sides", ["both", "rows", "columns"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_carried_update_does_the_same(kind: str, sides: str, weight: float) -> None:
    W = random(OUT, IN, seed=50)
    r = random(OUT, seed=51).exp() if sides != "columns" else None
    c = random(IN, seed=52).exp() if sides != "rows" else None

    def scaled(matrix: Tensor) -> Tensor:
        matrix = matrix if r is None else r[:, None] * matrix
        return matrix if c is None else matrix * c

    update = update_of(kind)
    carried = update.carried(Basis(r, c, lambda rows: scaled(W)[rows], weight))
    wanted = scaled(applied(update, W, weight))
    torch.testing.assert_close(applied(carried, scaled(W), weight), wanted, rtol=3e-6, atol=1e-6)
    naive = applied(update, scaled(W), weight)
    assert float((naive - wanted).norm() / (wanted - scaled(W)).norm()) > 0.05


def test_factors_of_rows_stay(tmp_path: Any) -> None:
    parts = {"weight": LazyTensor.of(random(OUT, seed=1)), "on_input": LazyTensor.of(torch.tensor(0))}
    update = kinds.get("ia3").build(parts, 1.0, 1.0)
    assert update.carried(Basis(random(OUT, seed=2), random(IN, seed=3), lambda _: random(1, seed=4))) is update


def test_a_rotation_goes_with_columns_alone() -> None:
    parts = {"oft_blocks": LazyTensor.of(random(6, 4, 4, seed=1))}
    update = kinds.get("oft").build(parts, 1.0, 0.0)
    assert update.carried(Basis(None, random(IN, seed=3), lambda _: random(1, seed=4))) is update
    with pytest.raises(ValueError, match="no rotation any more"):
        update.carried(Basis(random(OUT, seed=2), None, lambda _: random(1, seed=4)))


def test_what_has_no_such_update_says_so() -> None:
    shapes = {"lora_A.weight": (RANK, IN), "lora_B.weight": (OUT, RANK), "dora_scale": (OUT, 1)}
    parts = {name: LazyTensor.of(random(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
    with pytest.raises(ValueError, match="nothing is known"):
        kinds.get("wdora").build(parts, 1.0, 1.0).carried(Basis(None, random(IN, seed=3), lambda _: random(1, seed=4)))
    with pytest.raises(ValueError, match="has no 5 features"):
        update_of("lora").carried(Basis(None, random(5, seed=3), lambda _: random(1, seed=4)))
