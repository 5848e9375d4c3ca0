"""Products in bfloat16 on the way: recorded, as true as float32's, one result in each process, left out on request."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.dialects import open_adapter
from loratools.linalg.native import delta
from loratools.linalg.products import Rounded
from loratools.surgery.extract import Extraction, extract
from loratools.surgery.extract.certify import certify
from tests.conftest import clean_env

SHAPES = {"up_proj": (640, 320), "down_proj": (320, 640), "o_proj": (384, 384), "odd": (301, 385)}
served = pytest.mark.skipif(not Rounded.serves((2, 2)), reason="this processor does not multiply bfloat16")


def random(shape: tuple[int, ...], seed: int, scale: float) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Return a base and a fine-tune whose changes have a few directions above noise, in one dtype."""
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    old, new = {}, {}
    for seed, (name, (out, inner)) in enumerate(SHAPES.items()):
        W = random((out, inner), seed, 0.02).to(request.param)
        change = random((out, 24), 10 + seed, 1e-3) @ random((24, inner), 20 + seed, 1.0)
        change += random((out, inner), 30, 2e-3)
        old[f"model.layers.0.{name}.weight"] = W
        new[f"model.layers.0.{name}.weight"] = (W.float() + change).to(request.param)
    save_file(old, base)
    save_file(new, tuned)
    return base, tuned


def products_of(output: Path) -> str:
    """Return what the record of an adapter says."""
    return str(open_adapter(output).provenance[-1].parameters["products"])


def check_errors(found: Extraction, models: tuple[Path, Path], output: Path) -> None:
    """Compare the stated errors with float64 on the factors as stored, and with the optimum."""
    old, new = (load_file(path) for path in models)
    stored = load_file(output / "adapter_model.safetensors")
    for one in found.of("factored"):
        assert one.layer is not None
        D = new[one.pair.name].float() - old[one.pair.name].float()
        prefix = f"base_model.model.{one.path.removesuffix('.weight')}"
        A, B = (stored[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
        error = float((D.double() - B @ A).norm()) / float(D.double().norm())
        sigma = torch.linalg.svdvals(D.double())
        assert one.layer.error == pytest.approx(error, rel=1e-6)
        assert error <= 1.0003 * float(sigma[one.rank :].norm() / sigma.norm())


@served
def test_the_record_names_the_arithmetic_and_errors_are_true(models: tuple[Path, Path], tmp_path: Path) -> None:
    for arithmetic, said in (("auto", "bfloat16, the last float32"), ("float32", "float32")):
        found = extract(*models, tmp_path / arithmetic, 16, arithmetic=arithmetic)  # type: ignore[arg-type]
        assert products_of(tmp_path / arithmetic) == said
        check_errors(found, models, tmp_path / arithmetic)
    extract(*models, tmp_path / "tight", 16, tight=True)
    assert products_of(tmp_path / "tight") == "float32"


def test_a_processor_without_such_products_takes_the_steps_of_float32(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = extract(*models, tmp_path / "asked", 16, arithmetic="float32")
    monkeypatch.setattr(delta, "multiplies_bf16", lambda: False)
    found = extract(*models, tmp_path / "out", 16)
    assert found.digest == asked.digest
    assert products_of(tmp_path / "out") == "float32"


def test_without_the_c_code_the_errors_are_as_true(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "LIBRARY", tmp_path / "none.so")
    delta._library.cache_clear()
    try:
        found = extract(*models, tmp_path / "out", 16)
    finally:
        monkeypatch.undo()
        delta._library.cache_clear()
    assert math.isfinite(found.total.error)
    check_errors(found, models, tmp_path / "out")


def test_torch_computes_on_one_thread_whatever_it_was_told(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Its sums of float64 are in another order on another number of threads."""
    before, seen = torch.get_num_threads(), set()
    try:
        torch.set_num_threads(3)
        for threads in (1, 2):
            extract(
                *models,
                tmp_path / str(threads),
                16,
                threads=threads,
                progress=lambda _: seen.add(torch.get_num_threads()),
            )
            certify(
                models[1], models[0], tmp_path / str(threads), threads=threads,
                progress=lambda _: seen.add(torch.get_num_threads()),
            )  # fmt: skip
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


@served
def test_every_process_and_number_of_threads_writes_the_same(models: tuple[Path, Path], tmp_path: Path) -> None:
    digests = [extract(*models, tmp_path / str(threads), 16, threads=threads).digest for threads in (1, 2, 9)]
    for number, threads in (("2", "1"), ("1", "3")):
        code = (
            "import sys; import loratools;"
            "print(loratools.extract_svd(sys.argv[1], sys.argv[2], sys.argv[3], 16, threads=int(sys.argv[4])).digest)"
        )
        line = [sys.executable, "-c", code, *map(str, models), str(tmp_path / f"p{number}"), threads]
        env = {**clean_env(), "OMP_NUM_THREADS": number}
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=env)
        digests.append(done.stdout.strip())
    assert len(set(digests)) == 1
