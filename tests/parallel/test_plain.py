"""What goes to JSON comes back equal; a stranger's document makes no other object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratools.errors import BadFile
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy
from loratools.parallel.plain import NotPlain, from_plain, to_plain
from loratools.parallel.shares import Part
from loratools.storage.header import TensorSpec

ALONE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
VALUES = st.recursive(
    ALONE | st.builds(Path, st.sampled_from(["a", "/b/c"])) | st.frozensets(st.text(max_size=3), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(VALUES)
def test_a_value_comes_back_equal(value: Any) -> None:
    back = from_plain(json.loads(json.dumps(to_plain(value))))
    assert back == value
    assert type(back) is type(value)


def test_a_named_tuple_of_ours_stays_one() -> None:
    """`TensorSpec` says where the factors of a part lie: as a bare tuple, no extraction could be gathered."""
    spec = TensorSpec("F32", (2, 3), Path("a"), 8, 32)
    back = from_plain(json.loads(json.dumps(to_plain(spec))))
    assert (back, type(back)) == (spec, TensorSpec)


@pytest.mark.parametrize("value", [Part(3, 16), Ranks(Energy(0.7), maximum=8), Ranks(budget=3000, uniform=True)])
def test_a_dataclass_of_ours_comes_back_equal(value: Any) -> None:
    assert from_plain(json.loads(json.dumps(to_plain({"a": (value, [value])})))) == {"a": (value, [value])}


def test_what_lives_in_memory_only_is_named() -> None:
    with pytest.raises(NotPlain, match=r"value\['a'\]\[1\] is a object"):
        to_plain({"a": [1, object()]})
    with pytest.raises(NotPlain, match="value is a dict"):
        to_plain({1: 2})
    with pytest.raises(NotPlain, match="value is a dict"):
        to_plain({"=": "tuple"})


@pytest.mark.parametrize(
    "what",
    [
        "os:system", "subprocess:Popen", "builtins:eval", "loratools.errors:BadFile", "loratools.nowhere:Part",
        "loratools", "loratools.parallel.plain:import_module", "loratools.parallel.call:Part",
        "loratools.parallel.shares:Part.parse", "loratoolsx.parallel:Part", 3, None, ["tuple"],
    ],
)  # fmt: skip
def test_a_document_makes_no_other_object(what: Any) -> None:
    with pytest.raises(BadFile, match="cannot be read back"):
        from_plain({"=": what, "number": 1, "of": 2})


def test_a_value_that_cannot_be_is_refused() -> None:
    with pytest.raises(BadFile, match=r"Part' cannot be read back: part is 3/2"):
        from_plain({"=": "loratools.parallel.shares:Part", "number": 3, "of": 2})
