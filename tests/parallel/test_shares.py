"""Parts are counted from 1, hold everything once, and are about equally large."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.errors import InvalidOption
from loratools.parallel.shares import Part, balanced

SIZES = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(0, 1000), max_size=30)


@given(SIZES, st.integers(1, 12))
def test_every_name_is_in_one_part(sizes: dict[str, int], of: int) -> None:
    parts = balanced(sizes, of)
    assert len(parts) == of
    assert sorted(name for names in parts for name in names) == sorted(sizes)


@given(SIZES, st.integers(1, 12))
def test_no_part_is_far_above_the_least_that_is_possible(sizes: dict[str, int], of: int) -> None:
    """Graham's bound needs the best division; that is at least the mean, and at least the largest."""
    largest = max(sum(sizes[name] for name in names) for names in balanced(sizes, of))
    assert largest <= sum(sizes.values()) / of + max(sizes.values(), default=0)


@given(SIZES, st.integers(1, 12), st.randoms(use_true_random=False))
def test_parts_do_not_depend_on_the_order(sizes: dict[str, int], of: int, random: object) -> None:
    names = list(sizes)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert balanced({name: sizes[name] for name in names}, of) == balanced(sizes, of)


def test_the_largest_come_first() -> None:
    assert balanced({"a": 5, "b": 4, "c": 3, "d": 3, "e": 3}, 2) == [("a", "d"), ("b", "c", "e")]
    assert balanced({"a": 1}, 3) == [("a",), (), ()]


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "-1/2", "1/0", "1/2/3", "1 / 2", "a/b", "1/99999"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(InvalidOption, match="part is"):
        Part.parse(text)


def test_parts_read_as_they_print() -> None:
    assert str(Part.parse("3/16")) == "3/16"
    assert Part.parse("3/16") == Part(3, 16)
