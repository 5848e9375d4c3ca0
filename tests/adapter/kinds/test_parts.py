"""What parts make a kind, in what shapes, and what is said of those that do not fit."""

from __future__ import annotations

import pytest
import torch

from loratools.adapter import kinds
from loratools.adapter.site import Site
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor
from tests.adapter.kinds.reference import Parts, applied, build, merged, random
from tests.adapter.kinds.test_kinds import CONV, EMBEDDING, KINDS, LINEAR, magnitude, weight_of


@pytest.mark.parametrize(
    ("parts", "shape", "written"),
    [
        (LINEAR, (7,), (7,)),
        (LINEAR, (7, 1), (7,)),
        (LINEAR, (1, 7), (7,)),
        (EMBEDDING, (10,), (10,)),
        (EMBEDDING, (1, 10), (10,)),
        (CONV, (1, 7, 1, 1), (1, 7, 1, 1)),
        (CONV, (7,), (1, 7, 1, 1)),
        (CONV, (7, 1, 1, 1), (1, 7, 1, 1)),
    ],
)
def test_magnitudes_of_every_shape_in_the_wild(parts: Parts, shape: tuple[int, ...], written: tuple[int, ...]) -> None:
    """All of them mean the same, and are written as PEFT writes them."""
    W = weight_of(parts)
    given, usual = build(magnitude(parts, *shape)), build(magnitude(parts))
    found = [applied(W, [(update, 1.0)], transposed=False, rows=3, dtype=torch.float64) for update in (given, usual)]
    assert torch.equal(found[0], found[1])
    part = given.parts["lora_magnitude_vector"]
    assert part.shape == tuple(part.load().shape) == written


GROUPED = {"lora_A.weight": random(8, 2, 3, 3), "lora_B.weight": random(6, 2, 1, 1)}


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (magnitude(LINEAR) | {"lora_magnitude_vector": random(8)}, "expected one number for each of 7 features"),
        (magnitude(EMBEDDING) | {"lora_magnitude_vector": random(7)}, "expected one number for each of 10 features"),
        (LINEAR | {"lora_B.weight": random(7, 4)}, "do not share a rank"),
        (LINEAR | {"lora_B.bias": random(6)}, r"lora_B.bias has shape \(6,\), expected \(7,\)"),
        (CONV | {"lora_B.bias": random(6)}, r"lora_B.bias has shape \(6,\), expected \(7,\)"),
        (CONV | {"lora_B.weight": random(7, 3, 2, 1)}, "are no factors of kind conv"),
        (CONV | {"lora_B.weight": random(7, 3, 1)}, "are no factors of kind conv"),
        (GROUPED, "a convolution with 4 groups, which cannot be merged"),
        (EMBEDDING | {"lora_embedding_B": random(10, 4)}, "do not share a rank"),
        (EMBEDDING | {"lora_embedding_A": random(0, 7)}, "empty factors"),
        (CONV | {"lora_A.weight": random(0, 5, 2, 4)}, "empty factors"),
        (LINEAR | {"lora_A.weight": random(0, 10)}, "empty factors"),
    ],
)
def test_shapes_that_do_not_fit(parts: Parts, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build(parts)


def test_parts_that_no_kind_claims() -> None:
    for parts in (
        {"lora_A.weight": random(3, 10)},
        {"lora_magnitude_vector": random(7)},
        EMBEDDING | {"lora_B.bias": random(10)},
        LINEAR | {"lora_diag": random(3)},
    ):
        assert kinds.claim({part: LazyTensor.of(tensor) for part, tensor in parts.items()}) is None


@pytest.mark.parametrize(
    ("name", "transposed", "zero", "feature"),
    [
        ("dora", False, (2, slice(None)), 2),
        ("dora", True, (5, slice(None)), 5),
        ("dora-conv2d", False, (6,), 6),
        ("dora-embedding", False, (slice(None), 4), 4),
    ],
)
def test_a_feature_whose_norm_is_zero(name: str, transposed: bool, zero: tuple[object, ...], feature: int) -> None:
    parts = {part: tensor.clone() for part, tensor in KINDS[name].items()}
    W = weight_of(parts)
    W[zero] = 0  # type: ignore[index]
    parts["lora_embedding_B" if "embedding" in name else "lora_B.weight"][feature] = 0
    with pytest.raises(IncompatibleAdapter, match=f"zero in all of output feature {feature}"):
        applied(W, [(build(parts), 1.0)], transposed=transposed, rows=2, dtype=torch.float32)


def test_the_bias_of_b_is_the_updates_own() -> None:
    for parts in (LINEAR, CONV, magnitude(LINEAR), magnitude(CONV)):
        bias = random(7, seed=3)
        update = build({**parts, "lora_B.bias": bias})
        assert update.bias is not None
        assert torch.equal(update.bias.load(), bias)
        assert torch.equal(update.parts["lora_B.bias"].load(), bias)
        assert build(parts).bias is None


def test_dora_has_no_delta_weight_of_its_own() -> None:
    with pytest.raises(ValueError, match="depends on the base weight"):
        build(KINDS["dora"]).delta_weight()


def tokens(rows: list[int], count: int | None = None) -> kinds.Update:
    """Return an update that replaces these rows."""
    values = LazyTensor.of(random(len(rows) if count is None else count, 10))
    parts = {"token_adapter.trainable_tokens_delta": values}
    assert kinds.claim(parts) == "tokens"
    built: kinds.Update = kinds.get("tokens").build(parts, 1.0, 1.0, layout={"rows": rows})
    return built


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_rows_take_the_place_of_others(rows: int) -> None:
    W = random(9, 10, seed=4)
    update = tokens([6, 0, 8])
    expected = W.clone()
    expected[[6, 0, 8]] = update.parts["token_adapter.trainable_tokens_delta"].load()
    found = applied(W, [(update, 1.0)], transposed=False, rows=rows, dtype=torch.float64)
    assert torch.equal(found, expected)
    X = random(4, 10)
    site = Site.whole("w", (9, 10))
    projected = update.project(X, 1.0, kinds.Underlying(site, lambda: W, lambda probes: probes @ W.T))
    torch.testing.assert_close(projected, X @ expected.T)


def test_rows_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="expected a row for each of 3 token indices"):
        tokens([1, 2, 3], 2)
    with pytest.raises(ValueError, match="are not different rows"):
        tokens([1, 1])
    with pytest.raises(ValueError, match="nothing says which token indices"):
        kinds.get("tokens").build(tokens([1]).parts, 1.0, 1.0)
    with pytest.raises(ValueError, match="token index 9 is beyond the base's 9 rows"):
        tokens([9]).fitted((9, 10))  # type: ignore[attr-defined]
    assert tokens([8]).fitted((9, 10)).shape == (9, 10)  # type: ignore[attr-defined]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e25])
@pytest.mark.parametrize("columns", [64, 192, 70])
def test_norms_of_float32_rows(scale: float, columns: int) -> None:
    """Whatever the size of the numbers, also where float32 could not hold their squares."""
    W = random(5, columns) * scale
    parts = {"lora_A.weight": random(2, columns) * scale, "lora_B.weight": random(5, 2)}
    parts["lora_magnitude_vector"] = 1 + random(5).abs()
    found = applied(W, [(build(parts), 1.0)], transposed=False, rows=2, dtype=torch.float32).double()
    expected = merged(W, parts, 0.7)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 3e-7
