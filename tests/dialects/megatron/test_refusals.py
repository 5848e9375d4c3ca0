"""Megatron-Bridge and NeMo: what cannot be read without running code, or without being told more, is refused."""

from __future__ import annotations

import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import dialects
from loratools.errors import BadFile, LoraToolsError, UnsupportedAdapter
from tests.dialects.megatron.files import (
    BRIDGE,
    NEMO,
    NEMO_CONFIG,
    RUN_CONFIG,
    bridge,
    factors,
    nemo,
    state,
)  # fmt: skip


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


def test_pickles_with_code_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = nemo(tmp_path / "a.nemo", {"model.x": Exploit()}, NEMO_CONFIG)
    with pytest.raises(BadFile, match=r"a\.nemo: this pickle holds more than tensors.*mkdir"):
        dialects.open_adapter(path)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    with pytest.raises(BadFile, match="this pickle holds more than tensors"):
        dialects.open_adapter(tmp_path / "unpacked")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("inside", ["", "weights"])
def test_distributed_checkpoints_are_refused_by_name(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "ckpt" / inside
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(UnsupportedAdapter, match=r"a distributed checkpoint \(2 \.distcp files\)") as refusal:
        dialects.open_adapter(tmp_path / "ckpt")
    assert "Export it" in str(refusal.value.hint)


def test_other_archives_are_refused_by_name(tmp_path: Path) -> None:
    tensors = state(NEMO, "model.decoder.", 1)
    with pytest.raises(BadFile, match="a compressed archive") as compressed:
        dialects.open_adapter(nemo(tmp_path / "a.nemo", tensors, NEMO_CONFIG, mode="w:gz"))
    assert "tar xzf a.nemo" in str(compressed.value.hint)
    ranks = nemo(tmp_path / "b.nemo", tensors, NEMO_CONFIG, name="mp_rank_00/model_weights.ckpt")
    with pytest.raises(UnsupportedAdapter, match=r"saved in 1 parts .* such as mp_rank_00/model_weights\.ckpt"):
        dialects.open_adapter(ranks)
    with pytest.raises(UnsupportedAdapter, match=r"no model_weights\.ckpt in it; it holds model_config\.yaml, other"):
        dialects.open_adapter(nemo(tmp_path / "c.nemo", tensors, NEMO_CONFIG, name="other"))
    whole = nemo(tmp_path / "d.nemo", tensors, NEMO_CONFIG)
    for size in (2000, 300):
        whole.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(BadFile, match=r"damaged|reaches beyond|no archive"):
            dialects.open_adapter(whole)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: &a [1, 1]\nb: [*a, *a]\n", "has aliases"),
        ("a: " + "[" * 200 + "]" * 200, "is nested more than 64 deep"),
        ("!!python/object/apply:os.mkdir [hacked]", "is not plain YAML"),
        ("- 1\n", "is not names and values"),
        ("a: " + "x" * 200_001, "larger than 200000 bytes"),
    ],
)
def test_configurations_are_data(tmp_path: Path, text: str, sentence: str) -> None:
    folder = bridge(tmp_path / "a", state(BRIDGE, "decoder.", 1), None)
    (folder / "run_config.yaml").write_text(text)
    with pytest.raises(BadFile, match=sentence):
        dialects.open_adapter(folder)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    A, B = factors("fc1", 0)
    expert = "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.adapter"
    tensors = state(BRIDGE, "decoder.", 1) | {f"{expert}.linear_in.weight": A, f"{expert}.linear_out.weight": B}
    with pytest.raises(UnsupportedAdapter) as refusal:
        dialects.open_adapter(bridge(tmp_path / "a", tensors))
    assert "local_experts.3" in refusal.value.problems[0]
    assert "experts are not read" in refusal.value.problems[0]
    ranks = {**RUN_CONFIG, "model": {**RUN_CONFIG["model"], "tensor_model_parallel_size": 2}}
    with pytest.raises(UnsupportedAdapter, match="trained by 2 tensor-parallel ranks"):
        dialects.open_adapter(bridge(tmp_path / "b", state(BRIDGE, "decoder.", 1), ranks))
    path = f"decoder.layers.0.{BRIDGE['qkv']}"
    with pytest.raises(BadFile) as partner:
        dialects.open_adapter(bridge(tmp_path / "c", {f"{path}.linear_in.weight": A}))
    assert partner.value.problems == ("model.layers.0.self_attn.qkv: no linear_out, while its partner is there",)
    empty = {f"{path}.linear_in.weight": torch.ones(0), f"{path}.linear_out.weight": torch.ones(0)}
    with pytest.raises(BadFile, match="2 of 2 tensors are empty: saved under DeepSpeed ZeRO-3"):
        dialects.open_adapter(bridge(tmp_path / "d", empty))


def test_a_damaged_archive_is_a_sentence_or_an_adapter(tmp_path: Path) -> None:
    """Bytes of tar headers, of the pickle and of anything are changed: nothing but loratools' own exceptions comes."""
    whole = nemo(tmp_path / "a.nemo", state(NEMO, "model.decoder.", 1), NEMO_CONFIG).read_bytes()
    with tarfile.open(tmp_path / "a.nemo") as archive:
        headers = [member.offset for member in archive]
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        at, size = chance.choice([*((header, 512) for header in headers), (512, 6000), (0, len(whole))])
        for _ in range(chance.choice((1, 2, 8))):
            data[at + chance.randrange(min(size, len(data) - at))] = chance.choice(
                (0, 48, 55, 255, chance.randrange(256))
            )
        for header in headers:  # a true checksum, or the tar module would look no further
            block = data[header : header + 512]
            data[header + 148 : header + 156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
        path = tmp_path / "damaged.nemo"
        path.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.1 else data)
        try:
            for lazy in dialects.open_adapter(path).tensors().values():
                lazy.load()
        except LoraToolsError:
            refused += 1
    assert 100 < refused < 300
