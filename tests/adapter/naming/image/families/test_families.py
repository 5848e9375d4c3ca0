"""Every family is valid once built, and data that contradict themselves are refused with all they contradict."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image import families
from loratools.adapter.naming.image.families import Family, Fused


@pytest.mark.parametrize("name", families.names())
def test_each_family_is_valid_and_says_what_it_is(name: str) -> None:
    family = families.get(name)
    assert all((family.summary, family.original, family.diffusers))


def test_flux_is_one_of_them() -> None:
    assert "flux" in families.names()


def test_a_family_says_all_that_it_contradicts_at_once() -> None:
    with pytest.raises(ValueError, match="toy") as refusal:
        Family(
            summary="toy",
            component="engine",
            renames={"blocks.{}.q": "layers.q", "blocks.0.q": "layers.0.q", "a.b": "x", "a_b": "x"},
            fused={"qkv": Fused(("q", "k"))},
            split={"gate_up": Fused(("qkv", "up"))},
            swapped=frozenset({"mod"}),
            called=("(",),
            depths={"heads": (3,)},
            inputs={"mod": (8,)},
            proportions={"mod": (2, 1)},
        )
    said = str(refusal.value)
    for what in (
        "engine is no component", "diffusers has x twice", "original has qkv twice",
        "original's blocks.0.q is blocks.{}.q and blocks.0.q",
        "original's a_b is a.b and a_b", "blocks.{}.q has 1 numbers, layers.q has 0", "mod is swapped and not",
        "mod has a proportion", "mod has inputs", "heads has depths", "( is no regular expression",
    ):  # fmt: skip
        assert what in said


@pytest.mark.parametrize(("parts", "sizes"), [(("q",), ()), (("q", "q"), ()), (("q", "k"), (1.0,))])
def test_a_fused_weight_has_several_parts_and_a_size_for_each(parts: tuple[str, ...], sizes: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"parts|sizes"):
        Fused(parts, sizes)
