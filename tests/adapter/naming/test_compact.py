"""Compact names mean exactly the names that were given."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter.naming.compact import compact, natural


def expand(pattern: str) -> set[str]:
    """Return every name that a pattern means, by its documentation."""
    choices = []
    for piece in re.split(r"(\[[^]]*\]|\{[^}]*\})", pattern):
        if piece.startswith("["):
            ranges = [part.split("-") for part in piece[1:-1].split(",")]
            choices.append([str(i) for ends in ranges for i in range(int(ends[0]), int(ends[-1]) + 1)])
        else:
            choices.append(piece[1:-1].split(",") if piece.startswith("{") else [piece])
    return {"".join(parts) for parts in product(*choices)}


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([], []),
        (["lm_head"], ["lm_head"]),
        (
            [f"model.layers.{i}.self_attn.{p}_proj" for i in range(30) for p in "qv"],
            ["model.layers.[0-29].self_attn.{q,v}_proj"],
        ),
        (
            [f"b.{i}.attn.to_{p}" for i in (0, 1, 2, 5, 11) for p in "kqv"] + ["b.0.attn.to_out.0"],
            ["b.0.attn.to_out.0", "b.[0-2,5,11].attn.to_{k,q,v}"],
        ),
        (["h.0.fc1", "h.0.fc2", "h.1.fc1"], ["h.[0-1].fc1", "h.0.fc2"]),
        (["a.01.x", "a.1.x"], ["a.01.x", "a.1.x"]),
        (["q_proj", "proj"], ["{proj,q_proj}"]),
    ],
)
def test_known_names(names: list[str], patterns: list[str]) -> None:
    assert sorted(compact(names)) == sorted(patterns)


part = st.sampled_from(
    ["0", "1", "2", "10", "01", "q_proj", "v_proj", "proj", "fc1", "fc2", "mlp", "a_b_c", "a_x_c", "a_c"]
)


@given(st.sets(st.lists(part, min_size=1, max_size=4).map(".".join), max_size=40))
def test_patterns_mean_exactly_the_names(names: set[str]) -> None:
    found = compact(names)
    expanded = [name for pattern in found for name in expand(pattern)]
    assert sorted(expanded) == sorted(names)
    assert len(found) <= len(names)
    assert found == compact(sorted(names, reverse=True))


def test_natural_order_counts() -> None:
    assert sorted(["h.10.x", "h.9.x", "h.9", "h.a"], key=natural) == ["h.9", "h.9.x", "h.10.x", "h.a"]


def test_a_hostile_number_is_a_word() -> None:
    long = "9" * 5000  # more digits than int() takes
    assert sorted(compact([f"h.{long}.x", "h.1.x"])) == ["h.1.x", f"h.{long}.x"]
