"""Matrices on their way to a device: exact for any layout, through memory that is bounded."""

from __future__ import annotations

import pytest
import torch

from loratools.engine import lane
from loratools.engine.lane import Lane
from tests.make.pretended_gpu import pretended
from tests.surgery.models import random


def test_a_matrix_goes_to_a_device_in_pieces_of_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "PIECE", 1 << 10)
    for X in (random(100, 37), random(64, 50).T, random(64, 90)[:, ::3], random(7, 11, dtype=torch.float64)):
        with pretended() as log:
            way = Lane(torch.device("cuda", 1))
            with way.open():
                sent = [way.send(X) for _ in range(3)]
            assert all(str(each.device) == "cuda:1" and torch.equal(each.cpu(), X) for each in sent)
        assert 0 < log.pinned <= 2 << 10
