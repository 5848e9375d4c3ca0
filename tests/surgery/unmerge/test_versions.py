"""Residuals of versions that are no longer written, and of such as are not known yet."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratools.errors import BadFile
from loratools.storage.companions import RESIDUAL
from loratools.surgery.merge import merge
from loratools.surgery.unmerge import unmerge
from tests.surgery.models import DTYPES, lora, random, save_adapter, save_base
from tests.surgery.unmerge.test_unmerge import expect_same

WIDTH = 2  # bytes of a number
SHAPES = {"block.0.up": (300, 700)}  # two tiles


def written_as_1(blob: bytes, width: int) -> tuple[bytes, int]:
    """Return the blocks of a tensor as version 1 had them, exceptions deflated, and how many exceptions were listed."""
    made, at, listed = b"", 0, 0
    while at < len(blob):
        (size,) = struct.unpack_from("<I", blob, at)
        form, count, ranks, _ = struct.unpack_from("<BIII", blob, at + 4)
        start = at + 4 + 13
        body, exceptions = blob[start : start + ranks], blob[start + ranks : at + 4 + size]
        if form == 2:
            numbers, number, shift = [], 0, 0
            for byte in exceptions:
                number, shift = number + ((byte % 128) << shift), shift + 7
                if byte < 128:
                    numbers.append(number)
                    number, shift = 0, 0
            gaps, high = np.array(numbers[::2], "<u4"), np.array(numbers[1::2], f"<u{width}")
            planes = b"".join((high >> (8 * n)).astype(np.uint8).tobytes() for n in range(width))
            exceptions = zlib.compress(gaps.tobytes() + planes) if count else b""
            form, listed = 0, listed + count
        block = struct.pack("<BIII", form, count, ranks, len(exceptions)) + body + exceptions
        made += struct.pack("<I", len(block)) + block
        at += 4 + size
    return made, listed


def rewritten(path: Path, version: int) -> int:
    """Write a residual as an older one, or as one of a version to come; return how many exceptions were listed."""
    tensors, listed = {}, 0
    with safe_open(path, "np") as opened:
        metadata = opened.metadata()
        for name in opened.keys():  # noqa: SIM118  (what is opened can't be iterated)
            blob, count = written_as_1(opened.get_tensor(name).tobytes(), WIDTH)
            tensors[name], listed = torch.frombuffer(bytearray(blob), dtype=torch.uint8), listed + count
    document = json.loads(metadata["residual"]) | {"version": version}
    save_file(tensors, path, metadata | {"residual": json.dumps(document)})
    return listed


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_residual_of_version_1_still_brings_every_bit_back(dtype: str, tmp_path: Path) -> None:
    weights = {"block.0.up.weight": random(300, 700, scale=0.05, dtype=DTYPES[dtype])}
    base = save_base(tmp_path / "base", weights, 1, model_type="llama")
    adapter = save_adapter(tmp_path / "adapter", lora(SHAPES, rank=4, seed=1, scale=0.01))
    merge(base, [adapter], tmp_path / "merged", keep_residual=True)
    assert rewritten(tmp_path / "merged" / RESIDUAL, 1) > 0
    assert unmerge(tmp_path / "merged", [adapter], tmp_path / "unmerged").method == "residual"
    expect_same(base, tmp_path / "unmerged")
    rewritten(tmp_path / "merged" / RESIDUAL, 3)
    with pytest.raises(BadFile, match="a residual of version 3, this loratools reads 1 and 2"):
        unmerge(tmp_path / "merged", [adapter], tmp_path / "again")
