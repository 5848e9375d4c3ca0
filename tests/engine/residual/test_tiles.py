"""Tiles of a residual: the blocks are those of the formulas in NumPy, and they bring every bit back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.residual import Lost, codes, prediction
from loratools.engine.residual.predict import measure, steps
from loratools.engine.residual.tiles import Coder
from loratools.storage.codecs.floats import narrow, widen
from loratools.storage.header import TensorSpec
from tests.adapter.kinds.reference import build, random
from tests.adapter.kinds.test_kinds import KINDS, LINEAR, weight_of

DORA = {name: parts for name, parts in KINDS.items() if "dora" in name and weight_of(parts).shape == (7, 10)}


@pytest.mark.parametrize(("base", "after"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("F32", "BF16")])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["lora", "two", "direct", *sorted(DORA)])
def test_blocks_are_numpys_and_bring_every_bit_back(name: str, transposed: bool, base: str, after: str) -> None:
    """Of one product, of two on one site, of rescaled ones, and of what no adapter changed but a cast did."""
    parts = {"direct": [], "lora": [LINEAR], "two": [LINEAR, {k: 3 * random(*v.shape) for k, v in LINEAR.items()}]}
    changes = parts.get(name, [DORA.get(name, LINEAR)])
    W = weight_of(LINEAR).flatten(1)
    W = (W.T if transposed else W).contiguous()
    bits = narrow(W.numpy(), base).reshape(-1)
    numbers = widen(bits, base, np.float32).reshape(W.shape)
    placed = [(Placement("m", build(each), Site.whole("w", W.shape, transposed=transposed)), 0.7) for each in changes]
    made = steps(placed)
    measure(placed, made, lambda start, stop: numbers[start:stop].astype(np.float64), 4)
    changed = numbers.copy()
    for step in made:
        changed += step.delta(slice(None)).astype(np.float32)
        if step.gains is not None:
            changed *= step.gains if step.across else step.gains[:, None]
    result = narrow(changed, after).reshape(-1)
    spec = TensorSpec(after, tuple(W.shape), Path("model.safetensors"), 0, 0)
    lost = Lost("w", base, tuple(W.shape), spec, tuple(placed))
    columns, coder = W.shape[1], Coder(lost, made)
    for start, stop in ((0, 3), (3, len(W))):
        tile = slice(start * columns, stop * columns)
        block = coder.encode(bits[tile], result[tile], start)
        predicted = prediction(lost, result[tile], made, start)
        assert block == codes.encode(bits[tile], result[tile], predicted, base, after)
        found = coder.decode(memoryview(block), result[tile], start)
        assert found.tobytes() == bits[tile].tobytes()
