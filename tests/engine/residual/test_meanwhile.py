"""What is coded while a merge runs: the bytes of a second look, whatever the height of the tiles that it is shown."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.residual import LENGTH, Array, Lost
from loratools.engine.residual.meanwhile import Meanwhile
from loratools.engine.residual.predict import steps
from loratools.engine.residual.tiles import Coder
from loratools.storage.codecs.floats import bytes_of, narrow, widen
from loratools.storage.header import TensorSpec
from loratools.surgery.merge import merge
from loratools.surgery.unmerge import unmerge
from tests.adapter.kinds.reference import build, random
from tests.adapter.kinds.test_kinds import KINDS
from tests.surgery.models import lora, save_adapter, save_base
from tests.surgery.models import random as weights

ROWS, COLUMNS, HEAD = 300, 1000, 24  # three tiles of the residual; bytes before the tensor in its file


def changed(path: Path, dtype: str) -> tuple[Lost, Array, Array]:
    """Write a tensor that a product changed to a file; return what it was, and both of its forms."""
    parts = {"lora_A.weight": random(4, COLUMNS), "lora_B.weight": random(ROWS, 4)}
    placed = [(Placement("m", build(parts), Site.whole("w", (ROWS, COLUMNS))), 0.05)]
    W = narrow(np.random.default_rng(1).standard_normal(ROWS * COLUMNS).astype(np.float32), dtype)
    delta = sum(step.delta(slice(None)) for step in steps(placed))
    after = narrow((widen(W, dtype, np.float32).reshape(ROWS, COLUMNS) + delta).astype(np.float32).reshape(-1), dtype)
    path.write_bytes(bytes(HEAD) + after.tobytes())
    spec = TensorSpec(dtype, (ROWS, COLUMNS), path, HEAD, HEAD + after.nbytes)
    return Lost("w", dtype, (ROWS, COLUMNS), spec, tuple(placed)), W, after


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("ends", [[300], [131, 262, 300], [1, 130, 131, 140, 299, 300], [256, 300]])
def test_tiles_of_any_height_give_the_blocks_of_a_second_look(ends: list[int], dtype: str, tmp_path: Path) -> None:
    lost, W, after = changed(tmp_path / "merged", dtype)
    coder, wanted = Coder(lost, steps(lost.placements)), b""
    for start, stop in lost.tiles():
        tile = slice(start * COLUMNS, stop * COLUMNS)
        block = coder.encode(W[tile], after[tile], start)
        wanted += LENGTH.pack(len(block)) + block
    done: list[int] = []
    with (tmp_path / "spool").open("w+b") as spool:
        early = Meanwhile({"w": lost}, spool, done.append)
        early.add("before", b"12345")
        watch = early.watch("w")
        assert watch is not None
        for start, stop in pairwise([0, *ends]):
            assert "w" not in early.early.pieces
            tile = slice(start * COLUMNS, stop * COLUMNS)
            watch(bytes_of(W[tile]), bytes_of(after[tile]), start)
        at, size = early.early.pieces["w"]
        assert at == 5
        assert (tmp_path / "spool").read_bytes()[at : at + size] == wanted
    assert sum(done) == W.nbytes


def test_what_takes_all_of_the_base_first_is_left_for_later(tmp_path: Path) -> None:
    dora = next(parts for name, parts in sorted(KINDS.items()) if "dora" in name)
    rescaled = [(Placement("m", build(dora), Site.whole("w", (7, 10))), 1.0)]
    spec = TensorSpec("BF16", (7, 10), tmp_path / "merged", 0, 140)
    lost = {
        "rescaled": Lost("rescaled", "BF16", (7, 10), spec, tuple(rescaled)), "cast": Lost("cast", "BF16", (7,), spec),
        "gone": Lost("gone", "BF16", (7,), None),
    }  # fmt: skip
    with (tmp_path / "spool").open("w+b") as spool:
        early = Meanwhile(lost, spool, lambda count: None)
        assert [early.watch(name) for name in (*lost, "as it was")] == [None] * 4


def test_tiles_of_a_merge_that_are_not_those_of_its_residual(tmp_path: Path) -> None:
    """1,000 rows of 700 numbers: 187 a tile of the residual, and the merge takes multiples of 8."""
    base = save_base(tmp_path / "base", {"up.weight": weights(1000, 700, dtype=torch.bfloat16, scale=0.05)})
    adapter = save_adapter(tmp_path / "adapter", lora({"up": (1000, 700)}, rank=4, scale=0.05))
    report = merge(base, [adapter], tmp_path / "merged", keep_residual=True, threads=2)
    assert report.residual is not None
    assert not [path.name for path in (tmp_path / "merged").iterdir() if path.name.startswith(".")]
    assert unmerge(tmp_path / "merged", [adapter], tmp_path / "restored").proved == "root hash"
