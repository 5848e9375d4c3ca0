"""What the tests of pages share: a base of six modules, an adapter of all of them, and the text of a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.surgery.models import lora, random, save_adapter, save_base

SHAPES = {f"model.layers.{i}.self_attn.{side}_proj": (24, 16) for i in range(3) for side in "qv"}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a folder with base/ and adapter/."""
    save_adapter(tmp_path / "adapter", lora(SHAPES, rank=4, seed=1))
    weights = {f"{module}.weight": random(*shape, seed=60 + i) for i, (module, shape) in enumerate(SHAPES.items())}
    save_base(tmp_path / "base", weights, model_type="llama")
    return tmp_path


def text_of(page: Path) -> str:
    """Return the page."""
    return page.read_text(encoding="utf-8")
