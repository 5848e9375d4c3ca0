"""Whether a layer is stored [in, out]: each sign by itself, and what stops where there is none."""

from __future__ import annotations

import pytest

from loratools.adapter.placement.conv1d import Conv1D

H, F = 8, 12
IN_OUT = {"h.0.up.weight": (H, F), "h.0.up.bias": (F,)}
OUT_IN = {"h.0.up.weight": (F, H), "h.0.up.bias": (F,)}
SQUARE = {"h.0.out.weight": (H, H), "h.0.out.bias": (H,)}
BARE = {"h.0.out.weight": (H, H)}


@pytest.mark.parametrize(
    ("shapes", "swapped", "turned"),
    [
        (IN_OUT | SQUARE, True, True),  # built of Conv1D, under names that GPT-2 does not have
        (IN_OUT | SQUARE, False, "fan_in_fan_out"),
        (IN_OUT | BARE, False, False),  # every Conv1D has a bias
        (OUT_IN | SQUARE, True, False),  # PEFT takes fan_in_fan_out back where it wraps an nn.Linear
        (SQUARE, True, True),
        (SQUARE, False, False),
        (BARE, True, False),
        (SQUARE | {"h.1.out.weight": (H, F), "h.1.out.bias": (F,)}, False, True),  # the name, in another block
        (SQUARE | {"h.1.out.weight": (F, H), "h.1.out.bias": (F,)} | IN_OUT, True, False),
    ],
)
def test_a_square_layer_of_remote_code(shapes: dict[str, tuple[int, ...]], swapped: bool, turned: bool | str) -> None:
    layers = Conv1D.of(shapes, "unheard_of")
    if isinstance(turned, str):
        with pytest.raises(ValueError, match=turned):
            layers.stored_in_out("h.0.out.weight", (H, H), (H, H), swapped)
    else:
        assert layers.stored_in_out("h.0.out.weight", (H, H), (H, H), swapped) is turned


def test_the_bias_of_an_unsquare_layer_shows_its_own() -> None:
    layers = Conv1D.of(IN_OUT | {"h.0.head.weight": (F, H), "h.0.head.bias": (F,)}, "")
    assert layers.of_all is None
    assert layers.stored_in_out("h.0.up.weight", (F, H), (H, F), swapped=False)
    assert not layers.stored_in_out("h.0.head.weight", (F, H), (F, H), swapped=True)
    assert layers.likely("h.0.up")
    assert not layers.likely("h.0.head")


def test_known_types_are_known_by_name() -> None:
    assert Conv1D.of(OUT_IN, "gpt2").stored_in_out("h.0.c_fc.weight", (H, H), (H, H), swapped=False)
    assert not Conv1D.of(IN_OUT, "starcoder2").stored_in_out("h.0.c_fc.weight", (H, H), (H, H), swapped=True)
    assert not Conv1D.of(IN_OUT, "gpt2").likely("h.0.up")
