"""Models that are quantized and not whole, or whose config.json states nothing that can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from tests.make.fp8 import STATED, blocks
from tests.storage.codecs.bnb_models import four_bit
from tests.storage.codecs.recode import K, Q
from tests.surgery.models import random, save_base


def two_modules(first: str, second: str) -> dict[str, torch.Tensor]:
    """Return two NF4 modules' tensors, of which `four_bit` names the one it makes."""
    stored = four_bit(random(64, 128), "nf4", False)
    module = next(iter(stored)).partition(".weight")[0]
    return {name.replace(module, path): tensor.clone() for path in (first, second) for name, tensor in stored.items()}


@pytest.mark.parametrize("missing", ["quant_map", "absmax"])
def test_a_module_that_lacks_what_its_like_has_is_named(tmp_path: Path, missing: str) -> None:
    stored = two_modules(Q, K)
    del stored[f"{K}.weight.{missing}"]
    base = save_base(tmp_path / "base", stored, model_type="llama")
    with pytest.raises(UnsupportedAdapter, match=missing) as refusal:
        logical(Checkpoint.open(base))
    assert K in str(refusal.value)
    assert Q not in str(refusal.value)


def test_a_statement_that_is_no_object_is_refused(tmp_path: Path) -> None:
    W, scale = blocks(random(256, 256))
    tensors = {f"{Q}.weight": W, f"{Q}.weight_scale_inv": scale}
    assert logical(Checkpoint.open(save_base(tmp_path / "good", tensors, quantization_config=STATED))).stored
    base = save_base(tmp_path / "base", tensors, quantization_config="fp8")
    with pytest.raises(BadFile, match="quantization_config is 'fp8', and an object was expected"):
        logical(Checkpoint.open(base))
