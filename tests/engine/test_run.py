"""A tensor's bytes depend on nothing else in a merge; and what they are, as one golden merge of each dtype says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.engine.run import Settings, in_torch, write_weights
from loratools.linalg import native
from loratools.surgery.merge import Merge, merge, prepare
from tests.conftest import clean_env
from tests.engine import models
from tests.surgery.models import Lora, load, merged, save_adapter, save_base, units_off

needs_c = pytest.mark.skipif(not native.available(), reason="installed without a C compiler")
DTYPES = ["BF16", "F16", "F32"]
GOLDEN = {
    "BF16": "d434531def24a12467f4f9d950947a5008f1944a194dd1fe677d46c63c7c10ea",
    "F16": "ba5abbb62ef84bf5de1f9218449f428e045535ff596dce15a56f772f8d236604",
    "F32": "2c027dd385870282f8e239a7ac471b031e0e6425e6a2b162984d1c8731284c4b",
}
"""SHA-256 over the bytes of all tensors of `models`, in the order of their names, as the C code writes them."""


@pytest.fixture
def without_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let nothing be compiled."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "librows.so")
    native._library.cache_clear()
    yield
    monkeypatch.undo()
    native._library.cache_clear()


def golden(folder: Path, dtype: str) -> dict[str, Tensor]:
    paths, weights = models.adapters(folder)
    merge(models.base(folder / "base", dtype), paths, folder / "out", weights=weights)
    return load(folder / "out")


def sha256(tensors: dict[str, Tensor]) -> str:
    hasher = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        hasher.update(tensor.contiguous().view(torch.uint8).numpy())
    return hasher.hexdigest()


@needs_c
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_merge(tmp_path: Path, dtype: str) -> None:
    """These bytes are a promise: where they change CHANGELOG says so."""
    assert sha256(golden(tmp_path, dtype)) == GOLDEN[dtype]


@needs_c
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_writes_the_golden_merge_but_for_last_bits(
    tmp_path: Path, dtype: str, request: pytest.FixtureRequest
) -> None:
    """The golden bytes themselves on 16 bits, ties aside; float32 shows that a matrix product adds in another order."""
    wanted = golden(tmp_path / "c", dtype)
    request.getfixturevalue("without_c")
    tensors = golden(tmp_path / "torch", dtype)
    off = {name: units_off(tensors[name], wanted[name]) for name in wanted}
    if dtype != "F32":
        assert max(int(units.max()) for units in off.values()) <= 1
        assert sum(int(units.count_nonzero()) for units in off.values()) <= 2
    else:
        torch.testing.assert_close(tensors, wanted, rtol=2.0**-20, atol=2.0**-22)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_golden_merge_is_its_definition_in_float64(tmp_path: Path, dtype: str) -> None:
    tensors = golden(tmp_path, dtype)
    weights = load(tmp_path / "base")
    W, (A, B) = weights["b.weight"].double(), models.factors({"b": models.SHAPES["b"]}, 4, 100)["b"]
    changed = W + 6 / 4 * B.double() @ A.double()
    m = load_file(tmp_path / "dora" / "adapter_model.safetensors")["base_model.model.b.lora_magnitude_vector"]
    wanted = {"b.weight": changed * (m.double() / changed.norm(dim=1))[:, None]}
    one, two = models.loras()
    wanted |= {name: merged(weights, [one, two], torch.float64)[name] for name in ("a.weight", "c.weight", "d.weight")}
    for name, numbers in wanted.items():
        unit = 2.0 ** -{"BF16": 8, "F16": 11, "F32": 24}[dtype] * numbers.abs()
        assert bool(((tensors[name].double() - numbers).abs() <= unit + 2e-7).all()), name


def write(prepared: Merge, folder: Path, settings: Settings) -> dict[str, Tensor]:
    folder.mkdir()
    write_weights(prepared.plan, folder, settings, lambda _: None)
    return load(folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_c), False])
def test_threads_tiles_and_the_order_of_adapters_do_not_show(
    tmp_path: Path, dtype: str, compiled: bool, request: pytest.FixtureRequest
) -> None:
    if not compiled:
        request.getfixturevalue("without_c")
    base, (paths, weights) = models.base(tmp_path / "base", dtype), models.adapters(tmp_path)
    made = []
    for order in ([0, 1, 2], [2, 0, 1], [2, 1, 0]):
        prepared = prepare(base, [paths[i] for i in order], tmp_path / "out", weights=[weights[i] for i in order])
        assert bool(in_torch(prepared.plan)) == (not compiled)
        for threads, tile in ((1, None), (2, 1), (4, 1000), (1, 1 << 23)):
            settings = Settings(threads, retention="off", tile_bytes=tile)
            made.append(sha256(write(prepared, tmp_path / f"{order}{threads}{tile}", settings)))
    assert len(set(made)) == 1


def embedding(folder: Path) -> tuple[Path, Tensor]:
    """Write an adapter for an embedding of 90 tokens, which no C code serves; return its ΔW in float64 too."""
    A, B = models.numbers(3, 90, seed=900, scale=0.25), models.numbers(24, 3, seed=901, scale=0.25)
    path = save_adapter(folder, Lora({"tokens": (A, B)}, alpha=5.0))
    prefix = "base_model.model.tokens.lora_embedding_"
    save_file({f"{prefix}A": A, f"{prefix}B": B}, path / "adapter_model.safetensors", {"format": "pt"})
    return path, 5 / 3 * (B.double() @ A.double()).T


@needs_c
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_tensors_of_the_plan_do_not_show(tmp_path: Path, dtype: str) -> None:
    """Alone in C, beside a tensor for torch, beside a cast, and file by file, as a merge that goes on does it."""
    alone = golden(tmp_path, dtype)
    weights = load(tmp_path / "base") | {"tokens.weight": models.numbers(90, 24, seed=9).to(alone["a.weight"].dtype)}
    paths, scales = models.adapters(tmp_path / "more")
    tokens, delta = embedding(tmp_path / "tokens")
    paths, scales = [*paths, tokens], [*scales, 1.0]
    base = save_base(tmp_path / "more" / "base", weights, shards=2)
    prepared = prepare(base, paths, tmp_path / "more" / "out", weights=scales)
    assert in_torch(prepared.plan) == {"tokens.weight"}
    beside = write(prepared, tmp_path / "beside", Settings(2))
    assert sha256({name: beside[name] for name in alone}) == sha256(alone)
    folder, done = tmp_path / "by file", list[str]()
    folder.mkdir()
    settings = Settings(2)
    write_weights(prepared.plan, folder, settings, lambda _: None, lambda path, _: done.append(path.name))
    assert sha256(load(folder)) == sha256(beside)
    assert done == [file.name for file in prepared.plan.files]
    wanted, unit = weights["tokens.weight"].double() + delta, 2.0 ** -{"BF16": 8, "F16": 11, "F32": 24}[dtype]
    torch.testing.assert_close(beside["tokens.weight"].double(), wanted, rtol=unit, atol=2e-7)


PROGRAM = """
import sys
from pathlib import Path
from loratools.surgery.merge import merge
merge("base", sys.argv[1].split(","), "out")
print("torch" in sys.modules)
"""


@needs_c
@pytest.mark.slow
@pytest.mark.parametrize(("adapters", "imported"), [("one", False), ("dora,one,two", False), ("one,tokens", True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_is_imported_where_a_tensor_needs_it(tmp_path: Path, dtype: str, adapters: str, imported: bool) -> None:
    models.adapters(tmp_path)
    models.base(tmp_path / "plain", dtype)
    weights = load(tmp_path / "plain") | {"tokens.weight": models.numbers(90, 24, seed=9)}
    save_base(tmp_path / "base", weights)
    embedding(tmp_path / "tokens")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, adapters],
        cwd=tmp_path,
        env=clean_env(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (str(imported), "")
