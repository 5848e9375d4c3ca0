"""The pretended device itself: it refuses what CUDA refuses."""

from __future__ import annotations

import pytest
import torch

from tests.make.pretended_gpu import pretended


def test_tensors_of_two_devices_do_not_meet() -> None:
    with pretended():
        here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
        assert str((there @ there).device) == "cuda:0"
        assert there.cpu().device.type == here.to("cpu").device.type == "cpu"
        for meet in (lambda: here + there, lambda: there @ here, lambda: torch.cat([here, there]), there.numpy):
            with pytest.raises((RuntimeError, TypeError), match=r"same device|Tensor\.cpu"):
                meet()
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2, 2, device="cuda:1")


def test_memory_that_changes_on_its_way_is_noticed() -> None:
    with pretended():
        sent, arrived = torch.zeros(4), torch.empty(4, device="cuda")
        arrived.copy_(sent, True)
        float(arrived.sum())
        sent.fill_(1)
        arrived.copy_(sent, non_blocking=True)
        sent.fill_(2)
        with pytest.raises(RuntimeError, match="was written to while a copy"):
            float(arrived.sum())
