"""What a new adapter starts as: which modules, and which numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import loratools
from loratools import live
from loratools.errors import InvalidOption
from tests.live import ids, net

BLOCKS = ["blocks.0.down", "blocks.0.up", "blocks.1.down", "blocks.1.up"]


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["up"], ["blocks.0.up", "blocks.1.up"]),
        (["blocks.0.up", "head"], ["blocks.0.up", "head"]),
        ([r"0.up"], ["blocks.0.up"]),
        (r".*\.1\..*", ["blocks.1.down", "blocks.1.up"]),
        ("all-linear", [*BLOCKS, "head"]),
    ],
)
def test_targets_are_names_a_pattern_or_all(targets: str | list[str], chosen: list[str]) -> None:
    assert sorted(live.attach(net(), targets=targets, rank=1).sites) == chosen


def test_all_linear_leaves_the_output_head_alone() -> None:
    model = net()
    model.get_output_embeddings = lambda: model.head  # type: ignore[operator]
    assert sorted(live.attach(model, targets="all-linear", rank=1).sites) == BLOCKS
    with pytest.raises(InvalidOption, match="no linear layer"):
        live.attach(nn.Sequential(nn.LayerNorm(3)), targets="all-linear")


def test_a_string_that_is_a_name_is_told_apart_from_a_list() -> None:
    with pytest.raises(InvalidOption, match=r"regular expression for whole paths.*targets=\['up'\]"):
        live.attach(net(), targets="up")


def pieces(**options: object) -> dict[str, live.site.Piece]:
    settings = {"targets": ["up", "conv", "embed"], "rank": 64, "seed": 3} | options
    lora = live.attach(net(torch.float32), **settings)  # type: ignore[arg-type]
    return {path: piece for _, piece, path, _ in lora.children()}


def test_random_starts_have_their_deviation_and_follow_the_seed_alone() -> None:
    kaiming, gaussian = pieces(), pieces(init="gaussian")
    up, conv = kaiming["blocks.0.up"], kaiming["conv"]
    assert up.A.abs().max() <= 8**-0.5
    assert abs(up.A.std().item() * 3**0.5 / 8**-0.5 - 1) < 0.1
    assert abs(conv.A.std().item() * 3**0.5 / 24**-0.5 - 1) < 0.1
    assert abs(gaussian["blocks.0.up"].A.std().item() * 64 - 1) < 0.1
    assert not up.B.any()
    assert not kaiming["embed"].A.any()
    assert abs(kaiming["embed"].B.std().item() - 1) < 0.1
    torch.manual_seed(99)
    again, other = pieces(), pieces(seed=4)
    assert all(torch.equal(piece.A, kaiming[path].A) for path, piece in again.items())
    assert not torch.equal(other["blocks.0.up"].A, up.A)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_made_of_the_weight_leave_the_base_alone(init: live.Init, tmp_path: Path) -> None:
    model, x = net(torch.float32), ids()
    y, W = model(x), model.blocks[0]["up"].weight.detach().clone()
    lora = live.attach(model, targets=["up", "conv"], rank=3, alpha=6, init=init)
    assert (model(x) - y).abs().max() < 1e-6
    assert torch.equal(model.blocks[0]["up"].weight, W)
    piece = lora.sites["blocks.0.up"].lora.pieces["default"][0]
    product = (piece.B @ piece.A).detach().double()
    if init == "pissa":
        U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
        assert (2 * product - U[:, :3] * S[:3] @ V[:3]).abs().max() < 1e-5
    else:
        Q, R = torch.linalg.qr(W.double())
        assert (product - Q[:, :3] @ R[:3]).abs().max() < 1e-5
    with torch.no_grad():
        piece.A.mul_(1.5)
    lora.save(tmp_path / "a")
    update = loratools.open_adapter(tmp_path / "a").updates["blocks.0.up"]
    assert (update.rank, update.scaling) == (6, 2.0)
    assert (update.delta_weight() - product).abs().max() < 1e-5  # 2·(1.5·B·A − B·A)
    other = net(torch.float32)
    live.load(other, tmp_path / "a")
    assert (other(x) - model(x)).abs().max() < 1e-5


def test_dora_starts_with_the_norms_of_the_weight() -> None:
    model = net()
    lora = live.attach(model, targets=["up", "embed", "conv"], dora=True, rank=2)
    norms = {
        "blocks.1.up": model.blocks[1]["up"].weight.norm(dim=1),
        "embed": model.embed.weight.norm(dim=0),
        "conv": model.conv.weight.flatten(1).norm(dim=1),
    }
    for path, norm in norms.items():
        piece = lora.sites[path].lora.pieces["default"][0]
        assert (piece.magnitude.detach().flatten() - norm).abs().max() < 1e-6
