"""What is read of both models: every element once, inside the sites and outside of them, in C and in NumPy alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from loratools.adapter.site import Site
from loratools.errors import BadFile
from loratools.linalg.native import proof
from loratools.parallel import no_progress
from loratools.storage.header import TensorSpec
from loratools.surgery.verify import tiles
from loratools.surgery.verify.probes import PROBES, Probe
from tests.conftest import clean_env
from tests.surgery import models
from tests.surgery.models import DTYPES, lora, random, save_adapter, save_base

ROWS, COLUMNS = 60, 44


def stored(path: Path, numbers: torch.Tensor, dtype: str) -> TensorSpec:
    """Write a tensor behind some other bytes."""
    data = numbers.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(b"other" + data)
    return TensorSpec(dtype, tuple(numbers.shape), path, 5, 5 + len(data))


def probe(site: Site) -> Probe:
    """Return a probe that knows all of its input features, and expects no change."""
    out, inputs = site.shape[::-1] if site.transposed else site.shape
    X = np.random.default_rng(out).standard_normal((inputs, PROBES))
    shape = (inputs, out) if site.transposed else (out, inputs)
    none, known = np.zeros(shape), np.arange(inputs, dtype=np.uint32)
    return Probe(site, X, np.zeros((out, PROBES)), np.zeros((out, PROBES)), known, lambda rows: none[rows], 0.0)


def site(rows: tuple[int, int, int], columns: tuple[int, int, int], *, transposed: bool = False) -> Site:
    out = len(range(*(columns if transposed else rows)))
    return Site("W", (ROWS, COLUMNS), rows, columns, (0, out), transposed)


ALL = (0, ROWS, 1), (0, COLUMNS, 1)
SITES = {
    "the whole": [site(*ALL)],
    "the whole, transposed": [site(*ALL, transposed=True)],
    "two parts of the rows": [site((0, 20, 1), ALL[1]), site((20, ROWS, 1), ALL[1])],
    "some rows": [site((7, 33, 1), ALL[1])],
    "every third row": [site((2, ROWS, 3), ALL[1])],
    "two parts of the columns": [
        site(ALL[0], (3, 19, 1), transposed=True), site(ALL[0], (19, 40, 1), transposed=True)
    ],
    "every other column": [site(ALL[0], (1, COLUMNS, 2))],
    "parts that meet": [site((0, 30, 1), ALL[1]), site((1, ROWS, 2), ALL[1])],
}  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tile", [COLUMNS * 4 * 7, 1 << 20])
@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("F32", "F16"), ("F16", "F32"), ("F64", "BF16")], ids="-".join)
@pytest.mark.parametrize("sites", SITES)
def test_every_element_is_seen_once(
    sites: str, dtypes: tuple[str, str], tile: int, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements that differ are known inside the sites, strays outside; all count in the norm and along the probes."""
    monkeypatch.setattr(tiles, "TILE", tile)
    W = random(ROWS, COLUMNS).to(DTYPES[dtypes[0]]).to(DTYPES[dtypes[1]]).double()  # a number in both dtypes
    result = W.clone()
    moved = torch.rand(W.shape, generator=torch.Generator().manual_seed(2)) < 0.1
    result[moved] *= 2
    probes = [probe(each) for each in SITES[sites]]
    before = stored(tmp_path / "before", W, dtypes[0])
    specs = before, stored(tmp_path / "after", result, dtypes[1])
    seen: list[int] = []
    found = tiles.survey(*specs, probes, exact, seen.append)
    inside = torch.zeros_like(moved)
    for each in probes:
        place = (slice(*each.site.rows), slice(*each.site.columns))
        delta = (result - W)[place].numpy()
        np.testing.assert_allclose(each.Y, (delta.T if each.site.transposed else delta) @ each.X, atol=1e-11)
        inside[place] = True
    assert found.squares == pytest.approx(float(result.square().sum()), rel=1e-12)
    assert found.strays == int((moved & ~inside).sum())
    assert found.tally.wrong == sum(int(moved[slice(*s.rows), slice(*s.columns)].sum()) for s in SITES[sites])
    assert found.tally.compared == sum(len(range(*s.rows)) * len(range(*s.columns)) for s in SITES[sites])
    assert sum(seen) == specs[1].nbytes


@pytest.mark.parametrize("sites", ["the whole", "some rows"])
@pytest.mark.parametrize("which", ["before", "after"])
def test_a_file_that_became_shorter_is_named(which: str, sites: str, tmp_path: Path) -> None:
    specs = [stored(tmp_path / name, random(ROWS, COLUMNS), "F16") for name in ("before", "after")]
    path = tmp_path / which
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        BadFile, match=rf"{which}: became shorter while it was read \(ends at byte {path.stat().st_size}\)"
    ):
        tiles.survey(specs[0], specs[1], [probe(each) for each in SITES[sites]], False, no_progress)


def test_merges_of_stored_factors_are_verified_without_torch(tmp_path: Path) -> None:
    """To import it takes longer than to read a model of a billion parameters, and three times the memory."""
    weights = {"a.weight": random(64, 96, dtype=torch.bfloat16), "norm.weight": random(96)}
    given = lora({"a": (64, 96)})
    paths = (
        save_base(tmp_path / "model", models.merged(weights, [given])), save_base(tmp_path / "base", weights),
        save_adapter(tmp_path / "adapter", given),
    )  # fmt: skip
    code = (
        "import sys; from loratools import verify; paths = sys.argv[1:]; "
        "assert verify(*paths).ok and verify(*paths, exact=True).ok; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], env=clean_env(), check=True)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process its memory")
@pytest.mark.parametrize("exact", [False, True])
def test_memory_does_not_grow_with_the_tensors(exact: bool, tmp_path: Path) -> None:
    """Of a tensor of 16 million elements, 128 MB in float64, no more than tiles is held."""
    weights = {"a.weight": torch.full((4096, 4096), 0.5, dtype=torch.bfloat16)}
    given = lora({"a": (4096, 4096)}, scale=0.02)
    paths = (
        save_base(tmp_path / "model", models.merged(weights, [given])), save_base(tmp_path / "base", weights),
        save_adapter(tmp_path / "adapter", given),
    )  # fmt: skip
    code = (
        "import sys; from loratools import verify; paths = sys.argv[2:]; "
        "assert verify(*paths, exact=sys.argv[1] == 'True', threads=2).ok; print(open('/proc/self/status').read())"
    )
    line = [sys.executable, "-c", code, str(exact), *map(str, paths)]
    env = clean_env() | {"OPENBLAS_NUM_THREADS": "1"}
    told = subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout
    assert int(told.split("VmHWM:")[1].split()[0]) < 100_000  # kB


def test_this_machine_serves_what_it_can() -> None:
    """A pass through files is there wherever the rest of the C code is, on systems that read as it does."""
    assert proof.passes() is (proof.available() and sys.platform != "win32")
