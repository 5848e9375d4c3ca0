"""Damaged files: the two readers agree on what is an adapter, and neither ends in anything but a sentence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import reader as second
from container import Refused, canonical, load

from loratools.errors import LoraToolsError
from loratools.format import validate

from . import adapter_of, cases

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, 1e300, 2**53, "", "x", "lora", "experts", "wdora", "full",
    "1.0", "1.1", "blake3:" + "0" * 64, [], [1],
    ["q"], {}, {"a": 1}, {"name": "a", "must_understand": False}, "../x", "\x00", "é",
]  # fmt: skip


def agree(path: Path) -> bool:
    """Return whether both accept the file; fail where only one does."""
    try:
        ours = not validate.validate(path)
    except LoraToolsError:
        ours = False
    try:
        second.read(path)
        theirs = True
    except Refused:
        theirs = False
    assert ours == theirs, path
    return ours


@pytest.mark.parametrize("name", cases("valid"))
def test_changed_bytes(name: str, tmp_path: Path) -> None:
    source = adapter_of("valid", name)
    data = (source / "adapter_model.safetensors" if source.is_dir() else source).read_bytes()
    chance = random.Random(name)
    path = tmp_path / "adapter.safetensors"
    accepted = 0
    for _ in range(20):
        damaged = bytearray(data)
        at = chance.randrange(len(damaged))
        if chance.random() < 0.2:
            del damaged[at:]
        elif chance.random() < 0.3:
            damaged[at : at + 1] = chance.choice([b"", b"\0", b"{", b'"', b"9"]) * 2
        else:
            damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        accepted += agree(path)
    assert accepted <= 10  # names and free text may change unnoticed; tensors may not


@pytest.mark.parametrize("name", cases("valid"))
def test_changed_manifests(name: str, tmp_path: Path) -> None:
    source = adapter_of("valid", name)
    data = (source / "adapter_model.safetensors" if source.is_dir() else source).read_bytes()
    length = int.from_bytes(data[:8], "little")
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(data)
    document = json.loads(load(path)[1]["loratools"])
    header = json.loads(data[8 : 8 + length])
    chance = random.Random(name)
    for _ in range(40):
        changed = json.loads(json.dumps(document))
        place = changed
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = chance.choice(keys)
            if not (isinstance(place[key], dict | list) and place[key]) or chance.random() < 0.3:
                break
            place = place[key]
        value = chance.choice(JUNK)
        if chance.random() < 0.2:
            del place[key]
        elif isinstance(place, dict) and chance.random() < 0.3:
            place[chance.choice(["a", "layout", "tensor", "a..b", "extensions", "seed", "meaning", "rows"])] = value
        else:
            place[key] = value
        if chance.random() < 0.5 and changed.get("format_version") == "1.1":
            changed.pop("meaning", None)  # else it is always among what both find
            changed["format_version"] = "1.2"
        try:
            header["__metadata__"]["loratools"] = canonical(changed)
        except Refused:
            header["__metadata__"]["loratools"] = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
        agree(path)


CONFIG_FIELDS = [
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
    "use_rslora", "modules_to_save", "bias", "use_dora", "lora_bias", "exclude_modules", "init_lora_weights",
    "use_qalora", "other", "layer_replication", "trainable_token_indices",
]  # fmt: skip
CONFIG_JUNK = [
    *JUNK, "LORA", "LORATOOLS", "none", "pissa", {"blk.q": 1}, {"q": 1, "^blk\\.q": 2}, {"^blk\\.q": 1}, ["head"],
    ["v"], [[0, 1]],
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in cases("valid") if adapter_of("valid", name).is_dir()])
def test_changed_configs(name: str, tmp_path: Path) -> None:
    source, chance = adapter_of("valid", name), random.Random(name)
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    config = json.loads((source / "adapter_config.json").read_text())
    for _ in range(40):
        changed = config | {chance.choice(CONFIG_FIELDS): chance.choice(CONFIG_JUNK)}
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        agree(tmp_path)
