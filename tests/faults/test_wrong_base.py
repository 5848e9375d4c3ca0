"""The wrong base is refused before an output appears, and so is the same merge twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter.model import BaseIdentity
from loratools.errors import (
    IncompatibleAdapter,
    OutputRefused,
    WrongBase,
)
from loratools.storage import digest, files
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import merge
from tests.faults.expect import refused
from tests.make import tiny

Q0 = "model.layers.0.self_attn.q_proj"


def sealed(model: Path, algorithm: str = "blake3") -> Any:
    checkpoint = Checkpoint.open(model / "base")
    adapter = dialects.open_adapter(model / "adapter")
    names = [f"{module}.weight" for module in adapter.updates]
    tensors = {
        name: digest.tensor(spec.dtype, spec.shape, files.chunks(spec), algorithm)
        for name, spec in checkpoint.specs.items()
        if name in names
    }
    return replace(adapter, base=BaseIdentity("tiny", None, checkpoint.schema(algorithm), tensors))


def flip(model: Path, name: str) -> None:
    """Flip the lowest bit of one element of a tensor of the base."""
    spec = Checkpoint.open(model / "base").specs[name]
    with spec.file.open("r+b") as file:
        file.seek(spec.start + spec.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("algorithm", digest.ALGORITHMS)
def test_one_flipped_bit_in_a_touched_tensor_is_the_wrong_base(model: Path, algorithm: str) -> None:
    adapter = sealed(model, algorithm)
    merge(model / "base", [adapter], model / "right")
    flip(model, "model.norm.weight")  # untouched by the adapter, so its digests say nothing of it
    merge(model / "base", [adapter], model / "also right")
    flip(model, f"{Q0}.weight")
    error = refused(WrongBase, f"{Q0}.weight", model, adapter)
    assert "digest" in error.message
    merge(model / "base", [adapter], model / "unchecked", check_base="off")
    merge(model / "base", [adapter], model / "warned", check_base="warn")
    assert load_all(model / "unchecked").keys() == load_all(model / "right").keys()


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.specs}


def test_another_shape_and_another_model(model: Path) -> None:
    adapter = sealed(model)
    weights = tiny.llama_weights()
    for path in (model / "base").iterdir():
        path.unlink()
    save_file({name: tensor.float() for name, tensor in weights.items()}, model / "base" / "model.safetensors")
    refused(WrongBase, "digest", model, adapter)
    save_file(
        {name: tensor for name, tensor in weights.items() if "layers.1" not in name},
        model / "base" / "model.safetensors",
    )
    error = refused(IncompatibleAdapter, "does not fit this base model", model, adapter)
    assert any("model.layers.1.self_attn.q_proj" in problem for problem in error.problems)


def test_a_second_merge_of_the_same_adapter(model: Path) -> None:
    merge(model / "base", [model / "adapter"], model / "once")
    with pytest.raises(OutputRefused, match="already is a merge of this adapter"):
        merge(model / "once", [model / "adapter"], model / "twice")
    with pytest.raises(OutputRefused, match="already is a merge of this adapter"):
        merge(model / "once", [model / "adapter"], model / "twice", weights=[0.5])
    assert not (model / "twice").exists()
    tiny.save_peft(model / "other", tiny.lora_factors(seed=5))
    merge(model / "once", [model / "other"], model / "both")
