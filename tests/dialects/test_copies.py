"""Copies of the base's tensors, which PEFT saves beside trained embeddings: a named loss, or compared with the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools import dialects
from loratools.errors import LossyConversion
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from tests.make import tiny

from .adapters import peft_folder

EMBEDDING, COPY = "model.embed_tokens", "model.embed_tokens.weight"
FOREIGN = sorted(set(dialects.names()) - {"peft", "tinker", "megatron", "mistral", "mlx_vlm"})


def adapter(folder: Path, copy: torch.Tensor) -> Path:
    """Write factors of the embedding and of one projection, beside a copy of the embedding itself, as PEFT does."""
    generator = torch.Generator().manual_seed(0)
    prefix, q = "base_model.model.", "model.layers.0.self_attn.q_proj"
    sides = {
        f"{EMBEDDING}.lora_embedding_A": (4, copy.shape[0]), f"{EMBEDDING}.lora_embedding_B": (tiny.HIDDEN, 4),
        f"{q}.lora_A.weight": (4, tiny.HIDDEN), f"{q}.lora_B.weight": (tiny.HIDDEN, 4),
    }  # fmt: skip
    tensors = {prefix + name: torch.randn(side, generator=generator) for name, side in sides.items()}
    tensors[f"{prefix}{EMBEDDING}.base_layer.weight"] = copy
    return peft_folder(folder, tensors, target_modules=["q_proj", "embed_tokens"])


@pytest.mark.parametrize("dialect", FOREIGN)
def test_a_copy_that_nothing_compared_is_a_named_loss(dialect: str, tmp_path: Path) -> None:
    weights = tiny.llama_weights()
    opened = dialects.open_adapter(adapter(tmp_path / "a", weights[COPY]))
    assert opened.copies.keys() == {COPY}
    lost = [str(loss) for loss in dialects.get(dialect).losses(opened) if loss.where == COPY]
    assert lost == [
        f"{COPY}: a copy of the base's tensor came along, and only the base can tell whether it is one (--base)"
    ]
    with pytest.raises(LossyConversion) as refusal:
        dialects.save_adapter(opened, tmp_path / "out", dialect=dialect)
    assert lost[0] in refusal.value.problems


@pytest.mark.parametrize("dialect", ["mlx", "gguf"])  # those that can say the embedding's update
def test_with_the_base_a_true_copy_is_no_loss(dialect: str, tmp_path: Path) -> None:
    weights = tiny.llama_weights()
    base = Checkpoint.open(tiny.save_llama(tmp_path / "base", weights))
    found = convert(adapter(tmp_path / "a", weights[COPY]), tmp_path / "out", to=dialect, base=base)
    assert (found.losses, found.modules) == ((), 2)
    merge(base, [tmp_path / "a"], tmp_path / "one")
    merge(base, [dialects.open_adapter(tmp_path / "out", base=base)], tmp_path / "two")
    one, two = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "two")
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.specs)
    assert not torch.equal(one.read(COPY), weights[COPY])


def test_with_the_base_a_copy_that_is_none_is_a_tensor_trained_whole(tmp_path: Path) -> None:
    weights = tiny.llama_weights()
    base = tiny.save_llama(tmp_path / "base", weights)
    larger = torch.cat([weights[COPY], torch.ones(2, tiny.HIDDEN, dtype=torch.bfloat16)])
    folder = adapter(tmp_path / "a", larger)
    with pytest.raises(LossyConversion) as refusal:
        convert(folder, tmp_path / "out", to="mlx", base=base)
    assert f"{COPY}: mlx-lm has no place for a tensor trained whole" in refusal.value.problems


def test_peft_and_peft_alone_writes_it_again(tmp_path: Path) -> None:
    weights = tiny.llama_weights()
    opened = dialects.open_adapter(adapter(tmp_path / "a", weights[COPY]))
    assert dialects.save_adapter(opened, tmp_path / "b", dialect="peft") == []
    assert torch.equal(dialects.open_adapter(tmp_path / "b").copies[COPY].load(), weights[COPY])
