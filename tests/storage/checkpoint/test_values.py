"""Digests by value: of codes those of the 16-bit numbers that a scheme's formula makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.storage import digest
from loratools.storage.checkpoint import Checkpoint, values
from loratools.storage.checkpoint.logical import encodings, logical
from tests.make import fp8, tiny


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_the_digest_of_codes_is_that_of_their_numbers_in_16_bit(algorithm: str, tmp_path: Path) -> None:
    fp8.save_llama(tmp_path / "base", tiny.llama_weights())
    stored = load_file(tmp_path / "base" / "model.safetensors")
    view = logical(Checkpoint.open(tmp_path / "base"))
    assert len(encodings(view)) == 14
    for name in encodings(view):
        W = fp8.decoded(stored, name.removesuffix(".weight")).float().bfloat16()
        spec = view.specs[name]
        hasher = values.start(spec, algorithm)
        for piece in values.pieces(spec):
            hasher.update(values.plain(spec, piece))
        raw = bytes(W.contiguous().flatten().view(torch.uint8).numpy())
        assert digest.finish(hasher, algorithm) == digest.tensor("BF16", W.shape, [raw], algorithm)


def test_a_plain_tensor_is_hashed_as_it_is_stored(tmp_path: Path) -> None:
    tiny.save_llama(tmp_path / "base", tiny.llama_weights())
    spec = Checkpoint.open(tmp_path / "base").specs["model.norm.weight"]
    whole = b"".join(bytes(values.plain(spec, piece)) for piece in values.pieces(spec))
    assert whole == spec.file.read_bytes()[spec.start : spec.stop]
