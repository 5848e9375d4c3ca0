"""What is said of an adapter's changes: by which adapter, of which module, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import compare, report, spectrum
from loratools.errors import IncompatibleAdapter
from tests.surgery.models import lora, save_adapter

SHAPES = {f"layers.{i}.q": (9, 7) for i in range(3)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with sound/, some/ with the first two of its modules, and wrong/ with a NaN in the third."""
    save_adapter(tmp_path / "sound", lora(SHAPES, rank=2))
    save_adapter(tmp_path / "some", lora(dict(list(SHAPES.items())[:2]), rank=2))
    save_adapter(tmp_path / "wrong", lora(SHAPES, rank=2))
    path = tmp_path / "wrong" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "layers.2.q.lora_A" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, path)
    return tmp_path


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        (lambda place: spectrum(place / "wrong"), "wrong"),
        (lambda place: compare(place / "sound", place / "wrong"), "wrong"),
        (lambda place: compare(place / "some", place / "wrong"), "wrong"),  # the module is in one adapter alone
        (lambda place: compare(place / "wrong", place / "some", paper=True), "wrong"),
        (lambda place: report([place / "some", place / "wrong"], place / "page.html"), "adapter 2"),
        (lambda place: report(place / "wrong", place / "page.html"), "adapter 1"),
    ],
    ids=["spectrum", "compare", "only in one", "paper", "report of two", "report"],
)
def test_a_change_that_holds_nan_is_named(measure: Callable[[Path], object], name: str, place: Path) -> None:
    with pytest.raises(IncompatibleAdapter) as refused:
        measure(place)
    assert f"{name}: layers.2.q: factor A (2, 7) holds 1 NaN or infinite element" in refused.value.message
    assert "diverged" in (refused.value.hint or "")
    assert not (place / "page.html").exists()
