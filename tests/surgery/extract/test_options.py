"""What an extraction cannot be told, and what it answers."""

from __future__ import annotations

import pytest

from loratools.errors import InvalidOption
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Fixed
from loratools.surgery.extract.options import ExtractOptions


def test_spellings_become_one() -> None:
    options = ExtractOptions(8, "bfloat16")
    assert (options.rank_choice, options.stored) == (Ranks(Fixed(8)), "BF16")


def test_everything_that_is_wrong_is_named() -> None:
    with pytest.raises(InvalidOption) as caught:
        ExtractOptions("all", "int4", -1, 0.0, "yes", "f16", "gpu", 0, None)  # type: ignore[arg-type]
    assert [problem.partition(" ")[0].rstrip(":") for problem in caught.value.problems] == [
        "ranks", "dtype", "seed", "tolerance", "tight", "arithmetic", "device", "threads", "force",
    ]  # fmt: skip
    assert "bf16, f16, f32 or f64" in str(caught.value)


def test_a_seed_is_one_that_the_provenance_can_hold() -> None:
    assert ExtractOptions(8, seed=2**53 - 1).seed == 2**53 - 1
    with pytest.raises(InvalidOption, match="seed is 9007199254740992; it lies between 0 and 2"):
        ExtractOptions(8, seed=2**53)


def test_ranks_are_chosen_in_one_way() -> None:
    with pytest.raises(InvalidOption) as caught:
        Ranks(Fixed(2), noise=True, budget=-1, minimum=4, maximum=2)
    budget, ways, bounds = caught.value.problems
    assert budget == "budget is -1; it can be a whole number of at least 1 or None"
    assert "one way to choose ranks is needed" in ways
    assert "ranks between 4 and 2" in bounds
