"""What the header of a kohya file says of its tensors, and no tensor shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loratools.dialects.kohya import network
from loratools.storage.lazy import LazyTensor
from tests.dialects.adapters import factors, opened
from tests.dialects.kohya.test_kohya import FLAT, saved

PARTS = {"lora_A.weight": LazyTensor.of(torch.ones(1, 2)), "lora_B.weight": LazyTensor.of(torch.ones(2, 1))}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"ss_network_module": "networks.lora_flux"}, []),
        ({"ss_network_module": "lycoris.kohya"}, []),
        ({"ss_network_module": "networks.mystery"}, ["the header's network networks.mystery is not known here"]),
        ({"ss_network_args": '{"conv_dim": "4", "dropout": "0.1", "use_tucker": "True"}'}, []),
        ({"ss_network_args": '{"gate": "0.5", "off": "", "rs_lora": "True"}'}, ["options in ss_network_args", "gate"]),
        ({"ss_network_args": '{"dora_wd": "True"}'}, ["says dora_wd, and there is no dora_scale for m"]),
        ({"ss_network_args": "[1]"}, []),
        ({"ss_network_args": "{"}, []),
    ],
)
def test_notes(header: dict[str, str], said: list[str]) -> None:
    notes = list(network.notes(header, {"m": PARTS}))
    assert len(notes) == bool(said)
    assert all(text in notes[0] for text in said)


def test_a_magnitude_is_what_dora_wd_means() -> None:
    parts = {**PARTS, "dora_scale": LazyTensor.of(torch.ones(2, 1))}
    assert not list(network.notes({"ss_network_args": '{"dora_wd": "True"}'}, {"m": parts}))


def test_they_are_said_where_the_file_is_read(tmp_path: Path) -> None:
    A, B = factors(0)
    tensors = {
        f"{FLAT}_to_q.lora_down.weight": A,
        f"{FLAT}_to_q.lora_up.weight": B,
        f"{FLAT}_to_q.alpha": torch.ones(()),
    }
    header = {"ss_network_module": "networks.mystery", "ss_network_args": json.dumps({"gate": "0.5"})}
    _, warnings = opened(saved(tmp_path / "a.safetensors", tensors, header))
    assert [warning.partition(": ")[2].partition(" is not")[0].partition(" that")[0] for warning in warnings] == [
        "the header's network networks.mystery", "options in ss_network_args",
    ]  # fmt: skip
