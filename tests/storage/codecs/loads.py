"""Models as transformers loads them, and what they say to a few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor


def load(folder: Path, **options: Any) -> Any:
    """Load a model on the CPU, in bfloat16."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model.eval()(torch.arange(1, 25).view(2, 12)).logits.double())
